"""Torch's counterparts of NumPy's arrays and dtypes, and trees of tensors."""

import copy
import zlib
from collections.abc import Callable
from typing import Any

import numpy as np
import torch as th
from stable_baselines3.common.utils import obs_as_tensor

_WITHOUT_FLOAT64 = ("mps",)


def double_device(device: th.device) -> th.device:
    """Return the device of float64 tensors for results of a device: the CPU where the device has no float64."""
    return th.device("cpu") if device.type in _WITHOUT_FLOAT64 else device


def to_double(tensor: th.Tensor) -> th.Tensor:
    """Return a tensor as float64, on its device if possible."""
    return tensor.to(double_device(tensor.device)).double()


def to_tensor(observations: Any, device: th.device) -> Any:
    """Return observations, an array or a dict of arrays, as tensors on a device; on the host they share memory."""
    if device.type == "cpu" and type(observations) is np.ndarray:
        return th.from_numpy(observations)  # a third of the time of SB3's way
    return obs_as_tensor(observations, device)


def torch_dtype(dtype: Any) -> th.dtype:
    """Return torch's counterpart of a NumPy dtype."""
    return th.from_numpy(np.empty(0, dtype)).dtype


def map_tree(leaf: Callable[[Any], Any], tree: Any) -> Any:
    """Return a copy of a tree of dicts, lists and tuples, such as state dicts, with ``leaf`` applied to its values."""
    if isinstance(tree, dict):
        copied = copy.copy(tree)  # keeps the attribute in which a state dict has its version
        for key, value in tree.items():
            copied[key] = map_tree(leaf, value)
        return copied
    return type(tree)(map_tree(leaf, value) for value in tree) if type(tree) in (list, tuple) else leaf(tree)


def checksum(tree: Any, start: int = 0) -> int:
    """Return a checksum of a tree of dicts, lists and tuples with tensors and other values."""
    if isinstance(tree, th.Tensor):
        return zlib.crc32(tree.detach().cpu().contiguous().reshape(-1).view(th.uint8).numpy().data, start)
    if isinstance(tree, dict):
        tree = list(tree.items())
    if isinstance(tree, (list, tuple)):
        for value in tree:
            start = checksum(value, start)
        return start
    return zlib.crc32(repr(tree).encode(), start)


def without_numpy(value: Any) -> Any:
    """Return a NumPy scalar as a Python one, since torch does not load files of weights that hold NumPy's."""
    return value.item() if isinstance(value, np.generic) else value
