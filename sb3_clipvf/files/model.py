"""
Files of models and statistics, read without running code and without taking more memory than there is.

A file is read once, checked as these bytes, and handed on as the same bytes: nothing can change in between. What it has
pickled is rebuilt by ``safe_pickle``; Stable-Baselines3 (SB3) gets the objects in the place of the pickles.
"""

import base64
import io
import json
import os
import pathlib
import re
import warnings
import zipfile
from collections.abc import Collection, Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch as th
from stable_baselines3.common.save_util import open_path, save_to_zip_file
from torch.overrides import TorchFunctionMode

from sb3_clipvf.files.archive import ModelPath, check_inner_zip, check_json, entries_of, read_bytes, reason_of
from sb3_clipvf.files.atomic import atomic_write
from sb3_clipvf.files.codec import ENCODED, NOTE, decoded, encoded
from sb3_clipvf.files.trust import Trust, UnsafeFileError
from sb3_clipvf.files.unpickle import TRUST_ADVICE, named_errors, rebuilt

_REFUSED_BY_TORCH = re.compile(r"GLOBAL (\S+)")


class CheckedStream(io.BytesIO):
    """The bytes of a model's zip that were checked."""


@dataclass(frozen=True)
class ModelFile:
    """
    A model's zip, checked but for what it has pickled.

    :param name: Of the file, for messages.
    :param content: Its bytes.
    :param data: The attributes of the model as JSON has them; None where the zip holds none.
    :param weights: Names of what it has tensors of.
    """

    name: str
    content: bytes
    data: Mapping[str, Any] | None
    weights: tuple[str, ...]

    def stream(self) -> CheckedStream:
        """:return: The bytes, for SB3's own functions"""
        return CheckedStream(self.content)

    def unpickled(self, trust: Trust, replaced: Collection[str]) -> dict[str, Any]:
        """
        Rebuild the attributes that are more than plain JSON.

        :param trust: How far the file is trusted.
        :param replaced: Attributes that will have other values; theirs are not looked at.
        :return: The objects, by attribute, and None for :data:`NOTE`.
        :raises UnsafeFileError: If one needs what is neither on the list nor trusted.
        :raises ValueError: If one cannot be read, being damaged or made for other versions.
        """
        fields: dict[str, Any] = {NOTE: None}
        for key, item in (self.data or {}).items():
            if isinstance(item, dict) and key not in replaced:
                if ":serialized:" in item:
                    fields[key] = self._unpickled(key, item[":serialized:"], trust)
                elif ENCODED in item:
                    fields[key] = self._decoded(key, item)
        return fields

    def _unpickled(self, key: str, text: Any, trust: Trust) -> Any:
        way_out = f"pass a value of your own: custom_objects={{{key!r}: ...}}."
        with named_errors(f"`{key}` in {self.name}", f"{TRUST_ADVICE}. Or {way_out}", f" To go on, {way_out}"):
            return rebuilt(base64.b64decode(text, validate=True), trust)

    def _decoded(self, key: str, item: dict[str, Any]) -> Any:
        way_out = f"To go on, pass a value of your own: custom_objects={{{key!r}: ...}}."
        with named_errors(f"`{key}` in {self.name}", f"`save` writes nothing like it. {way_out}", f" {way_out}"):
            return decoded(item)


def write_model(
    path: ModelPath, attributes: Mapping[str, Any], parameters: Mapping[str, Any], variables: Mapping[str, Any]
) -> None:
    """
    Write a model's zip, which replaces an older one only when it is complete; an open file is written to directly.

    :param path: File, with or without ".zip", or an open binary file.
    :param attributes: Attributes of the model, by name. What JSON cannot express is pickled, with a warning.
    :param parameters: State dicts, by name.
    :param variables: Further tensors, by name.
    :raises OSError: If the file cannot be written. What ``path`` held before is then unchanged.
    """
    stream = io.BytesIO()
    save_to_zip_file(stream, encoded(attributes), dict(parameters), dict(variables))
    if isinstance(path, str | os.PathLike):
        with atomic_write(_target(pathlib.Path(path))) as file:
            file.write(stream.getbuffer())
    else:
        open_path(path, "w").write(stream.getbuffer())


def _target(path: pathlib.Path) -> pathlib.Path:
    """Return the path that SB3 would write to. It adds a suffix, creates folders, and avoids a folder of that name."""
    if not path.suffix:
        path = pathlib.Path(f"{path}.zip")
    if path.is_dir():
        warnings.warn(f"Path '{path}' is a folder. Will save instead to {path}_2", stacklevel=4)
        path = pathlib.Path(f"{path}_2")
    if not path.parent.exists():
        warnings.warn(f"Path '{path.parent}' does not exist. Will create it.", stacklevel=4)
        path.parent.mkdir(exist_ok=True, parents=True)
    return path.resolve()  # a link stays one


def read_model(path: ModelPath, *, needs_data: bool = True) -> ModelFile:
    """
    Read a model's zip and check all but what it has pickled.

    :param path: The file, with or without ".zip", or an open binary file, whose position stays.
    :param needs_data: Whether it must hold the model's attributes, not only weights.
    :return: The file.
    :raises FileNotFoundError: If there is none.
    :raises UnsafeFileError: If its weights ask for more than tensors.
    :raises ValueError: If it is no model, damaged, or too large for the memory.
    """
    name, content = read_bytes(path, "zip")
    data = None
    weights = []
    for entry, raw in entries_of(name, content):
        if entry == "data":
            data = _parsed(name, raw)
        elif os.path.splitext(entry)[1] == ".pth":
            _check_weights(name, entry, raw)
            weights.append(entry.removesuffix(".pth"))
    if "policy" not in weights or (needs_data and data is None):
        missing = "`data`" if "policy" in weights else "`policy.pth`"
        raise ValueError(f"{name} must be what `save` wrote, but holds no {missing}. Pass the zip of a model.")
    return ModelFile(name, content, data, tuple(weights))


def check_model(file: ModelFile, cls: type[Any], trust: Trust, replaced: Collection[str]) -> None:
    """
    Refuse what would do more than describe a model, or less.

    :param file: The file.
    :param cls: The class that is loaded.
    :param trust: How far the file is trusted.
    :param replaced: Attributes that will have other values.
    :raises UnsafeFileError: If it brings an environment, whose name can have any module imported.
    :raises ValueError: If an attribute would hide a method, or something is missing.
    """
    data = file.data or {}
    if "policy.optimizer" not in file.weights:
        raise ValueError(f"{file.name} must be what `save` wrote, but holds no `policy.optimizer.pth`.")
    if data.get("env") is not None and "env" not in replaced and not trust.everything:
        raise UnsafeFileError(
            f"`env` in {file.name} must not be there: making an environment can import any module. {TRUST_ADVICE}."
        )
    missing = [key for key in ("policy_class", "observation_space", "action_space") if key not in data]
    if missing:
        raise ValueError(f"{file.name} must be what `save` wrote, but `data` in it holds no {', '.join(missing)}.")
    for key in data:
        if key.startswith("__") or callable(getattr(cls, key, None)):
            raise ValueError(f"`{key}` in {file.name} must not be there: {cls.__name__} has a method of this name.")


# ---------------------------------------------------------------------- contents


def _parsed(name: str, raw: bytes) -> dict[str, Any]:
    check_json(f"`data` in {name}", raw)
    try:
        data = json.loads(raw)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"`data` in {name} must be JSON, but {reason_of(error)}. Save the model again.") from error
    if not isinstance(data, dict):
        raise ValueError(f"`data` in {name} must be a JSON object, got {type(data).__name__}. Save the model again.")
    data.pop(NOTE, None)  # it is for SB3's reader
    for key, item in data.items():
        if isinstance(item, dict) and not isinstance(item.get(":serialized:", ""), str):
            raise ValueError(f"`{key}` in {name} must be pickled as text, got another type. Save the model again.")
    return data


def _check_weights(name: str, entry: str, raw: bytes) -> None:
    """Read weights as SB3 will, which takes tensors and plain containers of them only."""
    what = f"{entry!r} in {name}"
    check_inner_zip(what, raw)
    try:
        weights = th.load(io.BytesIO(raw), map_location="cpu", weights_only=True)
    except Exception as error:  # torch fails in many ways on damaged bytes
        refused = _REFUSED_BY_TORCH.search(str(error))
        if refused is None:
            raise ValueError(f"{what} could not be read: {reason_of(error)}. Save the model again.") from error
        # Not torch's own words, which advise to load it without the check.
        raise UnsafeFileError(
            f"{what} must hold tensors only, got {refused[1]}. SB3 reads no other weights, trusted or not."
        ) from None
    if not (isinstance(weights, dict) or weights is None):
        raise ValueError(f"{what} must hold a dict of tensors, got {type(weights).__name__}. Save the model again.")
    if entry.endswith("optimizer.pth") and not {"state", "param_groups"} <= (weights or {}).keys():
        raise ValueError(f"{what} must hold the state of an optimizer, got something else. Save the model again.")


ROOM = 64 * 2**20
"""Bytes that a policy may take besides four times those of the file's weights: buffers are no weights."""

_LEAST = 1024  # a tensor takes this, however small it is; in a file some hundred bytes
_FACTORIES = frozenset({th.empty, th.zeros, th.ones, th.full, th.rand, th.randn, th.eye, th.arange})


def network_bound(file: ModelFile, trust: Trust) -> AbstractContextManager[Any]:
    """Return a context in which a policy larger than the file's weights is refused, unless the file is trusted."""
    return nullcontext() if trust.everything else NetworkBound(file)


class NetworkBound(TorchFunctionMode):
    """
    Refuse tensors, while a policy is built, that are larger together than the file's weights give reason for.

    :param file: The model's file.
    """

    def __init__(self, file: ModelFile) -> None:
        super().__init__()
        with zipfile.ZipFile(file.stream()) as archive:
            self._weights = sum(info.file_size for info in archive.infolist() if info.filename == "policy.pth")
        self._name, self._taken = file.name, 0

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """
        Count what is made, before it takes memory.

        :param func: Of torch.
        :param types: Of its arguments.
        :param args: Its arguments.
        :param kwargs: Its keyword arguments.
        :return: Its result.
        :raises ValueError: If it is too much.
        """
        kwargs = kwargs or {}
        if func in _FACTORIES and "out" not in kwargs:
            self._taken += max(_LEAST, func(*args, **{**kwargs, "device": "meta"}).nbytes)
            if self._taken > ROOM + 4 * self._weights:
                raise ValueError(
                    f"The policy in {self._name} must be no larger than its weights, got a network of more than "
                    f"{self._taken / 1e6:.0f} MB and weights of {self._weights / 1e6:.1f} MB. Load it only if you know "
                    "where it comes from, with trust_pickle=True."
                )
        return func(*args, **kwargs)
