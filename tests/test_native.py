"""
The native engine alone: its rollouts, its updates, and its selection in training.

test_engines.py compares its updates with a straightforward program.
"""

import copy
import dataclasses
import logging
import os
import signal
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import kernel_cases
import numpy as np
import pytest
import test_engines
import torch as th
from gymnasium import spaces
from scipy import stats
from stable_baselines3.common.callbacks import BaseCallback
from stable_baselines3.common.env_util import make_vec_env
from stable_baselines3.common.policies import ActorCriticPolicy
from stable_baselines3.common.torch_layers import FlattenExtractor
from test_engines import BOX, OBS

from sb3_clipvf import ClipPPO
from sb3_clipvf.common.nonfinite import BadMinibatchError
from sb3_clipvf.distributions import dist_param_dim, dist_params
from sb3_clipvf.engines import division, native, threads
from sb3_clipvf.engines.autograd import AutogradEngine, AutogradUpdate
from sb3_clipvf.engines.division import DividedPolicy
from sb3_clipvf.engines.fused import FusedEngine
from sb3_clipvf.engines.kernels import entry
from sb3_clipvf.engines.kernels.totals import TOTAL
from sb3_clipvf.engines.native import NativeEngine
from sb3_clipvf.engines.rollout_writer import writer_for
from sb3_clipvf.engines.threads import ProcessWide
from sb3_clipvf.rollout import TensorRolloutBuffer, gae

ACTIONS: dict[str, spaces.Space[Any]] = {
    "discrete": spaces.Discrete(3),
    "multi_discrete": spaces.MultiDiscrete([2, 3]),
    "multi_binary": spaces.MultiBinary(3),
    "box": BOX,
    "gsde": BOX,
}
KWARGS: dict[str, dict[str, Any]] = {"gsde": {"use_sde": True}}
SETTINGS = dataclasses.replace(test_engines.SETTINGS, batch_size=16, n_epochs=3)
COEFFICIENTS = dataclasses.replace(test_engines.COEFFICIENTS, kl_coef=1.0)


def make_policy(actions: str = "box", **kwargs: Any) -> ActorCriticPolicy:
    th.manual_seed(0)
    all_kwargs = {"net_arch": [8], **KWARGS.get(actions, {}), **kwargs}
    return ActorCriticPolicy(OBS, ACTIONS[actions], lambda _: 3e-3, **all_kwargs)


def make_buffer(policy: ActorCriticPolicy, n_steps: int = 8, n_envs: int = 4) -> TensorRolloutBuffer:
    buffer = TensorRolloutBuffer(
        n_steps, OBS, policy.action_space, "cpu", n_envs=n_envs, dist_param_dim=dist_param_dim(policy.action_dist) or 0
    )
    buffer.reset()
    return buffer


def filled(policy: ActorCriticPolicy, **kwargs: Any) -> TensorRolloutBuffer:
    rng = np.random.default_rng(0)
    buffer = make_buffer(policy, **kwargs)
    for _ in range(buffer.buffer_size):
        obs = rng.normal(size=(buffer.n_envs, 3)).astype(np.float32)
        with th.no_grad():
            actions, values, log_prob = policy(th.as_tensor(obs))
        rewards = rng.normal(size=buffer.n_envs)
        starts = rng.random(buffer.n_envs) < 0.2
        rows = actions.numpy().reshape(buffer.n_envs, -1)
        buffer.add(obs, rows, rewards, starts, values, log_prob, dist_params(policy.action_dist))
    buffer.compute_returns_and_advantage(values, starts)
    return buffer


class OtherExtractor(FlattenExtractor):
    pass


def hook(*_: Any) -> None:
    return None


# ------------------------------------------------------------------ rollouts


@pytest.mark.parametrize(("gamma", "gae_lambda"), [(0.99, 0.95), (1.0, 1.0), (0.9, 0.0)])
def test_advantages_have_the_same_bits(gamma: float, gae_lambda: float) -> None:
    policy = make_policy()
    buffer = filled(policy, n_steps=50, n_envs=3)
    NativeEngine(policy, SETTINGS).begin_rollout(buffer)
    arrays = (buffer.rewards, buffer.values, buffer.episode_starts)
    last = (np.array([0.3, -2.0, 5.0], np.float32), np.array([True, False, False]))
    expected = gae(*arrays, *last, gamma, gae_lambda)
    assert buffer.gae_fn is not gae
    for ours, theirs in zip(buffer.gae_fn(*arrays, *last, gamma, gae_lambda), expected, strict=True):
        np.testing.assert_array_equal(ours, theirs)


def test_a_buffers_own_gae_is_kept() -> None:
    buffer = make_buffer(make_policy())
    own = partial(gae)
    buffer.gae_fn = own
    NativeEngine(make_policy(), SETTINGS).begin_rollout(buffer)
    assert buffer.gae_fn is own


class TestActing:
    @pytest.mark.parametrize(("net_arch", "n_envs", "limits"), [([256, 256], 8, True), ([64, 64], 8, False)])
    def test_no_product_is_split_among_threads(
        self, net_arch: list[int], n_envs: int, limits: bool, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """BLAS's threads would spin for some 30 ms on the cores that the update needs."""
        limited = []

        @contextmanager
        def limit() -> Iterator[None]:
            limited.append(True)
            yield

        monkeypatch.setattr(native, "one_blas_thread", ProcessWide(limit))
        engine = NativeEngine(make_policy(net_arch=net_arch), SETTINGS)
        engine.begin_rollout(make_buffer(engine.policy, n_envs=n_envs))
        engine.act(np.zeros((n_envs, 3), np.float32), with_dist_params=False)
        engine.predict_values(th.zeros(n_envs, 3))
        assert limited == [True] * (2 * limits)

    def test_a_deep_copy_fills_its_own_arrays(self) -> None:
        """Kernels find arrays by addresses, which a copy would share with the original."""
        engine = NativeEngine(make_policy(), SETTINGS)
        engine.begin_rollout(make_buffer(engine.policy))
        obs = np.ones((4, 3), np.float32)
        engine.act(obs, with_dist_params=True)
        twin = copy.deepcopy(engine)
        with th.no_grad():
            for parameter in twin.policy.parameters():
                parameter += 1.0
        twin.begin_rollout(make_buffer(twin.policy))
        acted = twin.act(obs, with_dist_params=True)
        with th.no_grad():
            expected = twin.policy.predict_values(th.as_tensor(obs)).numpy()
        np.testing.assert_allclose(acted.values, expected, rtol=1e-5, atol=1e-6)

    @pytest.mark.parametrize("width", [1, 2, 4])
    def test_rows_of_another_width_are_refused(self, width: int) -> None:
        policy = make_policy()
        engine = NativeEngine(policy, SETTINGS)
        engine.begin_rollout(make_buffer(policy))
        for call in (lambda rows: engine.act(rows, with_dist_params=True), engine.predict_values):
            with pytest.raises(ValueError, match=f"`observations` must have 3 numbers per row, .* got {width}"):
                call(th.ones(4, width))

    @pytest.mark.parametrize("engine_class", [NativeEngine, FusedEngine])
    @pytest.mark.parametrize("n_envs", [1, 7])
    @pytest.mark.parametrize("actions", ACTIONS)
    def test_gives_what_the_policy_would(self, engine_class: type[Any], actions: str, n_envs: int) -> None:
        policy = make_policy(actions)
        engine = engine_class(policy, SETTINGS)
        engine.begin_rollout(make_buffer(policy, n_envs=n_envs))
        obs = th.randn(n_envs, 3)
        acted = engine.act(obs, with_dist_params=True)
        reference = AutogradEngine(policy, SETTINGS).act(obs, with_dist_params=True)
        assert acted.actions.shape == reference.actions.shape
        assert acted.actions.dtype == reference.actions.dtype
        with th.no_grad():
            taken = th.as_tensor(acted.actions)
            values, log_prob, _ = policy.evaluate_actions(obs, taken)
            params = dist_params(policy.get_distribution(obs))
        # Sums in another order, in float32
        th.testing.assert_close(acted.as_tensors()[1:], (values, log_prob, params), rtol=1e-5, atol=1e-6)
        on_array = engine.act(obs.numpy() if engine.acts_on_arrays else obs, with_dist_params=True)
        np.testing.assert_array_equal(on_array.values, acted.values)
        th.testing.assert_close(engine.predict_values(obs), values, rtol=1e-5, atol=1e-6)
        assert engine.act(obs, with_dist_params=False).dist_params is None

    @pytest.mark.parametrize("actions", ["discrete", "multi_discrete", "multi_binary"])
    def test_draws_with_the_policys_probabilities(self, actions: str) -> None:
        policy = make_policy(actions)
        engine = NativeEngine(policy, SETTINGS)
        n = 20_000
        engine.begin_rollout(make_buffer(policy, n_envs=n))
        obs = th.ones(n, 3)
        drawn = engine.act(obs, with_dist_params=False).actions.reshape(n, -1)
        with th.no_grad():
            dist = policy.get_distribution(obs[:1]).distribution
        parts = dist if isinstance(dist, list) else [dist]
        for column in range(drawn.shape[1]):
            if actions == "multi_binary":
                p = float(dist.probs[0, column])
                probs = np.array([1 - p, p])
            else:
                probs = parts[column].probs[0].numpy().astype(np.float64)
            counts = np.bincount(drawn[:, column].astype(int), minlength=len(probs))
            assert stats.chisquare(counts, n * probs / probs.sum()).pvalue > 1e-4

    def test_draws_with_the_policys_mean_and_spread(self) -> None:
        policy = make_policy("box", log_std_init=-0.5)
        engine = NativeEngine(policy, SETTINGS)
        engine.begin_rollout(make_buffer(policy, n_envs=20_000))
        obs = th.ones(20_000, 3)
        drawn = engine.act(obs, with_dist_params=False).actions
        with th.no_grad():
            dist = policy.get_distribution(obs[:1]).distribution
        standard = (drawn - dist.mean.numpy()) / dist.stddev.numpy()
        assert stats.kstest(standard[:, 0], "norm").pvalue > 1e-4
        assert abs(np.corrcoef(standard.T)[0, 1]) < 0.03

    @pytest.mark.parametrize("engine_class", [NativeEngine, FusedEngine])
    @pytest.mark.parametrize("n_envs", [1, 7, 20])
    @pytest.mark.parametrize("actions", ACTIONS)
    def test_a_seed_gives_the_actions_of_the_policy_itself(
        self, engine_class: type[Any], actions: str, n_envs: int
    ) -> None:
        policy = make_policy(actions)
        engine, buffer = engine_class(policy, SETTINGS), make_buffer(policy, n_envs=n_envs)
        observations = th.randn(9, n_envs, 3)
        taken = []
        for each in (engine, AutogradEngine(policy, SETTINGS)):
            th.manual_seed(1)
            each.begin_rollout(buffer)
            taken.append(np.stack([each.act(obs, with_dist_params=False).actions for obs in observations]))
        # Bits and classes are equal unless a random number falls within rounding of a bound; means differ by rounding.
        np.testing.assert_allclose(taken[0], taken[1], rtol=1e-5, atol=1e-6)
        assert len(np.unique(taken[0])) > 1

    @pytest.mark.parametrize("engine_class", [NativeEngine, FusedEngine])
    @pytest.mark.parametrize("actions", ["box", "discrete", "multi_discrete"])
    def test_more_environments_than_the_buffer_has_rows(self, actions: str, engine_class: type[Any]) -> None:
        policy = make_policy(actions)
        obs = th.linspace(-2, 2, 15).reshape(5, 3)
        engines = engine_class(policy, SETTINGS), AutogradEngine(policy, SETTINGS)
        taken = []
        for engine in engines:
            engine.begin_rollout(make_buffer(policy, n_envs=1))
            th.manual_seed(0)
            taken.append(engine.act(obs, with_dist_params=False).actions)
        np.testing.assert_allclose(*taken, rtol=1e-5, atol=1e-6)

    def test_torchs_seed_decides(self) -> None:
        policy = make_policy()
        engine, buffer = NativeEngine(policy, SETTINGS), make_buffer(policy)
        runs = []
        for seed in (1, 1, 2):
            th.manual_seed(seed)
            engine.begin_rollout(buffer)
            runs.append(np.stack([engine.act(th.ones(4, 3), with_dist_params=False).actions for _ in range(9)]))
        np.testing.assert_array_equal(runs[0], runs[1])
        assert not np.array_equal(runs[0], runs[2])
        assert len(np.unique(runs[0])) == runs[0].size

    def test_replaced_parameters_take_effect(self) -> None:
        policy = make_policy()
        engine = NativeEngine(policy, SETTINGS)
        engine.begin_rollout(make_buffer(policy))
        obs = th.ones(4, 3)
        for parameter in policy.parameters():
            parameter.data = parameter.data + 0.5
        with th.no_grad():
            expected = policy.predict_values(obs)
        th.testing.assert_close(engine.predict_values(obs), expected, rtol=1e-5, atol=1e-6)
        acted = engine.act(obs, with_dist_params=False).as_tensors()
        th.testing.assert_close(acted[1], expected, rtol=1e-5, atol=1e-6)
        assert acted[3] is None

    def test_parameters_replaced_by_an_environment_take_effect_in_the_next_rollout(self) -> None:
        """Until then, the memory of the replaced tensors is read, which must not be freed."""
        policy = make_policy()
        engine, buffer = NativeEngine(policy, SETTINGS), make_buffer(policy)
        engine.begin_rollout(buffer)
        written, obs = writer_for(engine, buffer, policy.action_space), np.ones((4, 3), np.float32)
        assert written is not None
        old, values = policy.predict_values(th.as_tensor(obs)), []
        for parameter in policy.parameters():
            parameter.data = parameter.data + 0.5
        for _ in range(2):
            written.act(obs)
            values.append(buffer.values[0].copy())
            engine.begin_rollout(buffer)
        new = policy.predict_values(th.as_tensor(obs))
        for got, wanted in zip(values, (old, new), strict=True):
            np.testing.assert_allclose(got, wanted.detach().numpy().ravel(), rtol=1e-5, atol=1e-6)

    @pytest.mark.parametrize("change", [th.Tensor.t, lambda tensor: tensor.clone().t()], ids=["view", "copy"])
    def test_torch_acts_with_tensors_that_kernels_cannot_read(self, change: Callable[[th.Tensor], th.Tensor]) -> None:
        policy, obs = make_policy(net_arch=[8, 8]), np.linspace(-1, 1, 12, dtype=np.float32).reshape(4, 3)
        engine, reference = NativeEngine(policy, SETTINGS), AutogradEngine(policy, SETTINGS)
        engine.begin_rollout(make_buffer(policy))
        for network in (policy.mlp_extractor.policy_net, policy.mlp_extractor.value_net):
            network[2].weight.data = change(network[2].weight.data)
        seen = []
        for each, rows in ((engine, obs), (reference, th.from_numpy(obs))):
            th.manual_seed(0)
            seen.append([*each.act(rows, with_dist_params=True)[:4], each.predict_values(th.from_numpy(obs)).numpy()])
        for ours, theirs in zip(*seen, strict=True):
            np.testing.assert_array_equal(ours, theirs)
        assert not engine.fits(make_buffer(policy))


class TestActingInGroups:
    """Many environments are divided into groups, which threads share; here 50, in groups of 16 or 17."""

    @pytest.fixture(autouse=True)
    def _small_groups(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(native, "rows_to_share", lambda _: 16)

    @pytest.mark.parametrize("in_buffer", [False, True])
    @pytest.mark.parametrize(
        ("actions", "kwargs", "n_matrices"),
        [
            ("box", {}, 0),
            ("discrete", {}, 0),
            ("multi_discrete", {}, 0),
            ("gsde", {}, 50),
            ("gsde", {}, 1),
            ("gsde", {"net_arch": [64]}, 1),  # as many rows as environments or more
        ],
    )
    def test_same_bits_on_any_number_of_threads(
        self, actions: str, kwargs: dict[str, Any], n_matrices: int, in_buffer: bool, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        used: list[int] = []

        def run_on_threads(run: Callable[[int], object], n_threads: int) -> None:
            used.append(n_threads)
            threads.run_on_threads(run, n_threads)

        monkeypatch.setattr(native, "run_on_threads", run_on_threads)
        policy, obs = make_policy(actions, **kwargs), th.randn(50, 3)
        engine, buffer = NativeEngine(policy, SETTINGS), make_buffer(policy, n_envs=50)
        reference = AutogradEngine(policy, SETTINGS)
        seen = []
        for n_threads in (0, 1, 2, 3, 8):
            engine._threads.next = lambda n=n_threads: n
            th.manual_seed(1)
            if n_matrices:
                policy.reset_noise(n_matrices)
            if n_threads == 0:
                expected = reference.act(obs, with_dist_params=True)[:4]
                continue
            engine.begin_rollout(buffer)
            if in_buffer:
                buffer.reset()
                buffer.pos = 3
                writer_for(engine, buffer, policy.action_space).act(obs.numpy())
                arrays = (buffer.actions, buffer.values, buffer.log_probs, buffer.dist_params)
                assert not any(array[[2, 4]].any() for array in arrays)
                acted = [array[3].reshape(wanted.shape) for array, wanted in zip(arrays, expected, strict=True)]
            else:
                acted = list(engine.act(obs, with_dist_params=True)[:4])
            seen.append([*acted, engine.predict_values(obs).numpy()])
        assert set(used) == {1, 2, 3}
        for arrays in seen:
            for ours, theirs in zip(arrays, [*expected, expected[1]], strict=True):
                np.testing.assert_allclose(ours, theirs, rtol=2e-5, atol=1e-5)  # sums in another order
            for ours, first in zip(arrays, seen[0], strict=True):
                np.testing.assert_array_equal(ours, first)

    @pytest.mark.parametrize("row", [0, 20, 49])
    def test_non_finite_numbers_are_found_in_any_group(self, row: int) -> None:
        engine = NativeEngine(make_policy(), SETTINGS)
        engine.begin_rollout(make_buffer(engine.policy, n_envs=50))
        obs = np.zeros((50, 3), np.float32)
        assert engine.act(obs, with_dist_params=False).is_finite is True
        obs[row, 1] = np.nan
        assert engine.act(obs, with_dist_params=False).is_finite is False


GSDE_POLICIES: dict[str, dict[str, Any]] = {
    "plain": {},
    "std per latent": {"full_std": False, "log_std_init": -1.0},
    "expln": {"use_expln": True, "log_std_init": 0.5},
    # The variance is about as large as the 1e-6 that is added to it.
    "small": {"log_std_init": -7.5},
    "no hidden layer": {"net_arch": []},
    "deep": {"net_arch": {"pi": [16, 8], "vf": []}, "activation_fn": th.nn.SiLU},
}


class TestActingWithGSDE:
    @pytest.mark.parametrize("n_envs", [1, 5])
    @pytest.mark.parametrize("n_matrices", [1, 3, 5])
    @pytest.mark.parametrize("kwargs", GSDE_POLICIES.values(), ids=GSDE_POLICIES)
    def test_gives_what_the_policy_gives(self, kwargs: dict[str, Any], n_matrices: int, n_envs: int) -> None:
        """With one matrix for each environment, and with one for all where there are more or fewer."""
        policy = make_policy("gsde", **kwargs)
        engine = NativeEngine(policy, SETTINGS)
        reference = AutogradEngine(policy, SETTINGS)
        engine.begin_rollout(make_buffer(policy, n_envs=n_envs))
        obs = th.randn(n_envs, 3)
        seen = []
        for _ in range(2):
            policy.reset_noise(n_matrices)
            ours, theirs = (each.act(obs, with_dist_params=True) for each in (engine, reference))
            # Sums in another order, in float32
            np.testing.assert_allclose(ours.actions, theirs.actions, rtol=1e-5, atol=1e-6)
            th.testing.assert_close(ours.values, theirs.values, rtol=1e-5, atol=1e-6)
            th.testing.assert_close(ours.log_prob, theirs.log_prob, rtol=1e-5, atol=1e-5)
            th.testing.assert_close(ours.dist_params, theirs.dist_params, rtol=1e-5, atol=1e-6)
            seen.append(ours.actions)
        # New matrices count at once
        assert np.abs(seen[0] - seen[1]).min() > 1e-6

    def test_the_same_state_gets_the_same_noise(self) -> None:
        policy = make_policy("gsde")
        engine = NativeEngine(policy, SETTINGS)
        engine.begin_rollout(make_buffer(policy))
        policy.reset_noise(4)
        random_state = th.get_rng_state()
        first, second = (engine.act(th.ones(4, 3), with_dist_params=False).actions for _ in range(2))
        np.testing.assert_array_equal(first, second)
        assert len(np.unique(first[:, 0])) == 4
        assert th.equal(th.get_rng_state(), random_state)

    def test_matrices_of_another_size_are_refused(self) -> None:
        policy = make_policy("gsde")
        engine = NativeEngine(policy, SETTINGS)
        policy.action_dist.exploration_mat = th.zeros(3, 2)
        with pytest.raises(ValueError, match="cannot reshape array of size 6"):
            engine.act(th.ones(4, 3), with_dist_params=False)

    @pytest.mark.parametrize("n_envs", [1, 3])
    def test_rollouts_are_those_of_the_autograd_engine(self, n_envs: int) -> None:
        """Same seed, same matrices: the only random numbers of a rollout."""
        rollouts = []
        for engine in ("autograd", "native"):
            env = make_vec_env("Pendulum-v1", n_envs=n_envs, seed=0)
            kwargs: dict[str, Any] = {"use_sde": True, "sde_sample_freq": 4, "kl_coef": 1.0, "seed": 0}
            kwargs |= {"clip_range": "lin_0.2", "clip_range_vf": 1.0, "device": "cpu"}
            model = ClipPPO("MlpPolicy", env, n_steps=16, batch_size=16, n_epochs=2, engine=engine, **kwargs)
            model.learn(32 * n_envs)
            assert model._engine is not None
            assert model._engine.name == engine
            rollouts.append(model.rollout_buffer)
        for name in ("observations", "actions", "log_probs", "values", "advantages", "dist_params"):
            ours, theirs = getattr(rollouts[1], name), getattr(rollouts[0], name)
            # The second rollout's: pendulums and two minibatches' steps carry float32 rounding on
            np.testing.assert_allclose(ours, theirs, rtol=1e-3, atol=1e-4, err_msg=name)


# ------------------------------------------------------------------ updates


def test_permutations_are_those_of_the_buffer_in_half_of_the_memory() -> None:
    np.random.seed(3)
    drawn = native._permutations(4, 1000)
    np.random.seed(3)
    np.testing.assert_array_equal(drawn, [np.random.permutation(1000) for _ in range(4)])
    assert drawn.nbytes == 4 * 4 * 1000


class TestUpdate:
    @pytest.mark.filterwarnings("ignore:You have specified a mini-batch size")
    @pytest.mark.parametrize(("actions", "form"), kernel_cases.PAIRS)
    def test_every_number_of_threads_gives_the_same_bits(
        self, actions: str, form: str, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """One group of rows on two threads, which share no sum; several groups, which must be added in order."""
        whole, divided = set(), set()
        all_numbers = (actions, form) == ("wide_box", "both")
        for n_threads in (1, 2, 3) if all_numbers else (1, 2):
            kernel_cases.run_on(monkeypatch, n_threads)
            whole.add(kernel_cases.digest("native", actions, form))
        for n_threads in (1, 2, 3, 8) if all_numbers else (1, 3):
            kernel_cases.divide(monkeypatch, n_threads)
            divided.add(kernel_cases.digest("native", actions, form))
        assert len(whole) == len(divided) == 1
        assert whole != divided, "the sums of groups and blocks are not rounded as one sum"

    @pytest.mark.parametrize("n_threads", [1, 2, 3])
    def test_an_update_left_early_draws_no_further_permutation(self, n_threads: int) -> None:
        states = []
        for engine_class in (AutogradEngine, NativeEngine):
            policy = make_policy()
            buffer = filled(policy)
            engine = engine_class(policy, dataclasses.replace(SETTINGS, target_kl=1e-5, n_epochs=20))
            if isinstance(engine, NativeEngine):
                engine._threads.next = lambda n_threads=n_threads: n_threads  # type: ignore[method-assign]
            np.random.seed(0)
            statistics = engine.update(buffer, COEFFICIENTS)
            assert statistics.stopped_at_kl is not None
            assert 1 <= statistics.n_epochs < 20
            states.append((statistics.n_epochs, np.random.random()))
        assert states[0] == states[1]

    def test_gradients_are_left_where_torch_leaves_them(self) -> None:
        gradients = []
        for engine_class in (AutogradEngine, NativeEngine):
            policy = make_policy()
            np.random.seed(0)
            engine_class(policy, dataclasses.replace(SETTINGS, n_epochs=1)).update(filled(policy), COEFFICIENTS)
            gradients.append([parameter.grad for parameter in policy.parameters()])
        for ours, theirs in zip(*gradients, strict=True):
            th.testing.assert_close(ours, theirs, rtol=1e-3, atol=1e-6)

    @pytest.mark.parametrize("actions", ["box", "gsde"])
    def test_gradients_agree_with_double_precision(self, actions: str) -> None:
        policy = make_policy(actions, net_arch=[16, 16])
        if actions == "gsde":
            with th.no_grad():
                # Copies are not made of matrices that have a gradient.
                policy.reset_noise()
        buffer = filled(policy)
        with th.no_grad():
            for parameter in policy.parameters():
                parameter += 0.05 * th.randn(parameter.shape)
        double = copy.deepcopy(policy).double()
        settings = dataclasses.replace(SETTINGS, n_epochs=1, batch_size=32, max_grad_norm=1e9)
        batch = next(buffer.get(32))
        batch = batch._replace(**{name: getattr(batch, name).double() for name in batch._fields})
        double.obs_to_tensor = None  # type: ignore[assignment]
        double.extract_features = lambda obs, *_: obs  # type: ignore[method-assign]
        reference = AutogradUpdate(double, settings, COEFFICIENTS, buffer)
        reference.loss(batch, measure_kl=True)
        reference.backward()
        NativeEngine(policy, settings).update(buffer, COEFFICIENTS)
        for ours, exact in zip(policy.parameters(), double.parameters(), strict=True):
            # Float32 sums over 32 rows
            th.testing.assert_close(ours.grad, exact.grad.float(), rtol=1e-4, atol=1e-6)

    def test_replaced_moments_take_effect(self) -> None:
        """optimizer.load_state_dict replaces them."""
        policies = [make_policy() for _ in range(2)]
        buffer = filled(policies[0])
        engines = [AutogradEngine(policies[0], SETTINGS), NativeEngine(policies[1], SETTINGS)]
        for policy, engine in zip(policies, engines, strict=True):
            for _ in range(2):
                np.random.seed(0)
                engine.update(buffer, COEFFICIENTS)
                policy.optimizer.load_state_dict(copy.deepcopy(policy.optimizer.state_dict()))
        for ours, theirs in zip(*(policy.parameters() for policy in policies), strict=True):
            th.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5)
        assert policies[1].optimizer.state_dict()["state"][0]["step"] == 12

    @pytest.mark.parametrize("name", ["weight", "exp_avg"])
    def test_a_square_that_was_transposed_no_longer_fits(self, name: str) -> None:
        """Its address, size and shape stay."""
        policy = make_policy(net_arch=[8, 8])
        engine, buffer = NativeEngine(policy, SETTINGS), filled(policy)
        assert engine.fits(buffer)
        weight = policy.mlp_extractor.policy_net[2].weight
        tensor = {"weight": weight, **policy.optimizer.state[weight]}[name]
        tensor.data = tensor.data.t()
        assert not engine.fits(buffer)

    def test_a_grown_layer_gets_gradients_of_its_shape(self) -> None:
        policies = [make_policy() for _ in range(2)]
        buffer = filled(policies[0])
        for policy, engine_class in zip(policies, (AutogradEngine, NativeEngine), strict=True):
            engine = engine_class(policy, SETTINGS)
            hidden, head = policy.mlp_extractor.value_net[0], policy.value_net
            hidden.out_features = head.in_features = 16
            hidden.weight.data, hidden.bias.data = hidden.weight.data.repeat(2, 1), hidden.bias.data.repeat(2)
            head.weight.data = head.weight.data.repeat(1, 2) / 2
            policy.optimizer = th.optim.Adam(policy.parameters(), lr=3e-3)
            np.random.seed(0)
            engine.update(buffer, COEFFICIENTS)
        for ours, theirs in zip(*(policy.parameters() for policy in policies), strict=True):
            assert ours.grad.shape == ours.shape
            th.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5)

    def test_an_emptied_optimizer_state_starts_from_zero(self) -> None:
        """set_parameters empties it with what get_parameters returned before the first update."""
        policies = [make_policy() for _ in range(2)]
        buffer = filled(policies[0])
        for policy, engine_class in zip(policies, (AutogradEngine, NativeEngine), strict=True):
            engine = engine_class(policy, SETTINGS)
            for _ in range(2):
                policy.optimizer.state.clear()
                np.random.seed(0)
                assert engine.fits(buffer)
                engine.update(buffer, COEFFICIENTS)
        for ours, theirs in zip(*(policy.parameters() for policy in policies), strict=True):
            th.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5)
        assert policies[1].optimizer.state_dict()["state"][0]["step"] == 6

    @pytest.mark.parametrize("engine_class", [NativeEngine, FusedEngine])
    @pytest.mark.parametrize(("actions", "stored"), [("discrete", 3), ("discrete", -1), ("multi_discrete", 2)])
    def test_actions_that_the_policy_does_not_have_are_refused(
        self, engine_class: type[Any], actions: str, stored: int
    ) -> None:
        """Kernels would read and write beyond the row."""
        policy = make_policy(actions)
        buffer = filled(policy)
        buffer.actions[3, 1, 0] = stored
        before = copy.deepcopy(policy.state_dict())
        settings = dataclasses.replace(SETTINGS, batch_size=32)
        with pytest.raises(ValueError, match=r"`rollout_buffer.actions` must be from 0 to below .* got \["):
            engine_class(policy, settings).update(buffer, COEFFICIENTS)
        assert all(th.equal(tensor, before[name]) for name, tensor in policy.state_dict().items())

    def test_an_update_that_was_refused_draws_as_many_permutations_as_the_reference(self) -> None:
        draws = []
        for engine_class in (AutogradEngine, FusedEngine, NativeEngine):
            policy = make_policy()
            buffer = filled(policy)
            buffer.returns[:] = np.nan
            np.random.seed(0)
            with pytest.raises(BadMinibatchError):
                engine_class(policy, SETTINGS).update(buffer, COEFFICIENTS)
            draws.append(np.random.random())
        assert draws[1:] == draws[:1] * 2

    @pytest.mark.parametrize("n_threads", [2, 3])
    def test_ctrl_c_before_its_own_part_frees_the_other_threads(
        self, n_threads: int, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """Otherwise they wait at the barrier for ever, and so does the end of the process."""
        policy = make_policy()
        buffer = filled(policy)
        engine = NativeEngine(policy, SETTINGS)
        engine._threads.next = lambda: n_threads  # type: ignore[method-assign]
        run_update = entry.run_update

        def interrupted(rank: int, *arguments: Any) -> Any:
            if rank == 0:
                raise KeyboardInterrupt
            return run_update(rank, *arguments)

        before = copy.deepcopy(policy.state_dict())
        monkeypatch.setattr(entry, "run_update", interrupted)
        with pytest.raises(KeyboardInterrupt):
            engine.update(buffer, COEFFICIENTS)
        assert all(th.equal(tensor, before[name]) for name, tensor in policy.state_dict().items())
        monkeypatch.undo()
        engine._threads.next = lambda: n_threads  # type: ignore[method-assign]
        assert engine.update(buffer, COEFFICIENTS).n_epochs == 3

    @pytest.mark.parametrize("n_threads", [1, 2])
    def test_ctrl_c_leaves_the_optimizer_with_the_steps_made(
        self, n_threads: int, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """In a short update, Python raises it when the kernel returns, after all steps."""
        policy = make_policy()
        buffer = filled(policy)
        engine = NativeEngine(policy, SETTINGS)
        kernel_cases.run_on(monkeypatch, n_threads)
        run_update = entry.run_update

        def interrupted(rank: int, *arguments: Any) -> None:
            run_update(rank, *arguments)
            if rank == 0:
                raise KeyboardInterrupt

        monkeypatch.setattr(entry, "run_update", interrupted)
        with pytest.raises(KeyboardInterrupt):
            engine.update(buffer, COEFFICIENTS)
        assert {float(state["step"]) for state in policy.optimizer.state.values()} == {6.0}

    @pytest.mark.parametrize("n_threads", [1, 2, 3])
    def test_ctrl_c_ends_a_long_update_at_a_step(self, n_threads: int, monkeypatch: pytest.MonkeyPatch) -> None:
        """All threads end before the same step, so that parameters and moments are those of a shorter update."""
        kernel_cases.divide(monkeypatch, n_threads)
        n_epochs, run_update, policies = 50_000, entry.run_update, [make_policy(), make_policy()]
        buffer = filled(policies[0])
        settings = dataclasses.replace(SETTINGS, batch_size=32, n_epochs=n_epochs)

        def watched(rank: int, *arguments: Any) -> Any:
            totals = arguments[-2].totals

            def send() -> None:
                while totals[TOTAL.n_steps] < 5:
                    time.sleep(1e-4)
                os.kill(os.getpid(), signal.SIGINT)

            if rank == 0:
                threading.Thread(target=send).start()
            return run_update(rank, *arguments)

        with monkeypatch.context() as patch:
            patch.setattr(division, "LONG_WORK", 0)
            patch.setattr(entry, "run_update", watched)
            np.random.seed(0)
            with pytest.raises(KeyboardInterrupt):
                NativeEngine(policies[0], settings).update(buffer, COEFFICIENTS)
        (n_steps,) = {int(state["step"]) for state in policies[0].optimizer.state.values()}
        assert 5 <= n_steps < n_epochs
        np.random.seed(0)
        settings = dataclasses.replace(settings, n_epochs=n_steps)
        NativeEngine(policies[1], settings).update(buffer, COEFFICIENTS)
        for ours, theirs in zip(*(policy.parameters() for policy in policies), strict=True):
            assert th.equal(ours, theirs)
            moments = (policy.optimizer.state[p] for policy, p in zip(policies, (ours, theirs), strict=True))
            assert len({state["exp_avg_sq"].numpy().tobytes() for state in moments}) == 1

    @pytest.mark.parametrize("is_long", [False, True])
    def test_only_a_long_update_leaves_the_main_thread_to_signals(
        self, is_long: bool, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        policy, run_update, found = make_policy(), entry.run_update, []

        def spy(*arguments: Any) -> Any:
            found.append(threading.current_thread() is not threading.main_thread())
            return run_update(*arguments)

        kernel_cases.run_on(monkeypatch, 1)
        monkeypatch.setattr(DividedPolicy, "is_long", lambda *_: is_long)
        monkeypatch.setattr(entry, "run_update", spy)
        NativeEngine(policy, SETTINGS).update(filled(policy), COEFFICIENTS)
        assert found == [is_long]

    @pytest.mark.parametrize("n_threads", [1, 2])
    def test_ctrl_c_ends_the_measurement_of_the_kl(self, n_threads: int, monkeypatch: pytest.MonkeyPatch) -> None:
        kernel_cases.divide(monkeypatch, n_threads)
        policy, kl_of_rollout, calls = make_policy(), entry.kl_of_rollout, []

        def interrupted(*arguments: Any) -> Any:
            result = kl_of_rollout(*arguments)
            calls.append(arguments)
            if threading.current_thread() is threading.main_thread():
                raise KeyboardInterrupt
            return result

        monkeypatch.setattr(entry, "kl_of_rollout", interrupted)
        settings = dataclasses.replace(SETTINGS, measure_kl_after=True)
        with pytest.raises(KeyboardInterrupt):
            NativeEngine(policy, settings).update(filled(policy, n_steps=70), COEFFICIENTS)
        n_chunks = len(calls[0][-1])
        assert n_chunks == 40
        # Each call is one chunk. The other thread may have done its half in the meantime.
        assert {n for _, n, *_ in calls} == {n_chunks}
        assert 1 <= len(calls) <= (1 if n_threads == 1 else 1 + n_chunks // 2)

    @pytest.mark.parametrize("n_threads", [1, 2, 3])
    def test_updates_in_several_threads_of_one_process(self, n_threads: int, monkeypatch: pytest.MonkeyPatch) -> None:
        """Each has its own policy; they share numba's kernels, BLAS and the threads of updates."""
        kernel_cases.divide(monkeypatch, n_threads)
        policies = [make_policy() for _ in range(4)]
        buffer = filled(policies[0])
        engines = [NativeEngine(policy, SETTINGS) for policy in policies]
        permutation = np.arange(32)
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(np.random, "permutation", lambda _: permutation)
            threads = [
                threading.Thread(target=lambda engine=engine: [engine.update(buffer, COEFFICIENTS) for _ in range(20)])
                for engine in engines
            ]
            for thread in threads:
                thread.start()
            for thread in threads:
                thread.join(60)
        for policy in policies[1:]:
            for ours, first in zip(policy.parameters(), policies[0].parameters(), strict=True):
                assert th.equal(ours, first)


# ------------------------------------------------------------------ in training


def make_model(engine: str = "auto", **kwargs: Any) -> ClipPPO:
    env = make_vec_env("CartPole-v1", n_envs=2, seed=0)
    arguments = {"n_steps": 32, "batch_size": 16, "n_epochs": 2, "seed": 0, "device": "cpu", "engine": engine}
    arguments |= {"clip_range": "lin_0.2", "clip_range_vf": 1.0}
    return ClipPPO("MlpPolicy", env, **{**arguments, **kwargs})


class Change(BaseCallback):
    """Changes the model at the end of the first rollout, and again in the middle of the second one."""

    def __init__(self, change: Callable[[ClipPPO], object]) -> None:
        super().__init__()
        self.change = change

    def _on_step(self) -> bool:
        if self.num_timesteps == 96:
            self.change(self.model)  # type: ignore[arg-type]
        return True


class TestTraining:
    def test_auto_selects_native_and_logs_it(self, capsys: pytest.CaptureFixture[str]) -> None:
        make_model(verbose=1).learn(64)
        assert "Training runs on the engine 'native': it is the fastest for this policy" in capsys.readouterr().out

    def test_a_policy_that_native_can_no_longer_run_continues_on_autograd(
        self, caplog: pytest.LogCaptureFixture
    ) -> None:
        def freeze(model: ClipPPO) -> None:
            model.policy.action_net.bias.requires_grad_(False)

        model = make_model()
        with caplog.at_level(logging.INFO, "sb3_clipvf"):
            model.learn(128, callback=Change(freeze))
        assert "'autograd': native cannot run the policy (some of its parameters are frozen)" in caplog.text
        assert model._n_updates == 4

    def test_tensors_frozen_and_replaced_in_a_rollout_continue_on_autograd(self) -> None:
        def replace(model: ClipPPO) -> None:
            bias = model.policy.action_net.bias
            bias.requires_grad_(False)
            bias.data = th.tensor([1e4, -1e4])

        model = make_model()
        model.learn(128, callback=Change(replace))
        assert (model.rollout_buffer.actions[17:] == 0).all()
        assert model._engine is not None
        assert model._engine.name == "autograd"
        assert model.policy.action_net.bias.tolist() == [1e4, -1e4]

    def test_tensors_that_kernels_cannot_read_continue_on_autograd(self) -> None:
        def transpose(model: ClipPPO) -> None:
            weight = model.policy.mlp_extractor.policy_net[2].weight
            weight.data = weight.data.t()

        models = [make_model(engine).learn(128, callback=Change(transpose)) for engine in ("auto", "autograd")]
        assert type(models[0]._engine) is AutogradEngine
        np.testing.assert_array_equal(*(model.rollout_buffer.actions for model in models))
        for ours, theirs in zip(*(model.policy.parameters() for model in models), strict=True):
            # Rounding differs in the first update, whose first steps of 3e-4 divide gradients by their own size.
            th.testing.assert_close(ours, theirs, rtol=1e-4, atol=3e-5)

    def test_auto_returns_to_fused_when_the_reason_is_gone(self) -> None:
        model = make_model(policy_kwargs={"features_extractor_class": OtherExtractor})
        handle = model.policy.optimizer.register_step_pre_hook(hook)
        model.learn(64)
        assert type(model._engine) is AutogradEngine
        handle.remove()
        model.learn(64)
        assert type(model._engine) is FusedEngine

    def test_auto_returns_to_native_when_the_reason_is_gone(self) -> None:
        def freeze(model: ClipPPO) -> None:
            model.policy.action_net.bias.requires_grad_(False)

        model = make_model()
        model.learn(128, callback=Change(freeze))
        assert model._engine is not None
        assert model._engine.name == "autograd"
        model.policy.action_net.bias.requires_grad_(True)
        # The frozen bias made fewer steps than the others: Adam's state must be whole again, too.
        model.policy.optimizer = th.optim.Adam(model.policy.parameters(), lr=3e-4, eps=1e-5)
        model.learn(64, reset_num_timesteps=False)
        assert model._engine.name == "native"

    def test_the_engine_can_be_changed_between_calls_of_learn(self) -> None:
        model = make_model()
        for engine in ("native", "fused", "autograd", "native"):
            model.engine = engine
            model.learn(64)
            assert model._engine is not None
            assert model._engine.name == engine

    def test_an_explicit_engine_that_can_no_longer_run_the_policy_raises(self) -> None:
        def freeze(model: ClipPPO) -> None:
            model.policy.action_net.bias.requires_grad_(False)

        with pytest.raises(ValueError, match="got 'native', which cannot: some of its parameters are frozen"):
            make_model("native").learn(128, callback=Change(freeze))

    def test_parameters_changed_by_a_callback_take_effect_at_once(self) -> None:
        """Parameters set in the middle of a rollout decide the actions from there on."""

        def set_bias(model: ClipPPO) -> None:
            with th.no_grad():
                model.policy.action_net.bias.copy_(th.tensor([1e4, -1e4]))

        model = make_model()
        model.learn(128, callback=Change(set_bias))
        # 32 steps a rollout of 2 environments: the change comes after step 16 of the second one.
        assert len(np.unique(model.rollout_buffer.actions[:16])) == 2
        assert (model.rollout_buffer.actions[17:] == 0).all()

    @pytest.mark.parametrize("event", ["_on_rollout_start", "_on_rollout_end"])
    def test_a_layer_replaced_between_rollout_and_update_is_trained(
        self, event: str, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """The engine checks the policy before each rollout and each update."""

        class Replace(BaseCallback):
            def _on_step(self) -> bool:
                return True

        def replace(self: Replace) -> None:
            if self.num_timesteps == 64:
                policy = self.model.policy
                policy.action_net = th.nn.Linear(64, 2)  # type: ignore[assignment]
                th.nn.init.zeros_(policy.action_net.weight)  # type: ignore[arg-type]
                policy.action_net.bias.data = th.tensor([40.0, -40.0])  # type: ignore[union-attr]
                policy.optimizer = th.optim.Adam(policy.parameters(), lr=0.1, eps=1e-5)
                replaced.append(policy.action_net)

        replaced: list[Any] = []
        monkeypatch.setattr(Replace, event, replace)
        model = make_model(learning_rate=0.1)
        model.learn(128, callback=Replace())
        assert model._engine is not None
        assert model._engine.name == "native"
        assert model.policy.action_net is replaced[0]
        assert replaced[0].weight.abs().sum() > 0, "the update did not reach the new layer"
        if event == "_on_rollout_start":
            assert (model.rollout_buffer.actions == 0).all()

    def test_the_training_mode_is_on_only_in_updates(self) -> None:
        class Spy(BaseCallback):
            def _on_rollout_end(self) -> None:
                modes.append({module.training for module in self.model.policy.modules()})

            def _on_step(self) -> bool:
                modes.append({module.training for module in self.model.policy.modules()})
                return True

        modes: list[set[bool]] = []
        model = make_model()
        model.learn(192, callback=Spy())
        assert all(mode == {False} for mode in modes)
        assert {module.training for module in model.policy.modules()} == {True}

    def test_the_training_mode_reaches_modules_added_later(self) -> None:
        modes: list[bool] = []

        class Spy(BaseCallback):
            def _on_step(self) -> bool:
                modes.append(dropout.training)
                return True

        model = make_model()
        model.learn(64)
        dropout = th.nn.Dropout()
        model.policy.mlp_extractor.policy_net.append(dropout)
        model.learn(64, callback=Spy(), reset_num_timesteps=False)
        assert set(modes) == {False}

    @pytest.mark.parametrize("engines", [("native", "autograd"), ("autograd", "native"), ("fused", "native")])
    def test_saved_on_one_engine_and_loaded_on_the_other(self, engines: tuple[str, str], tmp_path: Path) -> None:
        """The next update of both from the same rollout is the same: moments and step count were saved."""
        model = make_model(engines[0], clip_range=0.2)
        model.learn(192)
        model.save(tmp_path / "model")
        loaded = ClipPPO.load(tmp_path / "model", env=model.get_env(), engine=engines[1], device="cpu")
        loaded.set_logger(model.logger)
        loaded.rollout_buffer = model.rollout_buffer
        loaded._current_progress_remaining = model._current_progress_remaining
        for each in (model, loaded):
            np.random.seed(3)
            each.train()
        assert [each._engine.name for each in (model, loaded) if each._engine] == list(engines)
        for ours, theirs in zip(loaded.policy.parameters(), model.policy.parameters(), strict=True):
            th.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5)

    def test_the_saved_file_is_as_small_as_the_autograd_engines(self, tmp_path: Path) -> None:
        sizes = []
        for engine in ("native", "autograd"):
            model = make_model(engine)
            model.learn(64)
            model.save(tmp_path / engine)
            sizes.append((tmp_path / f"{engine}.zip").stat().st_size)
        assert sizes[0] == pytest.approx(sizes[1], rel=0.01)

    def test_same_seed_same_weights(self) -> None:
        weights = []
        for _ in range(2):
            model = make_model()
            model.learn(256)
            weights.append(model.policy.state_dict())
        for name, tensor in weights[0].items():
            assert th.equal(tensor, weights[1][name]), name
