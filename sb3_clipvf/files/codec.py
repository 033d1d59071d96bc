"""
Trees of plain values as one JSON text and one ``.npz`` archive, and back: exact, and without pickle.

A tree is made of None, bool, int, float, str, bytes, NumPy arrays and scalars, tensors, and of lists, tuples, deques
and dicts of trees. What comes back is equal to the last bit, and of the same type.
"""

import base64
import functools
import io
import json
import math
import pathlib
from collections import OrderedDict, deque
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import torch as th

from sb3_clipvf.common.messages import log
from sb3_clipvf.files import allowlist
from sb3_clipvf.files.allowlist import MADE, NotAllowedError, full_name

Tree = Any
"""A tree of plain values."""

TAG = "~"
"""Key by which JSON says what kind of value an object stands for."""

_SCALARS = frozenset({type(None), bool, int, float, str, bytes})


def frozen(value: Any, where: str = "state") -> Tree:
    """
    Copy a tree, so that it stays as it is now.

    :param value: The tree.
    :param where: What it belongs to, for messages.
    :return: A copy that shares nothing with it that can change.
    :raises TypeError: If something in it is no tree.
    """
    kind = type(value)
    if kind in _SCALARS:
        return value
    if kind is list and set(map(type, value)) <= _SCALARS:
        return list(value)  # rewards of a long episode: no need to look at each of them twice
    if isinstance(value, np.ndarray):
        _check_dtype(value.dtype, where)
        return np.array(value, order="C")
    if isinstance(value, np.generic):
        _check_dtype(value.dtype, where)
        return value
    if isinstance(value, th.Tensor):
        return value.detach().clone()
    if isinstance(value, dict):
        copied = {frozen(key, where): frozen(item, f"{where}[{key!r}]") for key, item in value.items()}
        return OrderedDict(copied) if kind is OrderedDict else copied
    if isinstance(value, deque):
        return deque((frozen(item, where) for item in value), maxlen=value.maxlen)
    if isinstance(value, (list, tuple)):
        items = [frozen(item, f"{where}[{index}]") for index, item in enumerate(value)]
        return items if isinstance(value, list) else tuple(items)
    if isinstance(value, (bool, int, float, str)):
        return next(plain(value) for plain in (bool, int, float, str) if isinstance(value, plain))
    raise TypeError(
        f"`{where}` must be made of numbers, text, bytes, arrays, tensors, and lists, tuples, deques and dicts of "
        f"them, got an object of the type {kind.__module__}.{kind.__qualname__}. Turn it into these."
    )


def _check_dtype(dtype: np.dtype[Any], where: str) -> None:
    if dtype.hasobject:
        raise TypeError(f"`{where}` must be an array of plain values, got one of the dtype {dtype}. Use a list.")


def to_bytes(tree: Tree) -> tuple[bytes, bytes]:
    """
    Write a tree.

    :param tree: What :func:`frozen` gives.
    :return: JSON text in UTF-8, and the ``.npz`` archive with its arrays.
    """
    arrays: dict[str, np.ndarray] = {}

    def add(value: Any) -> dict[str, Any]:
        key = f"a{len(arrays)}"
        kind, arrays[key] = as_array(value)
        return {TAG: kind, "v": key}

    text = json.dumps(to_json(tree, add), allow_nan=False, separators=(",", ":"))
    archive = io.BytesIO()
    np.savez(archive, **arrays)  # type: ignore[arg-type]
    return text.encode(), archive.getvalue()


def from_bytes(text: bytes, archive: bytes) -> Tree:
    """
    Read what :func:`to_bytes` wrote. Nothing in it can run code.

    :param text: JSON text.
    :param archive: The archive.
    :return: The tree.
    :raises Exception: Of any type, if it is something else: zipfile, zlib, NumPy and JSON have each their own.
    """
    with np.load(io.BytesIO(archive), allow_pickle=False) as arrays:
        return from_json(json.loads(text), lambda item: of_array(item[TAG], arrays[item["v"]]))


def to_json(value: Any, other: Callable[[Any], dict[str, Any]]) -> Any:
    """
    Turn a tree into what JSON can express.

    :param value: The tree.
    :param other: Called with what is neither a scalar nor a container; gives an object with :data:`TAG`.
    :return: Lists, dicts with text as keys, and scalars of JSON.
    """
    kind = type(value)
    if kind in (type(None), bool, int, str):
        return value
    if kind is float:
        return value if math.isfinite(value) else {TAG: "float", "v": repr(value)}
    if kind is list:
        return [to_json(item, other) for item in value]
    if kind is dict:
        if all(type(key) is str for key in value) and TAG not in value:
            return {key: to_json(item, other) for key, item in value.items()}
        return {TAG: "dict", "v": [[to_json(key, other), to_json(item, other)] for key, item in value.items()]}
    if kind is OrderedDict:
        return {TAG: "ordered", "v": to_json(list(value.items()), other)}
    if kind is tuple:
        return {TAG: "tuple", "v": [to_json(item, other) for item in value]}
    if kind is deque:
        return {TAG: "deque", "v": [to_json(item, other) for item in value], "maxlen": value.maxlen}
    return other(value)


def from_json(value: Any, other: Callable[[dict[str, Any]], Any]) -> Tree:
    """
    Read what :func:`to_json` gave.

    :param value: What JSON expressed.
    :param other: Called with an object that stands for what is neither a scalar nor a container; gives the value.
    :return: The tree.
    """
    if isinstance(value, list):
        return [from_json(item, other) for item in value]
    if not isinstance(value, dict):
        return value
    if TAG not in value:
        return {key: from_json(item, other) for key, item in value.items()}
    kind = value[TAG]
    if kind == "float":
        return float(value["v"])
    if kind == "dict":
        return {from_json(key, other): from_json(item, other) for key, item in value["v"]}
    if kind == "ordered":
        return OrderedDict(from_json(value["v"], other))
    if kind == "tuple":
        return tuple(from_json(item, other) for item in value["v"])
    if kind == "deque":
        return deque((from_json(item, other) for item in value["v"]), maxlen=value["maxlen"])
    return other(value)


def as_array(value: Tree) -> tuple[str, np.ndarray]:
    """
    Turn a value of bytes into an array.

    :param value: Bytes, a tensor, or an array or scalar of NumPy.
    :return: What kind of value it is, and the array.
    """
    if isinstance(value, bytes):
        return "bytes", np.frombuffer(value, np.uint8)
    if isinstance(value, th.Tensor):
        return "tensor", value.cpu().numpy()
    return ("array" if isinstance(value, np.ndarray) else "scalar"), np.asarray(value)


def of_array(kind: str, array: np.ndarray) -> Tree:
    """
    Turn an array back into the value.

    :param kind: What kind of value it is.
    :param array: From :func:`as_array`.
    :return: The value.
    :raises ValueError: If there is no such kind.
    """
    if kind == "bytes":
        return array.tobytes()
    if kind == "tensor":
        return th.from_numpy(array)
    if kind == "scalar":
        return array[()]
    if kind == "array":
        return array
    raise ValueError(f"unknown kind {kind!r}")


ENCODED = ":clipvf:"
"""Key of what stands for a value; under it is the version of the form."""

FORMAT = 1
"""Version of the form."""

NOTE = (
    "observation_space: this file was saved by sb3_clipvf.ClipPPO. Load it with ClipPPO.load, or take over its weights "
    "with PPO.set_parameters"
)
"""Name of an attribute that SB3's reader cannot read. It warns with the name, the only text of a file that it shows."""

_GENERATOR = "numpy.random._pickle"


def encoded(attributes: Mapping[str, Any]) -> dict[str, Any]:
    """
    Turn attributes into JSON, as far as JSON can express them; a warning names the others, which SB3 will pickle.

    :param attributes: By name.
    :return: The same; each value is either what JSON can express, or as it was. Before them, :data:`NOTE`.
    """
    values: dict[str, Any] = {NOTE: {":serialized:": None}}
    others = []
    for name, value in attributes.items():
        try:
            tree = to_json(value, _to_json)
        except Exception as error:  # states of objects are theirs to give; a model must be saved in any case
            values[name] = value
            others.append(f"`{name}` ({error})")
        else:
            values[name] = {ENCODED: FORMAT, ":type:": str(type(value)), "value": tree} if _has_tags(tree) else tree
    if others:
        _warn_of_pickles(", ".join(others))
    return values


@functools.cache
def _warn_of_pickles(names: str) -> None:
    """Once for the same names: a training saves its model many times."""
    log.warning(
        "Saved as pickles, since JSON cannot express them: %s. Whoever loads the file has to trust it "
        "(`trust_pickle`), or to pass values in their place. Strings such as 'lin_0.2', and classes of SB3 and torch, "
        "need no trust.",
        names,
    )


def decoded(item: Mapping[str, Any]) -> Any:
    """
    Read a value that :func:`encoded` turned into JSON.

    :param item: What stands for it.
    :return: The value.
    :raises NotAllowedError: If it names what is not on the list.
    :raises Exception: Of any type, if it is damaged, or made for other versions.
    """
    if item[ENCODED] != FORMAT:
        raise ValueError(f"it is of the form {item[ENCODED]!r}, and this version of sb3_clipvf reads {FORMAT}")
    return from_json(item["value"], _from_json)


def _has_tags(tree: Any) -> bool:
    if isinstance(tree, dict):
        # Of ours, or what a reader would take for a value of another form.
        return bool({TAG, ENCODED, ":serialized:"} & tree.keys()) or any(map(_has_tags, tree.values()))
    return isinstance(tree, list) and any(map(_has_tags, tree))


def _to_json(value: Any) -> dict[str, Any]:
    kind = type(value)
    if hasattr(value, "__qualname__"):
        if allowlist.find(value.__module__, value.__qualname__) is not value:
            raise NotAllowedError(full_name(value))
        return {TAG: "class", "v": full_name(value)}
    if isinstance(value, np.dtype):
        return {TAG: "dtype", "v": _checked_dtype(value)}
    if isinstance(value, pathlib.Path) and kind is type(pathlib.Path()):
        return {TAG: "path", "v": str(value)}
    if kind is np.random.Generator:
        state = value.bit_generator.state
        _maker(_GENERATOR, "__bit_generator_ctor")(state["bit_generator"])  # refuses other kinds
        return {TAG: "generator", "v": state}
    is_tensor = kind is th.Tensor and value.device.type == "cpu" and not value.requires_grad
    if kind in (bytes, np.ndarray) or isinstance(value, np.generic) or is_tensor:
        name, array = as_array(value)
        raw = base64.b64encode(array.tobytes()).decode()
        return {TAG: name, "v": raw, "dtype": _checked_dtype(array.dtype), "shape": list(array.shape)}
    allowlist.create(kind, ())  # refuses what is not on the list
    return {TAG: "object", "class": full_name(kind), "v": to_json(value.__getstate__(), _to_json)}


def _from_json(item: dict[str, Any]) -> Any:
    kind, content = item[TAG], item["v"]
    if kind == "class":
        return _class(content)
    if kind == "dtype":
        return _maker("numpy", "dtype")(content)
    if kind == "path":
        return _maker("pathlib", "PosixPath")(content)
    if kind == "generator":
        bit_generator = _maker(_GENERATOR, "__bit_generator_ctor")(content["bit_generator"])
        allowlist.restore(bit_generator, content)
        return _maker(_GENERATOR, "__generator_ctor")(bit_generator)
    if kind == "object":
        instance = allowlist.create(_class(item["class"]), ())
        allowlist.restore(instance, from_json(content, _from_json))
        return instance
    # A bytearray, so that the array can be written to.
    raw = bytearray(base64.b64decode(content, validate=True))
    dtype, shape = _maker("numpy", "dtype")(item["dtype"]), tuple(item["shape"])
    return of_array(kind, _maker("numpy.core.numeric", "_frombuffer")(raw, dtype, shape, "C"))


def _class(name: str) -> Any:
    module, _, last = name.rpartition(".")
    found = allowlist.find(module, last)
    if not isinstance(found, type):
        raise NotAllowedError(name)
    return found


def _checked_dtype(dtype: np.dtype[Any]) -> str:
    _maker("numpy", "dtype")(dtype.str)
    return dtype.str


def _maker(module: str, name: str) -> Any:
    """The function that a pickle may call under this name: it checks its arguments."""
    return MADE[f"{module}.{name}"]
