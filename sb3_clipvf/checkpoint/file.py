"""The checkpoint file: SB3's zip with the training's state, a format, versions, and a digest of each entry."""

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
from sb3_clipvf.files.archive import check_inner_zip, check_json, entries_of, read_bytes, read_json
from sb3_clipvf.files.codec import encoded

FORMAT = 1
"""Version of the layout."""

FILE_NAME = re.compile(r"checkpoint_(\d+)\.zip")
"""Names of checkpoints in their folder."""

_STATE, _ARRAYS, _MANIFEST = "training_state.json", "training_arrays.npz", "training_manifest.json"
_PACKAGES = ("stable_baselines3", "gymnasium", "torch", "numpy", "numba", "scipy", "mujoco", "sb3_clipvf")


@dataclass(frozen=True)
class CheckpointManifest:
    """
    What a checkpoint says about itself.

    :param training: Random name of the training, which its checkpoints share.
    :param num_timesteps: Environment steps of the training so far.
    :param total_timesteps: Environment steps at which the training ends.
    :param serial: Counts the checkpoints that a folder ever held; the newest has the highest.
    :param mean_return: Mean return of the training's last episodes, return units; None without a full window of them.
    :param differences: What will differ after a resume, and how to avoid it; empty where the resumed training gives the
        same weights to the last bit.
    :param versions: Of Python and of the packages that numbers come from.
    :param build: How the environments are built.
    :param entries: SHA-256 of each other entry of the file, in hexadecimal.
    :param format: Version of the layout.
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
    A whole checkpoint, read and checked.

    :param path: Where it was read from.
    :param content: The file.
    :param manifest: What it says about itself.
    :param tree: The state besides what SB3's ``load`` reads.
    """

    path: Path
    content: bytes
    manifest: CheckpointManifest
    tree: dict[str, Any]


def file_bytes(state: TrainingState, serial: int) -> bytes:
    """
    Make the file of a training's state.

    :param state: The state.
    :param serial: Of this checkpoint.
    :return: Its content.
    """
    stream = io.BytesIO()
    save_to_zip_file(stream, encoded(state.attributes), state.parameters, state.variables)
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
    """
    Look up the versions of what numbers come from.

    :return: By package, those that are installed, and Python.
    """
    return installed_versions(_PACKAGES)


def read_manifest(path: str | os.PathLike[str]) -> CheckpointManifest:
    """
    Read what a checkpoint says about itself, without checking the rest of it.

    :param path: The file.
    :return: Its manifest.
    :raises FileNotFoundError: If there is none.
    :raises NotACheckpointError: If it is a model without the state of its training, or of another format.
    :raises DamagedCheckpointError: If it is no whole zip.
    """
    with open(path, "rb") as file:
        return _manifest(Path(path), file)


def read_checkpoint(path: str | os.PathLike[str]) -> Checkpoint:
    """
    Read a checkpoint and check each entry of it.

    :param path: The file.
    :return: Its content.
    :raises FileNotFoundError: If there is none.
    :raises NotACheckpointError: If it is a model without the state of its training, or of another format.
    :raises DamagedCheckpointError: If parts of it are missing or changed; the message names them.
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
            f"{path} is damaged: {', '.join(wrong or [_STATE, _ARRAYS])} must be as written, got something else. Use "
            "an older checkpoint."
        )
    try:
        tree = codec.from_bytes(entries[_STATE], entries[_ARRAYS])
    except Exception as error:  # zipfile, zlib, NumPy and JSON have each their own
        raise DamagedCheckpointError(f"{path} is damaged: its state cannot be read: {error}") from error
    return Checkpoint(path, content, manifest, tree)


def newest_checkpoint(folder: str | os.PathLike[str]) -> Checkpoint:
    """
    Read the newest whole checkpoint of a folder; a warning names each newer one that is damaged.

    :param folder: Where a ``TrainingCheckpoint`` wrote.
    :return: The checkpoint.
    :raises FileNotFoundError: If there is none.
    :raises DamagedCheckpointError: If all are damaged.
    """
    paths = sorted_checkpoints(Path(folder))
    for path in reversed(paths):
        try:
            return read_checkpoint(path)
        except (DamagedCheckpointError, NotACheckpointError) as error:
            log.warning("A checkpoint is passed over: %s", error)
    if paths:
        raise DamagedCheckpointError(
            f"None of the {len(paths)} checkpoints in {folder} is whole. Start anew in another folder, or load a model "
            "that was saved elsewhere."
        )
    raise FileNotFoundError(
        f"{folder} holds no checkpoint_<timesteps>.zip. `path` must be a checkpoint or the folder of a "
        "TrainingCheckpoint; a training that was ended before its first checkpoint starts anew."
    )


def sorted_checkpoints(folder: Path) -> list[Path]:
    """
    Find the checkpoints of a folder.

    :param folder: The folder; it need not exist.
    :return: Oldest first. What cannot be read counts by its time steps, as newer than all others.
    """
    found: list[tuple[float, int, Path]] = []
    for path in folder.glob("checkpoint_*.zip"):
        match = FILE_NAME.fullmatch(path.name)
        if match is None:
            continue
        try:
            serial = float(read_manifest(path).serial)
        except (DamagedCheckpointError, NotACheckpointError):
            serial = float("inf")
        found.append((serial, int(match[1]), path))
    return [path for _, _, path in sorted(found)]


def _manifest(path: Path, stream: Any) -> CheckpointManifest:
    try:
        with zipfile.ZipFile(stream) as archive:
            is_model = "data" in archive.namelist()
            values = read_json(archive, _MANIFEST) if _MANIFEST in archive.namelist() else None
        if values is None and not is_model:
            raise DamagedCheckpointError(f"{path} holds no model. Use another checkpoint.")
        if values is not None and values["format"] == FORMAT:
            return CheckpointManifest(**{**values, "differences": tuple(values["differences"])})
    except DamagedCheckpointError:
        raise
    except Exception as error:  # a damaged zip raises whatever its parts lead to
        raise DamagedCheckpointError(f"{path} is damaged: {error}. Use an older checkpoint.") from error
    if values is None:
        raise NotACheckpointError(
            f"{path} is a model without the state of its training, so that it cannot be resumed. Go on from its "
            "weights by ClipPPO.load, or pass what a TrainingCheckpoint wrote."
        )
    raise NotACheckpointError(
        f"{path} has the format {values['format']}, and this version of sb3_clipvf reads {FORMAT}. Resume it with "
        f"sb3_clipvf {values.get('versions', {}).get('sb3_clipvf', 'of that time')}."
    )


def _digest(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()
