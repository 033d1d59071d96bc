"""The squashed Gaussian and the policies built on it."""

import copy
import functools
import math
import pickle
from pathlib import Path
from typing import Any

import gymnasium as gym
import numpy as np
import pytest
import torch as th
from gymnasium import spaces
from stable_baselines3 import A2C, PPO
from stable_baselines3.common.buffers import RolloutBuffer
from stable_baselines3.common.policies import ActorCriticPolicy
from stable_baselines3.common.torch_layers import CombinedExtractor, FlattenExtractor, NatureCNN
from stable_baselines3.common.vec_env import DummyVecEnv

from sb3_clipvf import ClipPPO
from sb3_clipvf.policies import (
    MIN_STD,
    SquashedActorCriticCnnPolicy,
    SquashedActorCriticPolicy,
    SquashedGaussianDistribution,
    SquashedMultiInputActorCriticPolicy,
)

OBS = spaces.Box(-np.inf, np.inf, (3,), np.float32)
ACT = spaces.Box(-1.0, 1.0, (2,), np.float32)


def f32(values: Any) -> np.ndarray:
    return np.array(values, np.float32)


def gaussian_of(policy: SquashedActorCriticPolicy, obs: th.Tensor) -> th.distributions.Normal:
    """The policy's Gaussian before squashing."""
    distribution = policy.get_distribution(obs).distribution
    assert isinstance(distribution, th.distributions.Normal)
    return distribution


def make_policy(act: spaces.Space[Any] = ACT, obs: spaces.Space[Any] = OBS, **kwargs: Any) -> SquashedActorCriticPolicy:
    th.manual_seed(0)
    return SquashedActorCriticPolicy(obs, act, lambda _: 3e-4, **kwargs)


def make_dist(mean: Any, std: Any, dtype: th.dtype = th.float64) -> SquashedGaussianDistribution:
    """Distribution with the given mean and std, both of shape (batch, d): inverts softplus(raw) + MIN_STD = std."""
    mean, std = th.as_tensor(mean, dtype=dtype), th.as_tensor(std, dtype=dtype)
    raw = (std - MIN_STD).expm1().log()
    return SquashedGaussianDistribution(mean.shape[-1]).proba_distribution(th.cat([mean, raw], dim=-1))


@functools.cache
def quadrature() -> tuple[np.ndarray, np.ndarray]:
    """Nodes and weights on (-1, 1); clustered at the ends, where the densities of wide Gaussians are steep."""
    nodes, weights = np.polynomial.legendre.leggauss(2000)
    # a = sin(pi x / 2) puts nodes at distances ~1e-13 of the ends
    return np.sin(np.pi * nodes / 2), weights * np.pi / 2 * np.cos(np.pi * nodes / 2)


def numpy_entropy(mean: float, std: float) -> float:
    """Entropy of one squashed component by quadrature of -p log p, with p from the textbook change of variables."""
    a, weights = quadrature()
    log_p = -0.5 * ((np.arctanh(a) - mean) / std) ** 2 - np.log(std * np.sqrt(2 * np.pi)) - np.log1p(-(a**2))
    return float(-np.sum(weights * np.exp(log_p) * log_p))


# --- the distribution ------------------------------------------------------------------------------------------------


def test_log_prob_golden() -> None:
    """
    mean 0.2, raw std 0: std = log 2 + 1e-4 = 0.6932471806. For a = 0.5: u = atanh 0.5 = log(3) / 2 = 0.5493061443,
    z = (u - 0.2) / std = 0.5038695492, log N = -z^2 / 2 - log std - log(2 pi) / 2
    = -0.1269422613 + 0.3663686615 - 0.9189385332 = -0.6795121330; log Jacobian = log(1 - 0.25) = -0.2876820725;
    log prob = -0.6795121330 + 0.2876820725 = -0.3918300606 (digits by Python's math module).
    """
    dist = SquashedGaussianDistribution(1).proba_distribution(th.tensor([[0.2, 0.0]], dtype=th.float64))
    log_prob = dist.log_prob(th.tensor([[0.5]], dtype=th.float64))
    assert log_prob.shape == (1,)
    assert log_prob.item() == pytest.approx(-0.3918300606, abs=1e-9)  # ten digits in the derivation


@pytest.mark.parametrize(("mean", "std"), [(0.0, 0.5), (0.8, 0.3), (-1.5, 1.0), (0.3, 2.0)])
def test_density_integrates_to_one(mean: float, std: float) -> None:
    a, weights = quadrature()
    dist = make_dist(np.full((len(a), 1), mean), np.full((len(a), 1), std))
    total = float(np.sum(weights * dist.log_prob(th.as_tensor(a)[:, None]).exp().numpy()))
    # Measured error below 1e-9; for std 2 the tail beyond the outermost node holds less than 1e-7
    assert total == pytest.approx(1.0, abs=1e-6)


def test_log_prob_matches_torch_transformed_distribution_and_sums_dims() -> None:
    """Independent program: torch's TransformedDistribution with TanhTransform."""
    generator = th.Generator().manual_seed(1)
    mean = th.randn((50, 3), generator=generator, dtype=th.float64)
    std = th.rand((50, 3), generator=generator, dtype=th.float64) + 0.1
    actions = th.tanh(2 * th.randn((50, 3), generator=generator, dtype=th.float64))
    reference = th.distributions.TransformedDistribution(
        th.distributions.Normal(mean, std), th.distributions.TanhTransform()
    )
    expected = reference.log_prob(actions)  # type: ignore[no-untyped-call]
    log_prob = make_dist(mean, std).log_prob(actions)
    assert log_prob.shape == (50,)
    # float64; atanh near the bounds loses some digits in either program
    th.testing.assert_close(log_prob, expected.sum(dim=1), rtol=1e-8, atol=1e-8)


def test_log_prob_gradcheck() -> None:
    actions = th.tensor([[0.3, -0.9], [0.99, 0.0]], dtype=th.float64)
    params = th.tensor([[0.1, -0.4, 0.5, -1.0], [1.0, 0.2, -0.3, 2.0]], dtype=th.float64, requires_grad=True)
    dist = SquashedGaussianDistribution(2)
    assert th.autograd.gradcheck(lambda p: dist.proba_distribution(p).log_prob(actions), (params,))


@pytest.mark.parametrize("dtype", [th.float32, th.float64])
def test_saturated_actions_have_the_probability_of_all_that_rounds_to_them(dtype: th.dtype) -> None:
    th.manual_seed(0)
    n_samples = 100_000
    eps = th.finfo(dtype).eps
    # Mean near the point where tanh rounds: 8.5 in float32, 18.5 in float64
    mean = th.full((n_samples, 1), math.atanh(1 - eps), dtype=dtype)
    for sign in (1.0, -1.0):
        dist = make_dist(sign * mean, th.full_like(mean, 0.5), dtype)
        n_saturated = int((sign * dist.sample() > 1 - eps).sum())
        probability = dist.log_prob(th.full_like(mean, sign))[0].exp().item() * 0.75 * eps
        # Five standard errors of a share near 0.4; tanh itself errs by less than the tenth of the mass this resolves
        assert n_saturated / n_samples == pytest.approx(probability, abs=5 * 0.5 / math.sqrt(n_samples))


@pytest.mark.parametrize("dtype", [th.float32, th.float64])
def test_log_prob_is_bounded_where_tanh_rounds(dtype: th.dtype) -> None:
    eps = th.finfo(dtype).eps
    dist = make_dist([[0.0], [4.0], [-4.0]], [[3.0], [5.0], [5.0]], dtype)
    signs = th.tensor([[1.0], [1.0], [-1.0]], dtype=dtype)
    # The two numbers above 1 - eps are one event
    assert th.equal(dist.log_prob(signs), dist.log_prob(signs * (1 - eps / 2)))
    assert not th.equal(dist.log_prob(signs), dist.log_prob(signs * (1 - eps)))
    # A mean deep in saturation makes ±1 certain: the same number, and no gradient, whatever the std
    params = th.tensor([[100.0, 5.0], [100.0, 6.0], [1000.0, 0.0]], dtype=dtype, requires_grad=True)
    certain = SquashedGaussianDistribution(1).proba_distribution(params).log_prob(th.ones((3, 1), dtype=dtype))
    # float32: log(0.75 eps) and a tail below 1e-40
    th.testing.assert_close(certain, th.full((3,), -math.log(0.75 * eps), dtype=dtype))
    certain.sum().backward()  # type: ignore[no-untyped-call]
    assert params.grad is not None and params.grad.abs().max() < 1e-30


def test_log_prob_gradcheck_at_saturated_actions() -> None:
    actions = th.tensor([[1.0], [-1.0], [1.0]], dtype=th.float64)
    params = th.tensor([[19.0, 0.5], [3.0, 1.0], [-5.0, 4.0]], dtype=th.float64, requires_grad=True)
    dist = SquashedGaussianDistribution(1)
    assert th.autograd.gradcheck(lambda p: dist.proba_distribution(p).log_prob(actions), (params,))


def test_gradient_of_other_components_survives_a_saturated_one() -> None:
    """Both branches are evaluated for every component; the one not taken must not spoil the gradient."""
    params = th.tensor([[0.3, 200.0, -30.0, -30.0]], requires_grad=True)  # std 1e-4: the branches not taken are extreme
    dist = SquashedGaussianDistribution(2).proba_distribution(params)
    dist.log_prob(th.tensor([[0.29131, 1.0]])).sum().backward()  # type: ignore[no-untyped-call]
    assert params.grad is not None and th.isfinite(params.grad).all()
    assert params.grad[0, 0] != 0 and params.grad[0, 1] == 0


@pytest.mark.parametrize("std", [MIN_STD, 1.05e-4, 1.5e-4, 2e-4, 3e-4])
@pytest.mark.parametrize("mean", [0.0, 20.0, -20.0])
def test_gradients_of_narrow_gaussians_are_finite(mean: float, std: float) -> None:
    """Some 8 / std from saturation, the gradient of log_ndtr overflows in float32, for some of these means."""
    means = mean + 0.7 * th.randn((2000, 1), generator=th.Generator().manual_seed(0))
    raw_std = math.log(math.expm1(std - MIN_STD)) if std > MIN_STD else -30.0
    params = th.cat([means, th.full_like(means, raw_std)], dim=1).requires_grad_()
    dist = SquashedGaussianDistribution(1).proba_distribution(params)
    dist.log_prob(dist.mode().detach()).sum().backward()  # type: ignore[no-untyped-call]
    assert params.grad is not None and th.isfinite(params.grad).all()


def test_entropy_jacobian_does_not_overflow_far_from_zero() -> None:
    """At u = ±40 tanh is exactly ±1 in float32; log(1 - tanh^2 u) = 2 log 2 - 2 |u| there, not -inf."""
    th.manual_seed(0)
    dist = make_dist([[40.0], [-40.0]], [[1e-3], [1e-3]], th.float32)
    gaussian_entropy = math.log(1e-3 * math.sqrt(2 * math.pi * math.e))
    # The sample is within 5 std = 0.005 of the mean, and the Jacobian's slope is 2
    expected = th.full((2,), gaussian_entropy + 2 * math.log(2.0) - 80.0)
    th.testing.assert_close(dist.entropy(), expected, rtol=0, atol=0.02)


@pytest.mark.parametrize(("mean", "std"), [(0.0, 0.5), (0.7, 0.3), (-1.0, 1.5)])
def test_entropy_estimates_the_integral(mean: float, std: float) -> None:
    th.manual_seed(0)
    n_samples = 200_000
    entropy = make_dist(np.full((n_samples, 1), mean), np.full((n_samples, 1), std)).entropy()
    assert entropy.shape == (n_samples,)
    # Five standard errors of the mean of the samples
    tolerance = 5 * entropy.std().item() / math.sqrt(n_samples)
    assert entropy.mean().item() == pytest.approx(numpy_entropy(mean, std), abs=tolerance)


def test_entropy_sums_dims_and_draws_a_fresh_sample() -> None:
    th.manual_seed(0)
    dist = make_dist(np.zeros((50_000, 2)), np.tile([0.3, 0.8], (50_000, 1)))
    first, second = dist.entropy(), dist.entropy()
    assert not th.equal(first, second)
    tolerance = 5 * first.std().item() / math.sqrt(50_000)  # five standard errors
    assert first.mean().item() == pytest.approx(numpy_entropy(0.0, 0.3) + numpy_entropy(0.0, 0.8), abs=tolerance)


@pytest.mark.parametrize(("mean", "std", "sign"), [(0.5, 0.2, 1), (0.5, 2.0, -1)])
def test_entropy_gradient_is_that_of_the_integral(mean: float, std: float, sign: int) -> None:
    """A narrow Gaussian gains entropy by widening, a wide one loses it (mass piles up at ±1); a mean off 0 costs."""
    th.manual_seed(0)
    n_samples = 100_000
    params = th.zeros((n_samples, 2), dtype=th.float64)
    params[:, 0] = mean
    params[:, 1] = math.log(math.expm1(std - MIN_STD))
    params.requires_grad_()
    SquashedGaussianDistribution(1).proba_distribution(params).entropy().sum().backward()  # type: ignore[no-untyped-call]
    assert params.grad is not None
    d_mean, d_raw = params.grad.mean(dim=0).tolist()
    d_std = d_raw / (1 - math.exp(-(std - MIN_STD)))  # d std / d raw = sigmoid(raw) = 1 - exp(-softplus(raw))
    h = 1e-4
    expected_mean = (numpy_entropy(mean + h, std) - numpy_entropy(mean - h, std)) / (2 * h)
    expected_std = (numpy_entropy(mean, std + h) - numpy_entropy(mean, std - h)) / (2 * h)
    # Gradients of one sample have std below 3: five standard errors
    tolerance = 5 * 3 / math.sqrt(n_samples)
    assert d_mean == pytest.approx(expected_mean, abs=tolerance)
    assert d_std == pytest.approx(expected_std, abs=tolerance)
    assert np.sign(d_std) == sign and d_mean < -0.1


def test_sample_and_mode() -> None:
    th.manual_seed(0)
    params = th.tensor([[0.5, -1.0, 0.3, -2.0]]).repeat(20_000, 1).requires_grad_()
    dist = SquashedGaussianDistribution(2).proba_distribution(params)
    assert th.equal(dist.mode(), th.tanh(params[:, :2]))
    actions = dist.sample()
    assert actions.shape == (20_000, 2) and actions.abs().max() <= 1
    # tanh keeps the median: half of the draws lie above the mode, within five standard errors of a fair coin
    above = (actions > dist.mode()).float().mean(dim=0)
    th.testing.assert_close(above, th.full((2,), 0.5), rtol=0, atol=5 * 0.5 / math.sqrt(20_000))
    actions.sum().backward()  # type: ignore[no-untyped-call]
    assert params.grad is not None and (params.grad[:, 2:] != 0).any(), "the sample is not reparameterised"


def test_from_params() -> None:
    params = th.tensor([[0.5, 0.3], [-0.2, 1.0]])
    dist = SquashedGaussianDistribution(1)
    assert th.equal(dist.actions_from_params(params, deterministic=True), th.tanh(params[:, :1]))
    actions, log_prob = dist.log_prob_from_params(params)
    assert actions.shape == (2, 1) and th.equal(log_prob, dist.log_prob(actions))
    assert not th.equal(actions, dist.actions_from_params(params))


def test_each_call_sets_a_new_gaussian_before_squashing() -> None:
    dist = SquashedGaussianDistribution(1)
    first = dist.proba_distribution(th.tensor([[2.0, 0.0]])).distribution
    second = dist.proba_distribution(th.tensor([[2.0, 0.0]])).distribution
    assert first is not second and isinstance(second, th.distributions.Normal)
    assert second.mean.item() == 2.0
    assert second.stddev.item() == pytest.approx(math.log(2.0) + 1e-4, rel=1e-6)  # softplus(0) + MIN_STD in float32


def test_std_has_a_floor() -> None:
    dist = SquashedGaussianDistribution(1).proba_distribution(th.tensor([[0.0, -1e4]]))
    assert dist.distribution.stddev.item() == pytest.approx(MIN_STD)
    assert th.isfinite(dist.log_prob(th.tensor([[0.5]]))).all()


@pytest.mark.parametrize("log_std_init", [-9.2, -3.0, 0.0, 2.0, 40.0])
def test_proba_distribution_net_starts_at_log_std_init_in_every_state(log_std_init: float) -> None:
    dist = SquashedGaussianDistribution(2)
    net = dist.proba_distribution_net(latent_dim=5, log_std_init=log_std_init)
    assert isinstance(net, th.nn.Linear) and net.weight.shape == (4, 5)
    gaussian = dist.proba_distribution(net(th.randn(7, 5))).distribution
    # Near the floor the sum softplus + MIN_STD keeps seven digits of float32 but the bias only six
    th.testing.assert_close(gaussian.stddev, th.full((7, 2), math.exp(log_std_init)), rtol=1e-5, atol=0)
    assert not th.equal(gaussian.mean[0], gaussian.mean[1]), "the mean must depend on the state"


@pytest.mark.parametrize("log_std_init", [math.log(MIN_STD), -20.0, 40.1, math.inf, math.nan])
def test_log_std_init_out_of_range_is_refused(log_std_init: float) -> None:
    with pytest.raises(ValueError, match=r"`log_std_init` must be in \(-9\.21034, 40\], got"):
        make_policy(log_std_init=log_std_init)


def test_log_std_init_of_another_type_is_refused() -> None:
    with pytest.raises(TypeError, match="`log_std_init` must be a number, got '0'"):
        make_policy(log_std_init="0")


# --- the policy ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("log_std_init", [-2.0, 0.0, 1.0])
def test_orthogonal_init_has_sb3_gains_and_the_std_asked_for(log_std_init: float) -> None:
    policy = make_policy(log_std_init=log_std_init)
    gram = policy.action_net.weight @ policy.action_net.weight.T
    # Rows of a gain-0.01 orthogonal matrix, means and stds alike; float32 rounding of 1e-4
    th.testing.assert_close(gram, 1e-4 * th.eye(4), rtol=0, atol=1e-9)
    assert th.equal(policy.action_net.bias[:2], th.zeros(2))
    assert policy.value_net.weight.norm().item() == pytest.approx(1.0, rel=1e-5)
    # The latent has 64 components below 1 in size: |raw - bias| <= 0.01 * 8, and softplus has slope below 1
    std = gaussian_of(policy, th.randn(100, 3)).stddev
    assert (std - math.exp(log_std_init)).abs().max() <= 0.081
    assert std.std() > 0, "the std must depend on the state"


def test_without_orthogonal_init_the_std_is_exact() -> None:
    policy = make_policy(log_std_init=-1.0, ortho_init=False)
    std = gaussian_of(policy, th.randn(10, 3)).stddev
    th.testing.assert_close(std, th.full((10, 2), math.exp(-1.0)))
    gram = policy.action_net.weight[:2] @ policy.action_net.weight[:2].T
    assert gram.diagonal().min() > 1e-3, "torch's own init of the means, not SB3's small one"


def test_parameters_and_optimizer() -> None:
    policy = make_policy()
    names = dict(policy.named_parameters())
    assert "log_std" not in names and policy.action_net.out_features == 4
    in_optimizer = {id(p) for group in policy.optimizer.param_groups for p in group["params"]}
    assert in_optimizer == {id(p) for p in names.values()}
    assert isinstance(policy.optimizer, th.optim.Adam)
    assert policy.optimizer.defaults["eps"] == 1e-5 and policy.optimizer.defaults["lr"] == 3e-4
    sgd = make_policy(optimizer_class=th.optim.SGD, optimizer_kwargs={"momentum": 0.9}).optimizer
    assert isinstance(sgd, th.optim.SGD) and sgd.defaults["momentum"] == 0.9


def test_all_but_the_action_layer_starts_as_in_sb3() -> None:
    ours = make_policy()
    th.manual_seed(0)
    theirs = ActorCriticPolicy(OBS, ACT, lambda _: 3e-4)
    for name, param in theirs.named_parameters():
        if name != "log_std" and not name.startswith("action_net"):
            assert th.equal(param, ours.state_dict()[name]), name


@pytest.mark.parametrize("share", [True, False])
@pytest.mark.parametrize("net_arch", [[], [8], {"pi": [16, 4], "vf": [8]}])
def test_networks(net_arch: Any, share: bool) -> None:
    policy = make_policy(net_arch=net_arch, share_features_extractor=share, activation_fn=th.nn.ReLU)
    obs = th.randn(5, 3)
    actions, values, log_prob = policy(obs)
    assert actions.shape == (5, 2) and values.shape == (5, 1) and log_prob.shape == (5,)
    assert th.equal(values, policy.predict_values(obs))
    assert (policy.pi_features_extractor is policy.vf_features_extractor) == share
    assert any(isinstance(module, th.nn.ReLU) for module in policy.modules()) == bool(net_arch)
    new_values, new_log_prob, entropy = policy.evaluate_actions(obs, actions)
    assert entropy is not None and entropy.shape == (5,)
    (new_values.mean() + new_log_prob.mean() + entropy.mean()).backward()  # type: ignore[no-untyped-call]
    assert all(p.grad is not None and th.isfinite(p.grad).all() for p in policy.parameters())


@pytest.mark.parametrize("mean_bias", [0.0, 3.0, 8.5, 12.0, -50.0])
@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_ratio_is_one_before_the_first_update_also_for_saturated_actions(mean_bias: float, dtype: Any) -> None:
    n_envs = 64
    act = spaces.Box(-2.0, 5.0, (2,), dtype)
    policy = make_policy(act)
    with th.no_grad():
        policy.action_net.bias[:2] += mean_bias
    obs = np.random.default_rng(0).normal(size=(n_envs, 3)).astype(np.float32)
    with th.no_grad():
        actions, values, log_prob = policy(th.as_tensor(obs))
    if abs(mean_bias) >= 12:
        assert (actions.abs() == 1).any(), "the case does not saturate"
    buffer = RolloutBuffer(1, OBS, act, "cpu", n_envs=n_envs)
    buffer.add(obs, actions.numpy(), np.zeros(n_envs), np.zeros(n_envs), values, log_prob)
    np.random.seed(0)
    batch = next(buffer.get())
    # Same rows in the buffer's shuffled order: the identity is exact because nothing but the stored action is read
    _, new_log_prob, _ = policy.evaluate_actions(batch.observations, batch.actions)
    assert th.equal(th.exp(new_log_prob - batch.old_log_prob), th.ones(n_envs))
    # A buffer that keeps the Box's dtype gives the same number
    assert th.equal(policy.evaluate_actions(th.as_tensor(obs), actions.to(th.float64))[1], log_prob)


def test_evaluate_actions_and_get_distribution_agree() -> None:
    policy = make_policy(log_std_init=-0.5)
    obs = th.randn(6, 3)
    actions = policy(obs)[0]
    log_prob = policy.evaluate_actions(obs, actions)[1]
    dist = policy.get_distribution(obs)
    assert isinstance(dist, SquashedGaussianDistribution)
    assert th.equal(dist.log_prob(actions), log_prob)


def test_predict_deterministic_is_the_unscaled_squashed_mean() -> None:
    act = spaces.Box(np.array([-2.0, 0.0], np.float32), np.array([1.0, 10.0], np.float32))
    policy = make_policy(act, ortho_init=False)
    obs = np.random.default_rng(0).normal(size=(7, 3)).astype(np.float32)
    squashed = np.tanh(gaussian_of(policy, th.as_tensor(obs)).mean.detach().numpy())
    expected = np.array([-0.5, 5.0]) + np.array([1.5, 5.0]) * squashed  # centre + half width * tanh(mean)
    actions, _ = policy.predict(obs, deterministic=True)
    assert actions.dtype == np.float32
    np.testing.assert_allclose(actions, expected, rtol=1e-5, atol=1e-6)  # float32 rounding
    single, _ = policy.predict(obs[0], deterministic=True)
    np.testing.assert_allclose(single, expected[0], rtol=1e-5, atol=1e-6)  # float32 rounding
    assert not np.array_equal(policy.predict(obs)[0], policy.predict(obs)[0])


F32_MAX, F64_MAX = float(np.finfo(np.float32).max), float(np.finfo(np.float64).max)
BOXES: dict[str, tuple[float, float, Any]] = {
    "unit": (-1.0, 1.0, np.float32),
    "asymmetric": (-0.3, 7.1, np.float32),
    "thirds": (-1 / 3, 2 / 3, np.float64),
    "far_from_zero": (1e6, 1e6 + 0.25, np.float32),
    "tiny": (1e-30, 3e-30, np.float32),
    "subnormal": (-5e-324, 5e-324, np.float64),
    "huge": (-F32_MAX, F32_MAX, np.float32),
    "huge_float64": (-F64_MAX, F64_MAX, np.float64),
    "at_the_top": (F64_MAX * 0.9999999999999998, F64_MAX, np.float64),
    "one_sided": (-F64_MAX, 1e-300, np.float64),
}


@pytest.mark.parametrize("name", BOXES)
def test_scaling_is_exact_at_the_bounds_and_never_leaves_the_box(name: str) -> None:
    low, high, dtype = BOXES[name]
    act = spaces.Box(low, high, (2, 3), dtype)
    policy = make_policy(act)
    ones = np.ones((4, 2, 3), np.float32)
    for sign, bound in ((1, act.high), (-1, act.low)):
        assert np.array_equal(policy.unscale_action(sign * ones), np.broadcast_to(bound, ones.shape))
        assert np.array_equal(policy.scale_action(bound), sign * ones[0])
    rng = np.random.default_rng(0)
    inside = np.nextafter(np.float32(1), np.float32(0))
    for scaled in (np.tanh(rng.normal(0, 3, (500, 2, 3))), ones * inside, -ones * inside, 0 * ones):
        action = policy.unscale_action(scaled.astype(np.float32))
        assert action.dtype == act.dtype and action.shape == scaled.shape
        assert np.isfinite(action).all() and (action >= act.low).all() and (action <= act.high).all()


@pytest.mark.parametrize("name", ["unit", "asymmetric", "thirds", "tiny", "huge", "huge_float64", "one_sided"])
def test_scale_inverts_unscale(name: str) -> None:
    low, high, dtype = BOXES[name]
    policy = make_policy(spaces.Box(low, high, (3,), dtype))
    scaled = np.random.default_rng(0).uniform(-1, 1, (100, 3)).astype(np.float32)
    back = policy.scale_action(policy.unscale_action(scaled))
    assert back.dtype == dtype
    # float32 rounding of the action, at most eps * |bound| / half width, which is below 3 eps in these boxes
    np.testing.assert_allclose(back, scaled, rtol=0, atol=1e-6)


def test_scaling_is_linear_between_the_bounds() -> None:
    policy = make_policy(spaces.Box(f32([-2, 0]), f32([6, 0.5])))
    assert policy.unscale_action(np.array([[0.5, -0.5]])).tolist() == [[4.0, 0.125]]
    assert policy.scale_action(np.array([4.0, 0.125])).tolist() == [0.5, -0.5]
    # Whole-number actions of a careless caller are not divided as integers, and beyond ±1 the bound holds
    assert policy.unscale_action(np.array([[0, 2]])).tolist() == [[2.0, 0.5]]


def test_components_whose_bounds_coincide() -> None:
    policy = make_policy(spaces.Box(f32([-1, 0.1]), f32([1, 0.1])))
    assert np.array_equal(policy.unscale_action(f32([[0.3, 0.7]])), f32([[0.3, 0.1]]))
    assert policy.scale_action(f32([0.5, 0.1])).tolist() == [0.5, 0.0]
    # With all bits of the mantissa set the two products round downwards for one action in seven
    top = float(np.nextafter(2.0, 1.0))
    point = make_policy(spaces.Box(top, top, (1,), np.float64))
    assert (point.unscale_action(f32(np.linspace(-0.99, 0.99, 500))[:, None]) == top).all()


def test_actions_of_shape_2_3() -> None:
    act = spaces.Box(np.arange(6, dtype=np.float32).reshape(2, 3), np.arange(6, dtype=np.float32).reshape(2, 3) + 1)
    policy = make_policy(act)
    obs = np.zeros((5, 3), np.float32)
    actions, _, log_prob = policy(th.as_tensor(obs))
    assert actions.shape == (5, 2, 3) and log_prob.shape == (5,)
    # Buffers keep actions flat
    assert th.equal(policy.evaluate_actions(th.as_tensor(obs), actions.reshape(5, 6))[1], log_prob)
    for batch in (obs, obs[0]):
        env_actions, _ = policy.predict(batch)
        assert env_actions.shape == (*batch.shape[:-1], 2, 3)
        assert all(act.contains(action) for action in env_actions.reshape(-1, 2, 3))


@pytest.mark.parametrize("share", [True, False])
def test_cnn_policy(share: bool) -> None:
    obs_space = spaces.Box(0, 255, (3, 36, 36), np.uint8)
    policy = SquashedActorCriticCnnPolicy(obs_space, ACT, lambda _: 1e-3, share_features_extractor=share)
    assert isinstance(policy.features_extractor, NatureCNN)
    obs = np.stack([obs_space.sample() for _ in range(2)])
    actions, values, log_prob = policy(th.as_tensor(obs))
    assert actions.shape == (2, 2) and values.shape == (2, 1)
    assert th.equal(policy.evaluate_actions(th.as_tensor(obs), actions)[1], log_prob)
    assert policy.predict(obs[0])[0].shape == (2,)


def test_images_already_normalised_are_not_divided_again() -> None:
    obs_space = spaces.Box(0.0, 1.0, (3, 36, 36), np.float32)
    policy = SquashedActorCriticCnnPolicy(obs_space, ACT, lambda _: 1e-3, normalize_images=False)
    assert ACT.contains(policy.predict(obs_space.sample())[0])


def test_multi_input_policy() -> None:
    image = spaces.Box(0, 255, (3, 36, 36), np.uint8)
    obs_space = spaces.Dict({"vector": spaces.Box(-1, 1, (4,), np.float32), "image": image})
    policy = SquashedMultiInputActorCriticPolicy(obs_space, ACT, lambda _: 1e-3)
    assert isinstance(policy.features_extractor, CombinedExtractor)
    obs = obs_space.sample()
    batch = {key: th.as_tensor(value)[None] for key, value in obs.items()}
    actions, _, log_prob = policy(batch)
    assert th.equal(policy.evaluate_actions(batch, actions)[1], log_prob)
    assert ACT.contains(policy.predict(obs)[0])


def test_features_extractor_can_be_chosen() -> None:
    obs_space = spaces.Box(0, 255, (3, 36, 36), np.uint8)
    policy = SquashedActorCriticCnnPolicy(obs_space, ACT, lambda _: 1e-3, features_extractor_class=FlattenExtractor)
    assert isinstance(policy.features_extractor, FlattenExtractor) and policy.features_dim == 3 * 36 * 36
    small = SquashedActorCriticCnnPolicy(obs_space, ACT, lambda _: 1e-3, features_extractor_kwargs={"features_dim": 7})
    assert small.features_dim == 7


# --- refusals --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("space", [spaces.Discrete(3), spaces.MultiDiscrete([2, 3]), spaces.MultiBinary(4)])
def test_discrete_action_spaces_are_refused(space: spaces.Space[Any]) -> None:
    with pytest.raises(
        TypeError, match=r"`action_space` must be a Box for a squashed policy, got .*Use \"MlpPolicy\"\."
    ):
        make_policy(space)


def test_the_refusal_names_the_policy_for_the_observations() -> None:
    images = spaces.Box(0, 255, (3, 36, 36), np.uint8)
    with pytest.raises(TypeError, match='Use "CnnPolicy"'):
        SquashedActorCriticCnnPolicy(images, spaces.Discrete(2), lambda _: 1e-3)
    with pytest.raises(TypeError, match='Use "MultiInputPolicy"'):
        SquashedMultiInputActorCriticPolicy(spaces.Dict({"a": OBS}), spaces.Discrete(2), lambda _: 1e-3)


def test_nested_action_spaces_are_refused() -> None:
    with pytest.raises(TypeError, match=r"must be a Box for a squashed policy, got Dict.*Flatten it into one Box"):
        make_policy(spaces.Dict({"a": ACT}))


def test_infinite_bounds_are_refused_with_the_first_dimension() -> None:
    one_dim = spaces.Box(f32([-1, -np.inf, 0, -1]), f32([1, 1, 1, np.inf]))
    message = r"must have finite bounds .* in 2 dimension\(s\), the first at \[1\]\. Give the env"
    with pytest.raises(ValueError, match=message):
        make_policy(one_dim)
    high = np.ones((2, 3), np.float32)
    high[1, 2] = np.inf
    with pytest.raises(ValueError, match=r"in 1 dimension\(s\), the first at \[1, 2\]\. "):
        make_policy(spaces.Box(-np.ones((2, 3), np.float32), high))


@pytest.mark.parametrize("dtype", [np.int32, np.uint8, np.float16])
def test_other_dtypes_are_refused(dtype: Any) -> None:
    with pytest.raises(ValueError, match=rf"must be of dtype float32 or float64 .*, got {np.dtype(dtype).name}\. "):
        make_policy(spaces.Box(0, 1, (2,), dtype))


def test_gsde_and_its_options_are_refused() -> None:
    with pytest.raises(
        ValueError, match=r"`use_sde` must be False .*use_sde=True and policy_kwargs=dict\(squash_output"
    ):
        make_policy(use_sde=True)
    for options in ({"full_std": False}, {"use_expln": True}, {"squash_output": False}):
        name = next(iter(options))
        with pytest.raises(ValueError, match=rf'`{name}` must be {not options[name]} .*"MlpPolicy"'):
            make_policy(ACT, OBS, **options)
    make_policy(use_sde=False, full_std=True, use_expln=False, squash_output=True)


# --- copies, files, algorithms ---------------------------------------------------------------------------------------


def test_save_and_load(tmp_path: Path) -> None:
    images = spaces.Box(0, 255, (3, 36, 36), np.uint8)
    kwargs: dict[str, Any] = {
        "net_arch": [8],
        "log_std_init": -1.0,
        "share_features_extractor": False,
        "ortho_init": False,
    }
    policy = SquashedActorCriticCnnPolicy(images, spaces.Box(-2.0, 3.0, (2,)), lambda _: 1e-3, **kwargs)
    obs = images.sample()
    policy.evaluate_actions(th.as_tensor(obs)[None], th.zeros(1, 2))
    path = str(tmp_path / "policy.pth")
    policy.save(path)
    loaded = SquashedActorCriticCnnPolicy.load(path, device="cpu")
    assert loaded.squash_output and loaded.net_arch == [8] and loaded.log_std_init == -1.0
    assert not loaded.share_features_extractor and not loaded.ortho_init
    assert np.array_equal(loaded.predict(obs, deterministic=True)[0], policy.predict(obs, deterministic=True)[0])


def test_copies_need_no_detached_graph() -> None:
    """The distribution of the last pass is part of a graph, which cannot be copied: copies omit it."""
    policy = make_policy()
    obs = th.randn(4, 3)
    policy.evaluate_actions(obs, th.zeros(4, 2))
    twin = copy.deepcopy(policy)
    twin.optimizer.zero_grad()
    before = twin.predict(obs.numpy(), deterministic=True)[0]
    with th.no_grad():
        policy.action_net.bias.add_(1)
    assert np.array_equal(twin.predict(obs.numpy(), deterministic=True)[0], before)
    assert {id(p) for p in twin.parameters()} == {id(p) for p in twin.optimizer.param_groups[0]["params"]}
    restored = pickle.loads(pickle.dumps(policy.action_dist))
    assert restored.action_dim == 2 and not hasattr(restored, "distribution")
    twin.load_state_dict(policy.state_dict())
    assert th.equal(twin.get_distribution(obs).mode(), policy.get_distribution(obs).mode())


@pytest.mark.parametrize("algorithm", [A2C, PPO, ClipPPO])
def test_learns_inside_algorithms(algorithm: type[A2C] | type[PPO] | type[ClipPPO], tmp_path: Path) -> None:
    kwargs: dict[str, Any] = {"n_steps": 8, "ent_coef": 0.01, "seed": 0, "device": "cpu"}
    if algorithm is not A2C:
        kwargs["batch_size"] = 4
    model = algorithm(SquashedActorCriticPolicy, "Pendulum-v1", **kwargs)
    before = model.policy.parameters_to_vector()
    model.learn(64)
    after = model.policy.parameters_to_vector()
    assert np.isfinite(after).all() and not np.array_equal(before, after)
    model.save(tmp_path / "model")
    loaded = algorithm.load(tmp_path / "model", device="cpu")
    assert isinstance(loaded.policy, SquashedActorCriticPolicy)
    obs = np.zeros(3, np.float32)
    assert np.array_equal(loaded.predict(obs, deterministic=True)[0], model.predict(obs, deterministic=True)[0])


class RecordingEnv(gym.Env[np.ndarray, np.ndarray]):
    """Keeps every action it receives."""

    observation_space = OBS
    action_space = spaces.Box(f32([-3.0, 0.1]), f32([0.5, 0.3]))

    def __init__(self) -> None:
        self.received: list[np.ndarray] = []

    def reset(
        self, *, seed: int | None = None, options: dict[str, Any] | None = None
    ) -> tuple[np.ndarray, dict[str, Any]]:
        return np.zeros(3, np.float32), {}

    def step(self, action: np.ndarray) -> tuple[np.ndarray, float, bool, bool, dict[str, Any]]:
        self.received.append(action.copy())
        return np.zeros(3, np.float32), 0.0, False, False, {}


def test_the_environment_receives_unscaled_actions_in_its_box() -> None:
    env = RecordingEnv()
    # Wide: most actions near the bounds
    policy_kwargs = {"log_std_init": 2.0}
    vec_env = DummyVecEnv([lambda: env])
    A2C(SquashedActorCriticPolicy, vec_env, n_steps=64, policy_kwargs=policy_kwargs, device="cpu", seed=0).learn(64)
    received = np.stack(env.received)
    assert all(env.action_space.contains(action) for action in received)
    width = env.action_space.high - env.action_space.low
    # 64 draws with std e^2 before tanh: fewer than one in three stays off the bounds, half of them on either side
    assert (np.ptp(received, axis=0) > 0.99 * width).all()
