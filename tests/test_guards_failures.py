"""Errors that end a training: notes on how to resume, the last checkpoint, and writes that fail."""

import errno
import os
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch as th
from failing import ENGINES, BrokenError, Call, Faulty, broken, check_resumes, make, model_of, notes
from stable_baselines3.common.callbacks import CallbackList
from stable_baselines3.common.vec_env import DummyVecEnv

from sb3_clipvf import ClipPPO
from sb3_clipvf.checkpoint import TrainingCheckpoint
from sb3_clipvf.envs import FastDummyVecEnv, FastVecNormalize


class BrokenReset(Faulty):
    """Fails in the reset after step 36; a resumed one does not."""

    def reset(self, **kwargs: Any) -> tuple[Any, dict[str, Any]]:
        return broken() if self.n == 36 and self.change is broken else super().reset(**kwargs)


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("cls", [DummyVecEnv, FastDummyVecEnv])
def test_an_error_in_step_is_raised_with_a_note_on_how_to_resume(
    engine: str, cls: type[DummyVecEnv], tmp_path: Path
) -> None:
    with pytest.raises(BrokenError) as caught:
        model_of(make(broken, 20, cls), engine).learn(96, callback=TrainingCheckpoint(32, tmp_path))
    assert str(caught.value) == "the user's own words"
    assert caught.traceback[-1].name == "broken"
    text = notes(caught.value)
    assert "ended at num_timesteps=38 of 96" in text
    assert f"Its last complete checkpoint is {tmp_path / 'checkpoint_32.zip'}." in text
    assert f"ClipPPO.resume({str(tmp_path)!r}, env)" in text
    check_resumes(tmp_path, make(cls=cls))


@pytest.mark.parametrize("cls", [DummyVecEnv, FastDummyVecEnv])
def test_an_error_in_reset_is_raised_with_a_note_on_how_to_resume(cls: type[DummyVecEnv], tmp_path: Path) -> None:
    with pytest.raises(BrokenError) as caught:
        venv = cls([Faulty, partial(BrokenReset, broken, 99)])
        model_of(venv).learn(96, callback=TrainingCheckpoint(32, tmp_path))
    assert "num_timesteps=70 of 96" in notes(caught.value)
    check_resumes(tmp_path, cls([Faulty, BrokenReset]), 64)


def test_an_error_in_a_callback_is_raised_with_a_note_on_how_to_resume(tmp_path: Path) -> None:
    lists = CallbackList([CallbackList([TrainingCheckpoint(32, tmp_path)]), Call(broken)])
    with pytest.raises(BrokenError) as caught:
        model_of(make()).learn(96, callback=lists)
    assert "num_timesteps=40 of 96" in notes(caught.value)
    assert "checkpoint_32.zip" in notes(caught.value)
    check_resumes(tmp_path, make())


def test_updates_after_the_last_checkpoint_are_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(
        "sb3_clipvf.checkpoint.training_checkpoint.COPY_SHARE", 1e9
    )  # a copy in memory after each update
    with pytest.raises(BrokenError) as caught:
        model_of(make()).learn(96, callback=[TrainingCheckpoint(10**6, tmp_path), Call(broken, 70)])
    assert "checkpoint_64.zip" in notes(caught.value)
    assert "BrokenError ends the training. Its last checkpoint: " in caplog.text
    check_resumes(tmp_path, make(), 64)


def test_a_full_disk_at_that_time_does_not_hide_the_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
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


def test_without_checkpoints_the_note_says_so(tmp_path: Path) -> None:
    model = model_of(make())
    with pytest.raises(BrokenError) as caught:
        model.learn(96, callback=Call(broken))
    assert "No TrainingCheckpoint was used, so" in notes(caught.value)
    model.save(tmp_path / "model")
    with pytest.raises(BrokenError) as caught:
        model_of(make()).learn(96, callback=[TrainingCheckpoint(32, tmp_path), Call(broken, 10)])
    assert f"There is no checkpoint yet in {tmp_path}" in notes(caught.value)


def test_errors_before_the_training_get_no_note(tmp_path: Path) -> None:
    model_of(make()).learn(32, callback=TrainingCheckpoint(32, tmp_path))
    with pytest.raises(ValueError, match="another run") as caught:
        model_of(make()).learn(32, callback=TrainingCheckpoint(32, tmp_path))
    assert notes(caught.value) == ""


@pytest.mark.parametrize("engine", ENGINES)
def test_a_training_that_a_callback_ended_can_be_continued(engine: str, tmp_path: Path) -> None:
    model, venv = model_of(make(), engine), make()
    model.learn(96, callback=[TrainingCheckpoint(32, tmp_path), Call(lambda: False, 50)])
    assert model.num_timesteps == 50
    resumed = ClipPPO.resume(tmp_path, venv, device="cpu")
    for training in (model, resumed):
        training.learn(46, reset_num_timesteps=False)
        assert training.num_timesteps == 114
    for ours, theirs in zip(model.policy.parameters(), resumed.policy.parameters(), strict=True):
        assert th.equal(ours, theirs)


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


def test_folders_that_cannot_be_written_to_are_refused_before_training(tmp_path: Path) -> None:
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
