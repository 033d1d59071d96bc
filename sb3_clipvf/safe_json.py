"""
A model's attributes as JSON: what ``codec`` expresses, and the classes and objects of ``safe_objects``' list.

A value that is plain JSON stands in the file as it is. Others stand as ``{":clipvf:": FORMAT, ":type:": ..., "value":
...}``, beside Stable-Baselines3's own ``{":serialized:": ...}``, which is a pickle. Reading goes by the same list and
the same checks as that of pickles, so that it runs no code; there is no way to name anything else.
"""

import base64
import functools
import pathlib
from collections.abc import Mapping
from typing import Any

import numpy as np
import torch as th

from sb3_clipvf import codec, safe_objects
from sb3_clipvf.codec import TAG
from sb3_clipvf.messages import log
from sb3_clipvf.safe_makers import MADE, NotAllowedError, full_name

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
            tree = codec.to_json(value, _to_json)
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
    return codec.from_json(item["value"], _from_json)


def _has_tags(tree: Any) -> bool:
    if isinstance(tree, dict):
        # Of ours, or what a reader would take for a value of another form.
        return bool({TAG, ENCODED, ":serialized:"} & tree.keys()) or any(map(_has_tags, tree.values()))
    return isinstance(tree, list) and any(map(_has_tags, tree))


def _to_json(value: Any) -> dict[str, Any]:
    kind = type(value)
    if hasattr(value, "__qualname__"):
        if safe_objects.find(value.__module__, value.__qualname__) is not value:
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
        name, array = codec.as_array(value)
        raw = base64.b64encode(array.tobytes()).decode()
        return {TAG: name, "v": raw, "dtype": _checked_dtype(array.dtype), "shape": list(array.shape)}
    safe_objects.create(kind, ())  # refuses what is not on the list
    return {TAG: "object", "class": full_name(kind), "v": codec.to_json(value.__getstate__(), _to_json)}


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
        safe_objects.restore(bit_generator, content)
        return _maker(_GENERATOR, "__generator_ctor")(bit_generator)
    if kind == "object":
        instance = safe_objects.create(_class(item["class"]), ())
        safe_objects.restore(instance, codec.from_json(content, _from_json))
        return instance
    # A bytearray, so that the array can be written to.
    raw = bytearray(base64.b64decode(content, validate=True))
    dtype, shape = _maker("numpy", "dtype")(item["dtype"]), tuple(item["shape"])
    return codec.of_array(kind, _maker("numpy.core.numeric", "_frombuffer")(raw, dtype, shape, "C"))


def _class(name: str) -> Any:
    module, _, last = name.rpartition(".")
    found = safe_objects.find(module, last)
    if not isinstance(found, type):
        raise NotAllowedError(name)
    return found


def _checked_dtype(dtype: np.dtype[Any]) -> str:
    _maker("numpy", "dtype")(dtype.str)
    return dtype.str


def _maker(module: str, name: str) -> Any:
    """The function that a pickle may call under this name: it checks its arguments."""
    return MADE[f"{module}.{name}"]
