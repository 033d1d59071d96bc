"""VecEnvs around simulators, EnvPool and Gymnasium's vector environments train as in SB3."""

import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import gymnasium as gym
import numpy as np
import pytest
import torch as th
from gymnasium import spaces
from gymnasium.vector import AutoresetMode
from stable_baselines3 import PPO
from stable_baselines3.common.callbacks import EvalCallback
from stable_baselines3.common.env_util import make_vec_env
from stable_baselines3.common.vec_env import (
    DummyVecEnv,
    VecEnv,
    VecEnvWrapper,
    VecFrameStack,
    VecMonitor,
    VecNormalize,
)

from sb3_clipvf import SB3_EQUIVALENT, ClipPPO
from sb3_clipvf.callbacks import IsolatedEvalCallback
from sb3_clipvf.checkpoint import TrainingCheckpoint, newest_checkpoint
from sb3_clipvf.envs import FastDummyVecEnv, FastVecNormalize, as_vec_env
from sb3_clipvf.envs.layers import stepped_objects, vec_env_layers

ARGUMENTS = {"n_steps": 16, "batch_size": 16, "n_epochs": 1, "seed": 0, "device": "cpu"}


class Simulator:
    """Two environments of seven steps in arrays: it returns SB3's four-tuple, but is no VecEnv."""

    num_envs = 2
    observation_space = spaces.Box(-9, 9, (4,))
    action_space = spaces.Box(-1, 1, (1,))

    def __init__(self) -> None:
        self.time, self.rng = 0, np.random.default_rng(0)

    def observe(self) -> np.ndarray:
        return self.rng.normal(size=(2, 4)).astype(np.float32)

    def reset(self) -> Any:
        self.time = 0
        return self.observe()

    def step(self, actions: np.ndarray) -> Any:
        self.time = self.time % 7 + 1
        # One after the other, since SB3 asks for the values of final observations one by one.
        obs, dones = self.observe(), np.array([self.time == 7, self.time == 3])
        infos = [{"terminal_observation": obs[i], "TimeLimit.truncated": True} if dones[i] else {} for i in range(2)]
        return obs, self.rng.normal(size=2).astype(np.float32), dones, infos


class Unwrapped(Simulator):
    """A simulator with Gymnasium's property."""

    @property
    def unwrapped(self) -> "Unwrapped":
        return self


class Slotted:
    """A simulator without ``__dict__``, with the methods of a VecEnv."""

    __slots__ = ("_actions", "_simulator")
    num_envs, observation_space, action_space = 2, Simulator.observation_space, Simulator.action_space

    def __init__(self) -> None:
        self._simulator, self._actions = Simulator(), None

    def reset(self) -> Any:
        return self._simulator.reset()

    def step_async(self, actions: np.ndarray) -> None:
        self._actions = actions

    def step_wait(self) -> Any:
        return self._simulator.step(self._actions)

    def seed(self, seed: int | None = None) -> None:
        """Nothing is drawn."""


class Adapter(VecEnvWrapper):
    """A VecEnv around a simulator, as SB3's users write it."""

    def __init__(self, simulator: Any) -> None:
        VecEnvWrapper.__init__(
            self, simulator, observation_space=simulator.observation_space, action_space=simulator.action_space
        )

    def seed(self, seed: int | None = None) -> None:
        """Nothing is drawn."""

    def reset(self) -> Any:
        return self.venv.reset()

    def step_async(self, actions: np.ndarray) -> None:
        self.actions = actions

    def step_wait(self) -> Any:
        return self.venv.step(self.actions)


class Passing(VecEnvWrapper):
    """A wrapper that passes everything on."""

    def reset(self) -> Any:
        return self.venv.reset()

    def step_wait(self) -> Any:
        return self.venv.step_wait()


class WithoutInit(VecEnvWrapper):
    """A wrapper like SuperSuit's: it calls no constructor of SB3, and finds no attributes inside."""

    def __init__(self, simulator: Any) -> None:
        self.venv, self.num_envs, self.render_mode = simulator, simulator.num_envs, None
        self.observation_space, self.action_space = simulator.observation_space, simulator.action_space

    def reset(self, seed: int | None = None, options: Any = None) -> Any:
        return self.venv.reset()

    def step_wait(self) -> Any:
        return self.venv.step_wait()

    def env_is_wrapped(self, wrapper_class: Any, indices: Any = None) -> Any:
        return [False] * self.num_envs

    def getattr_recursive(self, name: str) -> Any:
        raise AttributeError(name)

    def getattr_depth_check(self, name: str, already_found: bool) -> Any:
        return None

    def get_attr(self, attr_name: str, indices: Any = None) -> Any:
        raise AttributeError(attr_name)


class ToTensors(Adapter):
    """A simulator that returns arrays on a device, in its own form."""

    def reset(self) -> Any:
        return th.as_tensor(self.venv.reset())

    def step_wait(self) -> Any:
        obs, rewards, dones, infos = self.venv.step(self.actions)
        return th.as_tensor(obs), th.as_tensor(rewards), th.as_tensor(dones), {"last": infos}


class ToArrays(Passing):
    """A wrapper that converts these to SB3's form."""

    def reset(self) -> Any:
        return self.venv.reset().numpy()

    def step_wait(self) -> Any:
        obs, rewards, dones, infos = self.venv.step_wait()
        return obs.numpy(), rewards.numpy(), dones.numpy(), infos["last"]


class WithSpacesOfAll(Adapter):
    """A simulator with batched spaces, like Gymnasium's vector environments."""

    def __init__(self, simulator: Any) -> None:
        VecEnvWrapper.__init__(self, simulator, spaces.Box(-9, 9, (2, 4)), spaces.Box(-1, 1, (2, 1)))


class WithSpacesOfOne(Passing):
    """A wrapper with the spaces of one environment."""

    def __init__(self, venv: VecEnv) -> None:
        super().__init__(venv, spaces.Box(-9, 9, (4,)), spaces.Box(-1, 1, (1,)))


class Robots(VecEnv):
    """A VecEnv whose ``unwrapped`` is the simulator, like Isaac Lab's."""

    def __init__(self, simulator: Any) -> None:
        self.simulator = simulator
        super().__init__(2, simulator.observation_space, simulator.action_space)

    @property
    def unwrapped(self) -> Any:
        return self.simulator

    def reset(self) -> Any:
        return self.simulator.reset()

    def step_async(self, actions: np.ndarray) -> None:
        self.actions = actions

    def step_wait(self) -> Any:
        return self.simulator.step(self.actions)

    def close(self) -> None:
        """Nothing is open."""

    def get_attr(self, attr_name: str, indices: Any = None) -> Any:
        raise AttributeError(attr_name)

    def set_attr(self, attr_name: str, value: Any, indices: Any = None) -> None:
        raise AttributeError(attr_name)

    def env_method(self, method_name: str, *args: Any, indices: Any = None, **kwargs: Any) -> Any:
        raise AttributeError(method_name)

    def env_is_wrapped(self, wrapper_class: Any, indices: Any = None) -> Any:
        return [False] * 2


class Headless(Robots):
    """A VecEnv whose ``unwrapped`` raises."""

    @property
    def unwrapped(self) -> Any:
        raise RuntimeError("there is no window")


class OfVectors(Adapter):
    """Around Gymnasium's vector environments and EnvPool, after the example in EnvPool's documentation."""

    def __init__(self, envs: Any) -> None:
        space = getattr(envs, "single_observation_space", envs.observation_space)
        VecEnvWrapper.__init__(self, envs, space, getattr(envs, "single_action_space", envs.action_space))

    def get_attr(self, attr_name: str, indices: Any = None) -> Any:
        raise AttributeError(attr_name)

    def reset(self) -> Any:
        return self.venv.reset()[0]

    def step_wait(self) -> Any:
        obs, rewards, terminated, truncated, _ = self.venv.step(self.actions)
        return obs, rewards, terminated | truncated, [{"terminal_observation": row} for row in obs]


def gymnasium_vector() -> VecEnv:
    kwargs = {"autoreset_mode": AutoresetMode.SAME_STEP}
    envs = gym.make_vec("Pendulum-v1", 2, "sync", vector_kwargs=kwargs, max_episode_steps=9)
    envs.reset(seed=0)
    return OfVectors(envs)


def envpool_vector() -> VecEnv:
    envpool = pytest.importorskip("envpool")
    return OfVectors(envpool.make_gymnasium("Pendulum-v1", num_envs=2, max_episode_steps=9, seed=0))


INNER: dict[str, Callable[[], VecEnv]] = {
    "simulator": lambda: Adapter(Simulator()),
    "simulator with unwrapped": lambda: Adapter(Unwrapped()),
    "wrapped": lambda: Passing(Adapter(Simulator())),
    "tensors": lambda: ToArrays(ToTensors(Simulator())),
    "spaces of all": lambda: WithSpacesOfOne(WithSpacesOfAll(Simulator())),
    "robots": lambda: Robots(Simulator()),
    "robots wrapped": lambda: Passing(Robots(Simulator())),
    "headless": lambda: Headless(Simulator()),
    "gymnasium": gymnasium_vector,
    "envpool": envpool_vector,
    "no constructor": lambda: WithoutInit(Slotted()),
    "no dict": lambda: VecMonitor(Slotted()),
}
OUTER: dict[str, Callable[[VecEnv], VecEnv]] = {
    "plain": lambda venv: venv,
    "monitor": VecMonitor,
    "normalize": lambda venv: VecNormalize(VecMonitor(venv)),
    "stack": lambda venv: VecFrameStack(VecNormalize(VecMonitor(venv)), 2),
}
pytestmark = pytest.mark.filterwarnings(
    "ignore:.*render_mode:UserWarning", "ignore:.*already wrapped:UserWarning", "ignore:.*precision lowered:UserWarning"
)


# All wrappers are in "stack". Which one is the outermost matters to the algorithm, whatever is inside.
@pytest.mark.parametrize(
    ("inner", "outer"),
    [(inner, outer) for inner in INNER for outer in OUTER if outer in ("plain", "stack") or inner == "simulator"],
)
def test_they_train_as_in_sb3(inner: str, outer: str) -> None:
    theirs = PPO("MlpPolicy", OUTER[outer](INNER[inner]()), **ARGUMENTS).learn(64)
    ours = ClipPPO("MlpPolicy", OUTER[outer](INNER[inner]()), **ARGUMENTS, **SB3_EQUIVALENT).learn(64)
    for ours_part, theirs_part in zip(ours.policy.parameters(), theirs.policy.parameters(), strict=True):
        assert th.equal(ours_part, theirs_part)


@pytest.mark.parametrize("inner", INNER)
@pytest.mark.parametrize("cls", [EvalCallback, IsolatedEvalCallback])
def test_they_are_evaluated(cls: type[EvalCallback], inner: str) -> None:
    callback = cls(OUTER["normalize"](INNER[inner]()), n_eval_episodes=2, eval_freq=16, verbose=0)
    ClipPPO("MlpPolicy", OUTER["normalize"](INNER[inner]()), **ARGUMENTS).learn(32, callback=callback)
    assert np.isfinite(callback.last_mean_reward)


@pytest.mark.parametrize(
    ("inner", "named"),
    [
        ("simulator", ["Adapter does not provide", "Environments of test_envs_layers.Simulator"]),
        (
            "wrapped",
            [
                "Passing does not provide",
                "Adapter does not provide",
                "Environments of test_envs_layers.Simulator",
            ],
        ),
        ("robots", ["Environments of test_envs_layers.Robots"]),
        ("headless", ["Environments of test_envs_layers.Headless"]),
        ("gymnasium", ["OfVectors does not provide", "Environments of gymnasium.vector.sync_vector_env.SyncVectorEnv"]),
        ("envpool", ["OfVectors does not provide", "PendulumGymnasiumEnvPool begin new episodes"]),
        ("no constructor", ["WithoutInit does not provide", "Environments of test_envs_layers.Slotted"]),
        ("no dict", ["Environments of test_envs_layers.Slotted"]),
    ],
)
def test_checkpoints_name_what_they_do_not_keep(
    inner: str, named: list[str], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.WARNING, "sb3_clipvf"):
        model = ClipPPO("MlpPolicy", VecMonitor(INNER[inner]()), **ARGUMENTS)
        model.learn(64, callback=TrainingCheckpoint(32, tmp_path))
    differences = newest_checkpoint(tmp_path).manifest.differences
    assert len(differences) == len(named)
    for text, difference in zip(named, differences, strict=True):
        assert text in difference
        assert difference in caplog.text
    model = ClipPPO.resume(tmp_path, VecMonitor(INNER[inner]()), device="cpu")
    model.learn(32, reset_num_timesteps=False, callback=TrainingCheckpoint(32, tmp_path))
    assert model.num_timesteps == 96


class StatefulSimulator(Simulator):
    """A simulator that returns its state."""

    def get_training_state(self) -> Any:
        return {"time": self.time, "drawn": self.rng.bit_generator.state["state"]}

    def set_training_state(self, state: Any) -> None:
        self.time = state["time"]
        self.rng.bit_generator.state = {**self.rng.bit_generator.state, "state": state["drawn"]}


class StatefulAdapter(Adapter):
    """An adapter that returns the state of its simulator."""

    def get_training_state(self) -> Any:
        return StatefulSimulator.get_training_state(self.venv)

    def set_training_state(self, state: Any) -> None:
        StatefulSimulator.set_training_state(self.venv, state)


class StatefulSlotted(Slotted):
    """A simulator without ``__dict__`` that returns its state."""

    __slots__ = ()

    def get_training_state(self) -> Any:
        return StatefulSimulator.get_training_state(self._simulator)

    def set_training_state(self, state: Any) -> None:
        StatefulSimulator.set_training_state(self._simulator, state)


@pytest.mark.parametrize(
    "make",
    [lambda: VecMonitor(StatefulAdapter(Simulator())), lambda: FastVecNormalize(VecMonitor(StatefulSlotted()))],
    ids=["adapter", "simulator"],
)
def test_returned_states_are_resumed_to_the_last_bit(make: Callable[[], VecEnv], tmp_path: Path) -> None:
    whole = ClipPPO("MlpPolicy", make(), **ARGUMENTS).learn(128)
    checkpoint = TrainingCheckpoint(64, tmp_path)
    ClipPPO("MlpPolicy", make(), **ARGUMENTS).learn(64, callback=checkpoint, schedule_timesteps=128)
    assert newest_checkpoint(tmp_path).manifest.differences == ()
    resumed = ClipPPO.resume(tmp_path, make(), device="cpu").learn(64, reset_num_timesteps=False)
    for ours, theirs in zip(resumed.policy.parameters(), whole.policy.parameters(), strict=True):
        assert th.equal(ours, theirs)


def test_a_wrapper_that_keeps_shapes_is_checked() -> None:
    class Narrow(Simulator):
        def observe(self) -> np.ndarray:
            return super().observe()[:, :1]

    for make in (lambda: Passing(Adapter(Narrow())), lambda: VecNormalize(Robots(Narrow()))):
        with pytest.raises(ValueError, match=r"\(2, 4\) for 2 environments, got \(2, 1\)"):
            ClipPPO("MlpPolicy", make(), **ARGUMENTS).learn(32)


# ------------------------------------------------------------------ environments of two models


def pendulum() -> gym.Env[Any, Any]:
    return gym.make("Pendulum-v1", max_episode_steps=9)


SHARED: dict[str, tuple[Callable[[], Any], Callable[[Any], Any], Callable[[Any], Any]]] = {
    "environment": (pendulum, lambda env: env, lambda env: env),
    "in wrappers": (
        lambda: pendulum().unwrapped,
        lambda env: DummyVecEnv([pendulum, lambda: gym.wrappers.ClipAction(env)]),
        lambda env: VecMonitor(FastDummyVecEnv([lambda: env])),
    ),
    "simulator": (Unwrapped, Adapter, lambda simulator: VecMonitor(Adapter(simulator))),
    "robots": (Simulator, Robots, Robots),
    "layer": (lambda: make_vec_env("Pendulum-v1", 2), Passing, VecMonitor),
    "vector": (
        pendulum,
        lambda env: as_vec_env(gym.vector.SyncVectorEnv([lambda: env], autoreset_mode=AutoresetMode.SAME_STEP)),
        lambda env: DummyVecEnv([lambda: env]),
    ),
}


@pytest.mark.parametrize("name", SHARED)
def test_evaluation_in_the_environments_of_the_training_is_refused(name: str) -> None:
    make, training, evaluation = SHARED[name]
    shared = make()
    callback = IsolatedEvalCallback(evaluation(shared), eval_freq=8, verbose=0, warn=False)
    with pytest.raises(ValueError, match="`eval_env` must not share environments with the training"):
        ClipPPO("MlpPolicy", training(shared), **ARGUMENTS).learn(32, callback=callback)


def test_equal_environments_are_not_the_same() -> None:
    first, second = (Adapter(Unwrapped()) for _ in range(2))
    first.env = second.env = "Pendulum-v1"  # names are no environments
    first.envs = second.envs = 2
    found = stepped_objects(VecMonitor(first))
    assert not any(item is other for item in found for other in stepped_objects(second))
    assert vec_env_layers(second) == [second]
