"""TrainingCheckpoint: when checkpoints are written, which are kept, and what full disks, kills and signals leave."""

import contextlib
import errno
import logging
import multiprocessing
import os
import re
import signal
import threading
import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import checkpoint_cases
import numpy as np
import pytest
import torch as th
from checkpoint_cases import CASES, Kill, KilledError
from stable_baselines3 import PPO
from stable_baselines3.common.callbacks import (
    BaseCallback,
    CallbackList,
    EvalCallback,
    EveryNTimesteps,
    StopTrainingOnMaxEpisodes,
)
from stable_baselines3.common.env_util import make_vec_env

from sb3_clipvf import ClipPPO
from sb3_clipvf.checkpoint import (
    FolderInUseError,
    SaveBestTrainingReward,
    TrainingCheckpoint,
    newest_checkpoint,
    read_checkpoint,
    read_manifest,
    training_checkpoint,
)
from sb3_clipvf.checkpoint.signals import SignalWatch
from sb3_clipvf.files.model import read_model
from sb3_clipvf.files.trust import trust_of

CASE = CASES["native"]
FORK = multiprocessing.get_context("fork")


class Scores(BaseCallback):
    """Sets the returns of the training's episodes: one full window at each multiple of 64 steps."""

    def __init__(self, means: list[float]) -> None:
        super().__init__()
        self.means = means

    def _on_step(self) -> bool:
        return True

    def _on_rollout_end(self) -> None:
        buffer = self.model.ep_info_buffer
        assert buffer is not None
        buffer.clear()
        mean = self.means[self.model.num_timesteps // 64 - 1]
        buffer.extend([{"r": mean, "l": 1, "t": 0.0}] * (5 if np.isfinite(mean) else 4))


class Act(BaseCallback):
    """Does something at a step."""

    def __init__(self, at: int, act: Callable[[], Any]) -> None:
        super().__init__()
        self.at, self.act = at, act

    def _on_step(self) -> bool:
        if self.num_timesteps == self.at:
            self.act()
        return True


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def steps(folder: Path) -> list[int]:
    return sorted(int(path.stem.split("_")[1]) for path in folder.glob("checkpoint_*.zip"))


@pytest.mark.parametrize(
    ("every", "total", "expected"),
    [(64, 192, [64, 128, 192]), (100, 320, [128, 256, 320]), (1, 128, [64, 128]), (10**6, 128, [128])],
)
def test_checkpoints_are_due_at_the_first_boundary_after_each_multiple(
    tmp_path: Path, every: int, total: int, expected: list[int]
) -> None:
    CASE.model(tmp_path).learn(total, callback=TrainingCheckpoint(every, tmp_path / "new" / "folder", keep_last=9))
    assert steps(tmp_path / "new" / "folder") == expected


@pytest.mark.parametrize("make", [lambda folder: TrainingCheckpoint(64, folder), SaveBestTrainingReward])
def test_ending_a_callback_of_a_training_that_did_not_begin_masks_no_error(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, make: Callable[[Path], BaseCallback]
) -> None:
    monkeypatch.setattr("stable_baselines3.common.utils.SummaryWriter", None)  # as without TensorBoard
    model, callback = CASE.model(tmp_path), make(tmp_path / "new")
    model.tensorboard_log = str(tmp_path / "tb")

    def learn() -> None:
        try:
            model.learn(64, callback=[callback])
        finally:
            callback.on_training_end()

    with pytest.raises(ImportError, match="tensorboard is not installed"):
        learn()
    assert not (tmp_path / "new").exists()


def test_only_the_newest_are_kept(tmp_path: Path) -> None:
    CASE.model(tmp_path).learn(384, callback=TrainingCheckpoint(64, tmp_path, keep_last=2, keep_best=False))
    assert names(tmp_path) == ["checkpoint_320.zip", "checkpoint_384.zip"]
    assert [read_manifest(tmp_path / name).serial for name in names(tmp_path)] == [5, 6]


def test_the_best_by_training_return_is_kept(tmp_path: Path) -> None:
    scores = Scores([5.0, 7.0, 7.0, 9.0, 1.0])
    scores.means[3] = float("nan")  # no full window
    CASE.model(tmp_path).learn(320, callback=[scores, TrainingCheckpoint(64, tmp_path, keep_last=1)])
    assert names(tmp_path) == ["best_checkpoint.zip", "checkpoint_320.zip"]
    best = read_checkpoint(tmp_path / "best_checkpoint.zip").manifest
    assert (best.num_timesteps, best.mean_return) == (128, 7.0)


def test_a_resumed_training_knows_what_was_best(tmp_path: Path) -> None:
    scores, folder = Scores([-5.0, 0.0, -1.0, 8.0]), tmp_path / "checkpoints"
    CASE.model(tmp_path).learn(128, callback=[scores, TrainingCheckpoint(64, folder)])
    model = ClipPPO.resume(folder, CASE.make_env(tmp_path), device="cpu")
    callback = TrainingCheckpoint(64, folder)
    model.learn(64, reset_num_timesteps=False, callback=[scores, callback])
    assert read_manifest(folder / "best_checkpoint.zip").num_timesteps == 128
    model.learn(64, reset_num_timesteps=False, callback=[scores, callback])
    assert read_manifest(folder / "best_checkpoint.zip").num_timesteps == 256


def test_a_rewound_training_replaces_the_newer_checkpoints(tmp_path: Path) -> None:
    folder = tmp_path / "checkpoints"
    CASE.model(tmp_path).learn(256, callback=TrainingCheckpoint(64, folder, keep_last=3))
    model = ClipPPO.resume(folder / "checkpoint_128.zip", CASE.make_env(tmp_path), device="cpu")
    model.learn(64, reset_num_timesteps=False, callback=TrainingCheckpoint(64, folder, keep_last=3))
    # 256 belongs to the abandoned training; the newest one is the last that was written.
    assert steps(folder) == [128, 192, 256]
    assert newest_checkpoint(folder).manifest.num_timesteps == 192


def test_a_new_training_does_not_mix_with_another_one(tmp_path: Path) -> None:
    folder = tmp_path / "checkpoints"
    CASE.model(tmp_path).learn(64, callback=TrainingCheckpoint(64, folder))
    before = {name: (folder / name).read_bytes() for name in names(folder)}
    with pytest.raises(FolderInUseError, match=r"without checkpoints of another run.*checkpoint_64\.zip.*resume"):
        CASE.model(tmp_path).learn(64, callback=TrainingCheckpoint(64, folder))
    # Nor does one that was resumed from another folder.
    CASE.model(tmp_path).learn(64, callback=TrainingCheckpoint(64, tmp_path / "elsewhere"))
    model = ClipPPO.resume(tmp_path / "elsewhere", CASE.make_env(tmp_path), device="cpu")
    with pytest.raises(FolderInUseError, match="without checkpoints of another run"):
        model.learn(64, reset_num_timesteps=False, callback=TrainingCheckpoint(64, folder))
    # Nor does one that continues the weights of a checkpoint.
    model = ClipPPO.load(folder / "checkpoint_64.zip", CASE.make_env(tmp_path), device="cpu")
    with pytest.raises(FolderInUseError, match="without checkpoints of another run"):
        model.learn(64, reset_num_timesteps=False, callback=TrainingCheckpoint(64, folder))
    assert {name: (folder / name).read_bytes() for name in names(folder)} == before


def test_a_training_in_parts_is_one_training(tmp_path: Path) -> None:
    model = CASE.model(tmp_path)
    for _ in range(2):
        model.learn(64, reset_num_timesteps=False, callback=TrainingCheckpoint(64, tmp_path))
    assert steps(tmp_path) == [64, 128]
    with pytest.raises(FolderInUseError, match="another run"):
        model.learn(64, callback=TrainingCheckpoint(64, tmp_path))


def test_a_training_that_a_callback_stops_in_a_rollout_continues_from_there(tmp_path: Path) -> None:
    folder = tmp_path / "checkpoints"
    model = CASE.model(tmp_path)
    model.learn(320, callback=[TrainingCheckpoint(10**6, folder), StopTrainingOnMaxEpisodes(3)])
    stopped_at, rest = model.num_timesteps, model.remaining_timesteps
    assert stopped_at % 64 != 0
    model.learn(rest, reset_num_timesteps=False)
    here = checkpoint_cases.digest(model, tmp_path)

    resumed = ClipPPO.resume(folder, CASE.make_env(tmp_path), device="cpu")
    assert (resumed.num_timesteps, resumed.remaining_timesteps) == (stopped_at, rest)
    resumed.learn(rest, reset_num_timesteps=False)
    assert checkpoint_cases.digest(resumed, tmp_path) == here


@pytest.mark.parametrize("end", ["signal", "error", "nothing left", "signal before another end"])
def test_a_training_that_ends_where_it_was_resumed_keeps_that_checkpoint(
    end: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(training_checkpoint, "COPY_SHARE", 1e9)  # a copy after each update
    CASE.model(tmp_path).learn(128, callback=[TrainingCheckpoint(64, tmp_path), Scores([1.0, 2.0])])
    if end != "nothing left":
        newest_checkpoint(tmp_path).path.unlink()
    before = {path: path.read_bytes() for path in tmp_path.iterdir()}
    model = ClipPPO.resume(tmp_path, CASE.make_env(tmp_path), device="cpu")
    act = (lambda: 1 / 0) if end == "error" else kill_me(signal.SIGINT)
    remaining = model.remaining_timesteps + (64 if "another" in end else 0)
    with pytest.raises((SystemExit, ZeroDivisionError)) if remaining else contextlib.nullcontext():
        callbacks = [TrainingCheckpoint(64, tmp_path), Act(100, act)]  # without Scores
        model.learn(remaining, reset_num_timesteps=False, callback=callbacks)
    if "another" in end:  # that the run now ends later is worth a file
        assert newest_checkpoint(tmp_path).manifest.total_timesteps == 192
    else:
        assert {path: path.read_bytes() for path in tmp_path.iterdir()} == before


@pytest.mark.parametrize(
    ("arguments", "error", "match"),
    [
        ({"every_timesteps": 0}, ValueError, "`every_timesteps` must be a whole number of at least 1"),
        ({"keep_last": 0}, ValueError, "`keep_last` must be"),
        ({"keep_best": 1}, TypeError, "`keep_best` must be"),
        ({"reset_envs": "no"}, TypeError, "`reset_envs` must be"),
        ({"on_signal": None}, TypeError, "`on_signal` must be"),
        ({"on_error": "ignore"}, ValueError, "`on_error` must be"),
    ],
)
def test_illegal_arguments_are_refused(arguments: dict[str, Any], error: type[Exception], match: str) -> None:
    with pytest.raises(error, match=match):
        TrainingCheckpoint(**{"every_timesteps": 1, "path": "folder", **arguments})


@pytest.mark.parametrize("make", [lambda folder: TrainingCheckpoint(64, folder), SaveBestTrainingReward])
def test_callbacks_that_act_between_rollouts_are_refused_inside_others(
    make: Callable[[Path], BaseCallback], tmp_path: Path
) -> None:
    for wrapped in (lambda callback: callback, lambda callback: CallbackList([callback])):
        with pytest.raises(ValueError, match=r"got one in EveryNTimesteps. Pass it to learn"):
            CASE.model(tmp_path).learn(64, callback=EveryNTimesteps(10, wrapped(make(tmp_path))))
        with pytest.raises(ValueError, match=r"got one in EvalCallback. Pass it to learn"):
            inner = wrapped(make(tmp_path))
            callback = EvalCallback(make_vec_env("CartPole-v1"), callback_on_new_best=inner)
            CASE.model(tmp_path).learn(64, callback=callback)


def test_it_is_refused_in_other_algorithms(tmp_path: Path) -> None:
    with pytest.raises(TypeError, match="got PPO"):
        PPO("MlpPolicy", make_vec_env("CartPole-v1"), n_steps=64, device="cpu").learn(
            64, callback=TrainingCheckpoint(64, tmp_path)
        )


@pytest.mark.parametrize("at", [10, 74], ids=["in an empty folder", "after the folder was emptied"])
@pytest.mark.parametrize("on_error", ["warn", "raise"])
def test_another_training_in_the_same_folder_keeps_its_checkpoints(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, at: int, on_error: str
) -> None:
    folder, before = tmp_path / "checkpoints", {}
    kwargs: dict[str, Any] = {"keep_last": 1, "on_signal": False, "on_error": on_error}

    def train_another() -> None:
        for path in folder.iterdir():
            path.unlink()
        CASE.model(tmp_path).learn(64, callback=[Scores([1.0]), TrainingCheckpoint(64, folder, **kwargs)])
        before.update({path: path.read_bytes() for path in folder.iterdir()})

    model = CASE.model(tmp_path)
    callbacks = [Scores([2.0, 3.0, 4.0]), TrainingCheckpoint(64, folder, **kwargs), Act(at, train_another)]
    refusal = "`path` must be a folder without checkpoints of another run, got .* with checkpoint_64.zip, best_"
    if on_error == "raise":
        with pytest.raises(OSError, match=refusal):
            model.learn(192, callback=callbacks)
    else:
        model.learn(192, callback=callbacks)
        assert model.num_timesteps == 192
        messages = [record.getMessage() for record in caplog.records if record.levelno == logging.ERROR]
        missing = [64, 128, 192] if at < 64 else [128, 192]
        assert len(messages) == len(missing)
        for step, message in zip(missing, messages, strict=True):
            assert re.match(f"The checkpoint of step {step} was not written: {refusal}", message)
    assert {path: path.read_bytes() for path in folder.iterdir()} == before


# ------------------------------------------------------------------ files that cannot be removed


@pytest.mark.parametrize("on_error", ["warn", "raise"])
def test_files_that_cannot_be_removed_are_tried_again_and_the_training_continues(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, on_error: str
) -> None:
    leftover = tmp_path / ".checkpoint_9.zip.1-0123abcd.tmp"
    leftover.touch()
    os.utime(leftover, (0, 0))
    locked = {leftover.name, "checkpoint_64.zip", "checkpoint_128.zip"}  # as while another process reads it on Windows
    unlink, at = Path.unlink, []

    def fail_if_locked(self: Path, missing_ok: bool = False) -> None:
        if self.name in locked:
            raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), str(self))
        unlink(self, missing_ok)

    monkeypatch.setattr(Path, "unlink", fail_if_locked)
    model = CASE.model(tmp_path)
    checkpoint = TrainingCheckpoint(64, tmp_path, keep_last=1, keep_best=False, on_error=on_error)
    release = Act(266, lambda: (at.extend(steps(tmp_path)), locked.clear()))
    model.learn(320, callback=[checkpoint, release])
    assert model.num_timesteps == 320
    assert at == [64, 128, 256]
    assert names(tmp_path) == [leftover.name, "checkpoint_320.zip"]
    (message,) = [record.getMessage() for record in caplog.records if "cannot be removed" in record.getMessage()]
    assert "Permission denied" in message and "checkpoint_64.zip" in message


# ------------------------------------------------------------------ full disks


def fill_disk_at(calls: range, monkeypatch: pytest.MonkeyPatch) -> None:
    """The calls of fsync with these numbers find no space."""
    real, made = os.fsync, iter(range(10**6))

    def fsync(descriptor: int) -> None:
        if next(made) in calls:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        real(descriptor)

    monkeypatch.setattr(os, "fsync", fsync)


def test_a_full_disk_leaves_the_previous_checkpoint_and_the_training_continues(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    fill_disk_at(range(2, 3), monkeypatch)  # the file of the second checkpoint; each takes two calls, file and folder
    model = CASE.model(tmp_path)
    with caplog.at_level(logging.ERROR, "sb3_clipvf"):
        model.learn(128 + 64, callback=TrainingCheckpoint(64, tmp_path, keep_last=9, keep_best=False))
    assert model.num_timesteps == 192
    assert names(tmp_path) == ["checkpoint_192.zip", "checkpoint_64.zip"]
    assert newest_checkpoint(tmp_path).manifest.num_timesteps == 192
    assert "The checkpoint of step 128 was not written" in caplog.text
    assert "No space left on device" in caplog.text


def test_a_full_disk_ends_the_training_where_asked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fill_disk_at(range(2, 99), monkeypatch)
    with pytest.raises(OSError, match=r"checkpoint_128\.zip could not be written: No space left") as caught:
        CASE.model(tmp_path).learn(192, callback=TrainingCheckpoint(64, tmp_path, on_error="raise"))
    assert caught.value.errno == errno.ENOSPC
    monkeypatch.undo()
    assert newest_checkpoint(tmp_path).manifest.num_timesteps == 64


@pytest.mark.parametrize("on_error", ["warn", "raise"])
def test_an_attribute_that_cannot_be_written_is_as_a_full_disk(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, on_error: str
) -> None:
    monkeypatch.setattr(training_checkpoint, "COPY_SHARE", 1e9)  # a copy after each update
    model, reason = CASE.model(tmp_path), "`model.my_lock` must be a value that can be pickled, got a lock"
    callbacks = [
        TrainingCheckpoint(128, tmp_path, keep_best=False, on_error=on_error),
        Act(130, lambda: setattr(model, "my_lock", threading.Lock())),
        Act(300, lambda: delattr(model, "my_lock")),
    ]
    with pytest.raises(TypeError, match=reason) if on_error == "raise" else contextlib.nullcontext():
        model.learn(320, callback=callbacks)
    assert steps(tmp_path) == ([128] if on_error == "raise" else [128, 320])
    logged = [record.getMessage() for record in caplog.records if record.levelno == logging.ERROR]
    assert len(logged) == (on_error == "warn")  # once, though there were several copies
    assert all(text.startswith(f"Checkpoints from step 192 on are not written: {reason}") for text in logged)


@pytest.mark.parametrize("on_error", ["warn", "raise"])
def test_a_best_checkpoint_that_cannot_be_written_keeps_no_old_ones(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, on_error: str
) -> None:
    fill_disk_at(range(6, 7), monkeypatch)  # the best file of step 128; four calls each, as below
    callback = TrainingCheckpoint(64, tmp_path, keep_last=1, on_signal=False, on_error=on_error)
    full = pytest.raises(OSError, match=r"best_checkpoint\.zip could not be written: No space left")
    with full if on_error == "raise" else contextlib.nullcontext():
        CASE.model(tmp_path).learn(128, callback=[Scores([1.0, 3.0]), callback])
    assert names(tmp_path) == ["best_checkpoint.zip", "checkpoint_128.zip"]
    assert callback.best_mean_return == read_manifest(tmp_path / "best_checkpoint.zip").mean_return == 1.0
    logged = [record.getMessage() for record in caplog.records if record.levelno == logging.ERROR]
    assert len(logged) == (on_error == "warn")
    assert all(text.startswith("best_checkpoint.zip of step 128 was not written") for text in logged)


@pytest.mark.parametrize("call", [5, 7], ids=["of the checkpoint", "of the best one"])
def test_a_checkpoint_whose_folder_was_not_synced_counts_as_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, call: int
) -> None:
    fill_disk_at(range(call, call + 1), monkeypatch)  # four calls each: file and folder, of the newest and of the best
    callback, at = TrainingCheckpoint(64, tmp_path, keep_last=1, on_signal=False), []
    callbacks = [Scores([1.0, 3.0, 2.0, 1.0]), callback, Act(138, lambda: at.extend(steps(tmp_path)))]
    CASE.model(tmp_path).learn(192, callback=callbacks)
    assert re.search("step 128 may be lost: .* the last file written to .* is complete", caplog.text)
    assert at == [64, 128]  # the older one stays until one is certain
    assert steps(tmp_path) == [192]
    assert read_manifest(tmp_path / "checkpoint_192.zip").serial == 3
    assert callback.best_mean_return == read_manifest(tmp_path / "best_checkpoint.zip").mean_return == 3.0


# ------------------------------------------------------------------ kills and signals


def train(folder: Path, every: int, callbacks: list[BaseCallback], reset_envs: bool = False) -> None:
    case = CASES["resets"] if reset_envs else CASE
    case.model(folder).learn(
        checkpoint_cases.TOTAL,
        callback=[TrainingCheckpoint(every, folder / "checkpoints", reset_envs=reset_envs), *callbacks],
    )


def in_another_process(function: Callable[..., Any], *args: Any) -> int | None:
    process = FORK.Process(target=function, args=args)
    process.start()
    process.join()
    return process.exitcode


def ends_as_uninterrupted(name: str, folder: Path, tmp_path: Path) -> bool:
    found = checkpoint_cases.resumed(CASES[name], folder)
    return found["weights"] == checkpoint_cases.uninterrupted(CASES[name], tmp_path / "uninterrupted")["weights"]


def kill_me(number: int) -> Callable[[], None]:
    return lambda: os.kill(os.getpid(), number)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_signals_write_a_last_checkpoint_and_end_with_their_own_code(tmp_path: Path, number: int) -> None:
    code = in_another_process(train, tmp_path, 10**6, [Act(210, kill_me(number))])
    assert code == 128 + number
    last = newest_checkpoint(tmp_path / "checkpoints").manifest.num_timesteps
    assert 0 <= last <= 192
    assert ends_as_uninterrupted("native", tmp_path, tmp_path)


@pytest.mark.parametrize("in_write", [False, True])
def test_a_signal_writes_the_last_checkpoint_of_each_callback(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, in_write: bool
) -> None:
    real, signals = training_checkpoint.file_bytes, [signal.SIGTERM] * in_write

    def interrupted(*arguments: Any) -> bytes:
        if signals:
            signal.raise_signal(signals.pop())
        return real(*arguments)

    monkeypatch.setattr(training_checkpoint, "COPY_SHARE", 1e9)  # a copy after each update
    monkeypatch.setattr(training_checkpoint, "file_bytes", interrupted)
    # In a write of the first callback, or at step 100.
    checkpoints = [TrainingCheckpoint(64 if name == "a" and in_write else 10**6, tmp_path / name) for name in "abc"]
    with pytest.raises(SystemExit) as ended:
        CASE.model(tmp_path).learn(192, callback=[*checkpoints, Act(100, kill_me(signal.SIGTERM))])
    assert ended.value.code == 143
    expected = [[64], [0], [0]] if in_write else [[64]] * 3
    assert [steps(tmp_path / name) for name in "abc"] == expected


def test_after_a_signal_trainings_with_resets_end_as_uninterrupted_ones(tmp_path: Path) -> None:
    code = in_another_process(train, tmp_path, checkpoint_cases.EVERY, [Act(210, kill_me(signal.SIGTERM))], True)
    assert code == 143
    assert steps(tmp_path / "checkpoints") == [0, 128]
    assert ends_as_uninterrupted("resets", tmp_path, tmp_path)


def test_sigkill_at_any_moment_leaves_a_whole_checkpoint(tmp_path: Path) -> None:
    """Killed while it writes one checkpoint after the other, resumed, killed again."""
    delays = np.random.default_rng(0).uniform(0.0, 0.15, 4)
    folder = tmp_path / "checkpoints"
    callback = TrainingCheckpoint(1, folder, keep_last=2)

    def train_on() -> None:
        if steps(folder):
            model = ClipPPO.resume(folder, CASE.make_env(tmp_path), device="cpu")
            model.learn(10**6, reset_num_timesteps=False, callback=callback)
        else:
            CASE.model(tmp_path).learn(10**6, callback=callback)

    last = 0
    for delay in delays:
        process = FORK.Process(target=train_on)
        process.start()
        while max(steps(folder) if folder.exists() else [], default=0) <= last:
            assert process.is_alive()
            time.sleep(0.001)
        time.sleep(delay)
        process.kill()
        process.join()
        checkpoint = newest_checkpoint(folder)
        assert checkpoint.manifest.num_timesteps > last
        last = max(steps(folder))
    # What killed writes left is removed by the next training.
    model = ClipPPO.resume(folder, CASE.make_env(tmp_path), device="cpu")
    model.learn(64, reset_num_timesteps=False, callback=callback)
    assert [name for name in names(folder) if name.endswith(".tmp")] == []


def test_handlers_are_restored(tmp_path: Path) -> None:
    before = [signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)]
    seen = []

    def look() -> None:
        seen.extend(signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT))

    CASE.model(tmp_path).learn(64, callback=[TrainingCheckpoint(64, tmp_path), Act(32, look)])
    assert not set(seen) & set(before)
    assert [signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)] == before


def test_without_on_signal_handlers_do_not_change(tmp_path: Path) -> None:
    before = signal.getsignal(signal.SIGTERM)
    seen: list[Any] = []
    callbacks = [
        TrainingCheckpoint(64, tmp_path, on_signal=False),
        Act(32, lambda: seen.append(signal.getsignal(signal.SIGTERM))),
    ]
    CASE.model(tmp_path).learn(64, callback=callbacks)
    assert seen == [before]


def test_signals_outside_of_the_main_thread_are_warned_of_once(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    before, model, callback = signal.getsignal(signal.SIGTERM), CASE.model(tmp_path), TrainingCheckpoint(64, tmp_path)
    for total in (64, 128):
        thread = threading.Thread(
            target=lambda: model.learn(64, callback=callback, reset_num_timesteps=model.num_timesteps == 0)
        )
        thread.start()
        thread.join()
        assert model.num_timesteps == total and signal.getsignal(signal.SIGTERM) == before
    (text,) = [text for record in caplog.records if "`on_signal`" in (text := record.getMessage())]
    assert "has no effect: learn() runs outside of the main thread" in text
    assert steps(tmp_path) == [64, 128]


def test_ignored_signals_stay_ignored(tmp_path: Path) -> None:
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        model = CASE.model(tmp_path)
        model.learn(64, callback=[TrainingCheckpoint(64, tmp_path), Act(32, kill_me(signal.SIGINT))])
    finally:
        signal.signal(signal.SIGINT, before)
    assert model.num_timesteps == 64


def test_after_a_training_that_failed_signals_do_what_they_did_before(tmp_path: Path) -> None:
    model = CASE.model(tmp_path)
    with pytest.raises(KilledError):
        model.learn(64, callback=[TrainingCheckpoint(64, tmp_path), Kill(32)])
    with pytest.raises(KeyboardInterrupt):
        signal.raise_signal(signal.SIGINT)
    assert steps(tmp_path) == []


@pytest.mark.parametrize(("fails", "total"), [(False, 192), (True, 192), (False, 64)])
def test_a_signal_in_a_write_is_handled_after_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, fails: bool, total: int
) -> None:
    """Of a checkpoint that is due, of the last copy after an error, or of the checkpoint at the end."""
    real, before = training_checkpoint.file_bytes, signal.getsignal(signal.SIGINT)

    def interrupted(*arguments: Any) -> bytes:
        signal.raise_signal(signal.SIGINT)
        return real(*arguments)

    monkeypatch.setattr(training_checkpoint, "COPY_SHARE", 1e9)  # a copy after each update
    monkeypatch.setattr(training_checkpoint, "file_bytes", interrupted)
    checkpoint = TrainingCheckpoint(10**6 if fails else 64, tmp_path)
    with pytest.raises(KeyboardInterrupt if fails else SystemExit):
        CASE.model(tmp_path).learn(total, callback=[checkpoint, Act(100, lambda: 1 / 0)])
    assert steps(tmp_path) == [64]
    assert fails or signal.getsignal(signal.SIGINT) == before


def test_on_training_end_outside_of_learn_writes_nothing(tmp_path: Path) -> None:
    """The Zoo calls `on_training_end` once more, and also after an error."""
    callback = TrainingCheckpoint(64, tmp_path / "whole")
    CASE.model(tmp_path).learn(64, callback=callback)
    (tmp_path / "whole" / "checkpoint_64.zip").unlink()
    callback.on_training_end()
    assert steps(tmp_path / "whole") == []
    callback = TrainingCheckpoint(64, tmp_path / "failed")
    with pytest.raises(KilledError):
        CASE.model(tmp_path).learn(128, callback=[callback, Kill(100)])
    callback.on_training_end()
    assert steps(tmp_path / "failed") == [64]


def test_copies_for_signals_take_a_small_part_of_the_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    clock, copies = iter(range(0, 10**9, 5)), []  # each look at the clock finds 5 s later, so that a copy takes 5 s
    # Only this module's: kernels and environments look at the clock too, other threads as often as they can.
    monkeypatch.setattr(training_checkpoint, "time", SimpleNamespace(perf_counter=lambda: next(clock)))
    callback = TrainingCheckpoint(10**6, tmp_path)
    real = callback._state
    monkeypatch.setattr(callback, "_state", lambda **kwargs: copies.append(1) or real(**kwargs))
    CASE.model(tmp_path).learn(64 * 8, callback=callback)
    assert len(copies) == 2  # the first boundary's, and the last checkpoint


class Warmup:
    """A schedule that counts its calls."""

    n_calls = 0

    def __call__(self, progress: float) -> float:
        self.n_calls += 1
        return 1e-3 / self.n_calls


def test_copies_share_nothing_with_objects_of_the_user(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    callback = TrainingCheckpoint(10**6, tmp_path)
    model, seen = CASE.model(tmp_path), []
    model.learning_rate = Warmup()
    model._setup_lr_schedule()
    model.notes = {"rows": [np.zeros(2)], "tensors": [(th.zeros(1),)], "names": [["a"]]}

    class First(BaseCallback):
        def _on_rollout_start(self) -> None:
            seen.append(model.learning_rate.n_calls)

        def _on_step(self) -> bool:
            return True

    def change() -> None:
        model.notes["rows"][0][0], model.notes["tensors"][0][0][0] = 1.0, 1.0
        model.notes["names"][0].append("b")
        callback.save_last("A test")

    monkeypatch.setattr(training_checkpoint, "COPY_SHARE", 1e-9)  # the copy of step 0 is the only one
    model.learn(256, callback=[callback, First(), Act(210, change)])
    first = ClipPPO.load(tmp_path / "checkpoint_0.zip", device="cpu", trust_pickle=True, learning_rate=0.1)
    copied = read_model(tmp_path / "checkpoint_0.zip").unpickled(trust_of(True), ())["learning_rate"]
    assert copied.n_calls == seen[0] < model.learning_rate.n_calls
    assert repr(first.notes) == repr({"rows": [np.zeros(2)], "tensors": [(th.zeros(1),)], "names": [["a"]]})


@pytest.mark.parametrize("is_second", [False, True])
def test_a_second_signal_ends_a_write_without_another_one(is_second: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sb3_clipvf.checkpoint.signals.is_learning", lambda *_: True)
    saved: list[int] = []
    watch = SignalWatch(object(), lambda *_: saved.append(1))
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        watch.start()
        with pytest.raises(KeyboardInterrupt if is_second else SystemExit), watch.deferring():
            for _ in range(1 + is_second):
                signal.raise_signal(signal.SIGINT)
    finally:
        signal.signal(signal.SIGINT, before)
    assert len(saved) == (not is_second)


def test_a_watch_that_ends_below_another_one_still_lets_signals_through() -> None:
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    first, second = (SignalWatch(object(), pytest.fail) for _ in range(2))
    try:
        first.start()
        second.start()
        first.stop()
        with pytest.raises(KeyboardInterrupt):
            signal.raise_signal(signal.SIGINT)
        assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
    finally:
        for watch in (second, first):
            watch.stop()
        signal.signal(signal.SIGINT, before)
