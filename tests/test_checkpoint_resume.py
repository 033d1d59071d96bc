"""Exact resume: a training that is killed and resumed in another process ends as the one that was never killed."""

import importlib.util
import json
import logging
import os
import random
import subprocess
import sys
from pathlib import Path
from typing import Any

import checkpoint_cases
import gymnasium as gym
import numpy as np
import pytest
import torch as th
from checkpoint_cases import CASES, Case
from gymnasium import spaces
from stable_baselines3.common.callbacks import (
    BaseCallback,
    CallbackList,
    ConvertCallback,
    EvalCallback,
    EveryNTimesteps,
    LogEveryNTimesteps,
    StopTrainingOnRewardThreshold,
)
from stable_baselines3.common.logger import Logger
from stable_baselines3.common.vec_env import VecEnv

from sb3_clipvf import ClipPPO
from sb3_clipvf.checkpoint import TrainingCheckpoint, newest_checkpoint, read_manifest
from sb3_clipvf.files import codec

HAS_MUJOCO = importlib.util.find_spec("mujoco") is not None
NAMES = [name for name in CASES if HAS_MUJOCO or name != "cheetah"]


@pytest.fixture(scope="module")
def resumed_elsewhere(tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[str, str]]:
    """All trainings are killed here and resumed by one fresh process: starting it takes longer than the trainings."""
    folder = tmp_path_factory.mktemp("killed")
    for name in NAMES:
        checkpoint_cases.killed(CASES[name], folder / name)
    program = Path(checkpoint_cases.__file__)
    environment = {**os.environ, "PYTHONPATH": str(program.parent.parent), "PYTHONHASHSEED": "7"}
    child = subprocess.run(
        [sys.executable, "-W", "ignore", str(program), str(folder), *NAMES],
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )
    if child.returncode != 0:
        raise RuntimeError(child.stderr)
    found: dict[str, dict[str, str]] = json.loads(child.stdout.splitlines()[-1])
    return found


@pytest.mark.parametrize("name", CASES)
def test_a_killed_training_ends_as_the_uninterrupted_one(
    name: str, tmp_path: Path, resumed_elsewhere: dict[str, dict[str, str]]
) -> None:
    if name not in NAMES:
        pytest.skip("needs mujoco")
    case: Case = CASES[name]
    assert resumed_elsewhere[name] == checkpoint_cases.uninterrupted(case, tmp_path)


def test_a_resumed_model_knows_what_remains(tmp_path: Path) -> None:
    case = CASES["native"]
    checkpoint_cases.killed(case, tmp_path)
    model = ClipPPO.resume(tmp_path / "checkpoints", case.make_env(tmp_path), device="cpu")
    assert (model.num_timesteps, model.remaining_timesteps) == (128, 192)
    model.learn(model.remaining_timesteps, reset_num_timesteps=False)
    assert (model.num_timesteps, model.remaining_timesteps) == (320, 0)


@pytest.mark.parametrize("steps", [64, 192, 640])
def test_schedules_keep_their_first_horizon(tmp_path: Path, steps: int, caplog: pytest.LogCaptureFixture) -> None:
    case = CASES["native"]
    checkpoint_cases.killed(case, tmp_path)
    model = ClipPPO.resume(tmp_path / "checkpoints", case.make_env(tmp_path), device="cpu")
    with caplog.at_level(logging.WARNING, "sb3_clipvf"):
        model.learn(steps, reset_num_timesteps=False, callback=case.callbacks(tmp_path))
    rate = model.policy.optimizer.param_groups[0]["lr"]
    assert rate == pytest.approx(0.01 * max(0.0, 1 - (128 + steps) / 320))
    assert caplog.messages == []


def test_starting_again_is_refused(tmp_path: Path) -> None:
    case = CASES["native"]
    checkpoint_cases.killed(case, tmp_path)
    model = ClipPPO.resume(tmp_path / "checkpoints", case.make_env(tmp_path), device="cpu")
    with pytest.raises(ValueError, match="`reset_num_timesteps` must be False in the first"):
        model.learn(64)


def test_drawing_between_resume_and_learn_changes_nothing(tmp_path: Path) -> None:
    case = CASES["native"]
    checkpoint_cases.killed(case, tmp_path)
    expected = checkpoint_cases.resumed(case, tmp_path)
    model = ClipPPO.resume(tmp_path / "checkpoints" / "checkpoint_128.zip", case.make_env(tmp_path), device="cpu")
    np.random.rand(3)
    th.rand(3)
    random.random()
    model.learn(model.remaining_timesteps, reset_num_timesteps=False, callback=case.callbacks(tmp_path))
    assert checkpoint_cases.digest(model, tmp_path) == expected


def test_arguments_may_be_changed(tmp_path: Path) -> None:
    case = CASES["autograd"]
    checkpoint_cases.killed(case, tmp_path)
    folder, env = tmp_path / "checkpoints", case.make_env(tmp_path)
    with pytest.raises(TypeError, match="`seed` must not be passed to `resume`, got 0.* random states"):
        ClipPPO.resume(folder, env, device="cpu", seed=0)
    model = ClipPPO.resume(folder, env, device="cpu", n_epochs=3, ent_coef=0.1, stats_window_size=2)
    assert (model.n_epochs, model.ent_coef, model.num_timesteps) == (3, 0.1, 128)
    assert model.ep_info_buffer.maxlen == 2


# ------------------------------------------------------------------ callbacks


def test_other_callbacks_are_named(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    case = CASES["evaluations"]
    checkpoint_cases.killed(case, tmp_path)
    model = ClipPPO.resume(tmp_path / "checkpoints", case.make_env(tmp_path), device="cpu")
    callbacks = [*case.callbacks(tmp_path)[::2], StopTrainingOnRewardThreshold(1.0)]
    with caplog.at_level(logging.WARNING, "sb3_clipvf"), pytest.raises(AssertionError):
        model.learn(64, reset_num_timesteps=False, callback=callbacks)
    gone, new = caplog.messages[:2]
    assert "EvalCallback" in gone
    assert "EvalCallback.callback.StopTrainingOnNoModelImprovement" in gone
    assert "StopTrainingOnRewardThreshold" in new
    assert "TrainingCheckpoint" not in gone + new


def test_lists_and_progress_bars_do_not_change_the_tree(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    case = CASES["native"]
    checkpoint_cases.killed(case, tmp_path)
    model = ClipPPO.resume(tmp_path / "checkpoints", case.make_env(tmp_path), device="cpu")
    checkpoint, kill = case.callbacks(tmp_path)
    callback = CallbackList([CallbackList([checkpoint]), kill])
    with caplog.at_level(logging.WARNING, "sb3_clipvf"):
        model.learn(64, reset_num_timesteps=False, callback=callback, progress_bar=True)
    assert caplog.messages == []


class Forgetful(BaseCallback):
    """Keeps something, without methods for its state."""

    def __init__(self) -> None:
        super().__init__()
        self.kept = 0

    def _on_step(self) -> bool:
        self.kept += 1
        return True


class ForgetfulEvaluation(EvalCallback):
    """Keeps more than its base class, without methods for its state."""

    def __init__(self, env: VecEnv) -> None:
        super().__init__(env, eval_freq=10**6)
        self.kept = 0


class Plain(BaseCallback):
    """Keeps nothing."""

    def _on_step(self) -> bool:
        return True


def test_callbacks_that_may_keep_more_are_named(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    case = CASES["native"]
    callbacks = [Plain(), Forgetful(), ForgetfulEvaluation(case.make_env(tmp_path)), lambda locals_, globals_: True]
    callbacks = [
        callback if isinstance(callback, BaseCallback) else ConvertCallback(callback) for callback in callbacks
    ]
    with caplog.at_level(logging.WARNING, "sb3_clipvf"):
        case.model(tmp_path).learn(128, callback=[TrainingCheckpoint(64, tmp_path / "checkpoints"), *callbacks])
    logged = [text for text in caplog.messages if "training_state()" in text]
    assert [name for text in logged for name in ("Forgetful ", "ForgetfulEvaluation ") if name in text] == [
        "Forgetful ",
        "ForgetfulEvaluation ",
    ]
    assert len(logged) == 2  # once, though there were several checkpoints
    manifest = read_manifest(tmp_path / "checkpoints" / "checkpoint_128.zip")
    assert len(manifest.differences) == 2


class Drawing(BaseCallback):
    """Draws random numbers when a training starts."""

    def _on_training_start(self) -> None:
        np.random.rand(), random.random(), th.rand(1), self.model.action_space.sample()

    def _on_step(self) -> bool:
        return True


class Counting(BaseCallback):
    """Sets its state when a training starts."""

    def _on_training_start(self) -> None:
        self.count, self.n_calls = 0, 0

    def _on_step(self) -> bool:
        self.count += 1
        return True

    def count_call(self, locals_: dict[str, Any], globals_: dict[str, Any]) -> bool:
        return True

    def training_state(self) -> dict[str, Any]:
        return {"count": self.count}

    def load_training_state(self, state: dict[str, Any]) -> None:
        self.count = state["count"]


@pytest.mark.parametrize("kind", [Drawing, Counting])
def test_what_callbacks_do_at_the_start_does_not_change_a_resumed_training(
    kind: type[BaseCallback], tmp_path: Path
) -> None:
    made: list[Any] = []

    def make(folder: Path) -> list[BaseCallback]:
        made.append(kind())
        return made[-1:]

    case = Case(CASES["native"].make_env, make_callbacks=make)
    checkpoint_cases.killed(case, tmp_path / "killed")
    assert checkpoint_cases.resumed(case, tmp_path / "killed") == checkpoint_cases.uninterrupted(
        case, tmp_path / "whole"
    )
    resumed, whole = ({name: vars(callback).get(name) for name in ("count", "n_calls")} for callback in made[-2:])
    assert resumed == whole


def test_a_finished_training_that_is_resumed_writes_the_same_state(tmp_path: Path) -> None:
    def callbacks(folder: Path) -> list[BaseCallback]:
        return [TrainingCheckpoint(64, folder, keep_best=False), Drawing(), Counting()]

    case, first_folder, second_folder = CASES["native"], tmp_path / "first", tmp_path / "second"
    case.model(tmp_path).learn(64, callback=callbacks(first_folder))
    model = ClipPPO.resume(first_folder, case.make_env(tmp_path), device="cpu")
    model.learn(model.remaining_timesteps, reset_num_timesteps=False, callback=callbacks(second_folder))
    trees = [newest_checkpoint(folder).tree for folder in (first_folder, second_folder)]
    first, second = [[codec.to_bytes(tree[name]) for name in ("random", "spaces", "callbacks")] for tree in trees]
    assert first == second


class Phases(CallbackList):
    """A list with a state of its own."""

    def __init__(self, callbacks: list[BaseCallback]) -> None:
        super().__init__(callbacks)
        self.phase = 0


class Levels(EveryNTimesteps):
    """SB3's callback with a count that is set outside of ``__init__``."""

    level = 0

    def _on_step(self) -> bool:
        self.level += 1
        return super()._on_step()


class Counted:
    """Adds a count to any callback."""

    count = 0

    def update_locals(self, locals_: dict[str, Any]) -> None:
        self.count += 1
        super().update_locals(locals_)  # type: ignore[misc]


class CountedPlain(Counted, Plain):
    """A class of one's own with it."""


class CountedEveryNTimesteps(Counted, EveryNTimesteps):
    """SB3's class with it."""


class Unstorable(Plain):
    """Its state is not of the types that files hold."""

    def training_state(self) -> set[int]:
        return {1, 2}

    def load_training_state(self, state: set[int]) -> None:
        raise NotImplementedError


class Renamed(EveryNTimesteps):
    """SB3's class with no method of its own."""

    name = "levels"


class SavedPhases(Phases):
    """The same list, with methods for its state."""

    def training_state(self) -> dict[str, Any]:
        return {"phase": self.phase}

    def load_training_state(self, state: dict[str, Any]) -> None:
        self.phase = state["phase"]


def with_attribute(locals_: dict[str, Any], globals_: dict[str, Any]) -> bool:
    with_attribute.count = getattr(with_attribute, "count", 0) + 1
    return True


def with_global(locals_: dict[str, Any], globals_: dict[str, Any]) -> bool:
    global calls
    calls += 1
    return True


calls = 0
counting = Counting()


@pytest.mark.parametrize(
    ("callback", "name"),
    [
        (Phases([Plain()]), "Phases"),
        (Levels(50, Plain()), "Levels"),
        (CountedPlain(), "CountedPlain"),
        (CountedEveryNTimesteps(50, Plain()), "CountedEveryNTimesteps"),
        (Unstorable(), "Unstorable"),
        (Renamed(50, Plain()), None),
        (with_attribute, "with_attribute"),
        (with_global, "with_global"),
        (lambda locals_, globals_, seen=[]: seen.append(1) or True, "<lambda>"),
        (Counting().count_call, "Counting.count_call"),
        (CallbackList([counting, ConvertCallback(counting.count_call)]), None),
        (LogEveryNTimesteps(40), None),
        (SavedPhases([Plain()]), None),
        (CallbackList([Plain()]), None),
        (lambda locals_, globals_: locals_["self"].num_timesteps < 10**6, None),
    ],
    ids=[
        "list",
        "derived",
        "own and another",
        "derived from two",
        "unstorable",
        "renamed",
        "attribute",
        "global",
        "default",
        "method",
        "saved method",
        "SB3's method",
        "saved list",
        "SB3's list",
        "none",
    ],
)
def test_lists_and_functions_with_a_state_are_named(callback: Any, name: str | None, tmp_path: Path) -> None:
    callback = callback if isinstance(callback, BaseCallback) else ConvertCallback(callback)
    CASES["native"].model(tmp_path).learn(64, callback=[TrainingCheckpoint(64, tmp_path), callback])
    differences = read_manifest(tmp_path / "checkpoint_64.zip").differences
    assert [text for text in differences if name is None or f"{name} " in text] == list(differences)
    assert len(differences) == (name is not None)


def test_the_state_of_a_list_continues(tmp_path: Path) -> None:
    case, before, after = CASES["native"], SavedPhases([Plain()]), SavedPhases([Plain()])
    before.phase = 3
    case.model(tmp_path).learn(64, callback=[TrainingCheckpoint(64, tmp_path), before])
    model = ClipPPO.resume(tmp_path, case.make_env(tmp_path), device="cpu")
    model.learn(64, reset_num_timesteps=False, callback=[TrainingCheckpoint(64, tmp_path), after])
    assert after.phase == 3


def test_a_training_without_callbacks_saves_no_callback_state(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    case = CASES["native"]
    case.model(tmp_path).learn(64, callback=TrainingCheckpoint(64, tmp_path / "checkpoints"))
    model = ClipPPO.resume(tmp_path / "checkpoints", case.make_env(tmp_path), device="cpu")
    with caplog.at_level(logging.WARNING, "sb3_clipvf"):
        model.learn(64, reset_num_timesteps=False)
    (text,) = [text for text in caplog.messages if "allback" in text]
    assert "are missing: TrainingCheckpoint." in text


# ------------------------------------------------------------------ libraries that round


class Pictures(gym.Env[np.ndarray, int]):
    """Noise."""

    observation_space = spaces.Box(0, 255, (36, 36, 1), np.uint8)
    action_space = spaces.Discrete(2)

    def reset(self, *, seed: int | None = None, options: dict[str, Any] | None = None) -> tuple[np.ndarray, dict]:
        super().reset(seed=seed)
        return self.np_random.integers(0, 255, (36, 36, 1), dtype=np.uint8), {}

    def step(self, action: int) -> tuple[np.ndarray, float, bool, bool, dict]:
        return self.np_random.integers(0, 255, (36, 36, 1), dtype=np.uint8), 1.0, False, False, {}

    def get_training_state(self) -> None:
        """Nothing but its generator."""

    def set_training_state(self, state: None) -> None:
        """Nothing."""


def test_convolutions_are_reported(tmp_path: Path) -> None:
    model = ClipPPO("CnnPolicy", Pictures(), n_steps=8, batch_size=8, n_epochs=1, device="cpu")
    model.learn(8, callback=TrainingCheckpoint(8, tmp_path))
    (difference,) = read_manifest(tmp_path / "checkpoint_8.zip").differences
    assert difference.startswith("Sums of convolutions")


# ------------------------------------------------------------------ TensorBoard


def test_the_tensorboard_run_continues_and_shows_each_step_once(tmp_path: Path) -> None:
    accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    logs = tmp_path / "logs"
    case = Case(CASES["native"].make_env, {"tensorboard_log": str(logs)})
    checkpoint_cases.killed(case, tmp_path)
    case.model(tmp_path).learn(64, tb_log_name="ClipPPO")  # another run, which began later
    checkpoint_cases.resumed(case, tmp_path)
    assert sorted(path.name for path in logs.iterdir()) == ["ClipPPO_1", "ClipPPO_2"]
    events = accumulator.EventAccumulator(str(logs / "ClipPPO_1")).Reload()
    assert [event.step for event in events.Scalars("time/rollout_seconds")] == [64, 128, 192, 256, 320]
    # Those of an update are written after the next rollout: at 192, what the checkpoint of 128 had not written yet.
    assert [event.step for event in events.Scalars("train/loss")] == [128, 192, 256, 320]


@pytest.mark.parametrize("name", ["CartPole/run", "a/b/run"])
def test_a_tensorboard_run_in_a_folder_below_continues(name: str, tmp_path: Path) -> None:
    pytest.importorskip("tensorboard")
    logs = tmp_path / "logs"
    case = Case(CASES["native"].make_env, {"tensorboard_log": str(logs)})
    case.model(tmp_path).learn(64, callback=TrainingCheckpoint(64, tmp_path / "checkpoints"), tb_log_name=name)
    model = ClipPPO.resume(tmp_path / "checkpoints", case.make_env(tmp_path), device="cpu")
    model.learn(64, reset_num_timesteps=False, tb_log_name=name)
    assert {path.parent for path in logs.rglob("events*")} == {logs / f"{name}_1"}


@pytest.mark.parametrize("is_set", [False, True])
def test_a_logger_that_is_set_after_a_resume_is_kept(is_set: bool, tmp_path: Path) -> None:
    pytest.importorskip("tensorboard")
    case = Case(CASES["native"].make_env, {"tensorboard_log": str(tmp_path / "logs")})
    case.model(tmp_path).learn(64, callback=TrainingCheckpoint(64, tmp_path / "checkpoints"))
    model = ClipPPO.resume(tmp_path / "checkpoints", case.make_env(tmp_path), device="cpu")
    if is_set:
        model.set_logger(Logger(str(tmp_path / "own"), []))
    first = model.logger
    for _ in range(2):
        model.learn(64, reset_num_timesteps=False)
    assert (model.logger is first) is is_set


def test_another_folder_for_tensorboard_is_used(tmp_path: Path) -> None:
    pytest.importorskip("tensorboard")
    case = Case(CASES["native"].make_env, {"tensorboard_log": str(tmp_path / "logs")})
    checkpoint_cases.killed(case, tmp_path)
    other = str(tmp_path / "other")
    env = case.make_env(tmp_path)
    model = ClipPPO.resume(tmp_path / "checkpoints", env, device="cpu", tensorboard_log=other)
    model.learn(64, reset_num_timesteps=False)
    assert [path.parent for path in (tmp_path / "other").rglob("events*")] == [tmp_path / "other" / "ClipPPO_0"]


def test_numpy_numbers_in_the_optimizer_are_saved_as_plain_numbers(tmp_path: Path) -> None:
    kwargs = {"weight_decay": np.float64(0.01), "betas": (np.float64(0.5), 0.999)}
    sizes: dict[str, Any] = {"n_steps": 8, "batch_size": 8, "n_epochs": 1, "device": "cpu", "engine": "autograd"}
    model = ClipPPO("MlpPolicy", "CartPole-v1", policy_kwargs={"net_arch": [4], "optimizer_kwargs": kwargs}, **sizes)
    model.policy.optimizer.param_groups[0]["eps"] = np.float32(0.5)
    model.learn(16, callback=TrainingCheckpoint(8, tmp_path / "checkpoints"))
    model.save(tmp_path / "model")
    resumed = ClipPPO.resume(tmp_path / "checkpoints", gym.make("CartPole-v1"), device="cpu")
    for copy in (resumed, ClipPPO.load(tmp_path / "model", device="cpu")):
        group = copy.policy.optimizer.param_groups[0]
        assert (group["weight_decay"], group["betas"], group["eps"]) == (0.01, (0.5, 0.999), 0.5)
        assert {type(value) for value in (group["weight_decay"], *group["betas"], group["eps"])} == {float}
