"""The mathematics: golden numbers with their derivation, identities, float64 gradients, behaviour at kinks."""

import functools
import math
from collections.abc import Callable

import pytest
import torch as th
from torch.distributions import Bernoulli, Categorical, Normal, kl_divergence

from sb3_clipvf import objectives

# Golden numbers are exact decimals or closed forms: only the rounding of a few float64 operations is let through.
EXACT = 1e-12
INFINITE = 1e30
"""A clip range that no float here reaches."""


def f64(*values: float) -> th.Tensor:
    return th.tensor(values, dtype=th.float64)


def leaf(*values: float) -> th.Tensor:
    return f64(*values).requires_grad_()


def gradient(function: Callable[[th.Tensor], th.Tensor], *values: float) -> list[float]:
    """Gradient of a scalar function of one vector."""
    x = leaf(*values)
    (grad,) = th.autograd.grad(function(x), x)
    return grad.tolist()


def randn(*shape: int, seed: int = 0) -> th.Tensor:
    return th.randn(*shape, dtype=th.float64, generator=th.Generator().manual_seed(seed))


class TestAdvantages:
    def test_golden(self) -> None:
        # mean 3; deviations -2, -1, 0, 3; unbiased variance (4 + 1 + 0 + 9) / 3 = 14/3
        std = math.sqrt(14 / 3) + 1e-8
        normalized = objectives.normalize_advantages(f64(1, 2, 3, 6))
        assert normalized.tolist() == pytest.approx([-2 / std, -1 / std, 0, 3 / std], abs=EXACT)

    def test_constant_advantages_become_zero(self) -> None:
        assert objectives.normalize_advantages(f64(5, 5, 5)).tolist() == [0, 0, 0]

    @pytest.mark.parametrize("advantages", [[], [7.5]])
    def test_a_single_advantage_does_not_change(self, advantages: list[float]) -> None:
        assert objectives.normalize_advantages(f64(*advantages)).tolist() == advantages


class TestSurrogates:
    def test_unclipped_golden(self) -> None:
        # (0.5 * 2 + 1.5 * -1) / 2
        assert objectives.unclipped_surrogate(f64(0.5, 1.5), f64(2, -1)).item() == pytest.approx(-0.25, abs=EXACT)

    @pytest.mark.parametrize(
        ("ratio", "advantage", "expected"),
        [
            (1.5, 1, 1.2),  # good action, too likely: min(1.5, 1.2)
            (0.5, 1, 0.5),  # good action, too rare: min(0.5, 0.8), nothing is clipped
            (0.5, -1, -0.8),  # bad action, rare enough: min(-0.5, -0.8)
            (1.5, -1, -1.5),  # bad action, too likely: min(-1.5, -1.2), nothing is clipped
            (1.1, 3, 3.3),  # inside the range
        ],
    )
    def test_clipped_golden(self, ratio: float, advantage: float, expected: float) -> None:
        assert objectives.clipped_surrogate(f64(ratio), f64(advantage), 0.2).item() == pytest.approx(
            expected, abs=EXACT
        )

    def test_clipped_is_a_mean(self) -> None:
        # (1.2 + 0.5 - 0.8 - 1.5) / 4
        objective = objectives.clipped_surrogate(f64(1.5, 0.5, 0.5, 1.5), f64(1, 1, -1, -1), 0.2)
        assert objective.item() == pytest.approx(-0.15, abs=EXACT)

    def test_clip_fraction_golden(self) -> None:
        # 0.5 and 1.3 are outside [0.75, 1.25]; 1.25 lies on its border and is not clipped
        assert objectives.clip_fraction(f64(0.5, 0.81, 1.25, 1.3), 0.25).item() == 0.5

    def test_infinite_clip_equals_none(self) -> None:
        ratio, advantages = randn(50).exp(), randn(50, seed=1)
        clipped = objectives.clipped_surrogate(ratio, advantages, INFINITE)
        assert th.equal(clipped, objectives.unclipped_surrogate(ratio, advantages))

    def test_clipping_never_raises_the_objective(self) -> None:
        ratio, advantages = randn(500).exp(), randn(500, seed=1)
        clipped = [objectives.clipped_surrogate(r, a, 0.2) for r, a in zip(ratio, advantages, strict=True)]
        unclipped = [objectives.unclipped_surrogate(r, a) for r, a in zip(ratio, advantages, strict=True)]
        assert all(low <= high for low, high in zip(clipped, unclipped, strict=True))
        assert objectives.clipped_surrogate(ratio, advantages, 0.2) < objectives.unclipped_surrogate(ratio, advantages)

    @pytest.mark.parametrize(
        "surrogate",
        [
            objectives.unclipped_surrogate,
            functools.partial(objectives.clipped_surrogate, clip_range=0.2),
        ],
    )
    def test_ratio_one_gives_the_plain_policy_gradient(self, surrogate: Callable[..., th.Tensor]) -> None:
        logits, advantages = randn(6, 3), randn(6, seed=1)
        actions = th.tensor([0, 1, 2, 0, 1, 2])
        logits.requires_grad_()
        log_prob = Categorical(logits=logits).log_prob(actions)
        (ours,) = th.autograd.grad(
            surrogate((log_prob - log_prob.detach()).exp(), advantages), logits, retain_graph=True
        )
        (plain,) = th.autograd.grad((advantages * log_prob).mean(), logits)
        th.testing.assert_close(ours, plain, rtol=0, atol=1e-15)

    def test_gradcheck(self) -> None:
        # At least 0.05 away from the kinks at 0.8 and 1.2
        ratio, advantages = leaf(0.5, 0.7, 0.9, 1.1, 1.3, 1.6), f64(1, -2, 3, -4, 5, -6)
        assert th.autograd.gradcheck(lambda r: objectives.clipped_surrogate(r, advantages, 0.2), ratio)
        assert th.autograd.gradcheck(lambda r: objectives.unclipped_surrogate(r, advantages), ratio)

    @pytest.mark.parametrize(
        ("ratio", "advantage", "expected"),
        [
            (1.5, 2, 0),  # moved far enough: no further
            (0.5, -2, 0),
            (0.5, 2, 2),  # moved the wrong way: pulled back in full
            (1.5, -2, -2),
            (1, 2, 2),  # where every update starts
            (1.25, 2, 2),  # on the border: as inside
            (0.75, -2, -2),
        ],
    )
    def test_gradient_on_both_sides_of_the_kinks(self, ratio: float, advantage: float, expected: float) -> None:
        grad = gradient(lambda r: objectives.clipped_surrogate(r, f64(advantage), 0.25), ratio)
        assert grad == [expected]


class TestKL:
    def test_categorical_golden(self) -> None:
        # p = (1/2, 1/2), q = (1/4, 3/4): 1/2 log 2 + 1/2 log(2/3) = 1/2 log(4/3)
        old, new = f64(0.5, 0.5).log(), f64(0.25, 0.75).log()
        assert objectives.categorical_kl(old, new).item() == pytest.approx(0.5 * math.log(4 / 3), abs=EXACT)
        # The other way round it is 1/4 log(1/2) + 3/4 log(3/2)
        reverse = 0.25 * math.log(0.5) + 0.75 * math.log(1.5)
        assert objectives.categorical_kl(new, old).item() == pytest.approx(reverse, abs=EXACT)

    def test_categorical_takes_logits_that_are_not_normalised(self) -> None:
        old, new = randn(4, 5), randn(4, 5, seed=1)
        shifted = objectives.categorical_kl(old + 7, new - 3)
        th.testing.assert_close(shifted, objectives.categorical_kl(old, new), rtol=0, atol=EXACT)

    def test_masked_actions_contribute_nothing(self) -> None:
        old = f64(0, 0, -math.inf)
        new = leaf(math.log(0.25), math.log(0.75), -math.inf)
        kl = objectives.categorical_kl(old, new)
        assert kl.item() == pytest.approx(0.5 * math.log(4 / 3), abs=EXACT)
        (grad,) = th.autograd.grad(kl, new)
        # d KL / d logit_i = q_i - p_i
        assert grad.tolist() == pytest.approx([-0.25, 0.25, 0], abs=EXACT)

    def test_an_action_that_became_impossible_makes_the_kl_infinite(self) -> None:
        assert objectives.categorical_kl(f64(0, 0), f64(0, -math.inf)).item() == math.inf

    def test_multi_categorical_golden(self) -> None:
        # (1/2, 1/2) against (1/4, 3/4), and uniform over 3 against (1/2, 1/4, 1/4): 1/3 (log 2/3 + 2 log 4/3)
        old = f64(0.5, 0.5, 1 / 3, 1 / 3, 1 / 3).log()[None]
        new = f64(0.25, 0.75, 0.5, 0.25, 0.25).log()[None]
        expected = 0.5 * math.log(4 / 3) + (math.log(2 / 3) + 2 * math.log(4 / 3)) / 3
        kl = objectives.multi_categorical_kl(old, new, [2, 3])
        assert kl.tolist() == pytest.approx([expected], abs=EXACT)

    def test_multi_categorical_of_one_is_categorical(self) -> None:
        old, new = randn(4, 5), randn(4, 5, seed=1)
        assert th.equal(objectives.multi_categorical_kl(old, new, [5]), objectives.categorical_kl(old, new))

    def test_bernoulli_golden(self) -> None:
        # Bits with p = 3/4, 1/2 and q = 1/4, 1/4; log-odds of 3/4 are log 3.
        # 3/4 log 3 + 1/4 log(1/3) = 1/2 log 3, and as for the categorical 1/2 log(4/3)
        old, new = f64(math.log(3), 0)[None], f64(-math.log(3), -math.log(3))[None]
        assert objectives.bernoulli_kl(old, new).tolist() == pytest.approx([0.5 * math.log(4)], abs=EXACT)

    def test_bernoulli_stays_finite_far_out(self) -> None:
        # p = 1 and q = exp(-1000), which rounds to 0: log(1 / exp(-1000)) = 1000; the same with zeros and ones swapped
        assert objectives.bernoulli_kl(f64(1000)[None], f64(-1000)[None]).tolist() == [1000]
        assert objectives.bernoulli_kl(f64(-1000)[None], f64(1000)[None]).tolist() == [1000]

    def test_gaussian_golden(self) -> None:
        # N(0, 1) against N(1, 2): log 2 + (1 + 1) / (2 * 4) - 1/2; N(3, 2) against N(0, 1): -log 2 + (4 + 9) / 2 - 1/2
        first = math.log(2) + 0.25 - 0.5
        second = -math.log(2) + 6.5 - 0.5
        kl = objectives.gaussian_kl(
            f64(0, 3)[None], f64(0, math.log(2))[None], f64(1, 0)[None], f64(math.log(2), 0)[None]
        )
        assert kl.tolist() == pytest.approx([first + second], abs=EXACT)

    def test_equal_distributions_have_a_kl_of_zero(self) -> None:
        x, log_std = randn(4, 6), randn(4, 6, seed=1)
        for kl in (
            objectives.categorical_kl(x, x),
            objectives.multi_categorical_kl(x, x, [2, 4]),
            objectives.bernoulli_kl(x, x),
            objectives.gaussian_kl(x, log_std, x, log_std),
        ):
            assert kl.tolist() == [0, 0, 0, 0]

    def test_torch_gives_the_same(self) -> None:
        old, new, old_log_std, log_std = (randn(7, 4, seed=seed) for seed in range(4))
        pairs = [
            (
                objectives.categorical_kl(old, new),
                kl_divergence(Categorical(logits=old), Categorical(logits=new)),
            ),
            (
                objectives.bernoulli_kl(old, new),
                kl_divergence(Bernoulli(logits=old), Bernoulli(logits=new)).sum(-1),
            ),
            (
                objectives.gaussian_kl(old, old_log_std, new, log_std),
                kl_divergence(Normal(old, old_log_std.exp()), Normal(new, log_std.exp())).sum(-1),
            ),
        ]
        for ours, theirs in pairs:
            assert ours.shape == (7,)
            # float64 rounding of a handful of operations
            th.testing.assert_close(ours, theirs, rtol=1e-10, atol=1e-12)

    def test_gradcheck(self) -> None:
        old, old_log_std = randn(3, 5), 0.3 * randn(3, 5, seed=1)
        new, log_std = randn(3, 5, seed=2).requires_grad_(), (0.3 * randn(3, 5, seed=3)).requires_grad_()
        assert th.autograd.gradcheck(lambda x: objectives.categorical_kl(old, x), new)
        assert th.autograd.gradcheck(lambda x: objectives.multi_categorical_kl(old, x, [2, 3]), new)
        assert th.autograd.gradcheck(lambda x: objectives.bernoulli_kl(old, x), new)
        assert th.autograd.gradcheck(lambda m, s: objectives.gaussian_kl(old, old_log_std, m, s), (new, log_std))

    def test_gradient_is_zero_at_equal_distributions(self) -> None:
        """The penalty does not disturb the first step: KL has its minimum at pi_old."""
        x = randn(3, 4).requires_grad_()
        (grad,) = th.autograd.grad(objectives.categorical_kl(x.detach(), x).sum(), x)
        # float64 rounding of softmax
        th.testing.assert_close(grad, th.zeros_like(grad), rtol=0, atol=1e-15)


class TestEstimator:
    def test_golden(self) -> None:
        # Ratios 2 and 1/2: ((2 - 1) + (1/2 - 1) - 0) / 2
        log_ratio = f64(math.log(2), -math.log(2))
        assert objectives.kl_k3(log_ratio).item() == pytest.approx(0.25, abs=EXACT)
        assert objectives.kl_k3(log_ratio[:1]).item() == pytest.approx(1 - math.log(2), abs=EXACT)

    def test_it_is_never_negative(self) -> None:
        assert all(objectives.kl_k3(log_ratio) > 0 for log_ratio in randn(100))

    def test_against_the_exact_kl(self) -> None:
        old, new = Normal(f64(0.0), f64(1.0)), Normal(f64(0.1), f64(1.05))
        exact = objectives.gaussian_kl(old.loc, old.scale.log(), new.loc, new.scale.log()).item()
        th.manual_seed(0)
        n = 100_000
        actions = old.sample((n,))
        log_ratio = (new.log_prob(actions) - old.log_prob(actions)).flatten()
        # Unbiased: within five standard errors of the mean of n samples
        samples = th.stack([objectives.kl_k3(x) for x in log_ratio[:1000]])
        standard_error = samples.std().item() / math.sqrt(n)
        assert abs(objectives.kl_k3(log_ratio).item() - exact) < 5 * standard_error
        assert 5 * standard_error < exact


class TestValueLosses:
    # V_old = 0, clip range 1, target 3. Prediction 2: clipped to 1, errors (2-3)^2 = 1 and (1-3)^2 = 4.
    # Prediction -2: clipped to -1, errors 25 and 16. Prediction 0.5: not clipped, error 6.25.
    CASES = [(2, 1, 4), (-2, 25, 16), (0.5, 6.25, 6.25)]

    @pytest.mark.parametrize(("prediction", "unclipped", "clipped"), CASES)
    def test_golden(self, prediction: float, unclipped: float, clipped: float) -> None:
        values, old_values, returns = f64(prediction), f64(0), f64(3)
        assert objectives.value_loss(values, returns).item() == unclipped
        assert objectives.value_loss_clipped_prediction(values, old_values, returns, 1.0).item() == clipped
        assert objectives.value_loss_clipped_max(values, old_values, returns, 1.0).item() == max(unclipped, clipped)

    def test_all_are_means_without_a_half(self) -> None:
        values, old_values, returns = f64(2, -2, 0.5, 3), f64(0, 0, 0, 3), f64(3, 3, 3, 3)
        assert objectives.value_loss(values, returns).item() == (1 + 25 + 6.25 + 0) / 4
        assert objectives.value_loss_clipped_prediction(values, old_values, returns, 1.0).item() == (4 + 16 + 6.25) / 4
        assert objectives.value_loss_clipped_max(values, old_values, returns, 1.0).item() == (4 + 25 + 6.25) / 4

    def test_clip_values_golden(self) -> None:
        # The range is counted from the old value
        clipped = objectives.clip_values(f64(10.5, 13, 7), f64(10, 10, 10), 2.0)
        assert clipped.tolist() == [10.5, 12, 8]

    def test_clip_fraction_golden(self) -> None:
        # Changes 0.5, 3, -3 and 2: the last lies on the border and is not clipped
        values, old_values = f64(10.5, 13, 7, 12), f64(10, 10, 10, 10)
        assert objectives.vf_clip_fraction(values, old_values, 2.0).item() == 0.5

    def test_infinite_range_equals_plain(self) -> None:
        values, old_values, returns = (randn(50, seed=seed) for seed in range(3))
        plain = objectives.value_loss(values, returns)
        for clipped in (objectives.value_loss_clipped_max, objectives.value_loss_clipped_prediction):
            # V_old + (V - V_old) differs from V by rounding
            th.testing.assert_close(clipped(values, old_values, returns, INFINITE), plain, rtol=1e-12, atol=0)

    def test_max_form_is_the_largest_of_the_three(self) -> None:
        values, old_values, returns = (randn(50, seed=seed) for seed in range(3))
        largest = objectives.value_loss_clipped_max(values, old_values, returns, 0.3)
        assert largest > objectives.value_loss(values, returns)
        assert largest > objectives.value_loss_clipped_prediction(values, old_values, returns, 0.3)

    def test_gradcheck(self) -> None:
        # Old values 0, range 1, targets 3: kinks where |V| = 1, and for the max where both errors are equal (V = 1, 5)
        values = leaf(-2, -0.6, 0.5, 1.7, 4, 6)
        old_values, returns = th.zeros_like(values).detach(), th.full_like(values, 3).detach()
        assert th.autograd.gradcheck(lambda v: objectives.value_loss(v, returns), values)
        for loss in (objectives.value_loss_clipped_max, objectives.value_loss_clipped_prediction):
            assert th.autograd.gradcheck(lambda v, loss=loss: loss(v, old_values, returns, 1.0), values)

    @pytest.mark.parametrize(
        ("prediction", "max_form", "sb3_form"),
        [
            (2, 0, 0),  # too far towards the target 3: no gradient
            (-2, -10, 0),  # too far away from it: 2 (V - R) pulls it back, in SB3's form it stays there
            (0.5, -5, -5),  # inside the range: the plain gradient
            (0, -6, -6),  # at V = V_old, where every update starts: the plain gradient in full
        ],
    )
    def test_gradient_on_both_sides_of_the_kinks(self, prediction: float, max_form: float, sb3_form: float) -> None:
        old_values, returns = f64(0), f64(3)
        grad = gradient(lambda v: objectives.value_loss_clipped_max(v, old_values, returns, 1.0), prediction)
        assert grad == [max_form]
        grad = gradient(lambda v: objectives.value_loss_clipped_prediction(v, old_values, returns, 1.0), prediction)
        assert grad == [sb3_form]

    def test_overshooting_the_target_is_pulled_back_by_the_max_form(self) -> None:
        # V = 6 is 3 beyond the target, its clipped prediction 1 only 2 short of it: the larger error has the gradient
        grad = gradient(lambda v: objectives.value_loss_clipped_max(v, f64(0), f64(3), 1.0), 6)
        assert grad == [6]


class TestEntropy:
    def test_golden(self) -> None:
        assert objectives.entropy_loss(f64(1, 2, 6), f64(0, 0, 0)).item() == -3

    def test_without_a_closed_form_log_prob_replaces_it(self) -> None:
        # -log_prob is 1, 2, 6
        assert objectives.entropy_loss(None, f64(-1, -2, -6)).item() == -3
        assert gradient(lambda log_prob: objectives.entropy_loss(None, log_prob), -1, -2) == [0.5, 0.5]
