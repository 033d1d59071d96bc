"""The checkpoint file: an SB3 model beside a checked state, whose damage is found and named."""

import errno
import hashlib
import io
import json
import logging
import os
import shutil
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import gymnasium as gym
import pytest
import torch as th
from checkpoint_cases import CASES
from stable_baselines3.common.evaluation import evaluate_policy
from stable_baselines3.common.save_util import load_from_zip_file

from sb3_clipvf import ClipPPO
from sb3_clipvf.checkpoint import (
    CheckpointManifest,
    DamagedCheckpointError,
    NotACheckpointError,
    TrainingCheckpoint,
    newest_checkpoint,
    read_checkpoint,
    read_manifest,
)
from sb3_clipvf.checkpoint import file as checkpoint_file
from sb3_clipvf.checkpoint.file import sorted_checkpoints, versions
from sb3_clipvf.files.archive import SMALL

CASE = CASES["native"]


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Checkpoints of the steps 128, 256 and 320."""
    folder = tmp_path_factory.mktemp("checkpoints")
    CASE.model(folder).learn(320, callback=CASE.callbacks(folder))
    return folder / "checkpoints"


@pytest.fixture
def copied(checkpoints: Path, tmp_path: Path) -> Path:
    shutil.copytree(checkpoints, tmp_path / "copied")
    return tmp_path / "copied"


def rewrite(path: Path, change: Callable[[dict[str, bytes]], Any]) -> None:
    """Change the entries of a zip, as no crash does: the zip itself stays valid."""
    with zipfile.ZipFile(path) as archive:
        entries = {name: archive.read(name) for name in archive.namelist()}
    change(entries)
    with zipfile.ZipFile(path, "w") as archive:
        for name, content in entries.items():
            archive.writestr(name, content)


def test_a_checkpoint_is_a_model_for_load_and_for_sb3s_reader(checkpoints: Path, tmp_path: Path) -> None:
    path = checkpoints / "checkpoint_320.zip"
    model = ClipPPO.load(path, CASE.make_env(tmp_path), device="cpu")
    assert model.num_timesteps == 320
    mean, _ = evaluate_policy(model, CASE.make_env(tmp_path), n_eval_episodes=2, warn=False)
    assert mean > 0
    with pytest.warns(UserWarning, match="saved by sb3_clipvf"):
        data, parameters, _ = load_from_zip_file(path, device="cpu")
    assert data is not None
    assert data["num_timesteps"] == 320
    assert th.equal(parameters["policy"]["action_net.bias"], model.policy.action_net.bias)


def test_a_loaded_checkpoint_trains_on_in_other_environments(checkpoints: Path) -> None:
    model = ClipPPO.load(checkpoints / "checkpoint_256.zip", gym.make("CartPole-v1"), device="cpu")
    model.learn(64, reset_num_timesteps=False)
    assert model.num_timesteps == 320


def test_the_manifest_describes_what_is_in_the_file(checkpoints: Path) -> None:
    manifest = read_manifest(checkpoints / "checkpoint_256.zip")
    assert (manifest.num_timesteps, manifest.total_timesteps, manifest.serial) == (256, 320, 2)
    assert manifest.differences == ()
    assert manifest.versions == versions()
    assert {"python", "torch", "numpy", "stable_baselines3", "gymnasium", "sb3_clipvf"} <= manifest.versions.keys()
    assert {"data", "policy.pth", "policy.optimizer.pth", "training_state.json"} <= manifest.entries.keys()
    assert manifest.build["n_envs"] == 2


@pytest.mark.parametrize(
    "entry", ["data", "policy.pth", "policy.optimizer.pth", "training_state.json", "training_arrays.npz"]
)
def test_a_changed_entry_is_named(copied: Path, entry: str) -> None:
    path = copied / "checkpoint_320.zip"
    rewrite(path, lambda entries: entries.update({entry: entries[entry][:-1] + b"!"}))
    with pytest.raises(DamagedCheckpointError, match=rf"damaged: it does not match its manifest in {entry}\. "):
        read_checkpoint(path)


@pytest.mark.parametrize(
    ("change", "named"),
    [
        (lambda entries: entries.pop("policy.pth"), "policy.pth"),
        (lambda entries: entries.update(more=b""), "more"),
        (lambda entries: entries.pop("training_state.json"), "training_state.json"),
        (lambda entries: entries.update({"training_manifest.json": b"{"}), "damaged"),
        (lambda entries: entries.update({"training_manifest.json": b'{"format": 1}'}), "damaged"),
    ],
    ids=["missing", "added", "no state", "no manifest", "a part of the manifest"],
)
def test_missing_and_added_entries_are_named(copied: Path, change: Callable[..., Any], named: str) -> None:
    rewrite(copied / "checkpoint_320.zip", change)
    with pytest.raises(DamagedCheckpointError, match=named):
        read_checkpoint(copied / "checkpoint_320.zip")


@pytest.mark.parametrize("share", [0.0, 0.01, 0.5, 0.9, 0.999])
def test_a_file_that_was_cut_short_is_damaged(copied: Path, share: float) -> None:
    path = copied / "checkpoint_320.zip"
    content = path.read_bytes()
    path.write_bytes(content[: int(share * len(content))])
    with pytest.raises(DamagedCheckpointError, match=r"checkpoint_320\.zip"):
        read_checkpoint(path)


def with_state(entries: dict[str, bytes], state: bytes) -> None:
    manifest = json.loads(entries["training_manifest.json"])
    manifest["entries"]["training_state.json"] = hashlib.sha256(state).hexdigest()
    entries.update({"training_state.json": state, "training_manifest.json": json.dumps(manifest).encode()})


@pytest.mark.parametrize(
    "state", [b"{", b'{"~":"array","v":"a99999"}', b"[" * 100_000], ids=lambda state: str(state[:9])
)
def test_a_state_that_cannot_be_read_is_damage(copied: Path, state: bytes) -> None:
    path = copied / "checkpoint_320.zip"
    rewrite(path, lambda entries: with_state(entries, state))
    with pytest.raises(DamagedCheckpointError, match=r"checkpoint_320\.zip is damaged: its state cannot be read"):
        read_checkpoint(path)


def test_files_too_large_for_the_memory_are_not_read(copied: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = copied / "checkpoint_320.zip"
    rewrite(path, lambda entries: with_state(entries, b"[[]" + b",[]" * 500_000 + b"]"))
    read_checkpoint(path)
    monkeypatch.setattr("sb3_clipvf.files.archive.free_memory", lambda: 0)
    with pytest.raises(DamagedCheckpointError, match="the values of training_state.json in .* must be small enough"):
        read_checkpoint(path)
    with path.open("ab") as file:
        file.truncate(SMALL + 1)
    with pytest.raises(ValueError, match=r"checkpoint_320\.zip must be small enough to be loaded"):
        read_checkpoint(path)


def test_a_manifest_that_is_too_large_is_not_read(copied: Path) -> None:
    path = copied / "checkpoint_320.zip"
    rewrite(path, lambda entries: entries.update({"training_manifest.json": b" " * (SMALL + 1)}))
    with pytest.raises(DamagedCheckpointError, match="training_manifest.json is larger than 16,777,216 bytes"):
        read_manifest(path)


def test_a_checkpoint_that_a_running_training_removes_is_skipped(copied: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    first, *others = sorted_checkpoints(copied)

    def removing(path: Path) -> CheckpointManifest:
        first.unlink(missing_ok=True)
        return read_manifest(path)

    monkeypatch.setattr("sb3_clipvf.checkpoint.file.read_manifest", removing)
    assert others and sorted_checkpoints(copied) == others


@pytest.mark.parametrize("function", ["read_manifest", "read_checkpoint"])
def test_the_newest_checkpoint_is_read_if_a_training_replaces_the_only_one(
    function: str, copied: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    *others, last = sorted_checkpoints(copied)
    for path in others:
        path.unlink()
    newer, read = last.with_name("checkpoint_999.zip"), getattr(checkpoint_file, function)

    def replacing(path: Path) -> Any:
        if not newer.exists():
            last.rename(newer)
        return read(path)

    monkeypatch.setattr(checkpoint_file, function, replacing)
    assert newest_checkpoint(copied).path == newer


def test_a_flipped_bit_is_found_wherever_it_is(copied: Path) -> None:
    path = copied / "checkpoint_320.zip"
    content = bytearray(path.read_bytes())
    with zipfile.ZipFile(path) as archive:
        starts = {info.filename: info.header_offset + 64 + len(info.filename) for info in archive.infolist()}
    for start in starts.values():
        content[start] ^= 1
        path.write_bytes(content)
        with pytest.raises(DamagedCheckpointError):
            read_checkpoint(path)
        content[start] ^= 1


def test_the_newest_complete_checkpoint_is_used_and_damaged_ones_are_named(
    copied: Path, caplog: pytest.LogCaptureFixture
) -> None:
    (copied / "checkpoint_320.zip").write_bytes(b"PK")
    rewrite(copied / "checkpoint_256.zip", lambda entries: entries.update(data=b"{}"))
    with caplog.at_level(logging.WARNING, "sb3_clipvf"):
        assert newest_checkpoint(copied).manifest.num_timesteps == 128
    assert [("320" in text, "256" in text) for text in caplog.messages] == [(True, False), (False, True)]


def fail_for(name: str, error: OSError, monkeypatch: pytest.MonkeyPatch) -> None:
    """Let files of one name be unreadable, also for root."""
    real = io.open

    def failing(path: Any, *arguments: Any, **kwargs: Any) -> Any:
        if Path(path).name == name:
            raise error
        return real(path, *arguments, **kwargs)

    monkeypatch.setattr("builtins.open", failing)
    monkeypatch.setattr(io, "open", failing)  # of pathlib


@pytest.mark.parametrize("kind", ["a folder", errno.EACCES, errno.EIO])
def test_checkpoints_that_cannot_be_read_are_skipped_and_named(
    copied: Path, kind: str | int, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    path = copied / "checkpoint_320.zip"
    if isinstance(kind, int):
        fail_for(path.name, OSError(kind, os.strerror(kind)), monkeypatch)
    else:
        path.unlink()
        path.mkdir()
    assert sorted_checkpoints(copied)[-1] == path
    with caplog.at_level(logging.WARNING, "sb3_clipvf"):
        assert newest_checkpoint(copied).manifest.num_timesteps == 256
    reason = os.strerror(errno.EISDIR if isinstance(kind, str) else kind)
    (message,) = caplog.messages
    assert "checkpoint_320.zip cannot be read" in message and reason in message
    # The resumed training writes its next checkpoints beside it.
    callback = TrainingCheckpoint(64, copied, keep_last=9)
    model = ClipPPO.resume(copied, CASE.make_env(copied), device="cpu")
    model.learn(128, reset_num_timesteps=False, callback=callback)
    assert callback.newest == copied / "checkpoint_384.zip"
    assert read_manifest(callback.newest).serial >= 3


def test_a_folder_of_unreadable_checkpoints_says_so(copied: Path) -> None:
    for path in copied.iterdir():
        path.unlink()
        path.mkdir()
    with pytest.raises(DamagedCheckpointError, match="All 3 checkpoints in .* are damaged or cannot be read"):
        newest_checkpoint(copied)


def test_without_a_whole_checkpoint_there_is_nothing_to_resume(copied: Path, tmp_path: Path) -> None:
    for path in copied.iterdir():
        path.write_bytes(b"")
    with pytest.raises(DamagedCheckpointError, match="All 3 checkpoints in .* are damaged"):
        newest_checkpoint(copied)
    with pytest.raises(FileNotFoundError, match=r"holds no checkpoint_<timesteps>\.zip"):
        newest_checkpoint(tmp_path)
    with pytest.raises(FileNotFoundError):
        ClipPPO.resume(tmp_path / "checkpoint_1.zip", CASE.make_env(tmp_path))


def test_a_plain_model_is_refused_with_the_hint(tmp_path: Path) -> None:
    CASE.model(tmp_path).save(tmp_path / "model.zip")
    with pytest.raises(NotACheckpointError, match=r"ClipPPO\.load"):
        ClipPPO.resume(tmp_path / "model.zip", CASE.make_env(tmp_path))


def test_another_format_is_refused(copied: Path) -> None:
    def change(entries: dict[str, bytes]) -> None:
        manifest = json.loads(entries["training_manifest.json"])
        manifest.update(format=2, versions={"sb3_clipvf": "9.9"})
        entries["training_manifest.json"] = json.dumps(manifest).encode()

    rewrite(copied / "checkpoint_320.zip", change)
    with pytest.raises(NotACheckpointError, match=r"format 2.*sb3_clipvf 9\.9"):
        read_checkpoint(copied / "checkpoint_320.zip")


def test_changed_versions_are_warned_of(copied: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    def change(entries: dict[str, bytes]) -> None:
        manifest = json.loads(entries["training_manifest.json"])
        manifest["versions"].update(torch="1.0", absent_here="3.0")
        entries["training_manifest.json"] = json.dumps(manifest).encode()

    rewrite(copied / "checkpoint_320.zip", change)
    with caplog.at_level(logging.WARNING, "sb3_clipvf"):
        ClipPPO.resume(copied, CASE.make_env(tmp_path), device="cpu")
    assert f"absent_here 3.0 -> absent, torch 1.0 -> {versions()['torch']}" in caplog.text
