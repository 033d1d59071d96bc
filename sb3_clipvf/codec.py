"""
Trees of plain values as one JSON text and one ``.npz`` archive, and back: exact, and without pickle.

A tree is made of None, bool, int, float, str, bytes, NumPy arrays and scalars, tensors, and of lists, tuples, deques
and dicts of trees. What comes back is equal to the last bit, and of the same type.
"""

import io
import json
import math
from collections import OrderedDict, deque
from collections.abc import Callable
from typing import Any

import numpy as np
import torch as th

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
