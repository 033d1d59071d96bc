"""
Read and write files of models: writing is atomic, reading runs no code and stays within the free memory.

A file is read once: Stable-Baselines3 (SB3) reads the bytes that were checked. It gets rebuilt objects instead of the
pickles.
"""

import base64
import functools
import io
import json
import os
import pathlib
import re
import warnings
from collections.abc import Collection, Iterator, Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch as th
from stable_baselines3.common.save_util import data_to_json, open_path, save_to_zip_file
from torch.overrides import TorchFunctionMode

from sb3_clipvf.common.messages import log
from sb3_clipvf.common.tensors import map_tree, without_numpy
from sb3_clipvf.files.archive import SMALL, ModelPath, check_inner_zip, check_json, entries_of, read_bytes, reason_of
from sb3_clipvf.files.atomic import atomic_write
from sb3_clipvf.files.codec import ENCODED, NOTE, decoded, encoded
from sb3_clipvf.files.trust import TRUST_ADVICE, Trust, UnsafeFileError
from sb3_clipvf.files.unpickle import named_errors, unpickle

_VARIABLES = ("pytorch_variables.pth", "tensors.pth")  # the second one by old versions of SB3

ROOM = 64 * 2**20
"""A loaded policy may take four times the bytes of the saved weights plus these: not all its tensors are saved."""


class CheckedStream(io.BytesIO):
    """Bytes of a model's zip that were checked."""


@dataclass(frozen=True)
class ModelFile:
    """
    A model's zip, checked except for its pickles.

    :param name: Name of the file, for messages.
    :param content: Its bytes.
    :param data: Attributes of the model, as parsed from JSON; None if the zip holds none.
    :param weight_sizes: Size in bytes of each entry of tensors, by its name without the suffix.
    :param variables: Names of further tensors, which SB3 sets as attributes of the model.
    """

    name: str
    content: bytes
    data: Mapping[str, Any] | None
    weight_sizes: Mapping[str, int]
    variables: frozenset[str]

    def stream(self) -> CheckedStream:
        """Return the bytes for SB3's own functions."""
        return CheckedStream(self.content)

    def unpickled(self, trust: Trust, replaced: Collection[str]) -> dict[str, Any]:
        """Return attributes that plain JSON cannot hold, without those in ``replaced``; :data:`NOTE` maps to None."""
        fields: dict[str, Any] = {NOTE: None}
        for key, item in (self.data or {}).items():
            if not isinstance(item, dict) or key in replaced:
                continue
            what, hint = f"`{key}` in {self.name}", f"pass a value of your own: custom_objects={{{key!r}: ...}}."
            damaged = f" To load the rest, {hint}"
            if ":serialized:" in item:
                with named_errors(what, f"{TRUST_ADVICE}. Or {hint}", damaged):
                    fields[key] = unpickle(base64.b64decode(item[":serialized:"], validate=True), trust)
            elif ENCODED in item:
                with named_errors(what, f"`save` does not write this.{damaged}", damaged):
                    fields[key] = decoded(item)
        return fields


def write_model(
    path: ModelPath, attributes: Mapping[str, Any], parameters: Mapping[str, Any], variables: Mapping[str, Any]
) -> None:
    """
    Write a model's attributes, state dicts and further tensors, each by name, as SB3's zip.

    The zip replaces an older one only when it is complete; an open file is written to directly.
    """
    stream = io.BytesIO()
    save_to_zip_file(stream, encoded(attributes), *(map_tree(without_numpy, dict(d)) for d in (parameters, variables)))
    if isinstance(path, str | os.PathLike):
        with atomic_write(_target(pathlib.Path(path))) as file:
            file.write(stream.getbuffer())
    else:
        open_path(path, "w").write(stream.getbuffer())


def frozen_attributes(attributes: Mapping[str, Any]) -> dict[str, Any]:
    """Return a model's attributes as plain JSON for SB3's ``save_to_zip_file``: nothing changes them later."""
    frozen: dict[str, Any] = json.loads(data_to_json(encoded(attributes)))
    return frozen


def _target(path: pathlib.Path) -> pathlib.Path:
    """Return the path that SB3 would write to: add a suffix, create folders, and avoid a folder of that name."""
    if not path.suffix:
        path = pathlib.Path(f"{path}.zip")
    if path.is_dir():
        warnings.warn(f"Path '{path}' is a folder. Will save instead to {path}_2", stacklevel=4)
        path = pathlib.Path(f"{path}_2")
    if not path.parent.exists():
        warnings.warn(f"Path '{path.parent}' does not exist. Will create it.", stacklevel=4)
        path.parent.mkdir(exist_ok=True, parents=True)
    return path


def read_model(path: ModelPath, *, needs_data: bool = True) -> ModelFile:
    """
    Read a model's zip and check everything but its pickles.

    :param path: File, with or without ".zip", or an open binary file, whose position is kept.
    :param needs_data: Whether it must hold the model's attributes, not only weights.
    :raises UnsafeFileError: If its weights hold more than tensors.
    :raises ValueError: If it is no model, damaged, or too large for the memory.
    """
    name, content = read_bytes(path, "zip")
    data, weight_sizes, variables = None, {}, frozenset[str]()
    for entry, raw in entries_of(name, content):
        if entry == "data":
            data = _parsed(name, raw)
        elif os.path.splitext(entry)[1] == ".pth":
            weights = _checked_weights(name, entry, raw)
            if entry in _VARIABLES:
                variables |= frozenset(map(str, weights))
            weight_sizes[entry.removesuffix(".pth")] = len(raw)
    if "policy" not in weight_sizes or (needs_data and data is None):
        missing = "`data`" if "policy" in weight_sizes else "`policy.pth`"
        raise ValueError(f"{name} must be what `save` wrote, but holds no {missing}. Pass the zip of a model.")
    return ModelFile(name, content, data, weight_sizes, variables)


def check_model(file: ModelFile, cls: type[Any], trust: Trust, replaced: Collection[str]) -> None:
    """Refuse a file that lacks parts of a model, brings an environment, or would hide methods of ``cls``."""
    data = file.data or {}
    if "policy.optimizer" not in file.weight_sizes:
        raise ValueError(
            f"{file.name} must be what `save` wrote, but holds no `policy.optimizer.pth`. Pass the zip of a model."
        )
    if data.get("env") is not None and "env" not in replaced and not trust.everything:
        raise UnsafeFileError(
            f"`env` in {file.name} must be absent: creating an environment can import any module. {TRUST_ADVICE}."
        )
    if not trust.everything:
        check_variables(file, _declared_variables(cls))
    missing = [key for key in ("policy_class", "observation_space", "action_space") if key not in data]
    if missing:
        raise ValueError(f"`data` in {file.name} must be complete, but holds no {', '.join(missing)}. Save it again.")
    for key in data:
        if key not in replaced and _hides_method(cls, key):
            raise ValueError(f"`{key}` in {file.name} must be absent: {cls.__name__} has a method of this name.")


def without_methods(cls: type[Any], attributes: Mapping[str, Any]) -> dict[str, Any]:
    """Return a model's attributes without those that :func:`check_model` refuses; warn about them."""
    hidden = tuple(key for key in attributes if _hides_method(cls, key))
    if hidden:
        _warn_about_methods(cls.__name__, ", ".join(f"`{key}`" for key in hidden))
    return {key: value for key, value in attributes.items() if key not in hidden}


@functools.cache
def _warn_about_methods(cls_name: str, names: str) -> None:
    """Warn once per class and names, since a run saves its model many times."""
    log.warning(
        "Not saved, since %s has methods, functions or classes of these names: %s. A loaded model has those of its "
        "class. Use other names for attributes of the model.",
        cls_name,
        names,
    )


def _hides_method(cls: type[Any], key: str) -> bool:
    return key.startswith("__") or callable(getattr(cls, key, None))


def check_variables(file: ModelFile, declared: Collection[str]) -> None:
    """Refuse further tensors that are not declared: SB3 sets them at any path, such as an attribute of a class."""
    others = sorted(file.variables.difference(declared))
    if others:
        raise UnsafeFileError(
            f"'pytorch_variables.pth' in {file.name} must hold only tensors that the algorithm declares "
            f"({', '.join(sorted(declared)) or 'none'}), got {', '.join(map(repr, others))[:300]}. {TRUST_ADVICE}."
        )


def network_bound(file: ModelFile, trust: Trust) -> AbstractContextManager[Any]:
    """Return a context that refuses a policy much larger than the file's weights, unless the file is trusted."""
    return nullcontext() if trust.everything else _NetworkBound(file)


# ---------------------------------------------------------------------- contents


def _declared_variables(cls: type[Any]) -> Collection[str]:
    """Return what a class declares without a model; one that reads its model's attributes declares nothing here."""
    try:
        return tuple(object.__new__(cls)._get_torch_save_params()[1])
    except AttributeError:
        return ()


def _parsed(name: str, raw: bytes) -> dict[str, Any]:
    check_json(f"`data` in {name}", raw)
    try:
        data = json.loads(raw)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"`data` in {name} must be JSON, but {reason_of(error)}. Save the model again.") from error
    if not isinstance(data, dict):
        raise ValueError(f"`data` in {name} must be a JSON object, got {type(data).__name__}. Save the model again.")
    data.pop(NOTE, None)  # only SB3's reader needs it
    for key, item in data.items():
        if isinstance(item, dict) and not isinstance(item.get(":serialized:", ""), str):
            raise ValueError(f"`{key}` in {name} must be pickled as text, got a different type. Save the model again.")
    return data


def _checked_weights(name: str, entry: str, raw: bytes) -> dict[Any, Any]:
    """Return weights, and check that SB3 can read them: only tensors and plain containers of these."""
    what = f"{entry!r} in {name}"
    check_inner_zip(what, raw)
    try:
        weights = th.load(io.BytesIO(raw), map_location="cpu", weights_only=True)
    except Exception as error:  # torch fails in many ways on damaged bytes
        refused = re.search(r"GLOBAL (\S+)", str(error))
        if refused is None:
            raise ValueError(f"{what} could not be read: {reason_of(error)}. Save the model again.") from error
        # torch's own message advises to load it without the check.
        raise UnsafeFileError(
            f"{what} must hold tensors only, got {refused[1]}. SB3 reads no other weights, trusted or not."
        ) from None
    _check_tensors(what, weights)
    if not (isinstance(weights, dict) or weights is None):
        raise ValueError(f"{what} must hold a dict of tensors, got {type(weights).__name__}. Save the model again.")
    if entry.endswith("optimizer.pth") and not {"state", "param_groups"} <= (weights or {}).keys():
        raise ValueError(f"{what} must hold the state of an optimizer, got something else. Save the model again.")
    return weights or {}


def _check_tensors(what: str, weights: Any) -> None:
    """Refuse tensors that take much more memory than the file when they are copied, such as views of one value."""
    n_bytes, storages = 0, dict[int, int]()
    for tensor in _tensors_of(weights):
        if tensor.layout is not th.strided:
            continue
        storage = tensor.untyped_storage()
        storages[storage.data_ptr()] = storage.nbytes()
        size = tensor.numel() * tensor.element_size()
        n_bytes += size
        # Parts of a network may share their weights.
        if size > storage.nbytes() or n_bytes > SMALL + 4 * sum(storages.values()):
            raise ValueError(
                f"{what} must hold no tensors larger than their values, got {n_bytes:,} bytes. Save the model again."
            )


def _tensors_of(weights: Any) -> Iterator[th.Tensor]:
    """Yield the tensors of nested containers, each container once: a file may name one at many places."""
    known, found = set[int](), [weights]
    while found:
        item = found.pop()
        if isinstance(item, th.Tensor):
            yield item
        elif isinstance(item, dict | list | tuple | set | frozenset) and id(item) not in known:
            known.add(id(item))
            found += [*item.keys(), *item.values()] if isinstance(item, dict) else item


# ---------------------------------------------------------------------- size of the policy

_MIN_BYTES = 1024  # memory of the smallest tensor, which takes some hundred bytes in a file
_FACTORIES = frozenset({th.empty, th.zeros, th.ones, th.full, th.rand, th.randn, th.eye, th.arange})


class _NetworkBound(TorchFunctionMode):
    """Count the bytes of tensors before they are created, and refuse more than the file's weights explain."""

    changes_no_numbers = True  # so that the choice of engine and device is that of the constructor

    def __init__(self, file: ModelFile) -> None:
        super().__init__()
        self._name, self._n_saved, self._n_bytes = file.name, file.weight_sizes["policy"], 0

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func in _FACTORIES and "out" not in kwargs:
            self._n_bytes += max(_MIN_BYTES, func(*args, **{**kwargs, "device": "meta"}).nbytes)
            if self._n_bytes > ROOM + 4 * self._n_saved:
                raise ValueError(
                    f"The policy in {self._name} must be no larger than its weights, got a network of more than "
                    f"{self._n_bytes / 1e6:.0f} MB and weights of {self._n_saved / 1e6:.1f} MB. If you trust "
                    "the file, pass trust_pickle=True."
                )
        return func(*args, **kwargs)
