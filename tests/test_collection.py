"""Collecting rollouts: bootstrapping of truncated episodes, actions, callbacks, buffers, incomplete rollouts."""

from pathlib import Path
from typing import Any

import gymnasium as gym
import numpy as np
import pytest
import torch as th
from gymnasium import spaces
from gymnasium.wrappers import TimeLimit
from stable_baselines3 import PPO
from stable_baselines3.common.buffers import RolloutBuffer
from stable_baselines3.common.callbacks import BaseCallback
from stable_baselines3.common.env_util import make_vec_env
from stable_baselines3.common.monitor import Monitor
from stable_baselines3.common.on_policy_algorithm import OnPolicyAlgorithm
from stable_baselines3.common.policies import ActorCriticPolicy, MultiInputActorCriticPolicy
from stable_baselines3.common.torch_layers import FlattenExtractor
from stable_baselines3.common.vec_env import DummyVecEnv, VecNormalize

from sb3_clipvf import ClipPPO, collection
from sb3_clipvf.collection import bootstrap_truncated, copy_of
from sb3_clipvf.engines.autograd import AutogradEngine
from sb3_clipvf.engines.interface import Acted
from sb3_clipvf.envs.episode_ends import EpisodeEnds
from sb3_clipvf.rollout import TensorRolloutBuffer

OBS = spaces.Box(-10.0, 10.0, (2,), np.float32)
BOX = spaces.Box(np.array([-2.0, 0.0], np.float32), np.array([2.0, 4.0], np.float32))
GAMMA = 0.5


class Valued(ActorCriticPolicy):
    """A policy that values an observation at 10 times its first number, and counts its forward passes."""

    n_calls = 0

    def predict_values(self, obs: Any) -> th.Tensor:
        self.n_calls += 1
        return 10 * obs[:, :1]


class DictValued(MultiInputActorCriticPolicy):
    def predict_values(self, obs: Any) -> th.Tensor:
        return 10 * obs["a"][:, :1] + obs["b"][:, :1]


def make(
    policy_class: type[Any] = Valued, obs: spaces.Space[Any] = OBS, act: spaces.Space[Any] = BOX, **kw: Any
) -> Any:
    th.manual_seed(0)
    return policy_class(obs, act, lambda _: 1e-3, net_arch=[4], **kw)


def info(*observation: float, truncated: bool = True) -> dict[str, Any]:
    return {"terminal_observation": np.array(observation, np.float32), "TimeLimit.truncated": truncated}


@pytest.mark.parametrize("engine", ["native", "autograd"])
def test_steps_per_second_exclude_compilation(engine: str) -> None:
    model = ClipPPO("MlpPolicy", "CartPole-v1", n_steps=16, batch_size=16, device="cpu", engine=engine)
    model.learn(16)
    starts = []

    class Compile(BaseCallback):
        def _on_step(self) -> bool:
            return True

        def _on_rollout_end(self) -> None:
            starts.append(model.start_time)
            model._engine.compile_seconds += 2.5

    model._engine.compile_seconds = 1e6  # from before this call
    model.learn(48, callback=Compile())
    assert [start - starts[0] for start in starts] == [0, 2_500_000_000, 5_000_000_000]
    assert model._engine.compile_seconds == 0.0


def bootstrapped(policy: Any, *arguments: Any) -> np.ndarray:
    # Settings matter only for updates, and there are none here.
    # All final observations are known, so that values of other ones are not read.
    return bootstrap_truncated(AutogradEngine(policy, None), *arguments, np.full(4, np.nan))  # type: ignore[arg-type]


class TestBootstrap:
    REWARDS = np.array([1.0, 2.0, 3.0, 4.0], np.float32)

    def test_sb3s_networks_do_not_evaluate_non_finite_observations(self) -> None:
        done, infos = np.array([True] + 3 * [False]), [info(np.inf, 0), {}, {}, {}]  # tanh makes it finite
        rewards = bootstrapped(make(ActorCriticPolicy), self.REWARDS, done, infos, GAMMA)
        np.testing.assert_array_equal(rewards, [np.nan, 2, 3, 4])

    def test_the_users_own_code_evaluates_them(self) -> None:
        done = np.array([True, True, False, False])
        rewards = bootstrapped(make(), self.REWARDS, done, [info(3, np.nan), info(np.nan, 3), {}, {}], GAMMA)
        # 1 + 0.5 * 30, whatever the second number is
        np.testing.assert_array_equal(rewards, [16, np.nan, 3, 4])

    def test_only_truncated_episodes_in_one_forward_pass(self) -> None:
        policy = make()
        infos = [info(3, 0), {}, info(5, 0, truncated=False), info(-1, 0)]
        rewards = bootstrapped(policy, self.REWARDS, np.array([True, False, True, True]), infos, GAMMA)
        # 1 + 0.5 * 30; continues; terminated; 4 + 0.5 * -10
        assert rewards.tolist() == [16, 2, 3, -1]
        assert policy.n_calls == 1

    def test_the_callers_rewards_do_not_change(self) -> None:
        before = self.REWARDS.copy()
        rewards = bootstrapped(make(), self.REWARDS, np.ones(4, bool), [info(3, 0)] * 4, GAMMA)
        np.testing.assert_array_equal(self.REWARDS, before)
        assert rewards.dtype == self.REWARDS.dtype

    @pytest.mark.parametrize(
        "infos",
        [
            [info(3, 0, truncated=False)] * 4,
            [{"TimeLimit.truncated": True}] * 4,
            [{"TimeLimit.truncated": True, "terminal_observation": None}] * 4,
            [{"terminal_observation": np.zeros(2, np.float32)}] * 4,
        ],
        ids=["terminated", "no observation", "empty observation", "no flag"],
    )
    def test_no_forward_pass_without_truncated_episodes(self, infos: list[dict[str, Any]]) -> None:
        policy = make()
        rewards = bootstrapped(policy, self.REWARDS, np.ones(4, bool), infos, GAMMA)
        np.testing.assert_array_equal(rewards, self.REWARDS)
        assert policy.n_calls == 0

    def test_the_flag_of_a_running_episode_is_ignored(self) -> None:
        rewards = bootstrapped(make(), self.REWARDS, np.zeros(4, bool), [info(3, 0)] * 4, GAMMA)
        np.testing.assert_array_equal(rewards, self.REWARDS)

    def test_dict_observations(self) -> None:
        obs = spaces.Dict({"a": OBS, "b": OBS})
        final = {"a": np.array([3, 0], np.float32), "b": np.array([1, 0], np.float32)}
        infos = [{"terminal_observation": final, "TimeLimit.truncated": True}, {}]
        policy = make(DictValued, obs)
        rewards = bootstrapped(policy, self.REWARDS[:2], np.array([True, False]), infos, GAMMA)
        # 1 + 0.5 * (30 + 1)
        assert rewards.tolist() == [16.5, 2]

    def test_discrete_observations(self) -> None:
        policy = make(ActorCriticPolicy, spaces.Discrete(4))
        infos = [{"terminal_observation": np.int64(state), "TimeLimit.truncated": True} for state in (2, 0)]
        rewards = bootstrapped(policy, self.REWARDS[:2], np.ones(2, bool), infos, GAMMA)
        with th.no_grad():
            values = policy.predict_values(th.tensor([2, 0])).flatten().numpy()
        np.testing.assert_allclose(rewards, self.REWARDS[:2] + GAMMA * values, rtol=1e-6)


def test_copies_own_their_memory() -> None:
    array = np.zeros(2)
    for observations in (array, {"a": array}, (array,)):
        copied = copy_of(observations)
        assert type(copied) is type(observations)
        array += 1
        inner = (
            copied
            if copied is not observations and isinstance(copied, np.ndarray)
            else next(iter(copied.values() if isinstance(copied, dict) else copied))
        )
        assert (inner == array - 1).all()


class OwnExtractor(FlattenExtractor):
    """An extractor that the native engine does not run."""


class Tensors(TensorRolloutBuffer):
    """A buffer whose own ``add`` takes SB3's arguments."""

    def add(self, *args: Any, **kwargs: Any) -> None:
        assert all(isinstance(part, th.Tensor) for part in (*args[4:], *kwargs.values()))
        super().add(*args, **kwargs)


class Watcher(BaseCallback):
    """Reads the local variables of each step."""

    def _on_step(self) -> bool:
        tensors = [self.locals[name] for name in ("obs_tensor", "values", "log_probs")]
        assert all(isinstance(tensor, th.Tensor) for tensor in tensors)
        width = self.training_env.observation_space.shape[0]
        assert [tensor.shape for tensor in tensors] == [(2, width), (2, 1), (2,)]
        return True


@pytest.mark.parametrize("engine", ["native", "auto", "autograd"])
def test_callbacks_that_watch_change_nothing(engine: str) -> None:
    """Without such callbacks, and with our buffer, the native engine makes no tensors in a step."""
    arguments = {"engine": engine, "n_steps": 16, "batch_size": 16, "seed": 1, "device": "cpu"}
    if engine == "auto":
        arguments |= {"policy_kwargs": {"features_extractor_class": OwnExtractor}}
    weights = []
    for callback, buffer in ((None, None), ([], None), (Watcher(), None), (None, Tensors)):
        env = make_vec_env("Pendulum-v1", n_envs=2)
        model = ClipPPO("MlpPolicy", env, rollout_buffer_class=buffer, kl_coef=0.5, **arguments)
        model.learn(64, callback=callback)
        weights.append(th.nn.utils.parameters_to_vector(model.policy.parameters()))
    for other in weights[1:]:
        th.testing.assert_close(other, weights[0], rtol=0, atol=0)


def test_the_native_engine_makes_no_tensors_without_such_callbacks(monkeypatch: pytest.MonkeyPatch) -> None:
    made = []
    to_tensor, as_tensors = collection.to_tensor, Acted.as_tensors
    monkeypatch.setattr(collection, "to_tensor", lambda *args: (made.append("observations"), to_tensor(*args))[1])
    monkeypatch.setattr(Acted, "as_tensors", lambda self: (made.append("acted"), as_tensors(self))[1])
    model = ClipPPO("MlpPolicy", make_vec_env("CartPole-v1", n_envs=2), n_steps=8, batch_size=16, device="cpu")
    model.learn(32)
    assert made == ["observations"] * 2  # for the last values of each rollout
    model.learn(16, callback=Watcher())
    assert made.count("acted") == 8


def test_a_replaced_add_gets_sb3s_arguments() -> None:
    model = ClipPPO("MlpPolicy", make_vec_env("Pendulum-v1", n_envs=2), n_steps=8, batch_size=16, device="cpu")
    given, add = [], model.rollout_buffer.add
    model.rollout_buffer.add = lambda *args, **kwargs: (given.append(args), add(*args, **kwargs))[1]
    model.learn(16)
    assert [len(args) for args in given] == [6] * 8
    assert all(isinstance(part, th.Tensor) for args in given for part in args[4:])


class Reusing(DummyVecEnv):
    """Returns its own arrays at each step, and overwrites them at the next."""

    def step_wait(self) -> Any:
        _, _, _, infos = super().step_wait()
        return self.buf_obs[None], self.buf_rews, self.buf_dones, infos  # type: ignore[index]


class Changing(gym.Env[np.ndarray, np.ndarray]):
    """Sums its actions, and changes them in-place."""

    observation_space = OBS

    def __init__(self, action_space: spaces.Space[Any]) -> None:
        self.action_space = action_space

    def reset(self, **_: Any) -> tuple[np.ndarray, dict[str, Any]]:
        return np.zeros(2, np.float32), {}

    def step(self, action: np.ndarray) -> tuple[np.ndarray, float, bool, bool, dict[str, Any]]:
        total = float(action.sum())
        action -= 5
        return np.zeros(2, np.float32), total, False, False, {}


@pytest.mark.parametrize("engine", ["native", "autograd"])
@pytest.mark.parametrize("space", [BOX, spaces.MultiDiscrete([3, 2]), spaces.MultiBinary(2)], ids=str)
def test_environments_may_change_the_actions_that_they_get(space: Any, engine: str) -> None:
    """The rollout has those that the policy chose, whether or not callbacks see them."""
    for callback in (None, lambda *_: True):
        venv = DummyVecEnv([lambda: Changing(space)] * 2)
        model = ClipPPO("MlpPolicy", venv, n_steps=8, batch_size=16, device="cpu", engine=engine, seed=0)
        model.learn(16, callback=callback)
        buffer = model.rollout_buffer
        sent = np.clip(buffer.actions, space.low, space.high) if space is BOX else buffer.actions
        np.testing.assert_allclose(sent.sum(2), buffer.rewards, rtol=1e-6)


class Ends(gym.Env[np.ndarray, np.ndarray]):
    """Every episode has two steps."""

    observation_space, action_space = OBS, BOX

    def reset(self, **_: Any) -> tuple[np.ndarray, dict[str, Any]]:
        self.n_steps = 0
        return np.zeros(2, np.float32), {}

    def step(self, action: np.ndarray) -> tuple[np.ndarray, float, bool, bool, dict[str, Any]]:
        self.n_steps += 1
        return np.full(2, self.n_steps, np.float32), 0.0, self.n_steps == 2, False, {}


def test_after_a_callback_stopped_the_next_rollout_starts_from_the_last_step() -> None:
    """Even if environments write the next step into the arrays that they returned."""
    model = ClipPPO("MlpPolicy", Reusing([Ends]), n_steps=4, batch_size=4, device="cpu")
    model.learn(4, callback=lambda local, _: local["self"].num_timesteps < 2)
    model.learn(4, reset_num_timesteps=False)
    assert model.rollout_buffer.episode_starts.ravel().tolist() == [1, 0, 1, 0]
    assert model.rollout_buffer.observations[:, 0, 0].tolist() == [0, 1, 0, 1]


class Doubling(RolloutBuffer):
    """Stores each step twice, in twice as many rows."""

    def __init__(self, buffer_size: int, *args: Any, **kwargs: Any) -> None:
        super().__init__(2 * buffer_size, *args, **kwargs)

    def add(self, *args: Any, **kwargs: Any) -> None:
        super().add(*args, **kwargs)
        super().add(*args, **kwargs)


class TwoRows(RolloutBuffer):
    """Two rows for each environment."""

    def __init__(self, *args: Any, n_envs: int = 1, **kwargs: Any) -> None:
        super().__init__(*args, n_envs=2 * n_envs, **kwargs)

    def add(self, *row: Any) -> None:
        super().add(*map(twice, row))

    def compute_returns_and_advantage(self, last_values: Any, dones: Any) -> None:
        super().compute_returns_and_advantage(twice(last_values), twice(dones))


def twice(rows: Any) -> Any:
    return (th.cat if isinstance(rows, th.Tensor) else np.concatenate)([rows, rows])


class OwnDraw(RolloutBuffer):
    """Its own ``get``, which calls SB3's."""

    def get(self, batch_size: int | None = None) -> Any:
        yield from super().get(batch_size)


class AnyDraw(OwnDraw):
    """Draws from the steps collected so far."""

    def get(self, batch_size: int | None = None) -> Any:
        full, self.full = self.full, True
        yield from super().get(batch_size)
        self.full = full


# The native, fused and autograd engines, and buffers of SB3.
ENGINES: dict[str, dict[str, Any]] = {
    "native": {"engine": "native"},
    "fused": {"policy_kwargs": {"features_extractor_class": OwnExtractor}},
    "autograd": {"engine": "autograd"},
    "host_buffer": {"rollout_buffer_class": RolloutBuffer},
}


def cartpole(n_steps: int = 16, n_envs: int = 1, **kwargs: Any) -> ClipPPO:
    env = make_vec_env("CartPole-v1", n_envs=n_envs, seed=0)
    return ClipPPO("MlpPolicy", env, n_steps=n_steps, batch_size=8, n_epochs=1, seed=0, device="cpu", **kwargs)


def vector(model: ClipPPO) -> th.Tensor:
    return th.nn.utils.parameters_to_vector(model.policy.parameters()).detach().clone()


@pytest.mark.filterwarnings("ignore:You have specified a mini-batch size")
@pytest.mark.parametrize("kwargs", ENGINES.values(), ids=ENGINES)
@pytest.mark.parametrize("n_steps", [4, 40])
class TestAnotherNumberOfSteps:
    """It applies from the next rollout on, whose buffer has no unused rows and none of an earlier rollout."""

    def test_assigned_before_learning(self, n_steps: int, kwargs: dict[str, Any]) -> None:
        model = cartpole(**kwargs)
        model.n_steps = n_steps
        model.learn(2 * n_steps)
        assert th.equal(vector(model), vector(cartpole(n_steps, **kwargs).learn(2 * n_steps)))

    def test_assigned_after_loading(self, n_steps: int, kwargs: dict[str, Any], tmp_path: Path) -> None:
        cartpole(**kwargs).learn(16).save(tmp_path / "model")
        models = []
        for given in ({}, {"n_steps": n_steps}):
            env = make_vec_env("CartPole-v1", seed=3)
            model = ClipPPO.load(tmp_path / "model", env, device="cpu", seed=3, trust_pickle=True, **given)
            model.n_steps = n_steps
            models.append(model.learn(n_steps))
        assert th.equal(vector(models[0]), vector(models[1]))

    @pytest.mark.parametrize("event", ["_on_rollout_start", "_on_step", "_on_rollout_end"])
    def test_assigned_by_a_callback(self, n_steps: int, kwargs: dict[str, Any], event: str) -> None:
        callback = Assigns(event, "n_steps", n_steps)
        model = cartpole(**kwargs)
        model.learn(16 + n_steps, callback=callback)
        assert callback.seen == [(16, True), (n_steps, True)]
        assert model.num_timesteps == 16 + n_steps

    def test_passed_by_the_users_own_loop(self, n_steps: int, kwargs: dict[str, Any]) -> None:
        model = cartpole(**kwargs)
        total, callback = model._setup_learn(100, None)
        for n in (16, n_steps, 16):
            assert model.collect_rollouts(model.env, callback, model.rollout_buffer, n)
            model.train()
            assert (model.rollout_buffer.pos, model.rollout_buffer.buffer_size) == (n, n)


class Assigns(BaseCallback):
    """Assigns an attribute of the model once, and records the size and completeness of each rollout."""

    def __init__(self, event: str, name: str, value: Any) -> None:
        super().__init__()
        self.name, self.value, self.seen = name, value, list[tuple[int, bool]]()
        inner = getattr(self, event)
        setattr(self, event, lambda: (self._assign(), inner())[1])

    def _assign(self) -> None:
        setattr(self.model, self.name, self.value)

    def _on_step(self) -> bool:
        return True

    def _on_rollout_end(self) -> None:
        buffer = self.locals["rollout_buffer"]
        self.seen.append((buffer.buffer_size, buffer.full))


@pytest.mark.parametrize("kwargs", ENGINES.values(), ids=ENGINES)
class TestIncompleteRollouts:
    MATCH = r"The rollout is incomplete: {} of 16 steps\. Collect the rest before training"

    def test_before_the_first_rollout(self, kwargs: dict[str, Any]) -> None:
        with pytest.raises(ValueError, match=self.MATCH.format(0)):
            cartpole(**kwargs).train()

    def test_after_a_callback_stopped(self, kwargs: dict[str, Any]) -> None:
        model = cartpole(**kwargs).learn(16)
        model.learn(16, callback=lambda *_: model.num_timesteps < 5)
        before = vector(model)
        with pytest.raises(ValueError, match=self.MATCH.format(4)):
            model.train()
        assert th.equal(vector(model), before)

    def test_after_a_reset(self, kwargs: dict[str, Any]) -> None:
        model = cartpole(**kwargs).learn(16)
        model.rollout_buffer.reset()
        with pytest.raises(ValueError, match=self.MATCH.format(0)):
            model.train()

    def test_one_that_replaces_a_complete_one(self, kwargs: dict[str, Any]) -> None:
        model = cartpole(**kwargs)
        callback = Assigns("_on_rollout_end", "rollout_buffer", cartpole(**kwargs).rollout_buffer)
        with pytest.raises(ValueError, match=self.MATCH.format(0)):
            model.learn(16, callback=callback)


class TestBuffersOfTheUsers:
    def test_several_rows_a_step_do_not_change_the_size(self) -> None:
        model = cartpole(rollout_buffer_class=Doubling).learn(32)
        assert (model.rollout_buffer.pos, model.num_timesteps) == (32, 32)

    def test_a_class_with_several_rows_a_step_is_not_resized(self) -> None:
        model = cartpole(rollout_buffer_class=Doubling)
        model.n_steps = 4
        with pytest.raises(ValueError, match="The rollout is incomplete: 8 of 32 steps"):
            model.learn(4)

    def test_a_rollout_longer_than_a_buffer_is_refused(self) -> None:
        model = cartpole(rollout_buffer_class=Tensors)
        model.n_steps = 17
        with pytest.raises(ValueError, match=r"The rollout buffer is full \(16 steps\)"):
            model.learn(17)

    def test_sb3s_bare_assertion_gets_a_message(self) -> None:
        model = cartpole(rollout_buffer_class=OwnDraw).learn(16)
        model.rollout_buffer.reset()
        with pytest.raises(ValueError, match="The rollout is incomplete: 0 of 16 steps"):
            model.train()

    def test_other_assertions_are_kept(self) -> None:
        class Asserts(RolloutBuffer):
            def get(self, batch_size: int | None = None) -> Any:
                assert batch_size == 0, "another one"

        with pytest.raises(AssertionError, match="another one"):
            cartpole(rollout_buffer_class=Asserts).learn(16)

    def test_more_rows_than_environments_do_not_change_the_actions(self) -> None:
        """Kernels draw one action for each environment, as torch does, not for each row."""
        kernels, torch = (
            cartpole(n_envs=2, rollout_buffer_class=TwoRows, engine=engine).learn(32) for engine in ("auto", "autograd")
        )
        assert kernels._engine.name == "fused"
        np.testing.assert_array_equal(kernels.rollout_buffer.actions, torch.rollout_buffer.actions)

    def test_one_may_draw_from_an_incomplete_rollout(self) -> None:
        model = cartpole(rollout_buffer_class=AnyDraw)
        model.n_steps = 4
        model.learn(4)
        assert model._n_updates == 1


class WithTime(RolloutBuffer):
    """Stores observations with the step in the rollout, which minibatches do not have."""

    def __init__(self, buffer_size: int, observation_space: Any, *args: Any, **kwargs: Any) -> None:
        box = spaces.Box(-np.inf, np.inf, (observation_space.shape[0] + 1,), np.float32)
        super().__init__(buffer_size, box, *args, **kwargs)

    def add(self, obs: np.ndarray, *args: Any, **kwargs: Any) -> None:
        super().add(np.column_stack([obs, np.full(len(obs), self.pos)]), *args, **kwargs)

    def _get_samples(self, *args: Any, **kwargs: Any) -> Any:
        samples = super()._get_samples(*args, **kwargs)
        return samples._replace(observations=samples.observations[:, :-1])


class Renamed(RolloutBuffer):
    """Keeps its advantages under another name."""

    def reset(self) -> None:
        super().reset()
        self.kept = vars(self).pop("advantages")

    def compute_returns_and_advantage(self, last_values: th.Tensor, dones: np.ndarray) -> None:
        self.advantages = self.kept
        super().compute_returns_and_advantage(last_values, dones)
        del self.advantages

    def get(self, batch_size: int | None = None) -> Any:
        self.advantages = self.kept
        batches = list(super().get(batch_size))
        del self.advantages
        return iter(batches)


@pytest.mark.parametrize("engine", ["auto", "autograd"])
@pytest.mark.parametrize("buffer_class", [WithTime, Renamed])
def test_a_buffer_may_store_other_things_than_sb3s(buffer_class: type[RolloutBuffer], engine: str) -> None:
    weights = []
    for cls in (RolloutBuffer, buffer_class):
        model = cartpole(rollout_buffer_class=cls, engine=engine).learn(64)
        weights.append(th.nn.utils.parameters_to_vector(model.policy.parameters()))
    assert th.equal(*weights)


def test_steps_that_do_not_fit_are_refused_for_such_a_buffer() -> None:
    model = cartpole(rollout_buffer_class=WithTime)
    model.set_env(DummyVecEnv([lambda: gym.make("CartPole-v1")]))
    model.env.step_wait = lambda: (np.zeros((1, 5), np.float32), np.zeros(1, np.float32), np.zeros(1, bool), [{}])
    with pytest.raises(ValueError, match=r"shape, \(1, 4\) for 1 environments, got \(1, 5\)"):
        model.learn(16)


def test_set_env_keeps_a_buffer_that_the_user_put_into_the_model() -> None:
    model = cartpole()
    own = model.rollout_buffer = WithTime(16, model.observation_space, model.action_space, model.device)
    for normalizes in (False, True):
        env: Any = make_vec_env("CartPole-v1")
        model.set_env(VecNormalize(env) if normalizes else env)
        assert model.learn(32).rollout_buffer is own


def test_another_number_of_environments_resizes_the_buffer() -> None:
    model = cartpole().learn(16)
    model.n_envs = 3
    model.set_env(make_vec_env("CartPole-v1", n_envs=3, seed=0))
    model.learn(96)
    assert model.rollout_buffer.rewards.shape == (16, 3)
    assert model.rollout_buffer.full


@pytest.mark.parametrize("n_steps", [0, -1, 2.5, "4", None, True])
def test_an_assigned_n_steps_is_checked(n_steps: Any) -> None:
    model = cartpole()
    model.n_steps = n_steps
    with pytest.raises((ValueError, TypeError), match="`n_steps` must be a whole number"):
        model.learn(16)
    with pytest.raises((ValueError, TypeError), match="`n_steps` must be a whole number"):
        cartpole().learn(32, callback=Assigns("_on_rollout_end", "n_steps", n_steps))


class HostLoop(ClipPPO):
    """Collects by SB3's loop, which stores no old distribution."""

    collect_rollouts = OnPolicyAlgorithm.collect_rollouts


class HostAdd(TensorRolloutBuffer):
    """A buffer whose ``add`` takes only SB3's arguments."""

    def add(self, obs: Any, action: Any, reward: Any, episode_start: Any, value: Any, log_prob: Any) -> None:  # type: ignore[override]
        super().add(obs, action, reward, episode_start, value, log_prob)


def logged(model: ClipPPO) -> dict[str, Any]:
    return dict(model.logger.name_to_value)


def collect_by_hand(model: ClipPPO, with_dist_params: Any = lambda step: False) -> None:
    """Collect with a user's own loop, which passes the distribution's parameters at some steps, or at none."""
    buffer = model.rollout_buffer
    obs, start = model.env.reset(), np.ones(1, bool)
    for step in range(model.n_steps):
        with th.no_grad():
            action, value, log_prob = model.policy(th.as_tensor(obs))
        new_obs, reward, done, _ = model.env.step(action.numpy())
        more = {"dist_params": th.zeros(1, 2)} if with_dist_params(step) else {}
        buffer.add(obs, action.numpy().reshape(-1, 1), reward, start, value, log_prob, **more)
        obs, start = new_obs, done
    buffer.compute_returns_and_advantage(th.zeros(1), done)


OUR_BUFFER = {name: kwargs for name, kwargs in ENGINES.items() if name != "host_buffer"}


@pytest.mark.parametrize("kwargs", OUR_BUFFER.values(), ids=OUR_BUFFER)
class TestRolloutsWithoutTheOldDistribution:
    NEEDS_KL = (
        {"kl_coef": 1.0},
        {"kl_coef": "lin_1.0", "clip_range": None},
        {"kl_coef": 1.0, "adaptive_kl_target": 0.01},
        {"lr_kl_target": 0.01},
    )

    def test_sb3s_loop_trains_without_the_kl(self, kwargs: dict[str, Any]) -> None:
        model = HostLoop(
            "MlpPolicy", make_vec_env("CartPole-v1", seed=0), n_steps=16, batch_size=8, seed=0, device="cpu", **kwargs
        )
        model.learn(64)
        assert "train/kl" not in logged(model)
        assert "train/approx_kl" in logged(model)
        host = PPO("MlpPolicy", make_vec_env("CartPole-v1", seed=0), n_steps=16, batch_size=8, seed=0, device="cpu",
                   policy_kwargs=kwargs.get("policy_kwargs")).learn(64)  # fmt: skip
        # Kernels round differently than torch; torch alone gives the same bits.
        tolerance = 0.0 if kwargs == {"engine": "autograd"} else 1e-4
        th.testing.assert_close(vector(model), vector(host), rtol=tolerance, atol=tolerance)

    @pytest.mark.parametrize("arguments", NEEDS_KL)
    def test_sb3s_loop_is_refused_if_an_argument_needs_the_kl(
        self, arguments: dict[str, Any], kwargs: dict[str, Any]
    ) -> None:
        env = make_vec_env("CartPole-v1", seed=0)
        model = HostLoop("MlpPolicy", env, n_steps=16, batch_size=8, device="cpu", **kwargs, **arguments)
        before = vector(model)
        name = "lr_kl_target" if "lr_kl_target" in arguments else "kl_coef"
        with pytest.raises(ValueError, match=f"`dist_params` must be given at each step if `{name}` is set, got None"):
            model.learn(16)
        assert th.equal(vector(model), before)

    def test_the_users_own_loop(self, kwargs: dict[str, Any]) -> None:
        model = cartpole(**kwargs)
        model._setup_learn(16, None)
        collect_by_hand(model)
        model.train()
        assert "train/kl" not in logged(model)
        assert model._n_updates == 1

    @pytest.mark.parametrize("without", [range(16), [0], [15], [3, 4]])
    def test_rows_of_an_earlier_rollout_are_not_used(self, without: Any, kwargs: dict[str, Any]) -> None:
        model = cartpole(**kwargs).learn(16)
        assert "train/kl" in logged(model)
        model.logger.name_to_value.clear()
        model.rollout_buffer.reset()
        collect_by_hand(model, lambda step: step not in without)
        model.train()
        assert "train/kl" not in logged(model)

    def test_a_later_rollout_by_collect_rollouts_has_it_again(self, kwargs: dict[str, Any]) -> None:
        model = cartpole(**kwargs)
        model._setup_learn(16, None)
        collect_by_hand(model)
        model.train()
        model.learn(16)
        assert 0 <= logged(model)["train/kl"] < 0.1
        fresh = cartpole(kl_coef=1.0, **kwargs)
        fresh._setup_learn(16, None)
        fresh.kl_coef = 0.0
        collect_by_hand(fresh)
        fresh.train()
        fresh.kl_coef = 1.0
        assert "train/kl" in logged(fresh.learn(16))

    def test_an_add_with_only_sb3s_arguments(self, kwargs: dict[str, Any]) -> None:
        model = cartpole(rollout_buffer_class=HostAdd, **kwargs).learn(32)
        assert "train/kl" not in logged(model)
        plain = cartpole(**kwargs).learn(32)
        assert th.equal(vector(model), vector(plain))
        with pytest.raises(ValueError, match="`dist_params` must be given at each step if `kl_coef` is set"):
            cartpole(rollout_buffer_class=HostAdd, kl_coef=1.0, **kwargs).learn(16)

    def test_a_missing_kl_is_logged_once(self, kwargs: dict[str, Any], caplog: pytest.LogCaptureFixture) -> None:
        env = make_vec_env("CartPole-v1", seed=0)
        with_host_loop = HostLoop("MlpPolicy", env, n_steps=16, batch_size=8, device="cpu", **kwargs)
        for model in (with_host_loop, cartpole(rollout_buffer_class=HostAdd, **kwargs)):
            caplog.clear()
            with caplog.at_level("INFO", logger="sb3_clipvf"):
                model.learn(48)
            assert [message for message in caplog.messages if "`train/kl` is omitted" in message] == [
                "`train/kl` is omitted: the rollout lacks the old distribution's parameters."
            ]


class Unshown(ActorCriticPolicy):
    """Leaves no distribution in ``action_dist``; ``get_distribution`` has one."""

    def forward(self, obs: Any, deterministic: bool = False) -> Any:
        before = getattr(self.action_dist, "distribution", None)
        result = super().forward(obs, deterministic)
        self.action_dist.distribution = before
        return result


def test_a_penalty_that_starts_later_reads_the_policys_distribution(caplog: pytest.LogCaptureFixture) -> None:
    model = ClipPPO(Unshown, make_vec_env("CartPole-v1", seed=0), n_steps=16, batch_size=8, seed=0)
    with caplog.at_level("INFO", logger="sb3_clipvf"):
        model.learn(48)
    assert caplog.text.count("`train/kl` is omitted") == 1
    assert "train/kl" not in logged(model)
    model.kl_coef = 1.0
    assert "train/kl" in logged(model.learn(16))


class TestLostEpisodes:
    """One warning reports that a wrapper outside of Monitor ends episodes."""

    @staticmethod
    def warnings(make_env: Any, caplog: pytest.LogCaptureFixture, steps: int = 64) -> list[str]:
        model = ClipPPO("MlpPolicy", DummyVecEnv([make_env] * 2), n_steps=16, batch_size=32, n_epochs=1, device="cpu")
        model.learn(steps)
        return [record.message for record in caplog.records if "outside of Monitor" in record.message]

    def test_a_time_limit_outside_of_monitor_warns_once(self, caplog: pytest.LogCaptureFixture) -> None:
        (message,) = self.warnings(lambda: TimeLimit(Monitor(gym.make("Pendulum-v1")), 5), caplog)
        assert "`rollout/ep_rew_mean` does not include them" in message
        assert message.endswith("Put Monitor outside of that wrapper, or use VecMonitor instead.")

    @pytest.mark.parametrize(
        "make_env",
        [
            lambda: Monitor(TimeLimit(gym.make("Pendulum-v1"), 5)),
            lambda: EpisodeEnds(TimeLimit(Monitor(gym.make("Pendulum-v1")), 5)),
            lambda: TimeLimit(gym.make("Pendulum-v1"), 5),
            lambda: OneLife(Monitor(gym.make("Pendulum-v1"))),
        ],
    )
    def test_other_environments_give_no_warning(self, make_env: Any, caplog: pytest.LogCaptureFixture) -> None:
        assert not self.warnings(make_env, caplog)

    def test_the_flag_is_not_saved(self, tmp_path: Path) -> None:
        model = ClipPPO("MlpPolicy", "Pendulum-v1", n_steps=64, device="cpu")
        model.learn(64)
        assert "_may_lose_episodes" not in model._saved_attributes()


class OneLife(gym.Wrapper[Any, Any, Any, Any]):
    """Ends episodes as SB3's EpisodicLifeEnv does: the game continues after the reset."""

    begun = False

    def reset(self, **kwargs: Any) -> Any:
        if self.begun:
            return self.env.step(self.action_space.sample())[0], {}
        self.begun = True
        return self.env.reset(**kwargs)

    def step(self, action: Any) -> Any:
        obs, reward, _, _, info = self.env.step(action)
        return obs, reward, True, False, info
