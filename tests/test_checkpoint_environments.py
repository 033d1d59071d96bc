"""The state of environments: exact if their classes are known or have methods for it, else reported."""

import importlib.util
import logging
import random
import re
import warnings
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import checkpoint_cases
import gymnasium as gym
import numpy as np
import pytest
from checkpoint_cases import CASES, Case, KilledError, SavedWalk, Walk, dummy
from gymnasium.wrappers import (
    DelayObservation,
    FrameStackObservation,
    MaxAndSkipObservation,
    NormalizeObservation,
    NormalizeReward,
    RecordEpisodeStatistics,
    StickyAction,
    TimeAwareObservation,
    TimeLimit,
    TransformReward,
)
from rl_zoo3.wrappers import ActionSmoothingWrapper, DelayedRewardWrapper, HistoryWrapper
from stable_baselines3.common.callbacks import EvalCallback
from stable_baselines3.common.env_util import make_vec_env
from stable_baselines3.common.monitor import Monitor, ResultsWriter, load_results
from stable_baselines3.common.vec_env import DummyVecEnv, SubprocVecEnv, VecEnv, VecEnvWrapper, VecNormalize

from sb3_clipvf import ClipPPO
from sb3_clipvf.callbacks import IsolatedEvalCallback
from sb3_clipvf.checkpoint import (
    EnvironmentMismatchError,
    ResumableEnv,
    TrainingCheckpoint,
    monitor_files,
    newest_checkpoint,
)
from sb3_clipvf.checkpoint.callback_state import compare_callbacks
from sb3_clipvf.checkpoint.env_state import env_state, restore_env
from sb3_clipvf.checkpoint.mujoco_state import mujoco_state, set_mujoco_state
from sb3_clipvf.checkpoint.random_state import (
    generator_from,
    generator_state,
    global_states,
    set_global_states,
    set_space_states,
)
from sb3_clipvf.checkpoint.resume import _restore_environments
from sb3_clipvf.checkpoint.vec_env_state import restore_vec_env, vec_env_state
from sb3_clipvf.envs import FastDummyVecEnv, FastSubprocVecEnv, FastVecNormalize, as_vec_env, vector
from sb3_clipvf.envs.gymnasium_vector import CartPoleVecEnv
from sb3_clipvf.files import codec

CLASSIC = ("CartPole-v1", "Pendulum-v1", "MountainCar-v0", "MountainCarContinuous-v0", "Acrobot-v1")
TOY = ("FrozenLake-v1", "CliffWalking-v1", "Taxi-v4", "Blackjack-v1")
MUJOCO = ("HalfCheetah", "Ant", "Humanoid", "HumanoidStandup", "Hopper", "Walker2d", "Swimmer", "Reacher", "Pusher")
MUJOCO_IDS = [f"{name}-v5" for name in (*MUJOCO, "InvertedPendulum", "InvertedDoublePendulum")]

# Gymnasium's, of EnvPool's space of observations.
pytestmark = pytest.mark.filterwarnings("ignore:.*precision lowered by casting")
needs_mujoco = pytest.mark.skipif(importlib.util.find_spec("mujoco") is None, reason="needs mujoco")


def results(env: gym.Env, actions: list[Any]) -> list[Any]:
    """Return the results of steps, and what the environment's generators draw after them."""
    found: list[Any] = []
    for action in actions:
        obs, reward, terminated, truncated, _ = env.step(action)
        found.append((np.array(obs).tobytes(), float(reward), terminated, truncated))
        if terminated or truncated:
            found.append(np.array(env.reset()[0]).tobytes())
    return [*found, env.unwrapped.np_random.random(), env.action_space.sample()]


def check_resumed_exactly(make: Callable[[], gym.Env], n_steps: int = 120) -> None:
    first, second = make(), make()
    first.action_space.seed(5)
    actions = [first.action_space.sample() for _ in range(37 + n_steps)]
    first.reset(seed=1)
    second.reset(seed=2)
    results(first, actions[:37])
    state = env_state(first)
    assert state["unknown"] == []
    restore_env(second, codec.from_bytes(*codec.to_bytes(codec.frozen(state))))
    assert repr(results(first, actions[37:])) == repr(results(second, actions[37:]))


@pytest.mark.parametrize("env_id", [*CLASSIC, *TOY, *(pytest.param(name, marks=needs_mujoco) for name in MUJOCO_IDS)])
def test_known_environments_resume_to_the_last_bit(env_id: str) -> None:
    check_resumed_exactly(lambda: Monitor(gym.make(env_id, max_episode_steps=50)))


@pytest.mark.parametrize(
    ("env_id", "wrap"),
    [
        ("CartPole-v1", lambda env: StickyAction(env, 0.5)),
        ("CartPole-v1", lambda env: FrameStackObservation(env, 3)),
        # The step after the saved state ends the episode before it writes a frame.
        ("Pendulum-v1", lambda env: MaxAndSkipObservation(env, 30)),
        ("CartPole-v1", lambda env: DelayObservation(env, 2)),
        ("CartPole-v1", lambda env: NormalizeReward(NormalizeObservation(env))),
        ("CartPole-v1", lambda env: TransformReward(TimeAwareObservation(env), lambda reward: 2 * reward)),
        ("CartPole-v1", RecordEpisodeStatistics),
        ("Pendulum-v1", lambda env: HistoryWrapper(env, 2)),
        ("Pendulum-v1", lambda env: DelayedRewardWrapper(ActionSmoothingWrapper(env, 0.9), 5)),
    ],
    ids=["sticky", "stack", "skip", "delay", "normalize", "time", "statistics", "history", "smooth"],
)
def test_known_wrappers_resume_to_the_last_bit(env_id: str, wrap: Callable[[gym.Env], gym.Env]) -> None:
    check_resumed_exactly(lambda: wrap(gym.make(env_id, max_episode_steps=50)))


class Hill(gym.envs.classic_control.MountainCarEnv):
    """A class that others derived: what it adds is not known."""


class Unknown(gym.Wrapper):
    """A wrapper without methods for its state."""


class Wrong(SavedWalk):
    """Its state cannot be stored."""

    def get_training_state(self) -> dict[str, Any]:
        return {"self": self}


@pytest.mark.parametrize(
    ("make", "named"),
    [
        (Walk, "checkpoint_cases.Walk"),
        (Hill, "Hill"),
        (lambda: Unknown(gym.make("CartPole-v1")), "Unknown"),
        (Wrong, r"Wrong .*get_training_state\(\)\['self'\]"),
        (lambda: gym.make("LunarLander-v3"), "lunar_lander.LunarLander"),
    ],
    ids=["own", "derived", "wrapper", "wrong", "box2d"],
)
def test_unknown_classes_are_named(make: Callable[[], gym.Env], named: str) -> None:
    if "lander" in named:
        pytest.importorskip("Box2D")
    (reason,) = env_state(Monitor(make()))["unknown"]
    assert re.search(named, reason)


class Robot(Walk):
    """As some around a simulator: ``unwrapped``, ``spec`` and ``_np_random`` are not what Gymnasium means by them."""

    def __init__(self) -> None:
        super().__init__()
        self.spec, self._np_random = "robot.xml", np.random.RandomState(0)

    @property
    def unwrapped(self) -> Any:
        return self._np_random

    def reset(self, *, seed: int | None = None, options: Any = None) -> Any:
        self._place, self._time = self._np_random.normal(size=2), 0
        return self._observation(), {}

    def step(self, action: Any) -> Any:
        self._time += 1
        self._place = np.clip(self._place + 0.3 * action + self._np_random.normal(0, 0.1, 2), -9, 9)
        return self._observation(), -float(np.abs(self._place).sum()), False, self._time >= 23, {}


class SavedRobot(Robot):
    """The same robot, with the two methods for its state."""

    def get_training_state(self) -> Any:
        return {"place": self._place, "time": self._time, "drawn": self._np_random.get_state(legacy=False)}

    def set_training_state(self, state: Any) -> None:
        self._place, self._time = state["place"], state["time"]
        self._np_random.set_state(state["drawn"])


@pytest.mark.parametrize("cls", [Robot, SavedRobot])
def test_attributes_that_mean_something_else_are_left_alone(cls: type[Robot], tmp_path: Path) -> None:
    case = Case(lambda _: make_vec_env(cls, 2), policy="MultiInputPolicy")
    checkpoint_cases.killed(case, tmp_path / "killed")
    found = checkpoint_cases.resumed(case, tmp_path / "killed")
    differences = newest_checkpoint(tmp_path / "killed" / "checkpoints").manifest.differences
    if cls is SavedRobot:
        assert differences == ()
        assert found == checkpoint_cases.uninterrupted(case, tmp_path / "uninterrupted")
    else:
        assert "Robot does not provide its state" in differences[0]


class Core(gym.Env[Any, int]):
    """Its wrapper provides the observations."""

    action_space = gym.spaces.Discrete(2)

    def reset(self, *, seed: int | None = None, options: dict[str, Any] | None = None) -> tuple[Any, dict[str, Any]]:
        super().reset(seed=seed)
        return None, {}

    def step(self, action: int) -> tuple[Any, float, bool, bool, dict[str, Any]]:
        return None, 1.0, bool(self.np_random.random() < 0.1), False, {}

    def get_training_state(self) -> None:
        """Nothing but its generator."""

    def set_training_state(self, state: None) -> None:
        """Nothing."""


class View(gym.ObservationWrapper):
    """Provides observations, and the space that the environment lacks."""

    def __init__(self, env: gym.Env) -> None:
        super().__init__(env)
        self.observation_space = gym.spaces.Box(-1, 1, (2,))

    def observation(self, observation: Any) -> np.ndarray:
        return np.zeros(2, np.float32)

    get_training_state = Core.get_training_state
    set_training_state = Core.set_training_state


def test_spaces_that_only_a_wrapper_has_need_no_state() -> None:
    check_resumed_exactly(lambda: View(Core()))


# ------------------------------------------------------------------ other processes


def seeded_walk() -> gym.Env:
    np.random.seed(5)
    random.seed(5)
    return SavedWalk()


def in_processes(cls: type[SubprocVecEnv], make: Callable[[], gym.Env], **kwargs: Any) -> VecEnv:
    kwargs["vec_env_kwargs"] = {"start_method": "fork", **({"n_workers": 2} if cls is FastSubprocVecEnv else {})}
    return make_vec_env(make, 3, seed=3, vec_env_cls=cls, **kwargs)


@pytest.mark.parametrize("cls", [SubprocVecEnv, FastSubprocVecEnv])
def test_environments_in_processes_may_draw_from_shared_generators(cls: type[SubprocVecEnv], tmp_path: Path) -> None:
    case = Case(lambda _: in_processes(cls, seeded_walk, wrapper_class=ResumableEnv), policy="MultiInputPolicy")
    checkpoint_cases.killed(case, tmp_path / "killed")
    assert newest_checkpoint(tmp_path / "killed" / "checkpoints").manifest.differences == ()
    found = checkpoint_cases.resumed(case, tmp_path / "killed")
    assert found == checkpoint_cases.uninterrupted(case, tmp_path / "uninterrupted")


@pytest.mark.parametrize("cls", [SubprocVecEnv, FastSubprocVecEnv])
def test_wrappers_around_the_wrapper_for_processes_are_refused(cls: type[SubprocVecEnv], tmp_path: Path) -> None:
    def make() -> gym.Env:
        class Local(Unknown):
            """Its class cannot be sent to another process."""

        return Local(ResumableEnv(gym.make("CartPole-v1")))

    env = in_processes(cls, make)
    model = ClipPPO("MlpPolicy", env, n_steps=16, batch_size=48, device="cpu")
    with pytest.raises(EnvironmentMismatchError, match="outermost wrapper .* around it in environments 0, 1, 2"):
        model.learn(48, callback=TrainingCheckpoint(48, tmp_path))
    env.close()


# ------------------------------------------------------------------ what differs, and what resets change about it


def unwrapped_processes(_: Path) -> VecEnv:
    return dummy("CartPole-v1", vec_env_cls=SubprocVecEnv, vec_env_kwargs={"start_method": "fork"})


def pool(_: Path) -> VecEnv:
    import envpool

    return as_vec_env(envpool.make_gymnasium("CartPole-v1", num_envs=2, seed=0))


class Halving(VecEnvWrapper):
    """Halves rewards, and counts steps, without methods for its state."""

    def __init__(self, venv: VecEnv) -> None:
        super().__init__(venv)
        self.count = 0

    def reset(self) -> Any:
        return self.venv.reset()

    def step_wait(self) -> Any:
        self.count += 1
        obs, rewards, dones, infos = self.venv.step_wait()
        return obs, rewards / (2 + self.count % 3), dones, infos


class SavedHalving(Halving):
    """The same wrapper, with the two methods for its state."""

    def get_training_state(self) -> int:
        return self.count

    def set_training_state(self, state: int) -> None:
        self.count = state


class HalvingDummy(DummyVecEnv):
    """SB3's class with the state of ``Halving``, without methods for it."""

    count = 0

    def step_wait(self) -> Any:
        self.count += 1
        obs, rewards, dones, infos = super().step_wait()
        return obs, rewards / (2 + self.count % 3), dones, infos


class SavedHalvingDummy(HalvingDummy):
    """The same class, with the two methods for what it adds to SB3's."""

    get_training_state = SavedHalving.get_training_state
    set_training_state = SavedHalving.set_training_state


INEXACT = {
    "own class": (lambda _: make_vec_env(Walk, 2), "MultiInputPolicy", "Walk does not provide its state"),
    "processes": (unwrapped_processes, "MlpPolicy", r"Wrap them in ResumableEnv"),
    "pool": (pool, "MlpPolicy", r"Environments of \S+ begin new episodes at a resume"),
    "wrapper": (lambda _: Halving(dummy("CartPole-v1")), "MlpPolicy", "Halving does not provide its state"),
    "base": (lambda _: halving(HalvingDummy), "MlpPolicy", "HalvingDummy does not provide its state"),
}


@pytest.mark.parametrize("name", INEXACT)
def test_what_differs_is_logged_once_and_kept_in_the_manifest(
    name: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    if name == "pool":
        pytest.importorskip("envpool")
    make, policy, text = INEXACT[name]
    case = Case(make, policy=policy)
    with caplog.at_level(logging.WARNING, "sb3_clipvf"):
        case.model(tmp_path).learn(256, callback=case.callbacks(tmp_path)[:1])
    logged = [message for message in caplog.messages if "will differ" in message]
    assert len(logged) == 1
    assert re.search(text, logged[0])
    (difference,) = newest_checkpoint(tmp_path / "checkpoints").manifest.differences
    assert difference in logged[0]
    caplog.clear()
    # Resumed all the same, in new episodes that are not those of the beginning.
    with caplog.at_level(logging.WARNING, "sb3_clipvf"):
        model = ClipPPO.resume(tmp_path / "checkpoints", case.make_env(tmp_path), device="cpu")
    assert "not resumed exactly" in caplog.text
    assert model._last_episode_starts is not None
    assert model._last_episode_starts.all()
    fresh = case.model(tmp_path)
    fresh._setup_learn(64)
    first, resumed = fresh._last_obs, model._last_obs
    assert codec.to_bytes(codec.frozen(first)) != codec.to_bytes(codec.frozen(resumed))
    model.learn(64, reset_num_timesteps=False, callback=case.callbacks(tmp_path)[:1])


@pytest.mark.parametrize("name", ["processes", "pool"])
def test_with_resets_it_is_exact(name: str, tmp_path: Path) -> None:
    if name == "pool":
        pytest.importorskip("envpool")
    make, policy, _ = INEXACT[name]
    case = Case(make, policy=policy, reset_envs=True)
    checkpoint_cases.killed(case, tmp_path / "killed")
    assert newest_checkpoint(tmp_path / "killed" / "checkpoints").manifest.differences == ()
    found = checkpoint_cases.resumed(case, tmp_path / "killed")
    assert found == checkpoint_cases.uninterrupted(case, tmp_path / "uninterrupted")


def strict_monitor(make: Callable[[], gym.Env] = lambda: gym.make("CartPole-v1"), *outer: Any) -> Callable[[], gym.Env]:
    def build() -> gym.Env:
        env: gym.Env = Monitor(make(), allow_early_resets=False)
        for wrap in outer:
            env = wrap(env)
        return env

    return build


STRICT = {
    "wrapper": lambda: Halving(DummyVecEnv([strict_monitor()] * 2)),
    "processes": lambda: SubprocVecEnv([strict_monitor()] * 2, "fork"),
    "own class in processes": lambda: SubprocVecEnv([strict_monitor(lambda: Hill(), ResumableEnv)] * 2, "fork"),
    "rows": lambda: as_vec_env(gym.vector.SyncVectorEnv([strict_monitor(lambda: TimeLimit(Hill(), 9))] * 2)),
}


@pytest.mark.parametrize("name", STRICT)
def test_a_monitor_without_early_resets_accepts_those_of_a_resume(name: str, tmp_path: Path) -> None:
    case = Case(lambda _: STRICT[name]())
    checkpoint_cases.killed(case, tmp_path)
    env = STRICT[name]()
    ClipPPO.resume(tmp_path / "checkpoints", env, device="cpu")
    env.close()


def test_what_differs_in_evaluations_too_is_logged_once(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    def make_env() -> VecEnv:
        return Halving(dummy("CartPole-v1"))

    callbacks = [TrainingCheckpoint(32, tmp_path), IsolatedEvalCallback(make_env(), eval_freq=16, n_eval_episodes=1)]
    model = ClipPPO("MlpPolicy", make_env(), n_steps=16, batch_size=16, n_epochs=1, seed=0, device="cpu", verbose=0)
    model.learn(64, callback=callbacks)
    assert len([message for message in caplog.messages if "will differ" in message]) == 1
    differences = newest_checkpoint(tmp_path).manifest.differences
    assert [text.startswith("In evaluations: ") for text in differences] == [False, True]
    caplog.clear()
    # `resume` logs it; the checkpoints that follow do not log it again.
    model = ClipPPO.resume(tmp_path, make_env(), device="cpu", verbose=0)
    callbacks = [TrainingCheckpoint(32, tmp_path), IsolatedEvalCallback(make_env(), eval_freq=16, n_eval_episodes=1)]
    model.learn(64, callback=callbacks, reset_num_timesteps=False)
    assert [message.split(":")[0] for message in caplog.messages if "Halving" in message] == [
        "The training is not resumed exactly"
    ]


def halving(cls: type[DummyVecEnv]) -> VecEnv:
    return make_vec_env("CartPole-v1", 2, seed=3, vec_env_cls=cls)


@pytest.mark.parametrize(
    "make",
    [lambda: SavedHalving(dummy("CartPole-v1")), lambda: halving(SavedHalvingDummy)],
    ids=["wrapper", "base"],
)
def test_vectorised_classes_with_methods_for_their_state_are_exact(make: Callable[[], VecEnv], tmp_path: Path) -> None:
    case = Case(lambda _: make())
    checkpoint_cases.killed(case, tmp_path / "killed")
    found = checkpoint_cases.resumed(case, tmp_path / "killed")
    assert found == checkpoint_cases.uninterrupted(case, tmp_path / "uninterrupted")


@pytest.mark.parametrize("has_methods", [False, True])
@pytest.mark.parametrize(
    ("base", "make"),
    [
        (FastDummyVecEnv, lambda cls: cls([lambda: gym.make("CartPole-v1")])),
        (SubprocVecEnv, lambda cls: cls([lambda: ResumableEnv(gym.make("CartPole-v1"))], "fork")),
        (CartPoleVecEnv, lambda cls: cls(gym.make_vec("CartPole-v1", num_envs=2))),
    ],
)
def test_classes_derived_from_known_ones_are_named_and_their_environments_are_saved(
    base: type[Any], make: Callable[[type[Any]], VecEnv], has_methods: bool
) -> None:
    methods = {name: getattr(SavedHalving, name) for name in ("get_training_state", "set_training_state")}
    env = make(type("Derived", (base,), methods if has_methods else {}))
    env.count = 5
    env.reset()
    state, reasons = vec_env_state(env)
    (layer,) = state["layers"]
    assert [text.split(" does not")[0].endswith(".Derived") for text in reasons] == [True] * (not has_methods)
    assert layer["given"] == ({"state": 5} if has_methods else None)
    assert (layer["environments"] or layer["adapter"]["cartpole"]) and "_seeds" in layer["attributes"]
    env.close()


def test_other_resets_than_before_are_warned_of(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    case = CASES["resets"]
    checkpoint_cases.killed(case, tmp_path)
    model = ClipPPO.resume(tmp_path / "checkpoints", case.make_env(tmp_path), device="cpu")
    with caplog.at_level(logging.WARNING, "sb3_clipvf"):
        model.learn(64, reset_num_timesteps=False, callback=TrainingCheckpoint(64, tmp_path / "checkpoints"))
    assert "every_timesteps and reset_envs of TrainingCheckpoint differ" in caplog.text


# ------------------------------------------------------------------ environments of another build


@pytest.fixture(scope="module")
def normalized(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("normalized")
    checkpoint_cases.killed(Case(lambda _: VecNormalize(dummy("CartPole-v1"))), folder)
    return folder / "checkpoints"


@pytest.mark.parametrize(
    ("make", "match"),
    [
        (lambda: VecNormalize(dummy("CartPole-v1", 3)), "the number of environments of the checkpoint, 2, got 3"),
        (lambda: gym.make("CartPole-v1"), "the number of environments of the checkpoint, 2, got 1"),
        (lambda: dummy("CartPole-v1"), "VecNormalize > DummyVecEnv, got DummyVecEnv"),
        (lambda: FastVecNormalize(dummy("CartPole-v1")), "got FastVecNormalize > DummyVecEnv"),
        (lambda: VecNormalize(dummy("CartPole-v0")), "CartPoleEnv > CartPole-v1, got .* CartPole-v0 as number 0"),
        (lambda: VecNormalize(DummyVecEnv([lambda: gym.make("CartPole-v1")] * 2)), "Monitor > .* got TimeLimit"),
        (lambda: VecNormalize(unwrapped_processes(Path())), "got VecNormalize > SubprocVecEnv"),
    ],
    ids=["number", "one", "no statistics", "other statistics", "other id", "no Monitor", "processes"],
)
def test_environments_of_another_build_are_refused(normalized: Path, make: Callable[[], Any], match: str) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # Gymnasium's, of CartPole-v0
        env = make()
    with pytest.raises(EnvironmentMismatchError, match=match):
        ClipPPO.resume(normalized, env, device="cpu")


def test_a_missing_environment_is_refused(normalized: Path) -> None:
    with pytest.raises(ValueError, match="`env` must be the environment to resume in, got None"):
        ClipPPO.resume(normalized, None, device="cpu")  # type: ignore[arg-type]


def test_processes_without_the_wrapper_are_refused(tmp_path: Path) -> None:
    checkpoint_cases.killed(CASES["processes"], tmp_path)
    env = unwrapped_processes(tmp_path)
    with pytest.raises(EnvironmentMismatchError, match="wrapped in ResumableEnv"):
        ClipPPO.resume(tmp_path / "checkpoints", env, device="cpu")
    env.close()


def test_the_faster_loop_and_sb3s_own_are_the_same(normalized: Path) -> None:
    env = FastDummyVecEnv([lambda: Monitor(gym.make("CartPole-v1")) for _ in range(2)])
    assert ClipPPO.resume(normalized, VecNormalize(env), device="cpu").num_timesteps == 128


def test_the_wrapper_for_processes_changes_nothing_here(normalized: Path) -> None:
    env = VecNormalize(dummy("CartPole-v1", wrapper_class=ResumableEnv))
    assert ClipPPO.resume(normalized, env, device="cpu").num_timesteps == 128


# ------------------------------------------------------------------ Monitor's files


def monitored(folder: Path, **kwargs: Any) -> DummyVecEnv:
    def make() -> gym.Env:
        return Monitor(gym.make("CartPole-v1"), str(folder / "0"), **kwargs)

    return DummyVecEnv([make])


def resume_and_close(folder: Path, env: VecEnv) -> None:
    ClipPPO.resume(folder / "checkpoints", env, device="cpu")
    env.close()


@pytest.mark.parametrize("override_existing", [True, False])
def test_monitor_files_lose_what_came_after_the_checkpoint_and_nothing_else(
    tmp_path: Path, override_existing: bool
) -> None:
    case = Case(lambda folder: monitored(folder, override_existing=override_existing))
    for folder in (tmp_path / "killed", tmp_path / "whole"):
        folder.mkdir()
        monitored(folder).close()  # a head for those who do not write one
    checkpoint_cases.killed(case, tmp_path / "killed")
    checkpoint_cases.resumed(case, tmp_path / "killed")
    checkpoint_cases.uninterrupted(case, tmp_path / "whole")
    killed, whole = (load_results(str(tmp_path / name)) for name in ("killed", "whole"))
    assert killed[["r", "l"]].equals(whole[["r", "l"]])
    assert len(killed) > 5
    assert killed["t"].is_monotonic_increasing


def test_files_of_earlier_versions_keep_their_columns(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def without_steps(path: str, header: dict[str, Any], extra_keys: tuple[str, ...]) -> ResultsWriter:
        writer = ResultsWriter(path, header)
        writer.logger.extrasaction = "ignore"
        return writer

    monkeypatch.setattr(vector, "ResultsWriter", without_steps)
    checkpoint_cases.killed(CASES["rows"], tmp_path)
    monkeypatch.undo()
    # The second resume reads a checkpoint of this version.
    for _ in range(2):
        checkpoint_cases.resumed(CASES["rows"], tmp_path)
        results = load_results(str(tmp_path))
        assert list(results) == ["index", "r", "l", "t"] and len(results) > 5


class Dying:
    """A file of which a process is killed when it writes text."""

    def __init__(self, file: Any) -> None:
        self._file = file

    def __getattr__(self, name: str) -> Any:
        return getattr(self._file, name)

    def write(self, _: str) -> None:
        raise KilledError


@pytest.mark.parametrize("override_existing", [True, False])
@pytest.mark.parametrize("largest", [10, 2**24], ids=["long", "short"])
def test_cutting_a_monitor_file_writes_no_rows_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, largest: int, override_existing: bool
) -> None:
    monkeypatch.setattr(monitor_files, "LARGEST_FILE", largest)
    row = {"r": 1.0, "l": 2, "t": 3.0}
    ResultsWriter(str(tmp_path / "0"), {"t_start": 0.0}).close()
    writer = ResultsWriter(str(tmp_path / "0"), {"t_start": 0.0}, override_existing=override_existing)
    writer.write_row(row)
    state = monitor_files.with_contents({"writer": monitor_files.file_state(writer)})["writer"]
    path = tmp_path / "0.monitor.csv"
    before = path.read_bytes()
    writer.write_row(row)
    file, writer.file_handler = writer.file_handler, Dying(writer.file_handler)
    monitor_files.restore_file(writer, state)
    assert path.read_bytes() == before
    writer.file_handler = file
    monitor_files.restore_file(writer, state)
    writer.write_row(row)
    writer.close()
    assert path.read_bytes() == before + before.splitlines(keepends=True)[-1]


def test_long_monitor_files_are_cut_and_not_kept(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(monitor_files, "LARGEST_FILE", 10)
    case = Case(lambda folder: monitored(folder, override_existing=False))
    monitored(tmp_path).close()
    checkpoint_cases.killed(case, tmp_path)
    before = (tmp_path / "0.monitor.csv").read_text()
    with caplog.at_level(logging.WARNING, "sb3_clipvf"):
        resume_and_close(tmp_path, case.make_env(tmp_path))
        after = (tmp_path / "0.monitor.csv").read_text()
        assert before.startswith(after)
        assert len(after) < len(before)
        assert "earlier rows" not in caplog.text
        resume_and_close(tmp_path, monitored(tmp_path))
    assert "override_existing=False before you resume" in caplog.text


# ------------------------------------------------------------------ crafted states


def _a_callback(**values: Any) -> None:
    compare_callbacks(EvalCallback(dummy("CartPole-v1", 1)), {"EvalCallback": {"attributes": values}})


def _a_wrapper(**values: Any) -> None:
    env = gym.make("CartPole-v1")
    state = env_state(env)
    state["layers"][0]["attributes"].update(values)
    restore_env(env, state)


def _vectorised(index: int, **values: Any) -> None:
    venv = VecNormalize(dummy("CartPole-v1", 1))
    state, _ = vec_env_state(venv)
    state["layers"][index]["attributes"].update(values)
    restore_vec_env(venv, state)


def _mujoco(part: str, **values: Any) -> None:
    env = gym.make("InvertedPendulum-v5")
    env.reset()
    state = mujoco_state(env.unwrapped)
    state[part].update(values)
    set_mujoco_state(env.unwrapped, state)


def _generator(kind: str, **values: Any) -> None:
    state = getattr(np.random, kind)(0).state
    generator_from({**state, **values, "state": {**state["state"], **values}})  # the names are at one of both places


def _legacy(place: int, value: Any) -> None:
    states = global_states()
    numbers = list(states["numpy"])
    numbers[place] = value
    set_global_states({**states, "numpy": tuple(numbers)})


@pytest.mark.parametrize(
    ("restore", "named"),
    [
        (lambda: _generator("MT19937", pos=2**28), r"`pos` .* in \[0, 624\], got 268435456"),
        (lambda: _generator("MT19937", pos=-1), r"`pos` .* in \[0, 624\], got -1"),
        (lambda: _generator("MT19937", key=np.zeros(3, np.uint32)), "`key` .* 624 numbers of the type uint32"),
        (lambda: _generator("Philox", buffer_pos=5), r"`buffer_pos` .* in \[0, 4\], got 5"),
        (lambda: _generator("SFC64", state=np.zeros(1, np.uint64)), "`state` .* 4 numbers"),
        (lambda: _legacy(2, 2**28), r"`pos` .* in \[0, 624\]"),
        (lambda: _legacy(1, "text"), "`key` .* 624 numbers"),
    ],
)
def test_random_states_that_would_break_numpy_are_refused(restore: Callable[[], None], named: str) -> None:
    before = global_states()
    with pytest.raises(ValueError, match=named):
        restore()
    set_global_states(before)
    for kind in ("PCG64", "PCG64DXSM", "MT19937", "Philox", "SFC64"):
        generator = np.random.Generator(getattr(np.random, kind)(0))
        generator.random(3, np.float32)
        assert generator_from(generator_state(generator)).random() == generator.random()  # type: ignore[union-attr]


def _a_model(**values: Any) -> None:
    venv = dummy("CartPole-v1", 1)
    venv.reset()
    state, _ = vec_env_state(venv)
    tree = {"environments": state, "random": global_states(), "resets": None, "model": values}
    _restore_environments(SimpleNamespace(), venv, tree)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("restore", "named"),
    [
        (lambda: _a_callback(best_model_save_path="anywhere"), "EvalCallback .* got 'best_model_save_path'"),
        (lambda: _a_callback(**{"eval_env.num_envs": 2}), "EvalCallback .* got 'eval_env.num_envs'"),
        (lambda: _a_wrapper(step=None), "TimeLimit .* only _elapsed_steps, got 'step'"),
        (lambda: _vectorised(0, venv=None), "VecNormalize .* got 'venv'"),
        (lambda: _vectorised(1, envs=[]), "DummyVecEnv .* only _seeds, got 'envs'"),
        (lambda: _mujoco("derived", qpos=0.0), "the simulation .* got 'qpos'"),
        (lambda: _mujoco("drawn", step=None), "InvertedPendulumEnv .* got 'step'"),
        (lambda: set_space_states(gym.make("CartPole-v1"), {"env": []}), "spaces .* got 'env'"),
        (lambda: _a_model(policy=None), "the model .* got 'policy'"),
    ],
)
def test_states_set_no_attributes_that_are_never_saved(restore: Callable[[], None], named: str) -> None:
    with pytest.raises(ValueError, match=f"The state of .*{named}"):
        restore()
