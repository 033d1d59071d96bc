"""SB3's action distributions as rows of parameters, and the exact KL between such rows."""

import copy
import math
import pickle
from collections.abc import Callable
from typing import Any

import gymnasium as gym
import numpy as np
import pytest
import torch as th
from gymnasium import spaces
from stable_baselines3.common.callbacks import BaseCallback
from stable_baselines3.common.distributions import (
    BernoulliDistribution,
    CategoricalDistribution,
    DiagGaussianDistribution,
    Distribution,
    MultiCategoricalDistribution,
    SquashedDiagGaussianDistribution,
    StateDependentNoiseDistribution,
)
from stable_baselines3.common.distributions import kl_divergence as kl_divergence_of_sb3
from stable_baselines3.common.policies import ActorCriticPolicy
from torch import distributions as td
from torch.distributions import Normal, kl_divergence

from sb3_clipvf import ClipPPO
from sb3_clipvf.distributions import dist_param_dim, dist_params, kl_from_params, refreshed_dist
from sb3_clipvf.policies import SquashedActorCriticPolicy, SquashedGaussianDistribution

N_STATES = 5
OBS = spaces.Box(-1.0, 1.0, (3,), np.float32)


def randn(*shape: int, seed: int) -> th.Tensor:
    return th.randn(*shape, dtype=th.float64, generator=th.Generator().manual_seed(seed))


def categorical(seed: int) -> Distribution:
    return CategoricalDistribution(4).proba_distribution(randn(N_STATES, 4, seed=seed))


def multi_categorical(seed: int) -> Distribution:
    return MultiCategoricalDistribution([2, 4, 3]).proba_distribution(randn(N_STATES, 9, seed=seed))


def bernoulli(seed: int) -> Distribution:
    return BernoulliDistribution(3).proba_distribution(randn(N_STATES, 3, seed=seed))


def gaussian(seed: int) -> Distribution:
    # SB3's std is a parameter, the same in all states
    return DiagGaussianDistribution(2).proba_distribution(randn(N_STATES, 2, seed=seed), randn(2, seed=seed + 10))


def sb3_squashed(seed: int) -> Distribution:
    dist = SquashedDiagGaussianDistribution(2)
    return dist.proba_distribution(randn(N_STATES, 2, seed=seed), randn(2, seed=seed + 10))


def squashed(seed: int) -> Distribution:
    return SquashedGaussianDistribution(2).proba_distribution(randn(N_STATES, 4, seed=seed))


def gsde(seed: int, squash_output: bool = False) -> Distribution:
    dist = StateDependentNoiseDistribution(2, squash_output=squash_output)
    dist.proba_distribution_net(latent_dim=6)
    log_std = 0.3 * randn(6, 2, seed=seed + 10)
    return dist.proba_distribution(randn(N_STATES, 2, seed=seed), log_std, randn(N_STATES, 6, seed=seed + 20))


def gsde_squashed(seed: int) -> Distribution:
    return gsde(seed, squash_output=True)


# The distribution, its KL by torch summed over independent parts, and the width of its row.
SINGLE: dict[str, tuple[Callable[[int], Distribution], bool, int]] = {
    "categorical": (categorical, False, 4),
    "bernoulli": (bernoulli, True, 3),
    "gaussian": (gaussian, True, 4),
    "sb3_squashed": (sb3_squashed, True, 4),
    "squashed": (squashed, True, 4),
    "gsde": (gsde, True, 4),
    "gsde_squashed": (gsde_squashed, True, 4),
}
ALL: dict[str, tuple[Callable[[int], Distribution], int]] = {
    "multi_categorical": (multi_categorical, 9),
    **{name: (make, width) for name, (make, _, width) in SINGLE.items()},
}


@pytest.mark.parametrize("name", ALL)
class TestEveryDistribution:
    def test_row_has_the_width_of_dist_param_dim(self, name: str) -> None:
        make, width = ALL[name]
        assert dist_param_dim(make(0)) == width
        assert dist_params(make(0)).shape == (N_STATES, width)

    def test_kl_of_equal_distributions_is_zero(self, name: str) -> None:
        make, _ = ALL[name]
        kl = kl_from_params(make(0), dist_params(make(0)))
        assert kl.shape == (N_STATES,)
        # exp(log(std)) differs from std by rounding
        th.testing.assert_close(kl, th.zeros_like(kl), rtol=0, atol=1e-14)

    def test_kl_is_from_old_to_new(self, name: str) -> None:
        make, _ = ALL[name]
        there, back = kl_from_params(make(1), dist_params(make(0))), kl_from_params(make(0), dist_params(make(1)))
        assert (there > 0).all()
        assert not th.allclose(there, back)

    def test_kl_is_the_expected_log_ratio_of_actions_of_the_old_policy(self, name: str) -> None:
        """Computed with SB3's own samples and log-probs, which do not use our rows; squashed ones with the Jacobian."""
        make, _ = ALL[name]
        old, new = make(0), make(1)
        th.manual_seed(0)
        log_ratio = th.stack([old.log_prob(a) - new.log_prob(a) for a in (sample(old) for _ in range(1000))])
        # Five standard errors of the mean of 1000 samples
        tolerance = 5 * log_ratio.std(dim=0) / math.sqrt(1000)
        assert ((log_ratio.mean(dim=0) - kl_from_params(new, dist_params(old))).abs() < tolerance).all()

    def test_gradient_reaches_the_new_parameters_only(self, name: str) -> None:
        make, _ = ALL[name]
        rows = dist_params(make(0))
        assert not rows.requires_grad
        params = dist_params(make(1)).requires_grad_()
        kl_from_params(with_row(make(1), params), rows).sum().backward()
        assert params.grad is not None
        assert params.grad.abs().sum() > 0
        assert rows.grad is None


def sample(dist: Distribution) -> th.Tensor:
    if not isinstance(dist, StateDependentNoiseDistribution):
        return dist.sample()
    # SB3's own sample keeps one noise matrix, here each draw has its own: draw from the Gaussian that it amounts to
    gaussian_actions = dist.distribution.sample()
    return gaussian_actions if dist.bijector is None else dist.bijector.forward(gaussian_actions)


def with_row(dist: Distribution, row: th.Tensor) -> Distribution:
    """Return the same type of distribution with parameters that have a gradient."""
    if isinstance(dist, MultiCategoricalDistribution | CategoricalDistribution | BernoulliDistribution):
        return dist.proba_distribution(row)
    mean, log_std = row.chunk(2, dim=-1)
    dist.distribution = Normal(mean, log_std.exp())  # type: ignore[attr-defined]
    return dist


@pytest.mark.parametrize("name", SINGLE)
def test_kl_equals_torchs_summed_over_dimensions(name: str) -> None:
    make, independent, _ = SINGLE[name]
    old, new = make(0), make(1)
    theirs = kl_divergence(old.distribution, new.distribution)
    theirs = theirs.sum(dim=-1) if independent else theirs
    # float64 rounding of a handful of operations
    th.testing.assert_close(kl_from_params(new, dist_params(old)), theirs, rtol=1e-10, atol=1e-12)


def test_multi_categorical_kl_equals_torchs_summed_over_dimensions() -> None:
    old, new = multi_categorical(0), multi_categorical(1)
    pairs = zip(old.distribution, new.distribution, strict=True)
    theirs = th.stack([kl_divergence(p, q) for p, q in pairs]).sum(dim=0)
    th.testing.assert_close(kl_from_params(new, dist_params(old)), theirs, rtol=1e-10, atol=1e-12)


def test_gaussian_row_is_means_then_log_stds() -> None:
    row = dist_params(DiagGaussianDistribution(2).proba_distribution(th.tensor([[1.0, 2.0]]), th.tensor([0.5, -0.5])))
    # log(exp(x)) in float32
    assert row.tolist() == [pytest.approx([1.0, 2.0, 0.5, -0.5], abs=1e-6)]


def test_categorical_row_is_logits() -> None:
    row = dist_params(CategoricalDistribution(2).proba_distribution(th.tensor([[math.log(1.0), math.log(3.0)]])))
    # torch normalises them: log(1/4), log(3/4)
    assert row.tolist() == [pytest.approx([math.log(0.25), math.log(0.75)], abs=1e-6)]


class TestUnknownDistributions:
    class Beta(Distribution):  # type: ignore[misc]
        """Implements only the abstract methods."""

        def proba_distribution_net(self, *args: Any, **kwargs: Any) -> Any: ...
        def proba_distribution(self, *args: Any, **kwargs: Any) -> Any: ...
        def log_prob(self, x: Any) -> Any: ...
        def entropy(self) -> Any: ...
        def sample(self) -> Any: ...
        def mode(self) -> Any: ...
        def actions_from_params(self, *args: Any, **kwargs: Any) -> Any: ...
        def log_prob_from_params(self, *args: Any, **kwargs: Any) -> Any: ...

    def test_have_no_width(self) -> None:
        assert dist_param_dim(self.Beta()) is None
        assert dist_param_dim(None) is None

    def test_are_refused(self) -> None:
        with pytest.raises(TypeError, match="`dist` must be one of SB3's action distributions, got Beta"):
            dist_params(self.Beta())
        with pytest.raises(TypeError, match="`dist` must be one of SB3's action distributions, got Beta"):
            kl_from_params(self.Beta(), th.zeros(1, 2))


class LaplaceDistribution(DiagGaussianDistribution):
    def proba_distribution(self, mean: th.Tensor, log_std: th.Tensor) -> Any:
        self.distribution = td.Laplace(mean, log_std.exp() * th.ones_like(mean))
        return self


class FullGaussianDistribution(DiagGaussianDistribution):
    def proba_distribution(self, mean: th.Tensor, log_std: th.Tensor) -> Any:
        self.distribution = td.MultivariateNormal(mean, scale_tril=th.diag(log_std.exp()))
        return self

    def log_prob(self, actions: th.Tensor) -> th.Tensor:
        return self.distribution.log_prob(actions)

    def entropy(self) -> th.Tensor:
        return self.distribution.entropy()


class BetaDistribution(DiagGaussianDistribution):
    def proba_distribution(self, mean: th.Tensor, log_std: th.Tensor) -> Any:
        self.distribution = td.Beta(mean.exp() + 1.0, log_std.exp() + 1.0)
        return self

    def log_prob(self, actions: th.Tensor) -> th.Tensor:
        return self.distribution.log_prob(actions.clamp(1e-3, 1.0 - 1e-3)).sum(dim=-1)


class HiddenDistribution(DiagGaussianDistribution):
    """Stores torch's distribution under another name."""

    def proba_distribution(self, mean: th.Tensor, log_std: th.Tensor) -> Any:
        self.hidden = td.Normal(mean, log_std.exp() * th.ones_like(mean))
        return self

    def log_prob(self, actions: th.Tensor) -> th.Tensor:
        return self.hidden.log_prob(actions).sum(dim=-1)

    def entropy(self) -> th.Tensor:
        return self.hidden.entropy().sum(dim=-1)

    def sample(self) -> th.Tensor:
        return self.hidden.rsample()


class RenamedDistribution(DiagGaussianDistribution):
    """A derived class that changes nothing."""


DERIVED = [
    LaplaceDistribution,
    FullGaussianDistribution,
    BetaDistribution,
    HiddenDistribution,
    RenamedDistribution,
]


class DerivedPolicy(ActorCriticPolicy):
    def __init__(self, *args: Any, dist: type[Any], **kwargs: Any) -> None:
        self.dist = dist
        super().__init__(*args, **kwargs)

    def _build(self, lr_schedule: Any) -> None:
        self.action_dist = self.dist(self.action_space.shape[0])
        super()._build(lr_schedule)


def model_with(dist: type[Any] | None, **kwargs: Any) -> ClipPPO:
    policy_kwargs = {"net_arch": [4], **({} if dist is None else {"dist": dist})}
    policy = "MlpPolicy" if dist is None else DerivedPolicy
    return ClipPPO(
        policy, "Pendulum-v1", n_steps=16, batch_size=8, device="cpu", seed=0, policy_kwargs=policy_kwargs, **kwargs
    )


class TestDerivedDistributions:
    """Their KL is not that of their base class."""

    @pytest.mark.parametrize("engine", ["auto", "autograd"])
    @pytest.mark.parametrize("dist", DERIVED)
    def test_train_without_the_exact_kl(self, dist: type[Any], engine: str) -> None:
        model = model_with(dist, engine=engine)
        model.learn(32)
        assert "train/approx_kl" in model.logger.name_to_value
        assert "train/kl" not in model.logger.name_to_value

    @pytest.mark.parametrize("kl_coef", [0.0, "const_0", "lin_0"])
    def test_train_with_a_penalty_that_stays_zero(self, kl_coef: float | str) -> None:
        model = model_with(DERIVED[0], kl_coef=kl_coef)
        model.learn(32)
        assert model.logger.name_to_value["train/kl_coef"] == 0

    @pytest.mark.parametrize("kwargs", [{"kl_coef": 1.0}, {"lr_kl_target": 0.01}])
    @pytest.mark.parametrize("dist", DERIVED)
    def test_refuse_the_penalty_by_name(self, dist: type[Any], kwargs: dict[str, float]) -> None:
        name = next(iter(kwargs))
        with pytest.raises(
            ValueError, match=rf"`{name}` needs the exact KL, .* \({dist.__name__}\) is not known, got {name}="
        ):
            model_with(dist, **kwargs)

    @pytest.mark.parametrize("kl_coef", [0.0, 1.0])
    def test_an_object_that_makes_another_distribution(self, kl_coef: float) -> None:
        """The type of SB3's object is known; that of torch's distribution in it is not."""

        def laplace(mean: th.Tensor, log_std: th.Tensor) -> Any:
            dist.distribution = td.Laplace(mean, log_std.exp() * th.ones_like(mean))
            return dist

        model = model_with(None, kl_coef=kl_coef)
        dist: Any = model.policy.action_dist
        dist.proba_distribution = laplace
        if kl_coef:
            with pytest.raises(ValueError, match="`kl_coef` needs the exact KL, but that of"):
                model.learn(32)
            return
        model.learn(32)
        assert "train/kl" not in model.logger.name_to_value

    def test_a_distribution_that_is_replaced_between_rollout_and_update(self) -> None:
        class Change(BaseCallback):
            def _on_step(self) -> bool:
                return True

            def _on_rollout_end(self) -> None:
                self.model.policy.action_dist = LaplaceDistribution(1)

        model = model_with(None)
        model.learn(16, callback=Change())
        assert "train/kl" not in model.logger.name_to_value


class Acting(gym.Env[Any, Any]):
    """An environment with a given action space."""

    observation_space = OBS

    def __init__(self, action_space: spaces.Space[Any]) -> None:
        self.action_space = action_space

    def reset(self, *, seed: int | None = None, options: Any = None) -> tuple[Any, dict[str, Any]]:
        return np.full(3, 0.5, np.float32), {}

    def step(self, action: Any) -> tuple[Any, float, bool, bool, dict[str, Any]]:
        return np.full(3, 0.5, np.float32), 1.0, False, False, {}


class Reader(BaseCallback):
    """Reads the distribution of a step, once by each way."""

    ways: tuple[Any, ...] = (
        lambda dist: [type(part.sample()) for part in parts_of(dist)],
        lambda dist: kl_divergence_of_sb3(dist, dist),
        lambda dist: [kl_divergence(part, part) for part in parts_of(dist)],
        copy.deepcopy,
        lambda dist: pickle.loads(pickle.dumps(dist)),
        lambda dist: [repr(part) for part in parts_of(dist)],
    )

    def __init__(self, torch_type: type[Any]) -> None:
        super().__init__()
        self.torch_type, self.n_read = torch_type, 0

    def _on_step(self) -> bool:
        dist: Any = self.model.policy.action_dist
        assert all(isinstance(part, self.torch_type) for part in parts_of(dist))
        if self.n_read < len(self.ways):
            self.ways[self.n_read](dist)
            self.n_read += 1
            assert {type(part) for part in parts_of(dist)} == {self.torch_type}
        log_prob = dist.log_prob(th.as_tensor(self.locals["actions"]))
        th.testing.assert_close(log_prob, self.locals["log_probs"], rtol=1e-5, atol=1e-6)  # float32 rounding
        return True


def parts_of(dist: Any) -> list[Any]:
    return dist.distribution if isinstance(dist.distribution, list) else [dist.distribution]


@pytest.mark.parametrize("engine", ["native", "fused"])
@pytest.mark.parametrize(
    ("space", "torch_type"),
    [
        (spaces.Discrete(3), td.Categorical),
        (spaces.MultiDiscrete([2, 3]), td.Categorical),
        (spaces.MultiBinary(3), td.Bernoulli),
        (spaces.Box(-1.0, 1.0, (2,), np.float32), Normal),
    ],
    ids=lambda value: type(value).__name__,
)
def test_callbacks_read_torchs_distribution(space: spaces.Space[Any], torch_type: type[Any], engine: str) -> None:
    model = ClipPPO("MlpPolicy", Acting(space), n_steps=8, batch_size=8, device="cpu", engine=engine)
    reader = Reader(torch_type)
    model.learn(8, callback=reader)
    assert reader.n_read == len(Reader.ways)


SPACES: dict[str, tuple[spaces.Space[Any], type[ActorCriticPolicy], dict[str, Any]]] = {
    "discrete": (spaces.Discrete(3), ActorCriticPolicy, {}),
    "multi_discrete": (spaces.MultiDiscrete([2, 3]), ActorCriticPolicy, {}),
    "multi_binary": (spaces.MultiBinary(3), ActorCriticPolicy, {}),
    "box": (spaces.Box(-1.0, 1.0, (2,), np.float32), ActorCriticPolicy, {}),
    "gsde": (spaces.Box(-1.0, 1.0, (2,), np.float32), ActorCriticPolicy, {"use_sde": True}),
    "squashed": (spaces.Box(-1.0, 1.0, (2,), np.float32), SquashedActorCriticPolicy, {}),
}


@pytest.mark.parametrize("name", SPACES)
class TestPolicies:
    def make(self, name: str) -> ActorCriticPolicy:
        th.manual_seed(0)
        action_space, policy_class, kwargs = SPACES[name]
        return policy_class(OBS, action_space, lambda _: 1e-3, net_arch=[4], **kwargs)

    def test_width_is_known_before_the_first_forward_pass(self, name: str) -> None:
        policy = self.make(name)
        width = dist_param_dim(policy.action_dist)
        assert dist_params(policy.get_distribution(th.rand(N_STATES, 3))).shape == (N_STATES, width)

    def test_the_forward_pass_leaves_its_distribution(self, name: str) -> None:
        """No second forward pass for SB3's own policies."""
        policy = self.make(name)
        obs = th.rand(N_STATES, 3)
        expected = dist_params(policy.get_distribution(obs)).detach()
        policy.get_distribution(th.rand(N_STATES, 3))
        stale = policy.action_dist.distribution
        policy(obs)
        policy.get_distribution = None  # type: ignore[assignment, method-assign]
        assert th.equal(dist_params(refreshed_dist(policy, obs, stale)), expected)

    def test_the_evaluation_leaves_its_distribution(self, name: str) -> None:
        policy = self.make(name)
        obs = th.rand(N_STATES, 3)
        actions, _, _ = policy(obs)
        expected = dist_params(policy.get_distribution(obs)).detach()
        policy.get_distribution(th.rand(N_STATES, 3))
        stale = policy.action_dist.distribution
        policy.evaluate_actions(obs, actions)
        policy.get_distribution = None  # type: ignore[assignment, method-assign]
        assert th.equal(dist_params(refreshed_dist(policy, obs, stale)), expected)

    def test_a_policy_that_leaves_none_is_called_again(self, name: str) -> None:
        policy = self.make(name)
        obs = th.rand(N_STATES, 3)
        expected = dist_params(policy.get_distribution(obs)).detach()
        policy.get_distribution(th.rand(N_STATES, 3))
        # As after a forward pass that bypasses `action_dist`
        stale = policy.action_dist.distribution
        assert th.equal(dist_params(refreshed_dist(policy, obs, stale)), expected)
