"""Non-finite values, across modules: where they are found, the error, the file written, and what is unchanged."""

import copy
import dataclasses
import logging
import math
import pickle
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import gymnasium as gym
import numpy as np
import pytest
import torch as th
from gymnasium import spaces
from kernel_cases import divide
from stable_baselines3 import PPO
from stable_baselines3.common.buffers import RolloutBuffer
from stable_baselines3.common.callbacks import BaseCallback
from stable_baselines3.common.logger import configure
from stable_baselines3.common.policies import ActorCriticPolicy
from stable_baselines3.common.torch_layers import CombinedExtractor, FlattenExtractor
from stable_baselines3.common.vec_env import DummyVecEnv, VecNormalize
from test_engines import COEFFICIENTS, N_ENVS, N_STEPS, make_case, make_engine, settings_for

from sb3_clipvf import SB3_EQUIVALENT, ClipPPO, NonFiniteError
from sb3_clipvf.checkpoint import TrainingCheckpoint, newest_checkpoint
from sb3_clipvf.common.nonfinite import FLOAT32_MAX, MAX_UPDATES_WITH_SKIPS, BadMinibatchError, is_finite
from sb3_clipvf.engines.autograd import AutogradEngine, _Snapshot
from sb3_clipvf.engines.native import NativeEngine
from sb3_clipvf.guards.diagnosis import reward_fault

# "gpu": the autograd engine as it runs on devices where reading a number is slow. "divided": native with several groups
# of rows, and blocks, on three threads.
ENGINES = ["autograd", "gpu", "fused", "native", "two_threads", "divided", "static"]
BATCH = 10


class TestIsFinite:
    @pytest.mark.parametrize("shape", [(1,), (3, 1), (4, 5), (40,), (3, 20)])
    @pytest.mark.parametrize("dtype", [np.float16, np.float32, np.float64])
    def test_one_bad_number_is_enough(self, shape: tuple[int, ...], dtype: Any) -> None:
        array = np.full(shape, -2, dtype)
        assert is_finite(array)
        for bad in (np.nan, np.inf, -np.inf):
            array.flat[-1] = bad
            assert not is_finite(array)

    def test_what_float32_cannot_hold_is_infinite(self) -> None:
        assert is_finite(np.array([FLOAT32_MAX, -FLOAT32_MAX]))
        assert is_finite(np.full(40, FLOAT32_MAX, np.float32))
        assert not is_finite(np.array([1e39, -1e39]))

    def test_integers_are_finite(self) -> None:
        assert is_finite(np.array([2**62]))
        assert is_finite(np.zeros(0, np.float32))


# ------------------------------------------------------------------ updates, engine by engine


def spoil(buffer: Any, fault: str) -> None:
    """Make the transition of environment 1 at step 2 non-finite."""
    if fault == "advantage":
        buffer.advantages[2, 1] = np.nan
    elif fault == "return":
        buffer.returns[2, 1] = -np.inf
    elif fault == "ratio, bad action":  # infinite, and so is the loss
        buffer.log_probs[2, 1] -= 200
        buffer.advantages[2, 1] = -100
    elif fault == "ratio, good action":  # the clipped loss is finite, but not its gradient: 0 times infinity
        buffer.log_probs[2, 1] -= 200
        buffer.advantages[2, 1] = 100
    elif fault == "old KL":
        buffer.dist_params[2, 1] = np.nan
    else:  # finite, but the square of its gradient's norm is not
        buffer.returns[2, 1] = 1.5e19


WHAT = {
    "advantage": "policy_loss",
    "return": "value_loss",
    "ratio, bad action": "policy_loss",
    "ratio, good action": "grad_norm",
    "old KL": "kl",
    "gradient": "grad_norm",
}
WEIGHTS = dataclasses.replace(COEFFICIENTS, vf_coef=10.0)


def state_of(policy: Any) -> dict[str, Any]:
    """Return the weights, and the optimizer's moments and steps."""
    moments = {f"{n} {key}": value for n, s in enumerate(policy.optimizer.state.values()) for key, value in s.items()}
    return copy.deepcopy({**policy.state_dict(), **moments})


def equal(first: dict[str, Any], second: dict[str, Any]) -> bool:
    return first.keys() == second.keys() and all(th.equal(first[name], second[name]) for name in first)


@pytest.fixture
def name(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """One of ENGINES."""
    if request.param == "divided":
        divide(monkeypatch, n_threads=3)
    return str(request.param)


def engine_for(name: str, policy: Any, buffer: Any, **changes: Any) -> Any:
    kind = {"gpu": "autograd", "two_threads": "native", "divided": "native"}.get(name, name)
    engine = make_engine(kind, policy, settings_for("box", **{"batch_size": BATCH, **changes}), buffer)
    if name == "gpu":
        engine._reads_are_cheap = lambda: False  # type: ignore[attr-defined,union-attr]
    if name == "two_threads":
        engine._threads.next = lambda: 2  # type: ignore[attr-defined,union-attr]
    return engine


def drawn_in(minibatch: int, monkeypatch: pytest.MonkeyPatch) -> np.ndarray:
    """Draw permutations in which the spoilt transition is in this minibatch, and return one."""
    order = np.roll(np.arange(N_STEPS * N_ENVS), -(1 * N_STEPS + 2) + minibatch * BATCH + 3)
    monkeypatch.setattr(np.random, "permutation", lambda _: order)
    return order


@pytest.mark.parametrize("name", ENGINES, indirect=True)
class TestUpdate:
    @pytest.mark.parametrize("fault", WHAT)
    def test_a_bad_minibatch_makes_no_step(self, name: str, fault: str, monkeypatch: pytest.MonkeyPatch) -> None:
        policy, buffer = make_case("box")
        engine = engine_for(name, policy, buffer, n_epochs=1)
        engine.update(buffer, WEIGHTS)  # so that there are moments
        spoil(buffer, fault)
        before = state_of(policy)
        order = drawn_in(0, monkeypatch)
        with pytest.raises(BadMinibatchError) as caught:
            engine.update(buffer, WEIGHTS)
        assert equal(state_of(policy), before)
        bad = caught.value
        assert (bad.what, bad.epoch, bad.minibatch) == (WHAT[fault], 0, 0)
        assert not abs(bad.terms[bad.what]) <= FLOAT32_MAX
        assert th.equal(bad.batch.observations, buffer._get_samples(order[:BATCH]).observations)

    @pytest.mark.parametrize("fault", WHAT)
    def test_skipping_does_not_change_the_others(self, name: str, fault: str, monkeypatch: pytest.MonkeyPatch) -> None:
        """The same bits as if the minibatch had not been drawn."""
        results = []
        for is_whole in (True, False):
            policy, buffer = make_case("box")
            spoil(buffer, fault)
            order = drawn_in(1, monkeypatch)
            if not is_whole:
                buffer = without(buffer, order[BATCH : 2 * BATCH])
                kept = np.concatenate([order[:BATCH], order[2 * BATCH :]])
                places = {int(index): place for place, index in enumerate(np.sort(kept))}
                monkeypatch.setattr(
                    np.random, "permutation", lambda _, kept=kept, places=places: np.array([places[i] for i in kept])
                )
            # The KL after the update would be measured over other transitions.
            engine = engine_for(name, policy, buffer, on_nonfinite="skip", measure_kl_after=False)
            statistics = engine.update(buffer, WEIGHTS)
            assert statistics.n_skipped == (2 if is_whole else 0)  # one in each epoch
            assert (statistics.skipped is not None) == is_whole
            results.append((state_of(policy), statistics.read()))
        assert equal(results[0][0], results[1][0])
        assert results[0][1] == results[1][1]
        assert all(math.isfinite(number) for number in results[0][1].values())

    def test_an_update_of_bad_minibatches_alone_raises(self, name: str) -> None:
        policy, buffer = make_case("box")
        buffer.advantages[:] = np.inf
        before = copy.deepcopy(policy.state_dict())
        with pytest.raises(BadMinibatchError, match="`policy_loss` must be finite, got nan"):
            engine_for(name, policy, buffer, on_nonfinite="skip").update(buffer, COEFFICIENTS)
        assert equal(policy.state_dict(), before)

    def test_a_bad_last_epoch_leaves_its_statistics_without_a_number(
        self, name: str, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        policy, buffer = make_case("box")
        engine = engine_for(name, policy, buffer, n_epochs=2, batch_size=30, on_nonfinite="skip")
        # One huge step, after which all numbers are too large
        policy.optimizer.param_groups[0]["lr"] = 1e30
        numbers = engine.update(buffer, COEFFICIENTS).read()
        assert math.isnan(numbers["approx_kl"])
        assert "kl" not in numbers
        assert math.isfinite(numbers["loss"])

    def test_a_bad_loss_comes_before_target_kl(self, name: str) -> None:
        policy, buffer = make_case("box")
        spoil(buffer, "ratio, bad action")
        engine = engine_for(name, policy, buffer, batch_size=30, target_kl=1e-6)
        with pytest.raises(BadMinibatchError):
            engine.update(buffer, dataclasses.replace(COEFFICIENTS, kl_coef=0.0))

    def test_an_infinite_ratio_of_a_good_action_is_stopped_by_target_kl(self, name: str) -> None:
        policy, buffer = make_case("box")
        spoil(buffer, "ratio, good action")
        engine = engine_for(name, policy, buffer, batch_size=30, target_kl=1e-6)
        statistics = engine.update(buffer, dataclasses.replace(COEFFICIENTS, kl_coef=0.0))
        assert statistics.stopped_at_kl == math.inf
        assert statistics.n_skipped == 0

    def test_a_kl_that_is_only_measured_may_be_infinite(self, name: str) -> None:
        policy, buffer = make_case("box")
        buffer.dist_params[2, 1] = np.inf
        engine = engine_for(name, policy, buffer, measure_kl_after=False)
        numbers = engine.update(buffer, dataclasses.replace(COEFFICIENTS, kl_coef=0.0)).read()
        assert not math.isfinite(numbers["kl"])
        assert math.isfinite(numbers["loss"])

    def test_advantages_without_spread_become_zero(self, name: str) -> None:
        policy, buffer = make_case("box")
        buffer.advantages[:] = 3.0
        numbers = engine_for(name, policy, buffer).update(buffer, COEFFICIENTS).read()
        assert abs(numbers["policy_gradient_loss"]) < 1e-6
        assert all(math.isfinite(number) for number in numbers.values())

    def test_a_large_ratio_is_clipped(self, name: str) -> None:
        """A ratio of e^80 is finite, and its gradient is 0 where the advantage is positive."""
        policy, buffer = make_case("box")
        buffer.log_probs[2, 1] -= 80
        buffer.advantages[2, 1] = 100
        numbers = engine_for(name, policy, buffer, batch_size=30, n_epochs=1).update(buffer, COEFFICIENTS).read()
        assert numbers["ratio_max"] > 1e30
        assert numbers["grad_norm"] < 1e3
        assert math.isfinite(numbers["loss"])


@pytest.mark.parametrize("name", ENGINES, indirect=True)
def test_the_reported_loss_is_the_checked_one(name: str) -> None:
    """Each term is finite; their weighted sum is finite in float64 only."""
    policy, buffer = make_case("box")
    buffer.returns[2, 1] = 1e18
    engine = engine_for(name, policy, buffer, batch_size=30)
    with pytest.raises(BadMinibatchError) as caught:
        engine.update(buffer, dataclasses.replace(COEFFICIENTS, vf_coef=1e6, clip_range_vf=None))
    assert caught.value.what == "loss"
    if name in ("autograd", "gpu", "static"):  # in float32
        assert caught.value.terms["loss"] == math.inf
    else:
        assert 1e39 < caught.value.terms["loss"] < math.inf


# ------------------------------------------------------------------ devices where reading a number is slow


class TestDevice:
    @pytest.mark.parametrize("kind", ["cuda", "mps", "xpu"])
    def test_numbers_are_read_only_on_the_cpu(self, kind: str) -> None:
        for device, may_read in ((kind, False), ("cpu", True)):
            policy = cast(Any, SimpleNamespace(device=th.device(device)))
            assert AutogradEngine(policy, settings_for("box"))._reads_are_cheap() is may_read

    @pytest.mark.parametrize("kind", ["cuda", "mps", "xpu"])
    def test_its_random_state_is_restored(self, kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
        put_back = []
        device = th.device(kind, 0)
        monkeypatch.setattr(getattr(th, kind), "get_rng_state", lambda of: ("state", of))
        monkeypatch.setattr(getattr(th, kind), "set_rng_state", lambda state, of: put_back.append((state, of)))
        policy, _ = make_case("box")
        monkeypatch.setattr(type(policy), "device", device)
        _Snapshot(policy).restore(policy)
        assert put_back == [(("state", device), device)]

    @pytest.mark.parametrize("kind", [ValueError, RuntimeError])
    def test_a_policy_that_refuses_such_numbers_is_not_changed(
        self, kind: type[Exception], monkeypatch: pytest.MonkeyPatch
    ) -> None:
        policy, buffer = make_case("box")
        engine = engine_for("gpu", policy, buffer)
        engine.update(buffer, WEIGHTS)
        evaluate = policy.evaluate_actions

        def strict(*arguments: Any) -> Any:
            if not all(parameter.isfinite().all() for parameter in policy.parameters()):
                raise kind("no number")
            return evaluate(*arguments)

        monkeypatch.setattr(policy, "evaluate_actions", strict)
        before = state_of(policy)
        spoil(buffer, "advantage")
        drawn_in(0, monkeypatch)
        with pytest.raises(BadMinibatchError):
            engine.update(buffer, WEIGHTS)
        assert equal(state_of(policy), before)
        skipping = engine_for("gpu", policy, buffer, on_nonfinite="skip")
        assert skipping.update(buffer, WEIGHTS).n_skipped == 2

    def test_other_errors_of_a_policy_are_raised_unchanged(self, monkeypatch: pytest.MonkeyPatch) -> None:
        policy, buffer = make_case("box")

        def refuse(*_: Any) -> Any:
            raise ValueError("no such thing")

        monkeypatch.setattr(policy, "evaluate_actions", refuse)
        with pytest.raises(ValueError, match="no such thing"):
            engine_for("gpu", policy, buffer).update(buffer, WEIGHTS)


def without(buffer: Any, indices: np.ndarray) -> Any:
    """Return a rollout of two steps less, without some transitions, in SB3's order of the others."""
    kept = np.delete(np.arange(N_STEPS * N_ENVS), indices)
    smaller = type(buffer)(
        N_STEPS - 2, buffer.observation_space, buffer.action_space, "cpu", n_envs=N_ENVS,
        dist_param_dim=buffer.dist_param_dim,
    )  # fmt: skip
    smaller.reset()
    names = ["observations", "actions", "rewards", "returns", "values", "log_probs", "advantages", "dist_params"]
    for name in names:
        rows = getattr(buffer, name).swapaxes(0, 1).reshape(N_STEPS * N_ENVS, -1)[kept]
        target = getattr(smaller, name)
        shaped = rows.reshape(N_ENVS, N_STEPS - 2, *target.shape[2:]).swapaxes(0, 1)
        target[:] = shaped
    smaller.pos, smaller.full = N_STEPS - 2, True
    return smaller


def test_draws_of_sb3s_buffer_are_found() -> None:
    policy, ours = make_case("box")
    buffer = RolloutBuffer(N_STEPS, ours.observation_space, ours.action_space, "cpu", n_envs=N_ENVS)
    for step in range(N_STEPS):
        buffer.add(*(getattr(ours, n)[step] for n in ("observations", "actions", "rewards", "episode_starts")),
                   th.as_tensor(ours.values[step]), th.as_tensor(ours.log_probs[step]))  # fmt: skip
    buffer.compute_returns_and_advantage(th.zeros(N_ENVS), np.zeros(N_ENVS, bool))
    buffer.returns[2, 1] = np.inf
    settings = settings_for("box", batch_size=BATCH, has_dist_params=False, measure_kl_after=False)
    coefficients = dataclasses.replace(COEFFICIENTS, kl_coef=0.0)
    with pytest.raises(BadMinibatchError) as caught:
        AutogradEngine(policy, settings).update(buffer, coefficients)
    row = int(np.flatnonzero(np.isinf(caught.value.batch.returns.numpy()))[0])
    assert divmod(int(caught.value.indices[row]), N_STEPS) == (1, 2)


# ------------------------------------------------------------------ steps


class World(gym.Env[Any, Any]):
    """Observations of ones and a small reward, with one bad value at one step; truncated after 6 steps."""

    action_space = spaces.Box(-1.0, 1.0, (1,), np.float32)

    def __init__(self, what: str = "", at: int = 5, value: float = np.nan, dtype: Any = np.float32) -> None:
        box = spaces.Box(-np.inf, np.inf, (3,), dtype)
        self.has_keys = what.startswith("key")
        counts = spaces.Box(0, 9, (1,), np.int64)
        self.observation_space = spaces.Dict({"a": counts, "b": box}) if self.has_keys else box
        self.what, self.at, self.value, self.dtype = what.removeprefix("key "), at, value, dtype
        self.n_steps = 0

    def _observe(self, is_bad: bool) -> Any:
        row = np.ones(3, self.dtype)
        if is_bad:
            row[1] = self.value
        return {"a": np.ones(1, np.int64), "b": row} if self.has_keys else row

    def reset(self, *, seed: int | None = None, options: dict[str, Any] | None = None) -> tuple[Any, dict[str, Any]]:
        super().reset(seed=seed)
        return self._observe(False), {}

    def step(self, action: Any) -> tuple[Any, float, bool, bool, dict[str, Any]]:
        self.n_steps += 1
        now = self.n_steps == self.at
        reward = self.value if now and self.what == "reward" else 0.1
        return self._observe(now and self.what == "observation"), reward, False, self.n_steps % 6 == 0, {}


def make(what: str = "", n_envs: int = 3, wrap: Any = None, policy: Any = "MlpPolicy", **kwargs: Any) -> ClipPPO:
    """Return a model whose environment 1 returns a bad value."""
    keys = ("at", "value", "dtype")
    world = {key: kwargs.pop(key) for key in keys if key in kwargs}
    env: Any = DummyVecEnv([lambda bad=index == 1: World(what if bad else what[:3] * what.startswith("key"), **world)
                            for index in range(n_envs)])  # fmt: skip
    small = {"n_steps": 8, "batch_size": 6, "n_epochs": 2, "seed": 0, "policy_kwargs": {"net_arch": [4]}}
    small |= {"clip_range": "lin_0.2", "clip_range_vf": 1.0}
    return ClipPPO(policy, env if wrap is None else wrap(env), device="cpu", **{**small, **kwargs})


class At(BaseCallback):
    """Calls a function with the model at the end of each rollout, before its update, or at the start of one."""

    def __init__(self, action: Any, first: int = 1, event: str = "end") -> None:
        super().__init__()
        self.action, self.first, self.event, self.n = action, first, event, 0

    def _on_rollout_start(self) -> None:
        if self.event == "start":
            self._act()

    def _on_rollout_end(self) -> None:
        if self.event == "end":
            self._act()

    def _act(self) -> None:
        self.n += 1
        if self.n >= self.first:
            self.action(self.model)

    def _on_step(self) -> bool:
        return True


def error_of(model: ClipPPO, n: int = 48, **kwargs: Any) -> NonFiniteError:
    with pytest.raises(NonFiniteError) as caught:
        model.learn(n, **kwargs)
    error = caught.value
    assert all(parameter.isfinite().all() for parameter in model.policy.parameters()) or error.what == "parameter"
    return error


def test_a_final_observation_beside_the_number_of_a_discrete_space() -> None:
    final = {"a": 3, "b": np.array([0.0, np.nan])}
    fault = reward_fault(np.zeros(2), np.array([0.0, np.nan]), [{}, {"terminal_observation": final}])
    assert (fault.what, fault.key, fault.row) == ("terminal_observation", "b", 1)


@pytest.mark.parametrize("engine", ["native", "autograd"])
class TestStep:
    @pytest.mark.parametrize("on_nonfinite", ["raise", "skip"])
    @pytest.mark.parametrize("value", [np.nan, np.inf])
    def test_an_observation(self, engine: str, value: float, on_nonfinite: str) -> None:
        """Infinity as well, which tanh turns into a finite number."""
        model = make("observation", engine=engine, value=value, on_nonfinite=on_nonfinite)
        error = error_of(model)
        assert (error.what, error.env_index, error.key, error.step, error.num_timesteps) == (
            "observation", 1, None, 5, 15,
        )  # fmt: skip
        assert str(error).startswith(
            f"`observation` of environment 1 must be finite, got {value} at element [1] (1 of 9 numbers), at step 5 of "
            "the rollout, num_timesteps=15. Correct the environment"
        )
        assert np.isfinite(model.predict(np.ones(3, np.float32))[0]).all()

    def test_the_last_observation_of_a_rollout(self, engine: str) -> None:
        error = error_of(make("observation", engine=engine, at=8), 24)
        assert (error.what, error.env_index, error.step, error.num_timesteps) == ("observation", 1, 8, 24)

    def test_an_observation_that_float32_cannot_hold(self, engine: str) -> None:
        error = error_of(make("observation", engine=engine, value=1e300, dtype=np.float64))
        assert (error.what, error.env_index) == ("observation", 1)

    @pytest.mark.parametrize("value", [np.nan, -np.inf])
    def test_a_reward(self, engine: str, value: float) -> None:
        error = error_of(make("reward", engine=engine, value=value))
        assert (error.what, error.env_index, error.step, error.num_timesteps) == ("reward", 1, 4, 15)
        assert "`reward` of environment 1 must be finite" in str(error)

    def test_a_large_reward_is_finite(self, engine: str) -> None:
        make("reward", engine=engine, value=1e10).learn(24)

    @pytest.mark.parametrize("value", [np.nan, np.inf])
    def test_a_final_observation(self, engine: str, value: float) -> None:
        error = error_of(make("observation", engine=engine, at=6, value=value))
        assert (error.what, error.env_index, error.step, error.num_timesteps) == ("terminal_observation", 1, 5, 18)

    def test_a_parameter_that_a_callback_ruined(self, engine: str) -> None:
        def ruin(model: Any) -> None:
            model.policy.log_std.data.fill_(np.nan)

        error = error_of(make(engine=engine), callback=At(ruin, event="start"))
        assert (error.what, error.key, error.env_index, error.step) == ("parameter", "log_std", None, 0)

    def test_a_policy_whose_numbers_overflow(self, engine: str) -> None:
        def enlarge(model: Any) -> None:
            model.policy.action_net.weight.data.fill_(3e38)

        error = error_of(make(engine=engine), callback=At(enlarge, event="start"))
        assert (error.what, error.env_index, error.step) == ("log_prob", 0, 0)


def test_a_dict_observation_is_named_by_its_key() -> None:
    model = make("key observation", policy="MultiInputPolicy")
    error = error_of(model)
    assert (error.what, error.key, error.env_index) == ("observation", "b", 1)
    assert "`observation` 'b' of environment 1 must be finite" in str(error)
    error = error_of(make("key observation", policy="MultiInputPolicy", at=6))
    assert (error.what, error.key, error.env_index) == ("terminal_observation", "b", 1)


class Filled(FlattenExtractor):
    """Replaces missing values of a sensor by a number."""

    def forward(self, observations: th.Tensor) -> th.Tensor:
        return super().forward(th.nan_to_num(observations, nan=-1.0, posinf=2.0))


class FilledDict(CombinedExtractor):
    def forward(self, observations: Any) -> th.Tensor:
        filled = {key: th.nan_to_num(tensor, nan=-1.0, posinf=2.0) for key, tensor in observations.items()}
        return super().forward(filled)


class FilledPolicy(ActorCriticPolicy):
    def extract_features(self, obs: Any, features_extractor: Any = None) -> Any:
        return super().extract_features(th.nan_to_num(obs, nan=-1.0, posinf=2.0), features_extractor)

    def predict_values(self, obs: Any) -> th.Tensor:  # calls `extract_features` of the base class
        return super().predict_values(th.nan_to_num(obs, nan=-1.0, posinf=2.0))


class Passing(FlattenExtractor):
    """User code that does not treat missing values."""


FILLED: dict[str, tuple[Any, str, dict[str, Any]]] = {
    "extractor": ("MlpPolicy", "observation", {"features_extractor_class": Filled}),
    "two extractors": (
        "MlpPolicy", "observation", {"features_extractor_class": Filled, "share_features_extractor": False},
    ),
    "policy": (FilledPolicy, "observation", {}),
    "dict": ("MultiInputPolicy", "key observation", {"features_extractor_class": FilledDict}),
}  # fmt: skip


class TestMissingSensors:
    """Non-finite observations that user code treats: only the policy's outputs count, as in SB3."""

    @pytest.mark.parametrize("engine", ["autograd", "auto"])
    @pytest.mark.parametrize("case", FILLED)
    @pytest.mark.parametrize("at", [5, 6, 8])  # within an episode, at its end, at the rollout's
    def test_they_train_as_in_sb3(self, at: int, case: str, engine: str) -> None:
        # Each of the two with each place, case and engine
        value = (np.nan, np.inf)[(at // 2 + [*FILLED].index(case) + (engine == "auto")) % 2]
        policy, what, policy_kwargs = FILLED[case]
        policy_kwargs = {"net_arch": [4], **policy_kwargs}
        world: dict[str, Any] = {"policy": policy, "policy_kwargs": policy_kwargs, "at": at, "value": value}
        env = make(what, **world).get_env()
        arguments = {"n_steps": 8, "batch_size": 6, "n_epochs": 2, "seed": 0, "device": "cpu"}
        theirs = PPO(policy, env, policy_kwargs=policy_kwargs, **arguments).learn(48)  # type: ignore[arg-type]
        ours = make(what, **world, **{**SB3_EQUIVALENT, "clip_range_vf": None, "engine": engine}).learn(48)
        for one, other in zip(ours.policy.parameters(), theirs.policy.parameters(), strict=True):
            # Environments that are cut off in the same step share a forward pass, which rounds differently.
            th.testing.assert_close(one, other, rtol=1e-4, atol=1e-5)

    @pytest.mark.parametrize("at", [5, 6, 8])
    def test_one_that_makes_the_policys_output_non_finite_is_named(self, at: int) -> None:
        error = error_of(make("observation", at=at, policy_kwargs={"features_extractor_class": Passing}))
        what = "terminal_observation" if at == 6 else "observation"
        assert (error.what, error.env_index, error.num_timesteps) == (what, 1, 3 * at)
        assert f"`{what}` of environment 1 must be finite, got nan at element [1]" in str(error)

    def test_one_whose_gradient_is_not_finite_is_named_by_the_update(self) -> None:
        """tanh of infinity is finite, but the gradient of the weights before it is NaN."""
        model = make("observation", value=np.inf, policy_kwargs={"features_extractor_class": Passing})
        error = error_of(model)
        assert (error.what, error.key, error.env_index, error.step) == ("grad_norm", "observations", 1, 5)

    def test_another_cause_is_named_instead(self) -> None:
        policy_kwargs = {"features_extractor_class": Filled}

        def ruin(model: Any) -> None:
            model.policy.log_std.data.fill_(np.nan)

        def spoil_advantages(model: Any) -> None:
            model.rollout_buffer.advantages[:] = np.inf

        error = error_of(make("observation", at=8, policy_kwargs=policy_kwargs), callback=At(ruin, 2, "start"))
        assert (error.what, error.key) == ("parameter", "log_std")
        error = error_of(make("observation", policy_kwargs=policy_kwargs), callback=At(spoil_advantages))
        assert error.key == "advantages"

    @pytest.mark.parametrize("wrap", [VecNormalize, lambda env: VecNormalize(env, norm_obs=False)])
    def test_non_finite_statistics_end_the_training(self, wrap: Any) -> None:
        model = make("observation", wrap=wrap, policy_kwargs={"features_extractor_class": Filled})
        if wrap is not VecNormalize:  # there are none
            model.learn(48)
            return
        error = error_of(model)
        assert (error.what, error.num_timesteps) == ("observation", 15)
        assert "The statistics of VecNormalize may contain it" in str(error)


def test_other_errors_of_the_policy_are_raised_unchanged() -> None:
    model = make(engine="autograd")

    def refuse(*_: Any, **__: Any) -> Any:
        raise ValueError("no such thing")

    model.policy.forward = refuse  # type: ignore[assignment,method-assign]
    with pytest.raises(ValueError, match="no such thing") as caught:
        model.learn(24)
    assert not isinstance(caught.value, NonFiniteError)


def test_the_error_names_vec_normalize() -> None:
    error = error_of(make("observation", wrap=VecNormalize))
    assert "The statistics of VecNormalize may contain it" in str(error)
    assert "VecNormalize" not in str(error_of(make("observation")))


# ------------------------------------------------------------------ updates of a training


def infinite_return(model: Any) -> None:
    model.rollout_buffer.returns[2, 1] = np.inf


def infinite_advantages(model: Any) -> None:
    model.rollout_buffer.advantages[:] = np.inf


class PlainBuffer(RolloutBuffer):
    """Its minibatches are not named tuples."""

    def get(self, batch_size: int | None = None) -> Any:
        for batch in super().get(batch_size):
            yield SimpleNamespace(**batch._asdict())


class TestTraining:
    @pytest.mark.parametrize("engine", ["native", "autograd"])
    def test_the_error_names_the_transition(self, engine: str) -> None:
        model = make(engine=engine)
        error = error_of(model, callback=At(infinite_return, 2))
        assert (error.what, error.key, error.env_index, error.step) == ("value_loss", "returns", 1, 2)
        assert (error.num_timesteps, error.epoch) == (48, 0)
        assert 0 <= error.minibatch < 4  # type: ignore[operator]
        assert "`returns` of environment 1 at step 2 of the rollout, got inf" in str(error)
        assert "on_nonfinite='skip' skips such minibatches" in str(error)
        assert np.isfinite(model.predict(np.ones(3, np.float32))[0]).all()

    def test_a_ratio_is_found_by_evaluating_the_policy(self) -> None:
        def spoil_ratio(model: Any) -> None:
            model.rollout_buffer.log_probs[2, 1] -= 200

        error = error_of(make(), callback=At(spoil_ratio))
        assert (error.key, error.env_index, error.step) == ("ratio", 1, 2)

    def test_one_bad_advantage_of_a_rollout_that_is_normalised_as_a_whole(self) -> None:
        def spoil_one(model: Any) -> None:
            model.rollout_buffer.advantages[2, 1] = np.inf

        model = make(advantage_scope="rollout", on_nonfinite="skip")
        error = error_of(model, callback=At(spoil_one))
        assert error.key in ("advantages", "advantages of the rollout")
        assert "all minibatches of the update were skipped" in str(error)

    @pytest.mark.parametrize("on_nonfinite", ["raise", "skip"])
    def test_a_parameter_that_a_callback_ruined(self, on_nonfinite: str) -> None:
        def ruin(model: Any) -> None:
            model.policy.value_net.bias.data.fill_(np.nan)

        model = make(on_nonfinite=on_nonfinite)
        with pytest.raises(NonFiniteError) as caught:
            model.learn(48, callback=At(ruin))
        error, text = caught.value, str(caught.value)
        assert (error.what, error.key, error.env_index) == ("value_loss", "value_net.bias", None)
        assert "Its cause: `value_net.bias`, got nan" in text
        assert "Resume from the last checkpoint or saved model. If a callback changes weights, correct it." in text
        assert "whole" not in text
        assert "on_nonfinite" not in text
        assert "learning_rate" not in text
        assert ("Training has ended since all minibatches" in text) == (on_nonfinite == "skip")

    def test_minibatches_of_another_kind(self, tmp_path: Path) -> None:
        model = make(engine="autograd", rollout_buffer_class=PlainBuffer)
        model.set_logger(configure(str(tmp_path), []))
        error = error_of(model, callback=At(infinite_return))
        assert (error.what, error.key, error.env_index, error.step) == ("value_loss", "returns", 1, 2)
        assert np.isinf(arrays_of(error)["returns"]).sum() == 1

    def test_overflow_without_a_single_cause(self) -> None:
        def enlarge(model: Any) -> None:
            model.rollout_buffer.returns[:] = 1e25

        error = error_of(make(clip_range_vf=None), callback=At(enlarge))
        assert (error.what, error.env_index, error.key) == ("value_loss", None, None)
        assert "No single transition is its cause" in str(error)

    def test_rewards_whose_sum_overflows(self) -> None:
        """Without NumPy's warnings, which would be errors in tests."""
        for engine in ("native", "autograd"):
            error = error_of(make("reward", engine=engine, value=3e38, gae_lambda=1.0, gamma=1.0))
            assert error.what in ("policy_loss", "value_loss")

    def test_skipping_continues_and_is_counted(self, caplog: pytest.LogCaptureFixture) -> None:
        model = make(on_nonfinite="skip")
        with caplog.at_level(logging.WARNING, "sb3_clipvf"):
            model.learn(72, callback=At(infinite_return, 2), log_interval=None)
        assert model.logger.name_to_value["train/skipped_minibatches"] == 2  # one in each epoch
        messages = [record.getMessage() for record in caplog.records if "skipped" in record.getMessage()]
        assert len(messages) == 1  # in two updates
        assert "2 minibatches were skipped in the update at num_timesteps=48 (first cause: `value_loss`" in messages[0]
        model.learn(24, log_interval=None)
        assert model.logger.name_to_value["train/skipped_minibatches"] == 0
        assert "train/skipped_minibatches" not in make().learn(24, log_interval=None).logger.name_to_value

    def test_skipping_in_too_many_updates_in_a_row_raises(self) -> None:
        model = make(on_nonfinite="skip")
        error = error_of(model, 24 * 100, callback=At(infinite_return))
        assert error.num_timesteps == 24 * (MAX_UPDATES_WITH_SKIPS + 1)
        assert f"training has ended since {MAX_UPDATES_WITH_SKIPS + 1} updates in a row" in str(error)

    def test_the_pages_name_the_number_of_updates(self) -> None:
        assert f"in at most {MAX_UPDATES_WITH_SKIPS} updates in a row" in " ".join(str(ClipPPO.__doc__).split())
        page = (Path(__file__).resolve().parents[1] / "docs" / "nonfinite.md").read_text()
        assert f"after {MAX_UPDATES_WITH_SKIPS + 1} updates in a row that skip some" in page

    def test_an_update_without_skips_resets_the_count(self) -> None:
        def now_and_then(model: Any) -> None:
            if model.num_timesteps % 72:
                infinite_return(model)

        make(on_nonfinite="skip").learn(24 * (MAX_UPDATES_WITH_SKIPS + 5), callback=At(now_and_then))

    def test_the_count_is_saved(self, tmp_path: Path) -> None:
        model = make(on_nonfinite="skip").learn(48, callback=At(infinite_return))
        model.save(tmp_path / "model")
        loaded = ClipPPO.load(tmp_path / "model", device="cpu")
        assert (loaded.on_nonfinite, loaded._updates_with_skips) == ("skip", 2)

    def test_skipping_all_minibatches_raises(self) -> None:
        error = error_of(make(on_nonfinite="skip"), callback=At(infinite_advantages))
        assert error.num_timesteps == 24
        assert "all minibatches of the update were skipped" in str(error)

    def test_callbacks_may_change_on_nonfinite(self) -> None:
        def skip(model: Any) -> None:
            model.on_nonfinite = "skip"
            infinite_return(model)

        make().learn(24, callback=At(skip))

    def test_an_unknown_choice_is_refused(self) -> None:
        with pytest.raises(
            ValueError, match="`on_nonfinite` must be one of 'raise', 'skip', got 'ignore'. 'skip' skips"
        ):
            make(on_nonfinite="ignore")

    def test_files_of_sb3_have_the_default(self, tmp_path: Path) -> None:
        PPO("MlpPolicy", "Pendulum-v1", n_steps=8, batch_size=8, device="cpu").save(tmp_path / "sb3")
        with pytest.warns(UserWarning, match="on_nonfinite='raise'"):
            assert ClipPPO.load(tmp_path / "sb3", device="cpu").on_nonfinite == "raise"

    def test_the_error_survives_a_pickle(self) -> None:
        error = error_of(make("reward"))
        copied = pickle.loads(pickle.dumps(error))
        assert (str(copied), copied.what, copied.env_index) == (str(error), "reward", 1)


# ------------------------------------------------------------------ the file


def arrays_of(error: NonFiniteError) -> dict[str, np.ndarray]:
    assert error.path is not None
    assert f"The arrays that led to this error are in {error.path}." in str(error)
    with np.load(error.path, allow_pickle=False) as file:
        return dict(file)


class TestFile:
    @pytest.mark.parametrize(("what", "at"), [("observation", 13), ("reward", 13), ("return", 0)])
    def test_is_beside_the_last_checkpoint_which_is_kept(self, tmp_path: Path, what: str, at: int) -> None:
        model = make(what, at=at)
        callbacks: list[BaseCallback] = [TrainingCheckpoint(24, tmp_path, keep_best=False)]
        if what == "return":
            callbacks.append(At(infinite_return, 2))
        error = error_of(model, 96, callback=callbacks)
        assert error.path is not None
        assert error.path.parent == tmp_path
        # Only that of step 24, which has no bad values
        assert sorted(path.name for path in tmp_path.iterdir()) == ["checkpoint_24.zip", error.path.name]
        newest_checkpoint(tmp_path)
        resumed = ClipPPO.resume(tmp_path, make().env, device="cpu")
        assert resumed._checkpoint_folder is None
        assert all(parameter.isfinite().all() for parameter in resumed.policy.parameters())
        # A later training without the callback has no such folder.
        model.learn(24)
        assert model._checkpoint_folder is None

    @pytest.mark.parametrize("whose", ["callback", "last step"])
    def test_a_copy_of_ruined_weights_is_not_written(
        self, tmp_path: Path, whose: str, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr("sb3_clipvf.checkpoint.training_checkpoint.COPY_SHARE", 1e9)  # a copy after each update

        def ruin(model: Any) -> None:
            if model.num_timesteps == 48:
                model.policy.log_std.data.fill_(np.nan)

        def make_last_step_huge(model: Any) -> None:
            if model.num_timesteps == 48:
                model.n_epochs, model.lr_schedule = 1, lambda _: 1e38

        action = At(ruin, event="start") if whose == "callback" else At(make_last_step_huge)
        model = make(batch_size=24)
        with pytest.raises(NonFiniteError) as caught:
            model.learn(96, callback=[action, TrainingCheckpoint(1000, tmp_path)])
        assert (caught.value.step, caught.value.num_timesteps) == (0, 48)
        assert [path.name for path in tmp_path.iterdir()] == ["nonfinite_48.npz"]

    def test_of_an_observation(self, tmp_path: Path) -> None:
        error = error_of(make("key observation", policy="MultiInputPolicy", tensorboard_log=str(tmp_path)))
        assert error.path is not None
        assert error.path.name == "nonfinite_15.npz"
        arrays = arrays_of(error)
        assert np.isnan(arrays["new_observations.b"][1, 1])
        assert arrays["new_observations.a"].shape == (3, 1)
        assert np.isfinite(arrays["observations.b"]).all()
        assert arrays["actions"].shape == (3, 1)
        assert {"values", "log_probs", "rewards", "dones", "observations.a"} < set(arrays)

    def test_of_a_reward(self, tmp_path: Path) -> None:
        model = make("reward")
        model.set_logger(configure(str(tmp_path), []))
        arrays = arrays_of(error_of(model))
        assert np.isnan(arrays["rewards"][1])
        names = {"observations", "actions", "values", "log_probs", "rewards", "dones", "new_observations"}
        assert set(arrays) == names

    def test_of_a_minibatch(self, tmp_path: Path) -> None:
        model = make()
        model.set_logger(configure(str(tmp_path), []))
        arrays = arrays_of(error_of(model, callback=At(infinite_return)))
        row = int(np.flatnonzero(np.isinf(arrays["returns"]))[0])
        assert divmod(int(arrays["indices"][row]), 8) == (1, 2)
        names = {"observations", "actions", "old_values", "old_log_prob", "advantages", "returns", "indices"}
        assert names < set(arrays)

    def test_is_not_written_without_a_folder(self) -> None:
        error = error_of(make("reward"))
        assert error.path is None
        assert "To have these arrays written to a file, use a TrainingCheckpoint or set `tensorboard_log`." in str(
            error
        )

    def test_a_failed_write_does_not_hide_the_error(self, tmp_path: Path) -> None:
        def remove(model: Any) -> None:
            (tmp_path / "folder").rmdir()

        callbacks = [TrainingCheckpoint(1000, tmp_path / "folder"), At(remove, event="start")]
        error = error_of(make("reward"), callback=callbacks)
        assert (error.what, error.path) == ("reward", None)
        assert "The arrays that led to this error could not be written to a file" in str(error)


def test_the_native_engine_flags_non_finite_observations() -> None:
    """Otherwise the tests above would not use its check."""
    model = make().learn(24)
    assert isinstance(model._engine, NativeEngine)
    assert model._engine.act(th.ones(2, 3), with_dist_params=False).is_finite is True
    bad = th.tensor([[1.0, 1.0, 1.0], [1.0, np.inf, 1.0]])
    assert model._engine.act(bad, with_dist_params=False).is_finite is False
