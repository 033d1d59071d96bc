"""Faults around a training: what the user sees, that nothing waits, and that the last checkpoint is whole."""

import contextlib
import copy
import errno
import os
import pickle
import signal
import threading
from collections.abc import Callable, Iterator
from functools import partial
from multiprocessing import connection
from pathlib import Path
from typing import Any

import gymnasium as gym
import numpy as np
import pytest
import torch as th
from gymnasium import spaces
from stable_baselines3 import PPO
from stable_baselines3.common.callbacks import BaseCallback, CallbackList
from stable_baselines3.common.vec_env import DummyVecEnv, SubprocVecEnv, VecEnv, VecEnvWrapper, VecNormalize

from sb3_clipvf import SB3_EQUIVALENT, ClipPPO
from sb3_clipvf.checkpoint import TrainingCheckpoint, newest_checkpoint
from sb3_clipvf.common.nonfinite import NonFiniteError
from sb3_clipvf.envs import FastDummyVecEnv, FastVecNormalize
from sb3_clipvf.envs.shapes import StepCheck
from sb3_clipvf.guards.workers import WorkerDiedError, unblock_dead_workers

ENGINES = ("native", "autograd")
SPACE = spaces.Box(-1, 1, (4,))
Step = tuple[Any, Any, Any, Any, dict[str, Any]]


class BrokenError(Exception):
    """What goes wrong in an environment or a callback."""


def broken(*_: Any) -> Any:
    raise BrokenError("the user's own words")


class Faulty(gym.Env[Any, Any]):
    """Episodes of 9 steps, which go wrong where a test says so, and tell their state."""

    action_space = spaces.Discrete(2)

    def __init__(
        self, change: Callable[[Step], Step] = lambda step: step, at: int = 0, space: spaces.Space[Any] = SPACE
    ) -> None:
        self.change, self.at, self.observation_space = change, at, space
        self.n = self.resets = 0

    def _step(self) -> Step:
        step: Step = (np.full(4, (self.n % 7) / 7, np.float32), 1.0, False, self.n % 9 == 0, {})
        return self.change(step) if self.n >= self.at else step

    def reset(self, *, seed: int | None = None, options: dict[str, Any] | None = None) -> tuple[Any, dict[str, Any]]:
        super().reset(seed=seed)
        self.resets += 1
        return self._step()[0], {}

    def step(self, action: Any) -> Step:
        self.n += 1
        return self._step()

    def get_training_state(self) -> dict[str, Any]:
        return {"n": self.n}

    def set_training_state(self, state: dict[str, Any]) -> None:
        self.n = state["n"]


class BrokenReset(Faulty):
    """The reset after the 36th step fails, and there is nothing wrong with a resumed one."""

    def reset(self, **kwargs: Any) -> tuple[Any, dict[str, Any]]:
        return broken() if self.n == 36 and self.change is broken else super().reset(**kwargs)


def make(change: Callable[[Step], Step] | None = None, at: int = 0, cls: Any = DummyVecEnv, bad: int = 1) -> VecEnv:
    """Two environments, one of them bad."""
    return cls([partial(Faulty, change, at) if change and index == bad else Faulty for index in range(2)])


def model_of(venv: Any, engine: str = "native", **kwargs: Any) -> ClipPPO:
    arguments = {"n_steps": 16, "batch_size": 16, "n_epochs": 1, "seed": 0, "device": "cpu", "engine": engine}
    return ClipPPO("MlpPolicy", venv, **{**arguments, **kwargs})


def whole(folder: Path, venv: VecEnv, num_timesteps: int = 32) -> None:
    """The last checkpoint is that of the given step, and a training goes on from it."""
    assert newest_checkpoint(folder).manifest.num_timesteps == num_timesteps
    assert not [path for path in folder.iterdir() if path.suffix == ".tmp"]
    model = ClipPPO.resume(folder, venv, device="cpu")
    model.learn(model.remaining_timesteps, reset_num_timesteps=False, callback=TrainingCheckpoint(32, folder))
    assert model.num_timesteps == 96
    venv.close()


def notes(error: BaseException) -> str:
    return "\n".join(getattr(error, "__notes__", ()))


@contextlib.contextmanager
def within(seconds: int) -> Iterator[None]:
    """Nothing waits for ever; a test that fails does not either."""

    def late(*_: Any) -> None:
        pytest.fail("it waits")  # a TimeoutError would be an OSError, which a broken pipe is as well

    before = signal.signal(signal.SIGALRM, late)
    signal.alarm(seconds)
    try:
        yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)


class Call(BaseCallback):
    """Calls a function at one step; what it returns says whether the training goes on."""

    def __init__(self, function: Callable[[], Any], at: int = 40) -> None:
        super().__init__()
        self.function, self.at = function, at

    def _on_step(self) -> bool:
        return self.num_timesteps != self.at or bool(self.function())


# ------------------------------------------------------------------ errors of the user's own code


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("cls", [DummyVecEnv, FastDummyVecEnv])
def test_an_error_in_step_comes_through_with_the_way_on(engine: str, cls: type[DummyVecEnv], tmp_path: Path) -> None:
    with pytest.raises(BrokenError) as caught:
        model_of(make(broken, 20, cls), engine).learn(96, callback=TrainingCheckpoint(32, tmp_path))
    assert str(caught.value) == "the user's own words"
    assert caught.traceback[-1].name == "broken"
    told = notes(caught.value)
    assert "ended at num_timesteps=38 of 96" in told
    assert f"Its last complete checkpoint is {tmp_path / 'checkpoint_32.zip'}." in told
    assert f"ClipPPO.resume({str(tmp_path)!r}, env)" in told
    whole(tmp_path, make(cls=cls))


@pytest.mark.parametrize("cls", [DummyVecEnv, FastDummyVecEnv])
def test_an_error_in_reset_comes_through_with_the_way_on(cls: type[DummyVecEnv], tmp_path: Path) -> None:
    with pytest.raises(BrokenError) as caught:
        venv = cls([Faulty, partial(BrokenReset, broken, 99)])
        model_of(venv).learn(96, callback=TrainingCheckpoint(32, tmp_path))
    assert "num_timesteps=70 of 96" in notes(caught.value)
    whole(tmp_path, cls([Faulty, BrokenReset]), 64)


def test_an_error_in_a_callback_comes_through_with_the_way_on(tmp_path: Path) -> None:
    lists = CallbackList([CallbackList([TrainingCheckpoint(32, tmp_path)]), Call(broken)])
    with pytest.raises(BrokenError) as caught:
        model_of(make()).learn(96, callback=lists)
    assert "num_timesteps=40 of 96" in notes(caught.value)
    assert "checkpoint_32.zip" in notes(caught.value)
    whole(tmp_path, make())


def test_what_was_learned_since_the_last_checkpoint_is_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(
        "sb3_clipvf.checkpoint.training_checkpoint.COPY_SHARE", 1e9
    )  # a copy in memory after each update
    with pytest.raises(BrokenError) as caught:
        model_of(make()).learn(96, callback=[TrainingCheckpoint(10**6, tmp_path), Call(broken, 70)])
    assert "checkpoint_64.zip" in notes(caught.value)
    assert "BrokenError ends the training. Its last checkpoint: " in caplog.text
    whole(tmp_path, make(), 64)


def test_a_disk_that_is_full_then_does_not_hide_the_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sb3_clipvf.checkpoint.training_checkpoint.COPY_SHARE", 1e9)

    def full(*_: Any) -> bool:
        monkeypatch.setattr(os, "fsync", lambda _: (_ for _ in ()).throw(OSError(errno.ENOSPC, "No space left")))
        return broken()

    callback = TrainingCheckpoint(10**6, tmp_path, on_error="raise")
    with pytest.raises(BrokenError) as caught:
        model_of(make()).learn(96, callback=[callback, Call(full, 90)])
    monkeypatch.undo()
    assert "The last update could not be saved: " in notes(caught.value)
    assert "No space left" in notes(caught.value)
    assert f"There is no checkpoint yet in {tmp_path}: start again." in notes(caught.value)
    assert list(tmp_path.iterdir()) == []


def test_without_checkpoints_the_note_says_what_is_left(tmp_path: Path) -> None:
    model = model_of(make())
    with pytest.raises(BrokenError) as caught:
        model.learn(96, callback=Call(broken))
    assert "No TrainingCheckpoint was among its callbacks" in notes(caught.value)
    model.save(tmp_path / "model")
    with pytest.raises(BrokenError) as caught:
        model_of(make()).learn(96, callback=[TrainingCheckpoint(32, tmp_path), Call(broken, 10)])
    assert f"There is no checkpoint yet in {tmp_path}" in notes(caught.value)


def test_errors_at_the_door_are_no_end_of_a_training(tmp_path: Path) -> None:
    model_of(make()).learn(32, callback=TrainingCheckpoint(32, tmp_path))
    with pytest.raises(ValueError, match="another training") as caught:
        model_of(make()).learn(32, callback=TrainingCheckpoint(32, tmp_path))
    assert notes(caught.value) == ""


@pytest.mark.parametrize("engine", ENGINES)
def test_a_callback_that_says_no_ends_the_training_and_a_later_one_goes_on(engine: str, tmp_path: Path) -> None:
    model, venv = model_of(make(), engine), make()
    model.learn(96, callback=[TrainingCheckpoint(32, tmp_path), Call(lambda: False, 50)])
    assert model.num_timesteps == 50
    resumed = ClipPPO.resume(tmp_path, venv, device="cpu")
    for training in (model, resumed):
        training.learn(46, reset_num_timesteps=False)
        assert training.num_timesteps == 114
    for ours, theirs in zip(model.policy.parameters(), resumed.policy.parameters(), strict=True):
        assert th.equal(ours, theirs)


# ------------------------------------------------------------------ processes that die


def kill_itself(step: Step) -> Step:
    os.kill(os.getpid(), signal.SIGKILL)
    return step


def exit_itself(step: Step) -> Step:
    os._exit(3)


@pytest.mark.parametrize(
    ("fault", "bad", "code", "text", "way_out"),
    [
        (kill_itself, 1, -9, "environment 1 was killed by SIGKILL", "memory runs out"),
        (kill_itself, 0, -9, "environment 0 was killed by SIGKILL", "memory runs out"),
        (exit_itself, 1, 3, "environment 1 ended with exit code 3", "DummyVecEnv"),
        (broken, 1, 1, "environment 1 ended with exit code 1", "its traceback is above, in the error output"),
    ],
)
def test_a_process_that_dies_ends_the_training(
    fault: Any, bad: int, code: int, text: str, way_out: str, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    # Forked processes hold the pipes of later ones open, so that without help the death of number 1 goes unseen.
    fork: Any = partial(SubprocVecEnv, start_method="fork")
    n_threads = threading.active_count()
    venv = make(fault, 20, fork, bad)
    with within(20), pytest.raises(WorkerDiedError, match=text) as caught:
        model_of(venv).learn(96, callback=TrainingCheckpoint(32, tmp_path))
    assert caught.value.exit_codes == {bad: code}
    assert way_out in str(caught.value)
    assert "num_timesteps=38 of 96" in notes(caught.value)
    assert "checkpoint_32.zip" in notes(caught.value)
    assert (fault is broken) == ("the user's own words" in capfd.readouterr().err)
    assert not any(process.is_alive() for process in venv.processes)
    assert threading.active_count() == n_threads
    with within(5):
        venv.close()
        with pytest.raises(ValueError, match="`env` must be open, got a SubprocVecEnv whose processes have ended"):
            model_of(venv).learn(32)
        whole(tmp_path, make(cls=fork))


def stay(step: Step) -> Step:
    """Hears neither the end of its pipe nor SIGTERM."""
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    while True:
        signal.pause()


def test_a_process_that_does_not_end_is_made_to(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sb3_clipvf.guards.workers.GRACE", 0.5)
    venv = SubprocVecEnv([partial(Faulty, kill_itself, 20), partial(Faulty, stay, 20)], start_method="fork")
    with within(10), pytest.raises(WorkerDiedError) as caught:
        model_of(venv).learn(96)
    assert caught.value.exit_codes == {0: -9}
    assert [process.exitcode for process in venv.processes] == [-9, -9]


def test_processes_that_were_not_forked_are_not_watched(monkeypatch: pytest.MonkeyPatch) -> None:
    venv = SubprocVecEnv([partial(Faulty, kill_itself, 20), *[Faulty] * 2], start_method="fork")

    def few(handles: Any, timeout: float | None = None) -> Any:
        if len(handles) > 2:
            raise ValueError("too many handles")  # Windows waits for 63 at most
        return wait(handles, timeout)

    wait = connection.wait
    monkeypatch.setattr(connection, "wait", few)
    # As on Windows; the end of the first process, which no other one holds the pipe of, is seen without help.
    monkeypatch.setattr("sb3_clipvf.guards.workers._FORKED", ())
    monkeypatch.delattr(signal, "SIGKILL")
    n_threads = threading.active_count()
    with unblock_dead_workers(venv):
        assert threading.active_count() == n_threads
    with within(10), pytest.raises(WorkerDiedError) as caught:
        model_of(venv).learn(96)
    assert caught.value.exit_codes == {0: -9}
    assert "memory runs out" in str(caught.value)
    assert not any(process.is_alive() for process in venv.processes)


def test_the_error_of_a_dead_process_can_be_pickled() -> None:
    error = WorkerDiedError("its message", {1: -9})
    error.add_note("its note")
    again = pickle.loads(pickle.dumps(error))
    assert (str(again), again.exit_codes, notes(again)) == ("its message", {1: -9}, "its note")


def test_an_error_elsewhere_leaves_the_processes_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sb3_clipvf.guards.workers.GRACE", 0.1)
    venv = make(cls=partial(SubprocVecEnv, start_method="fork"))
    for error in (BrokenError, EOFError):

        def fail(error: type[Exception] = error) -> None:
            raise error("elsewhere")

        with pytest.raises(error, match="elsewhere"):
            model_of(venv).learn(96, callback=Call(fail))
    model_of(venv).learn(32)
    venv.close()


# ------------------------------------------------------------------ what environments give


def gives(obs: Any) -> Callable[[Step], Step]:
    return lambda step: (obs, *step[1:])


@pytest.mark.parametrize("at", [0, 20])
@pytest.mark.parametrize("cls", [DummyVecEnv, FastDummyVecEnv])
@pytest.mark.parametrize(
    ("obs", "shape"),
    [
        (np.zeros(1, np.float32), "(1,)"),
        (0.5, "()"),
        (np.zeros((4, 1)), "(4, 1)"),
        (np.zeros(3), "(3,)"),
        ([[0.0] * 4] * 2, "(2, 4)"),
        (None, "()"),
    ],
)
def test_observations_that_numpy_would_stretch(
    obs: Any, shape: str, cls: type[DummyVecEnv], at: int, tmp_path: Path
) -> None:
    venv = make(gives(obs), at, cls)
    with pytest.raises(ValueError, match="must return observations of its space's shape") as caught:
        model_of(venv).learn(96, callback=TrainingCheckpoint(32, tmp_path))
    assert f"shape (4,), got {shape} from environment 1. Fix it" in str(caught.value)
    assert venv.envs[1].n == at  # at once, not at the end of the episode
    assert "_save_obs" not in vars(venv)
    if at:
        whole(tmp_path, make(cls=cls))


@pytest.mark.parametrize("cls", [DummyVecEnv, FastDummyVecEnv])
def test_one_key_of_a_dict_of_another_shape(cls: type[DummyVecEnv]) -> None:
    space = spaces.Dict({"a": spaces.Box(-1, 1, (2,)), "b": spaces.Box(-1, 1, (3,))})
    venv = cls([partial(Faulty, gives({"a": np.zeros(2), "b": np.zeros(1)}), space=space)])
    with pytest.raises(ValueError, match=r"observations\['b'\] of its space's shape \(3,\), got \(1,\)"):
        ClipPPO("MultiInputPolicy", venv, n_steps=16, batch_size=16).learn(16)


@pytest.mark.parametrize("at", [0, 20])
@pytest.mark.parametrize("cls", [VecNormalize, FastVecNormalize])
def test_observations_that_a_wrapper_would_stretch(cls: type[VecNormalize], at: int) -> None:
    processes = SubprocVecEnv([partial(Faulty, gives(np.zeros(1, np.float32)), at)] * 2, start_method="fork")
    venv = cls(processes)
    text = r"`env` must return observations of its space's shape, \(2, 4\) for 2 environments, got \(2, 1\)"
    with pytest.raises(ValueError, match=text):
        model_of(venv).learn(96)
    assert venv.obs_rms.mean.shape == (4,)
    assert round(venv.obs_rms.count) == 2 * at  # the reset, and the steps before the faulty one
    assert not {"reset", "step_wait"} & vars(processes).keys()
    venv.close()


class ShortEnd(Faulty):
    """Its final observations alone are of another shape."""

    def step(self, action: Any) -> Step:
        obs, reward, terminated, truncated, info = super().step(action)
        return np.zeros(1) if truncated else obs, reward, terminated, truncated, info


@pytest.mark.parametrize("cls", [DummyVecEnv, FastDummyVecEnv])
def test_final_observations_that_a_wrapper_would_stretch(cls: type[DummyVecEnv]) -> None:
    with pytest.raises(ValueError, match=r"shape \(4,\), got \(1,\) from environment 1"):
        model_of(FastVecNormalize(cls([Faulty, ShortEnd]))).learn(96)


class Part(DummyVecEnv):
    """Resets single environments by itself, as some that run on a GPU do, and has a step of its own."""

    def reset(self, indices: Any = None) -> Any:
        obs = super().reset()
        return obs if indices is None else obs[indices]

    def step_wait(self) -> Any:
        self.reset(np.array([1]))
        return super().step_wait()


def test_methods_of_others_go_on_as_they_were() -> None:
    venv, n_calls = Part([Faulty] * 2), []
    original = venv.step_wait
    venv.step_wait = lambda: (n_calls.append(1), original())[1]
    own = venv.step_wait
    model_of(venv).learn(32)
    assert len(n_calls) == 16
    assert venv.step_wait is own


class Bent(VecEnvWrapper):
    """Changes what environments of another kind would give: a step of all, and the first observations."""

    def __init__(self, venv: VecEnv, change: Callable[..., Any], at: int = 20) -> None:
        super().__init__(venv)
        self.change, self.at, self.n = change, at, 0

    def reset(self) -> Any:
        obs = self.venv.reset()
        return obs if self.at else self.change(obs, *[np.zeros(2)] * 2, [{}] * 2)[0]

    def step_wait(self) -> Any:
        self.n += 1
        step = self.venv.step_wait()
        return step if self.n < self.at else self.change(*step)


OBS = "`env` must return observations"


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize(
    ("change", "error", "text"),
    [
        (lambda o, r, d, i: (np.zeros((2, 3), o.dtype), r, d, i), ValueError, f"{OBS} of its space's shape, (2, 4)"),
        (lambda o, r, d, i: (np.zeros((2, 5), o.dtype), r, d, i), ValueError, "(2, 4) for 2 environments, got (2, 5)"),
        (lambda o, r, d, i: (o.reshape(2, 2, 2), r, d, i), ValueError, "got (2, 2, 2)"),
        (lambda o, r, d, i: (o[:1], r, d, i), ValueError, "got (1, 4)"),
        (lambda o, r, d, i: (o[0], r, d, i), ValueError, "got (4,)"),
        (
            lambda o, r, d, i: (o.tolist(), r, d, i),
            TypeError,
            f"{OBS} as a NumPy array of numbers, got one of type list",
        ),
        (lambda o, r, d, i: (o.astype(object), r, d, i), TypeError, "got one of object"),
        (lambda o, r, d, i: (o.astype(complex), r, d, i), TypeError, "got one of complex128"),
        (lambda o, r, d, i: (o, r[:1], d, i), ValueError, "`env` must return rewards of the shape (2,), got (1,)"),
        (lambda o, r, d, i: (o, r[:, None], d, i), ValueError, "rewards of the shape (2,), got (2, 1)"),
        (lambda o, r, d, i: (o, np.array([1.0, None]), d, i), TypeError, "`env` must return numbers as rewards"),
        (lambda o, r, d, i: (o, r, d[:1], i), ValueError, "`env` must return dones of the shape (2,), got (1,)"),
        (lambda o, r, d, i: (o, r, False, i), ValueError, "dones of the shape (2,), got ()"),
    ],
)
def test_steps_that_do_not_fit(change: Any, error: type[Exception], text: str, engine: str, tmp_path: Path) -> None:
    with pytest.raises(error) as caught:
        model_of(Bent(make(), change), engine).learn(96, callback=TrainingCheckpoint(32, tmp_path))
    assert text in str(caught.value)
    assert "checkpoint_32.zip" in notes(caught.value)
    if OBS in str(caught.value):
        with pytest.raises(error) as caught:
            model_of(Bent(make(), change, at=0), engine).learn(96)
        assert text in str(caught.value)


def test_final_observations_of_another_shape() -> None:
    check, obs, dones = StepCheck(SPACE, 2), np.zeros((2, 4), np.float32), np.array([False, True])
    infos: Any = [{}, {"terminal_observation": np.zeros(3), "TimeLimit.truncated": True}]
    with pytest.raises(ValueError, match=r"shape \(4,\), got \(3,\) from environment 1"):
        check((obs, np.zeros(2), dones, infos))
    infos[1]["TimeLimit.truncated"] = False  # then nobody reads it
    check((obs, np.zeros(2), dones, infos))


@pytest.mark.parametrize("engine", ENGINES)
def test_fractions_in_a_space_of_whole_numbers(engine: str) -> None:
    space = spaces.Box(0, 9, (4,), np.uint8)

    def change(obs: Any, *others: Any) -> Any:
        return (obs + 0.5, *others)

    with pytest.raises(
        ValueError, match="must return whole numbers as observations, since its space has the dtype uint8"
    ):
        model_of(Bent(DummyVecEnv([partial(Faulty, space=space)] * 2), change, at=3), engine).learn(32)

    def floats(obs: Any, *others: Any) -> Any:
        return (obs.astype(np.float64), *others)

    model_of(Bent(DummyVecEnv([partial(Faulty, space=space)] * 2), floats, at=3), engine).learn(32)


@pytest.mark.parametrize("bad", [np.nan, np.inf])
@pytest.mark.parametrize(
    ("space", "engine"),
    [
        (spaces.Box(0, 9, (4,), np.uint8), "native"),
        (spaces.Box(0, 9, (4,), np.uint8), "autograd"),
        (spaces.MultiDiscrete([2] * 4), "autograd"),
    ],
    ids=["box-native", "box-autograd", "discrete-autograd"],
)
def test_numbers_that_are_not_finite_in_a_space_of_whole_numbers(
    space: spaces.Space[Any], bad: float, engine: str
) -> None:
    def change(obs: Any, *others: Any) -> Any:
        return (np.where([[False] * 4, [True] * 4], bad, obs), *others)

    with pytest.raises(NonFiniteError) as caught:
        model_of(Bent(DummyVecEnv([partial(Faulty, space=space)] * 2), change, at=3), engine).learn(32)
    assert (caught.value.what, caught.value.env_index) == ("observation", 1)


def test_each_key_of_a_batch_is_checked() -> None:
    space = spaces.Dict({"a": spaces.Box(-1, 1, (2,)), "b": spaces.Box(0, 9, (3,), np.uint8), "c": spaces.Discrete(3)})
    check = StepCheck(space, 2)
    good = {"a": np.full((2, 2), 0.5), "b": np.zeros((2, 3), np.float32), "c": np.zeros(2, np.int32)}
    check.observations(good)
    check.observations({**good, "c": np.zeros((2, 1), int)})
    for key, bad, text in (
        ("a", np.zeros((2, 1)), r"observations\['a'\] of its space's shape, \(2, 2\) for 2 environments, got \(2, 1\)"),
        ("b", good["b"] + 0.5, r"whole numbers as observations\['b'\]"),
        ("a", np.zeros((2, 1, 2)), r"observations\['a'\] of its space's shape, \(2, 2\) for 2 .*, got \(2, 1, 2\)"),
        ("c", np.zeros((2, 2), int), r"observations\['c'\] of its space's shape, \(2,\) for 2 environments"),
    ):
        with pytest.raises(ValueError, match=text):
            check.observations({**good, key: bad})
    with pytest.raises(TypeError, match=r"observations\['c'\] as a NumPy array of numbers, got one of type list"):
        check.observations({**good, "c": [0, 1]})


def weights(cls: type[Any], venv: VecEnv, engine: str) -> list[np.ndarray]:
    arguments = {**SB3_EQUIVALENT, "engine": engine} if cls is ClipPPO else {}
    model = cls("MlpPolicy", venv, n_steps=16, batch_size=16, n_epochs=2, seed=0, device="cpu", **arguments)
    return [parameter.detach().numpy() for parameter in model.learn(64).policy.parameters()]


@pytest.mark.parametrize(
    ("change", "theirs"),
    [
        (lambda o, r, d, i: (o.astype(np.float64) + 1e-12, r, d, i), None),
        (lambda o, r, d, i: (1000 * o, r, d, i), None),
        (lambda o, r, d, i: (np.repeat(o, 2, axis=1)[:, ::2], r, d, i), None),
        (lambda o, r, d, i: (np.asfortranarray(o), r, d, i), None),
        # To whole numbers SB3 adds the values of final observations without their fractions; ours are those of floats.
        (lambda o, r, d, i: (o, r.astype(int), d, i), lambda *step: step),
        (lambda o, r, d, i: (o, r.astype(bool), d, i), lambda *step: step),
        (lambda o, r, d, i: (o, r.tolist(), d.astype(int), i), lambda *step: step),
        (lambda o, r, d, i: (o, r, 255 * d.astype(np.uint8), i), lambda *step: step),
        (lambda o, r, d, i: (o, r, d.astype(float), i), lambda *step: step),
    ],
    ids=["float64", "outside", "strided", "columns", "int", "bool", "lists", "bytes", "float dones"],
)
def test_what_sb3_takes_gives_sb3s_numbers(change: Any, theirs: Any) -> None:
    expected = weights(PPO, Bent(make(), theirs or change, at=0), "")
    for engine in ENGINES:
        # float32 sums in another order, over 8 minibatches; the smallest error found in trying was 1e-4.
        for one, other in zip(weights(ClipPPO, Bent(make(), change, at=0), engine), expected, strict=True):
            np.testing.assert_allclose(one, other, rtol=0, atol=1e-5)


def in_columns(obs: Any, rewards: Any, dones: Any, infos: Any) -> Any:
    for info in infos:
        if "terminal_observation" in info:
            info["terminal_observation"] = np.array([info["terminal_observation"]])
    return obs[:, None], rewards, dones, infos


@pytest.mark.parametrize(
    ("change", "space", "column", "engines"),
    [
        (lambda step: (step[0][None], *step[1:]), SPACE, False, ENGINES),
        (lambda step: (step[0].reshape(2, 2), *step[1:]), spaces.Box(-1, 1, (1, 2, 2)), False, ENGINES),
        (lambda step: (step[0][0], *step[1:]), spaces.Box(-1, 1, (1,)), False, ENGINES),
        (lambda step: (int(7 * step[0][0] + 0.5), *step[1:]), spaces.Discrete(7), True, ("autograd", "auto")),
    ],
    ids=["(1, 4) for (4,)", "(2, 2) for (1, 2, 2)", "() for (1,)", "column of discrete"],
)
@pytest.mark.parametrize("normalizes", [False, True])
def test_axes_of_length_one_give_sb3s_numbers(
    change: Any, space: spaces.Space[Any], column: bool, engines: tuple[str, ...], normalizes: bool
) -> None:
    def built(cls: type[DummyVecEnv] = DummyVecEnv) -> VecEnv:
        envs = [partial(Faulty, lambda step: (*change(step)[:2], False, step[2], {}), space=space)] * 2
        venv: VecEnv = cls(envs)
        if column:
            venv = Bent(venv, in_columns, at=0)
        return VecNormalize(venv, norm_obs=not isinstance(space, spaces.Discrete)) if normalizes else venv

    expected = weights(PPO, built(), "")
    for engine in engines:
        for cls in (DummyVecEnv, FastDummyVecEnv):
            for one, other in zip(weights(ClipPPO, built(cls), engine), expected, strict=True):
                np.testing.assert_allclose(one, other, rtol=0, atol=1e-5)  # as above


def test_copies_of_environments_write_into_their_own_rows() -> None:
    venv, copies = make(), []
    model_of(venv).learn(32, callback=Call(lambda: copies.append(copy.deepcopy(venv)) or True, 20))
    before = copy.deepcopy(venv.buf_obs)
    copies[0].step(np.zeros(2, int))
    np.testing.assert_array_equal(venv.buf_obs[None], before[None])


@pytest.mark.parametrize("name", ["step_wait", "reset", "_save_obs"])
@pytest.mark.parametrize("wraps", [False, True])
def test_what_a_callback_puts_on_environments_stays_after_the_training(name: str, wraps: bool) -> None:
    venv, n_calls = make(), 0
    before = set(vars(venv))

    class Puts(BaseCallback):
        def _on_training_start(self) -> None:
            old = getattr(venv, name) if wraps else partial(getattr(DummyVecEnv, name), venv)

            def own(*args: Any) -> Any:
                nonlocal n_calls
                n_calls += 1
                return old(*args)

            setattr(venv, name, own)

        def _on_step(self) -> bool:
            return True

    model_of(VecNormalize(venv)).learn(32, callback=Puts())
    assert set(vars(venv)) - before == {name, "actions"}
    n_calls = 0
    model_of(VecNormalize(venv)).learn(32)
    assert n_calls >= (1 if name == "reset" else 16)
    if wraps and name == "_save_obs":  # the check that it wraps goes on
        venv.envs[1].change = lambda step: (step[0][:1], *step[1:])
        with pytest.raises(ValueError, match=r"shape \(4,\), got \(1,\) from environment 1"):
            model_of(VecNormalize(venv)).learn(32)


# ------------------------------------------------------------------ full disks and folders that cannot be written to


def test_a_full_disk_leaves_the_earlier_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    venv = FastVecNormalize(make())
    model = model_of(venv).learn(32)
    files = {tmp_path / "model.zip": model.save, tmp_path / "statistics.pkl": venv.save}
    for path, save in files.items():
        save(str(path))
    before = {path: path.read_bytes() for path in files}

    def full(_: int) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "fsync", full)
    for path, save in files.items():
        with pytest.raises(OSError, match="could not be written: No space left on device.*is unchanged"):
            save(str(path))
    assert {path: path.read_bytes() for path in tmp_path.iterdir()} == before


def test_folders_that_cannot_be_written_to_are_refused_at_the_door(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    venv = make()
    for folder in (tmp_path / "file", tmp_path / "file" / "below", Path("/proc/here")):
        model = model_of(venv, tensorboard_log=str(folder))
        with pytest.raises(OSError, match="`tensorboard_log` must be a folder that can be written to, got"):
            model.learn(32)
        with pytest.raises(OSError, match="`path` must be a folder that can be written to, got"):
            model_of(venv).learn(32, callback=TrainingCheckpoint(32, folder))
        assert model.num_timesteps == 0
    assert [env.resets for env in venv.envs] == [3, 3]  # by the trainings with a TrainingCheckpoint alone


# ------------------------------------------------------------------ other environments than before


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    model_of(make(), batch_size=8).learn(32, callback=TrainingCheckpoint(32, tmp_path / "checkpoints"))
    return tmp_path / "checkpoints" / "checkpoint_32.zip"


def test_another_number_of_environments_is_told(saved: Path, caplog: pytest.LogCaptureFixture) -> None:
    model = ClipPPO.load(saved, env=DummyVecEnv([Faulty] * 3), device="cpu")
    assert caplog.text == ""  # it may be loaded to act alone
    model.learn(48)
    assert "`env` has 3 environments, and the model was saved with 2" in caplog.text
    assert (
        "now has 48 transitions instead of 32, and an epoch 6 minibatches of batch_size=8 instead of 4" in caplog.text
    )
    caplog.clear()
    assert model.learn(48).num_timesteps == 48
    ClipPPO.load(saved, env=make(), device="cpu").learn(32)
    ClipPPO.load(saved, device="cpu")
    assert caplog.text == ""
    with pytest.raises(ValueError, match="`env` must have the number of environments of the checkpoint, 2, got 3"):
        ClipPPO.resume(saved, DummyVecEnv([Faulty] * 3))


def test_another_number_of_environments_in_learn(saved: Path) -> None:
    model = ClipPPO.load(saved, env=make(), device="cpu")
    with pytest.raises(AssertionError, match=r"\(3 != 2\).*ClipPPO.load"):
        model.set_env(DummyVecEnv([Faulty] * 3))
    model.env = DummyVecEnv([Faulty] * 3)
    with pytest.raises(ValueError, match="number of environments that the model was built for, 2, got 3"):
        model.learn(32)


class OtherActions(Faulty):
    action_space = spaces.Discrete(3)


def test_other_spaces_are_refused_wherever_they_come(saved: Path) -> None:
    boxes = DummyVecEnv([partial(Faulty, space=spaces.Box(-1, 1, (5,)))] * 2)
    model = ClipPPO.load(saved, env=make(), device="cpu")
    for venv, both in (
        (boxes, r"Observation spaces do not match: Box\(.*\(4,\).* != Box\(.*\(5,\)"),
        (DummyVecEnv([OtherActions] * 2), r"Action spaces do not match: Discrete\(2\) != Discrete\(3\)"),
    ):
        text = f"`env` must have the spaces of the model, got others. {both}.*Wrap the environment"
        with pytest.raises(ValueError, match=text):
            ClipPPO.load(saved, env=venv, device="cpu")
        with pytest.raises(ValueError, match=text):
            ClipPPO.resume(saved, venv, device="cpu")
        with pytest.raises(ValueError, match=text):
            model.set_env(venv)
        own, model.env = model.env, venv
        with pytest.raises(ValueError, match=text):
            model.learn(32)
        model.env = own
    model.learn(32)


@pytest.mark.parametrize("has_keys", [False, True])
def test_bounds_of_observations_may_move_between_trainings(has_keys: bool) -> None:
    def space(high: float, n: int = 4, dtype: Any = np.float32, key: str = "b") -> spaces.Space[Any]:
        box = spaces.Box(-high, high, (n,), dtype)
        return spaces.Dict({"a": spaces.Discrete(2), key: box}) if has_keys else box

    def change(step: Step) -> Step:
        return ({"a": 0, "b": step[0]} if has_keys else step[0], *step[1:])

    policy = "MultiInputPolicy" if has_keys else "MlpPolicy"
    arguments: dict[str, Any] = {"n_steps": 16, "batch_size": 16, "seed": 0, "device": "cpu"}
    models: list[Any] = []
    for cls, more in ((PPO, {}), (ClipPPO, SB3_EQUIVALENT)):
        venv = DummyVecEnv([partial(Faulty, change, space=space(1))])
        model: Any = cls(policy, venv, **arguments, **more)
        model.learn(16)
        venv.observation_space = space(2)
        models.append(model.learn(16))
    theirs, ours = (list(model.policy.parameters()) for model in models)
    assert all(map(th.equal, ours, theirs))
    others = [space(1, 5), space(1, dtype=np.float64), *([space(1, key="c")] if has_keys else [])]
    for other in [*others, spaces.Discrete(2)]:
        venv.observation_space = other
        with pytest.raises(ValueError, match="`env` must have the spaces of the model, got others"):
            models[1].learn(16)


def test_spaces_of_a_file_are_checked_like_those_of_an_environment(saved: Path) -> None:
    space = spaces.Discrete(2, start=1)
    with pytest.raises(ValueError, match="`env` must count its discrete actions from 0, got"):
        ClipPPO.load(saved, device="cpu", custom_objects={"action_space": space})
