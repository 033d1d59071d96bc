"""
Trees of plain values as one JSON text and one ``.npz`` archive, and back: exact, and without pickle.

A tree is made of None, bool, int, float, str, bytes, NumPy arrays and scalars, tensors, and of lists, tuples, deques
and dicts of trees. What comes back is equal to the last bit, and of the same type.
"""

import io
import json
import math
from collections import deque
from collections.abc import Mapping
from typing import Any

import numpy as np
import torch as th

from sb3_clipvf.checkpoint.errors import DamagedCheckpointError

Tree = Any
"""A tree of plain values."""

_TAG = "~"
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
        return {frozen(key, where): frozen(item, f"{where}[{key!r}]") for key, item in value.items()}
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
    text = json.dumps(_to_json(tree, arrays), allow_nan=False, separators=(",", ":"))
    archive = io.BytesIO()
    np.savez(archive, **arrays)  # type: ignore[arg-type]
    return text.encode(), archive.getvalue()


def from_bytes(text: bytes, archive: bytes) -> Tree:
    """
    Read what :func:`to_bytes` wrote. Nothing in it can run code.

    :param text: JSON text.
    :param archive: The archive.
    :return: The tree.
    :raises DamagedCheckpointError: If it is something else.
    """
    try:
        with np.load(io.BytesIO(archive), allow_pickle=False) as arrays:
            return _from_json(json.loads(text), arrays)
    except Exception as error:  # zipfile, zlib, NumPy and JSON have each their own
        raise DamagedCheckpointError(f"The training state cannot be read: {error}") from error


def _to_json(value: Tree, arrays: dict[str, np.ndarray]) -> Any:
    kind = type(value)
    if kind in (type(None), bool, int, str):
        return value
    if kind is float:
        return value if math.isfinite(value) else {_TAG: "float", "v": repr(value)}
    if kind is list:
        return [_to_json(item, arrays) for item in value]
    if kind is dict:
        if all(type(key) is str for key in value) and _TAG not in value:
            return {key: _to_json(item, arrays) for key, item in value.items()}
        return {_TAG: "dict", "v": [[_to_json(key, arrays), _to_json(item, arrays)] for key, item in value.items()]}
    if kind is tuple:
        return {_TAG: "tuple", "v": [_to_json(item, arrays) for item in value]}
    if kind is deque:
        return {_TAG: "deque", "v": [_to_json(item, arrays) for item in value], "maxlen": value.maxlen}
    name, array = _as_array(value)
    key = f"a{len(arrays)}"
    arrays[key] = array
    return {_TAG: name, "v": key}


def _as_array(value: Tree) -> tuple[str, np.ndarray]:
    if isinstance(value, bytes):
        return "bytes", np.frombuffer(value, np.uint8)
    if isinstance(value, th.Tensor):
        return "tensor", value.cpu().numpy()
    return ("array" if isinstance(value, np.ndarray) else "scalar"), np.asarray(value)


def _from_json(value: Any, arrays: Mapping[str, np.ndarray]) -> Tree:
    if isinstance(value, list):
        return [_from_json(item, arrays) for item in value]
    if not isinstance(value, dict):
        return value
    if _TAG not in value:
        return {key: _from_json(item, arrays) for key, item in value.items()}
    kind, content = value[_TAG], value["v"]
    if kind == "float":
        return float(content)
    if kind == "dict":
        return {_from_json(key, arrays): _from_json(item, arrays) for key, item in content}
    if kind == "tuple":
        return tuple(_from_json(item, arrays) for item in content)
    if kind == "deque":
        return deque((_from_json(item, arrays) for item in content), maxlen=value["maxlen"])
    array = arrays[content]
    if kind == "bytes":
        return array.tobytes()
    if kind == "tensor":
        return th.from_numpy(array)
    if kind == "scalar":
        return array[()]
    if kind == "array":
        return array
    raise ValueError(f"unknown kind {kind!r}")
