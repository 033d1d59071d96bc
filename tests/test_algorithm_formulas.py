"""Formulas of docs/algorithm.md and docs/value_clipping.md that no function of the package states, in a small MDP."""

import math

import pytest
import torch as th
from torch.distributions import Normal

from sb3_clipvf import objectives
from sb3_clipvf.policies import SquashedGaussianDistribution

# Sums of a few dozen float64 products of numbers near 1.
EXACT = 1e-12
N_STATES, N_ACTIONS, GAMMA = 4, 3, 0.9


def draw(*shape: int, seed: int) -> th.Tensor:
    return th.rand(*shape, dtype=th.float64, generator=th.Generator().manual_seed(seed))


TRANSITIONS = th.softmax(4 * draw(N_STATES, N_ACTIONS, N_STATES, seed=0), dim=-1)
REWARDS = draw(N_STATES, N_ACTIONS, seed=1)
START = th.softmax(draw(N_STATES, seed=2), dim=0)
OLD_LOGITS = 2 * draw(N_STATES, N_ACTIONS, seed=3)
DIRECTION = draw(N_STATES, N_ACTIONS, seed=4) - 0.5


def solve(logits: th.Tensor) -> tuple[th.Tensor, th.Tensor, th.Tensor]:
    """The expected return, the discounted state distribution and the advantages of a softmax policy."""
    policy = logits.softmax(dim=-1)
    steps = th.einsum("sa,sat->st", policy, TRANSITIONS)
    identity = th.eye(N_STATES, dtype=th.float64)
    values = th.linalg.solve(identity - GAMMA * steps, (policy * REWARDS).sum(dim=-1))
    visits = (1 - GAMMA) * th.linalg.solve(identity - GAMMA * steps.T, START)
    return START @ values, visits, REWARDS + GAMMA * TRANSITIONS @ values - values[:, None]


OLD_RETURN, OLD_VISITS, OLD_ADVANTAGES = solve(OLD_LOGITS)
OLD_POLICY = OLD_LOGITS.softmax(dim=-1)


def surrogate(logits: th.Tensor, clip_range: float | None = None) -> th.Tensor:
    """The objective under the old policy's states and actions, by the package's function of a minibatch."""
    ratio = (logits.log_softmax(dim=-1) - OLD_LOGITS.log_softmax(dim=-1)).exp().flatten()
    # The functions take means: weights of n times the probability make them expectations.
    advantages = (len(ratio) * OLD_VISITS[:, None] * OLD_POLICY * OLD_ADVANTAGES).flatten()
    if clip_range is None:
        return objectives.unclipped_surrogate(ratio, advantages)
    return objectives.clipped_surrogate(ratio, advantages, clip_range)


def gain(logits: th.Tensor) -> th.Tensor:
    return solve(logits)[0] - OLD_RETURN


def error(size: float) -> float:
    """The error of the surrogate after a step of this size."""
    logits = OLD_LOGITS + size * DIRECTION
    return (gain(logits) - surrogate(logits) / (1 - GAMMA)).item()


def test_the_performance_difference_lemma() -> None:
    logits = OLD_LOGITS + DIRECTION
    visits = solve(logits)[1]
    mean_advantages = (logits.softmax(dim=-1) * OLD_ADVANTAGES).sum(dim=-1)
    assert visits.sum().item() == pytest.approx(1, abs=EXACT)
    assert abs(gain(logits).item()) > 1e-3
    assert gain(logits).item() == pytest.approx((visits @ mean_advantages / (1 - GAMMA)).item(), abs=EXACT)
    # The error of the surrogate is that of its state distribution.
    expected = ((visits - OLD_VISITS) @ mean_advantages / (1 - GAMMA)).item()
    assert error(1.0) == pytest.approx(expected, abs=EXACT)


@pytest.mark.parametrize("clip_range", [None, 0.2])
def test_at_the_old_policy_the_surrogate_has_the_gradient_of_the_return(clip_range: float | None) -> None:
    logits = OLD_LOGITS.clone().requires_grad_()
    (of_return,) = th.autograd.grad(solve(logits)[0], logits)
    objective = surrogate(logits, clip_range)
    (of_surrogate,) = th.autograd.grad(objective, logits)
    assert objective.item() == pytest.approx(0, abs=EXACT)
    assert of_return.abs().max() > 1e-3
    th.testing.assert_close(of_surrogate / (1 - GAMMA), of_return, rtol=0, atol=EXACT)


def test_half_the_step_has_about_a_quarter_of_the_error() -> None:
    ratios = [error(size) / error(size / 2) for size in (0.1, 0.01)]
    # The next term of the error is smaller by the size of the step.
    assert ratios == [pytest.approx(4, abs=0.5), pytest.approx(4, abs=0.05)]


@pytest.mark.parametrize("size", [0.01, 0.1, 1.0, 10.0])
def test_the_error_is_within_the_bound(size: float) -> None:
    logits = OLD_LOGITS + size * DIRECTION
    mean_advantages = (logits.softmax(dim=-1) * OLD_ADVANTAGES).sum(dim=-1)
    kl = OLD_VISITS @ objectives.categorical_kl(OLD_LOGITS.log_softmax(dim=-1), logits.log_softmax(dim=-1))
    bound = 2 * GAMMA * mean_advantages.abs().max() / (1 - GAMMA) ** 2 * (kl / 2).sqrt()
    assert 0 < abs(error(size)) <= bound.item()


def test_subtracting_a_constant_does_not_change_the_expected_gradient() -> None:
    logits = (OLD_LOGITS + DIRECTION).requires_grad_()
    ratio = (logits.log_softmax(dim=-1) - OLD_LOGITS.log_softmax(dim=-1)).exp().flatten()
    weights = (len(ratio) * OLD_VISITS[:, None] * OLD_POLICY).flatten()
    (grad,) = th.autograd.grad(objectives.unclipped_surrogate(ratio, weights), logits)
    assert grad.abs().max() < EXACT


def test_no_normalised_advantage_exceeds_its_bound() -> None:
    for n in (2, 5, 64):
        outlier = th.zeros(n, dtype=th.float64)
        outlier[0] = 1e6
        largest = objectives.normalize_advantages(outlier).max().item()
        assert largest == pytest.approx((n - 1) / math.sqrt(n), rel=1e-9)
        assert objectives.normalize_advantages(draw(n, seed=n)).abs().max().item() <= largest


def test_the_jacobian_of_tanh_cancels_in_the_ratio_and_bounds_the_entropy() -> None:
    old_params, params = (2 * draw(1, 2, seed=seed).expand(4096, 2) for seed in (5, 6))
    old, new = (SquashedGaussianDistribution(1).proba_distribution(p) for p in (old_params, params))
    u = Normal(*(getattr(old.distribution, name) for name in ("mean", "stddev"))).sample()  # type: ignore[no-untyped-call]
    actions = th.tanh(u)
    log_ratio = new.log_prob(actions) - old.log_prob(actions)
    without = (new.distribution.log_prob(u) - old.distribution.log_prob(u)).sum(dim=-1)
    # artanh(tanh(u)) rounds.
    th.testing.assert_close(log_ratio, without, rtol=0, atol=1e-6)
    at_squashed = (new.distribution.log_prob(actions) - old.distribution.log_prob(actions)).sum(dim=-1)
    assert (log_ratio - at_squashed).abs().max() > 0.1
    for raw_std in (-1.0, 0.4, 1.0, 10.0):
        wide = SquashedGaussianDistribution(1).proba_distribution(th.tensor([[0.0, raw_std]]).expand(100_000, 2))
        # Four standard errors.
        assert wide.entropy().mean() <= math.log(2) + 4 * wide.entropy().std() / math.sqrt(100_000)
