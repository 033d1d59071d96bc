"""
Encode trees of plain values, and attributes of models, as JSON: exact to the last bit, without pickle.

A tree is made of None, bool, int, float, str, bytes, NumPy arrays and scalars, tensors, and of lists, tuples, deques
and dicts of trees. Checkpoints are trees, stored as one JSON text and one ``.npz`` archive of the arrays. Attributes of
models may also hold classes and objects of the allowlist; their arrays are base64 in the JSON.
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

import cloudpickle
import numpy as np
import torch as th
from stable_baselines3.common.save_util import is_json_serializable

from sb3_clipvf.common.messages import log
from sb3_clipvf.files import allowlist
from sb3_clipvf.files.allowlist import NotAllowedError, full_name

Tree = Any  # of plain values

FORMAT = 1
ENCODED = ":clipvf:"
"""Key that marks an encoded attribute. Its value is the version of the format, ``FORMAT``."""

NOTE = (
    "observation_space: this file was saved by sb3_clipvf.ClipPPO. Load it with ClipPPO.load, or take over its weights "
    "with PPO.set_parameters"
)
"""Name of an attribute that SB3 cannot decode. SB3's warning shows this name, the only text of a file that it shows."""

_TAG = "~"  # key of JSON objects that stand for other values; it holds the kind of value
_SCALARS = frozenset({type(None), bool, int, float, str, bytes})


def frozen(value: Any, where: str = "state") -> Tree:
    """Return a copy of a tree that shares no memory with it; ``where`` names the tree in errors."""
    kind = type(value)
    if kind in _SCALARS:
        return value
    if kind is list and set(map(type, value)) <= _SCALARS:
        return list(value)  # a fast path, for the rewards of long episodes
    if isinstance(value, np.ndarray):
        _check_dtype(value.dtype, where)
        return np.array(value, order="C")
    if isinstance(value, np.generic):
        _check_dtype(value.dtype, where)
        return value
    if isinstance(value, th.Tensor):
        _check_tensor(value, where)
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
        f"them, got an object of the type {kind.__module__}.{kind.__qualname__}. Convert it to these."
    )


def _check_dtype(dtype: np.dtype[Any], where: str) -> None:
    if dtype.hasobject:
        raise TypeError(f"`{where}` must be an array of plain values, got one of the dtype {dtype}. Use a list.")


def _check_tensor(tensor: th.Tensor, where: str) -> None:
    if tensor.layout is not th.strided or not (tensor.dtype is th.bfloat16 or _numpy_has(tensor.dtype)):
        raise TypeError(
            f"`{where}` must be a dense tensor of bfloat16 or a type that NumPy has, got {tensor.dtype} with "
            f"{tensor.layout}. Convert it, for example by to_dense() or float()."
        )


@functools.cache
def _numpy_has(dtype: th.dtype) -> bool:
    try:
        th.empty(0, dtype=dtype).numpy()
    except (TypeError, RuntimeError):
        return False
    return True


def to_bytes(tree: Tree) -> tuple[bytes, bytes]:
    """Return a frozen tree as JSON text in UTF-8, and the ``.npz`` archive with its arrays."""
    arrays: dict[str, np.ndarray] = {}

    def add(value: Any) -> dict[str, Any]:
        key = f"a{len(arrays)}"
        kind, arrays[key] = _as_array(value)
        return {_TAG: kind, "v": key}

    text = json.dumps(_to_json(tree, add), allow_nan=False, separators=(",", ":"))
    archive = io.BytesIO()
    np.savez(archive, **arrays)  # type: ignore[arg-type]
    return text.encode(), archive.getvalue()


def from_bytes(text: bytes, archive: bytes) -> Tree:
    """Invert :func:`to_bytes`. Other bytes may raise any exception, but never run code."""
    with np.load(io.BytesIO(archive), allow_pickle=False) as arrays:
        return _from_json(json.loads(text), lambda item: _of_array(item[_TAG], arrays[item["v"]]))


def encoded(attributes: Mapping[str, Any]) -> dict[str, Any]:
    """Return the attributes as JSON, with :data:`NOTE`. Warn about those that SB3 will pickle instead."""
    values: dict[str, Any] = {NOTE: {":serialized:": None}}
    others = []
    for name, value in attributes.items():
        try:
            tree = _to_json(value, _object_to_json)
        except Exception as error:  # `__getstate__` of any class may fail, and the model must still be saved
            values[name] = _pickled(value) if is_json_serializable(value) else value
            others.append(f"`{name}` ({error})")
        else:
            values[name] = {ENCODED: FORMAT, ":type:": str(type(value)), "value": tree} if _has_tags(tree) else tree
    if others:
        _warn_about_pickles(", ".join(others))
    return values


def _pickled(value: Any) -> dict[str, str]:
    """Pickle a value in SB3's form. SB3 itself would write a subclass, such as a namedtuple, as its plain type."""
    return {":type:": str(type(value)), ":serialized:": base64.b64encode(cloudpickle.dumps(value)).decode()}


@functools.cache
def _warn_about_pickles(names: str) -> None:
    """Warn once per set of names, since a run saves its model many times."""
    log.warning(
        "Saved as pickles, since JSON cannot express them: %s. To load the file, trust it "
        "(`trust_pickle`), or pass other values for them. Strings such as 'lin_0.2', and classes of SB3 and torch, "
        "need no trust.",
        names,
    )


def decoded(item: Mapping[str, Any]) -> Any:
    """Invert :func:`encoded` for one attribute. Damage may raise any exception."""
    if item[ENCODED] != FORMAT:
        raise ValueError(f"its format is {item[ENCODED]!r}, and this version of sb3_clipvf reads {FORMAT}")
    return _from_json(item["value"], _object_from_json)


def _has_tags(tree: Any) -> bool:
    if isinstance(tree, dict):
        # Our own tag, or a key by which a reader would take a plain dict for something else.
        return bool({_TAG, ENCODED, ":serialized:"} & tree.keys()) or any(map(_has_tags, tree.values()))
    return isinstance(tree, list) and any(map(_has_tags, tree))


# ---------------------------------------------------------------------- containers and numbers


def _to_json(value: Any, other: Callable[[Any], dict[str, Any]]) -> Any:
    """Return a tree as JSON; ``other`` maps what is neither a scalar nor a container to a tagged object."""
    kind = type(value)
    if kind in (type(None), bool, int, str):
        return value
    if kind is float:
        return value if math.isfinite(value) else {_TAG: "float", "v": repr(value)}
    if kind is list:
        return [_to_json(item, other) for item in value]
    if kind is dict:
        if all(type(key) is str for key in value) and _TAG not in value:
            return {key: _to_json(item, other) for key, item in value.items()}
        return {_TAG: "dict", "v": [[_to_json(key, other), _to_json(item, other)] for key, item in value.items()]}
    if kind is OrderedDict:
        return {_TAG: "ordered", "v": _to_json(list(value.items()), other)}
    if kind is tuple:
        return {_TAG: "tuple", "v": [_to_json(item, other) for item in value]}
    if kind is deque:
        return {_TAG: "deque", "v": [_to_json(item, other) for item in value], "maxlen": value.maxlen}
    return other(value)


def _from_json(value: Any, other: Callable[[dict[str, Any]], Any]) -> Tree:
    """Invert :func:`_to_json`; ``other`` maps objects with other tags to their values."""
    if isinstance(value, list):
        return [_from_json(item, other) for item in value]
    if not isinstance(value, dict):
        return value
    if _TAG not in value:
        return {key: _from_json(item, other) for key, item in value.items()}
    kind = value[_TAG]
    if kind == "float":
        return float(value["v"])
    if kind == "dict":
        return {_from_json(key, other): _from_json(item, other) for key, item in value["v"]}
    if kind == "ordered":
        return OrderedDict(_from_json(value["v"], other))
    if kind == "tuple":
        return tuple(_from_json(item, other) for item in value["v"])
    if kind == "deque":
        return deque((_from_json(item, other) for item in value["v"]), maxlen=value["maxlen"])
    return other(value)


# ---------------------------------------------------------------------- arrays


def _as_array(value: Tree) -> tuple[str, np.ndarray]:
    """Return the kind of a value, and the value as an array."""
    if isinstance(value, bytes):
        return "bytes", np.frombuffer(value, np.uint8)
    if isinstance(value, th.Tensor):
        if value.dtype == th.bfloat16:  # NumPy has none
            return "bfloat16", value.cpu().view(th.int16).numpy()
        return "tensor", value.cpu().numpy()
    return ("array" if isinstance(value, np.ndarray) else "scalar"), np.asarray(value)


def _of_array(kind: str, array: np.ndarray) -> Tree:
    """Invert :func:`_as_array`."""
    if kind == "bytes":
        return array.tobytes()
    if kind in ("tensor", "bfloat16"):
        tensor = th.from_numpy(array)
        return tensor if kind == "tensor" else tensor.view(th.bfloat16)
    if kind == "scalar":
        return array[()]
    if kind == "array":
        return array
    raise ValueError(f"unknown kind {kind!r}")


# ---------------------------------------------------------------------- classes and objects of the allowlist

_GENERATOR = "numpy.random._pickle"
_POOL_SIZE = 4  # NumPy's default


def _object_to_json(value: Any) -> dict[str, Any]:
    kind = type(value)
    if hasattr(value, "__qualname__"):
        if allowlist.find(value.__module__, value.__qualname__) is not value:
            raise NotAllowedError(full_name(value))
        return {_TAG: "class", "v": full_name(value)}
    if isinstance(value, np.dtype):
        return {_TAG: "dtype", "v": _checked_dtype(value)}
    if isinstance(value, pathlib.Path) and kind is type(pathlib.Path()):
        return {_TAG: "path", "v": str(value)}
    if kind is np.str_:
        return {_TAG: "numpy text", "v": str(value)}
    if kind is th.Size:
        return {_TAG: "size", "v": list(value)}
    if kind is np.random.Generator:
        state = value.bit_generator.state
        allowlist.call(f"{_GENERATOR}.__bit_generator_ctor", state["bit_generator"])  # refuses other kinds
        return {_TAG: "generator", "v": state, **_seeds(value)}
    is_tensor = kind is th.Tensor and value.device.type == "cpu" and not value.requires_grad
    if kind in (bytes, np.ndarray) or isinstance(value, np.generic) or is_tensor:
        name, array = _as_array(value)
        raw = base64.b64encode(array.tobytes()).decode()
        return {_TAG: name, "v": raw, "dtype": _checked_dtype(array.dtype), "shape": list(array.shape)}
    allowlist.create(kind, ())  # refuses what is not on the list
    return {_TAG: "object", "class": full_name(kind), "v": _to_json(value.__getstate__(), _object_to_json)}


def _object_from_json(item: dict[str, Any]) -> Any:
    kind, content = item[_TAG], item["v"]
    if kind == "class":
        return _class(content)
    if kind == "dtype":
        return allowlist.call("numpy.dtype", content)
    if kind == "path":
        return allowlist.call("pathlib.PosixPath", content)
    if kind == "numpy text":
        return np.str_(content)
    if kind == "size":
        return allowlist.call("torch.Size", tuple(content))
    if kind == "generator":
        bit_generator = allowlist.call(f"{_GENERATOR}.__bit_generator_ctor", content["bit_generator"])
        if "seeds" in item:
            bit_generator = type(bit_generator)(_seed_sequence(item["seeds"]))
        allowlist.restore(bit_generator, content)
        return allowlist.call(f"{_GENERATOR}.__generator_ctor", bit_generator)
    if kind == "object":
        instance = allowlist.create(_class(item["class"]), ())
        allowlist.restore(instance, _from_json(content, _object_from_json))
        return instance
    # A bytearray makes the array writable.
    raw = bytearray(base64.b64decode(content, validate=True))
    dtype, shape = allowlist.call("numpy.dtype", item["dtype"]), tuple(item["shape"])
    return _of_array(kind, allowlist.call("numpy.core.numeric._frombuffer", raw, dtype, shape, "C"))


def _seeds(generator: np.random.Generator) -> dict[str, Any]:
    """Return the origin of a generator, from which ``spawn`` seeds others, if it has the usual form."""
    sequence = generator.bit_generator.seed_seq
    if type(sequence) is not np.random.SeedSequence or sequence.pool_size != _POOL_SIZE:
        return {}
    entropy = sequence.entropy
    parts = [*(entropy if isinstance(entropy, list | tuple) else [entropy]), *sequence.spawn_key]
    if not all(type(part) is int for part in parts):
        return {}
    return {"seeds": [entropy, list(sequence.spawn_key), sequence.n_children_spawned]}


def _seed_sequence(seeds: list[Any]) -> np.random.SeedSequence:
    entropy, spawn_key, n_spawned = seeds
    parts = [*(entropy if isinstance(entropy, list) else [entropy]), *spawn_key, n_spawned]
    if not all(type(part) is int and part >= 0 for part in parts):
        raise NotAllowedError("unusual arguments of numpy's SeedSequence")
    return np.random.SeedSequence(entropy, spawn_key=tuple(spawn_key), n_children_spawned=n_spawned)


def _class(name: str) -> Any:
    module, _, last = name.rpartition(".")
    found = allowlist.find(module, last)
    if not isinstance(found, type):
        raise NotAllowedError(name)
    return found


def _checked_dtype(dtype: np.dtype[Any]) -> str:
    allowlist.call("numpy.dtype", dtype.str)
    return dtype.str
