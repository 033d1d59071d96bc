"""
The checkpoint file: a model's zip with the training state, and a manifest with a digest of each entry.

``training_checkpoint`` writes these bytes by ``files.atomic.atomic_write``.
"""

import hashlib
import io
import json
import os
import re
import zipfile
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from stable_baselines3.common.save_util import save_to_zip_file

from sb3_clipvf.checkpoint.errors import DamagedCheckpointError, NotACheckpointError
from sb3_clipvf.checkpoint.monitor_files import with_contents
from sb3_clipvf.checkpoint.training_state import TrainingState
from sb3_clipvf.common.messages import log
from sb3_clipvf.common.versions import installed_versions
from sb3_clipvf.files import codec
from sb3_clipvf.files.archive import check_inner_zip, check_json, entries_of, read_bytes, read_json, reason_of

FORMAT = 1
"""Version of the file's layout."""

_NAME = re.compile(r"checkpoint_(\d+)\.zip")
_STATE, _ARRAYS, _MANIFEST = "training_state.json", "training_arrays.npz", "training_manifest.json"
_PACKAGES = ("stable_baselines3", "gymnasium", "torch", "numpy", "numba", "scipy", "mujoco", "sb3_clipvf")


@dataclass(frozen=True)
class CheckpointManifest:
    """
    Description of a checkpoint, stored in its file.

    :param training: Random name of the run, which its checkpoints share.
    :param num_timesteps: Environment steps of the run so far.
    :param total_timesteps: Environment steps at which the run ends.
    :param serial: Number of the checkpoint among all that its folder ever held; the newest has the highest.
    :param mean_return: Mean return of the last training episodes, return units; None without a full window of them.
    :param differences: What a resumed run will not repeat exactly, and how to avoid it; empty if it ends with the
        same weights to the last bit.
    :param versions: Versions of Python and of the packages that affect the numbers.
    :param build: Number and classes of the environments.
    :param entries: SHA-256 of each other entry of the file, in hexadecimal.
    :param format: Version of the file's layout.
    """

    training: str
    num_timesteps: int
    total_timesteps: int
    serial: int
    mean_return: float | None
    differences: tuple[str, ...]
    versions: dict[str, str]
    build: dict[str, Any]
    entries: dict[str, str]
    format: int = FORMAT


@dataclass(frozen=True)
class Checkpoint:
    """
    A complete checkpoint, read and checked.

    :param path: Path of the file.
    :param content: Bytes of the file.
    :param manifest: Description in the file.
    :param tree: Training state besides the model.
    """

    path: Path
    content: bytes
    manifest: CheckpointManifest
    tree: dict[str, Any]


def file_bytes(state: TrainingState, serial: int) -> bytes:
    """Return the content of a checkpoint's file."""
    stream = io.BytesIO()
    save_to_zip_file(stream, state.attributes, state.parameters, state.variables)
    text, arrays = codec.to_bytes(with_contents(state.tree))
    with zipfile.ZipFile(stream, "a") as archive:
        archive.writestr(_STATE, text, zipfile.ZIP_DEFLATED, 1)
        archive.writestr(_ARRAYS, arrays, zipfile.ZIP_DEFLATED, 1)
        manifest = CheckpointManifest(
            training=state.training,
            num_timesteps=state.num_timesteps,
            total_timesteps=state.total_timesteps,
            serial=serial,
            mean_return=state.mean_return,
            differences=state.differences,
            versions=versions(),
            build=state.tree["build"],
            entries={name: _digest(archive.read(name)) for name in archive.namelist()},
        )
        archive.writestr(_MANIFEST, json.dumps(asdict(manifest), indent=2))
    return stream.getvalue()


def versions() -> dict[str, str]:
    """Return the versions of Python and of the installed packages that affect the numbers."""
    return installed_versions(_PACKAGES)


def read_manifest(path: str | os.PathLike[str]) -> CheckpointManifest:
    """
    Read the manifest of a checkpoint, without checking the rest of the file.

    :param path: Checkpoint file.
    :return: Its manifest.
    :raises FileNotFoundError: If there is no such file.
    :raises NotACheckpointError: If it is a model without the training state, or has a different format.
    :raises DamagedCheckpointError: If it is no whole zip.
    """
    with open(path, "rb") as file:
        return _manifest(Path(path), file)


def read_checkpoint(path: str | os.PathLike[str]) -> Checkpoint:
    """
    Read a checkpoint and check each of its entries.

    :param path: Checkpoint file.
    :return: Its content.
    :raises FileNotFoundError: If there is no such file.
    :raises NotACheckpointError: If it is a model without the training state, or has a different format.
    :raises DamagedCheckpointError: If parts of it are missing or have changed; the message names them.
    :raises ValueError: If it does not fit into memory.
    """
    path = Path(path)
    _, content = read_bytes(path, None)
    try:
        entries = dict(entries_of(str(path), content))
        check_inner_zip(f"{_ARRAYS} in {path}", entries.get(_ARRAYS, b""))
        check_json(f"{_STATE} in {path}", entries.get(_STATE, b""))
    except ValueError as error:
        raise DamagedCheckpointError(str(error)) from error
    manifest = _manifest(path, io.BytesIO(content))
    found = {name: _digest(raw) for name, raw in entries.items() if name != _MANIFEST}
    wrong = sorted(
        name for name in found.keys() | manifest.entries.keys() if found.get(name) != manifest.entries.get(name)
    )
    if wrong or _STATE not in found or _ARRAYS not in found:
        raise DamagedCheckpointError(
            f"{path} is damaged: it does not match its manifest in {', '.join(wrong or [_STATE, _ARRAYS])}. Use an "
            "older checkpoint."
        )
    try:
        tree = codec.from_bytes(entries[_STATE], entries[_ARRAYS])
    except Exception as error:  # zipfile, zlib, NumPy and JSON raise many types
        text = f"{path} is damaged: its state cannot be read: {reason_of(error)}. Use an older checkpoint."
        raise DamagedCheckpointError(text) from error
    return Checkpoint(path, content, manifest, tree)


def newest_checkpoint(folder: str | os.PathLike[str]) -> Checkpoint:
    """
    Read the newest undamaged checkpoint of a folder. A warning names each newer one that is damaged or unreadable.

    :param folder: Folder of a ``TrainingCheckpoint``.
    :return: The checkpoint.
    :raises FileNotFoundError: If there is none.
    :raises DamagedCheckpointError: If all are damaged or unreadable.
    """
    # A run in progress removes old checkpoints, perhaps the only one found, after it has written a newer one.
    paths = sorted_checkpoints(Path(folder)) or sorted_checkpoints(Path(folder))
    for path in reversed(paths):
        try:
            return read_checkpoint(path)
        except FileNotFoundError:
            return newest_checkpoint(folder)
        except (DamagedCheckpointError, NotACheckpointError) as error:
            log.warning("A checkpoint is skipped: %s", error)
        except OSError as error:  # such as missing permissions or a bad sector
            log.warning("A checkpoint is skipped: %s cannot be read: %s.", path, error.strerror or error)
    if paths:
        raise DamagedCheckpointError(
            f"All {len(paths)} checkpoints in {folder} are damaged or cannot be read. Start a new run in another "
            "folder, or load a model that was saved elsewhere."
        )
    raise FileNotFoundError(
        f"{folder} holds no checkpoint_<timesteps>.zip. `path` must be a checkpoint or the folder of a "
        "TrainingCheckpoint. If the training ended before its first checkpoint, start it again."
    )


def sorted_checkpoints(folder: Path) -> list[Path]:
    """
    Return the checkpoints of a folder, oldest first; unreadable ones come last, in the order of their steps.

    Those that a run in progress removes at the same time are left out.
    """
    found: list[tuple[float, int, Path]] = []
    for path, steps in checkpoint_paths(folder).items():
        try:
            serial = float(read_manifest(path).serial)
        except FileNotFoundError:
            continue
        except (DamagedCheckpointError, NotACheckpointError, OSError):
            serial = float("inf")
        found.append((serial, steps, path))
    return [path for _, _, path in sorted(found)]


def checkpoint_paths(folder: Path) -> dict[Path, int]:
    """Return the checkpoints of a folder and the steps in their names, in any order, without reading them."""
    matches = {path: _NAME.fullmatch(path.name) for path in folder.glob("checkpoint_*.zip")}
    return {path: int(match[1]) for path, match in matches.items() if match is not None}


def _manifest(path: Path, stream: Any) -> CheckpointManifest:
    try:
        with zipfile.ZipFile(stream) as archive:
            is_model = "data" in archive.namelist()
            values = read_json(archive, _MANIFEST) if _MANIFEST in archive.namelist() else None
        if values is None and not is_model:
            raise ValueError("it holds no model")
        if values is not None and values["format"] == FORMAT:
            return CheckpointManifest(**{**values, "differences": tuple(values["differences"])})
    except Exception as error:  # zipfile and JSON raise many types for damaged bytes
        raise DamagedCheckpointError(f"{path} is damaged: {error}. Use another checkpoint.") from error
    if values is None:
        raise NotACheckpointError(
            f"{path} is a model without the state of its training, and cannot be resumed. Continue from its weights "
            "with ClipPPO.load, or pass a file that a TrainingCheckpoint wrote."
        )
    raise NotACheckpointError(
        f"{path} has the format {values['format']}, and this version of sb3_clipvf reads {FORMAT}. Resume it with "
        f"sb3_clipvf {values.get('versions', {}).get('sb3_clipvf', 'as installed then')}."
    )


def _digest(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()
