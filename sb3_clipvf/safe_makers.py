"""
The functions that a file may have called, each with its arguments checked, and how listed objects get their state.

``safe_objects`` has the list as a whole. NumPy's compiled code believes what it is given here: sizes, flags and types
that no honest file has are refused.
"""

import io
import math
import pathlib
import re
from collections import OrderedDict, deque
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np

_MULTIARRAY = ("numpy.core.multiarray", "numpy._core.multiarray")
_NUMERIC = ("numpy.core.numeric", "numpy._core.numeric")
_DTYPE = re.compile(r"[<>|=]?[biufc]\d{1,2}")
BIT_GENERATORS = ("PCG64", "PCG64DXSM")
"""Of NumPy; Gymnasium's spaces have the first."""


class NotAllowedError(Exception):
    """
    Something that is not on the list.

    :param what: What the file asked for.
    """

    def __init__(self, what: str) -> None:
        super().__init__(what)
        self.what = what


def full_name(value: Any) -> str:
    """:return: ``module.name`` of a class or function; of the type of anything else"""
    named = value if hasattr(value, "__qualname__") else type(value)
    return f"{named.__module__}.{named.__qualname__}"


def _check(is_honest: bool, what: str) -> None:
    if not is_honest:
        raise NotAllowedError(f"unusual arguments of {what}")


def _is_ints(value: Any) -> bool:
    return type(value) is tuple and all(type(item) is int and item >= 0 for item in value)


# ---------------------------------------------------------------------- collections, paths, words


def _ordered_dict(*args: Any) -> OrderedDict[Any, Any]:
    _check(not args, "collections.OrderedDict")
    return OrderedDict()


def _deque(items: Any = (), maxlen: Any = None) -> deque[Any]:
    _check(type(items) in (tuple, list) and (maxlen is None or type(maxlen) is int), "collections.deque")
    return deque(items, maxlen)


def _path(*parts: Any) -> pathlib.Path:
    _check(all(type(part) is str for part in parts), "pathlib.Path")
    return pathlib.Path(*parts)


def _train_freq(frequency: Any, unit: Any) -> Any:
    from stable_baselines3.common.type_aliases import TrainFreq, TrainFrequencyUnit

    _check(type(frequency) is int and isinstance(unit, TrainFrequencyUnit | str), "TrainFreq")
    return TrainFreq(frequency, TrainFrequencyUnit(unit))


def _train_frequency_unit(value: Any) -> Any:
    from stable_baselines3.common.type_aliases import TrainFrequencyUnit

    return TrainFrequencyUnit(value)


def _goal_selection(value: Any) -> Any:
    from stable_baselines3.her.goal_selection_strategy import GoalSelectionStrategy

    return GoalSelectionStrategy(value)


# ---------------------------------------------------------------------- numpy


def _dtype(text: Any, align: Any = False, copy: Any = True) -> Any:
    # Numbers only: arrays of objects hold anything, and others need parts of the state that can break numpy.
    if type(text) is not str or _DTYPE.fullmatch(text) is None:
        raise NotAllowedError(f"numpy.dtype({text!r})")
    _check(align in (False, 0) and copy in (True, 1), "numpy.dtype")
    return np.dtype(text, False, True)


def _set_dtype(dtype: Any, state: Any) -> None:
    # The rest would set sizes and flags that numpy relies on.
    _check(type(state) is tuple and len(state) == 8, "numpy.dtype")
    _check(state[0] in (3, 4) and state[1] in ("<", ">", "|", "="), "numpy.dtype")
    _check(state[2:] == (None, None, None, -1, -1, 0), "numpy.dtype")
    dtype.__setstate__(state)


def _is_dtype(value: Any) -> bool:
    return isinstance(value, np.dtype)


def _array(cls: Any, shape: Any, kind: Any) -> Any:
    # Empty; the state brings shape and values, which must fit each other.
    _check(cls is np.ndarray and shape == (0,) and kind in (b"b", "b"), "numpy's _reconstruct")
    return np.ndarray((0,), "b")


def _set_array(array: Any, state: Any) -> None:
    _check(type(state) is tuple and len(state) == 5, "numpy.ndarray")
    version, shape, dtype, is_fortran, raw = state
    _check(type(version) is int and _is_ints(shape) and _is_dtype(dtype), "numpy.ndarray")
    _check(type(is_fortran) is bool and type(raw) is bytes, "numpy.ndarray")
    array.__setstate__(state)


def _array_of_buffer(raw: Any, dtype: Any, shape: Any, order: Any) -> Any:
    _check(type(raw) in (bytes, bytearray) and _is_dtype(dtype), "numpy's _frombuffer")
    _check(_is_ints(shape) and order in ("C", "F"), "numpy's _frombuffer")
    _check(len(raw) == math.prod(shape) * dtype.itemsize, "numpy's _frombuffer")
    return np.frombuffer(raw, dtype=dtype).reshape(shape, order=order) if raw else np.empty(shape, dtype)


def _scalar(dtype: Any, raw: Any) -> Any:
    _check(_is_dtype(dtype) and type(raw) is bytes and len(raw) == dtype.itemsize, "numpy's scalar")
    return np.frombuffer(raw, dtype=dtype, count=1)[0]


def _bit_generator(kind: Any) -> Any:
    name = kind if type(kind) is str else getattr(kind, "__name__", "")
    if name not in BIT_GENERATORS or not (type(kind) is str or kind is getattr(np.random, name)):
        raise NotAllowedError(f"the random generator {kind!r}")
    return getattr(np.random, name)()


def _generator(bit_generator: Any, *_: Any) -> Any:
    # Older versions of numpy name the bit generator, and the function that makes it.
    is_made = type(bit_generator) in (np.random.PCG64, np.random.PCG64DXSM)
    return np.random.Generator(bit_generator if is_made else _bit_generator(bit_generator))


def _set_generator(generator: Any, state: Any) -> None:
    if state is not None:
        _set_bit_generator(generator.bit_generator, state)


def _set_bit_generator(bit_generator: Any, state: Any) -> None:
    kind = type(bit_generator).__name__
    numbers, *seeds = state if type(state) is tuple else (state,)
    _check(type(numbers) is dict and numbers.get("bit_generator") == kind, f"numpy.random.{kind}")
    _check(len(seeds) <= 1 and all(isinstance(seed, np.random.SeedSequence) for seed in seeds), f"numpy.random.{kind}")
    if seeds:
        bit_generator.__setstate__(state)
    else:
        bit_generator.state = numbers


def _seed_sequence(cls: Any, checksum: Any, state: Any) -> Any:
    import numpy as np
    from numpy.random import bit_generator

    _check(cls is np.random.SeedSequence and type(checksum) is int and state is None, "numpy's SeedSequence")
    return bit_generator.__pyx_unpickle_SeedSequence(cls, checksum, None)  # type: ignore[attr-defined]


def _set_seed_sequence(seeds: Any, state: Any) -> None:
    _check(type(state) is tuple and len(state) == 5, "numpy's SeedSequence")
    entropy, n_spawned, pool, pool_size, spawn_key = state
    is_entropy = entropy is None or type(entropy) is int or type(entropy) is list and _is_ints(tuple(entropy))
    _check(is_entropy and type(n_spawned) is int and _is_ints(spawn_key), "numpy's SeedSequence")
    # Its compiled code takes the pool to be of this form.
    is_pool = isinstance(pool, np.ndarray) and pool.dtype == np.uint32 and pool.shape == (pool_size,)
    _check(is_pool and type(pool_size) is int and pool_size >= 4, "numpy's SeedSequence")
    seeds.__setstate__(state)


# ---------------------------------------------------------------------- torch


def _storage(raw: Any) -> Any:
    import torch as th

    # torch's own function unpickles without limits.
    storage = th.load(io.BytesIO(raw), map_location="cpu", weights_only=True)
    _check(isinstance(storage, th.TypedStorage | th.UntypedStorage), "torch.storage._load_from_bytes")
    return storage


def _tensor(storage: Any, offset: Any, size: Any, stride: Any, requires_grad: Any, *_: Any) -> Any:
    import torch as th

    _check(isinstance(storage, th.TypedStorage), "torch._utils._rebuild_tensor_v2")
    _check(_is_ints((offset,)) and _is_ints(tuple(size)) and _is_ints(tuple(stride)), "torch._utils._rebuild_tensor_v2")
    # No hooks: these are functions.
    rebuild: Any = th._utils._rebuild_tensor_v2
    return rebuild(storage, offset, tuple(size), tuple(stride), requires_grad is True, OrderedDict())


def _parameter(data: Any, requires_grad: Any, *_: Any) -> Any:
    import torch as th

    _check(isinstance(data, th.Tensor), "torch._utils._rebuild_parameter")
    return th.nn.Parameter(data, requires_grad is True)


def _size(items: Any) -> Any:
    import torch as th

    _check(_is_ints(items), "torch.Size")
    return th.Size(items)


def _device(*args: Any) -> Any:
    import torch as th

    _check(all(type(arg) in (str, int) for arg in args), "torch.device")
    return th.device(*args)


# ---------------------------------------------------------------------- by name

MADE: dict[str, Callable[..., Any]] = {
    "collections.OrderedDict": _ordered_dict,
    "collections.deque": _deque,
    "numpy.dtype": _dtype,
    **{f"{module}._reconstruct": _array for module in _MULTIARRAY},
    **{f"{module}.scalar": _scalar for module in _MULTIARRAY},
    **{f"{module}._frombuffer": _array_of_buffer for module in _NUMERIC},
    "numpy.random._pickle.__bit_generator_ctor": _bit_generator,
    "numpy.random._pickle.__generator_ctor": _generator,
    "numpy.random.bit_generator.__pyx_unpickle_SeedSequence": _seed_sequence,
    "pathlib.PosixPath": _path,
    "pathlib.WindowsPath": _path,
    "pathlib._local.PosixPath": _path,
    "pathlib._local.WindowsPath": _path,
    "stable_baselines3.common.type_aliases.TrainFreq": _train_freq,
    "stable_baselines3.common.type_aliases.TrainFrequencyUnit": _train_frequency_unit,
    "stable_baselines3.her.goal_selection_strategy.GoalSelectionStrategy": _goal_selection,
    "torch.Size": _size,
    "torch.device": _device,
    "torch._utils._rebuild_parameter": _parameter,
    "torch._utils._rebuild_tensor_v2": _tensor,
    "torch.storage._load_from_bytes": _storage,
}
"""What stands for each function or class that may be called."""

STATES: Mapping[str, Callable[[Any, Any], None]] = {
    # Each kind of number has a type of its own.
    **{full_name(np.dtype(code)): _set_dtype for code in np.typecodes["All"] if _DTYPE.fullmatch(np.dtype(code).str)},
    "numpy.ndarray": _set_array,
    "numpy.random._generator.Generator": _set_generator,
    **{f"numpy.random._pcg64.{name}": _set_bit_generator for name in BIT_GENERATORS},
    "numpy.random.bit_generator.SeedSequence": _set_seed_sequence,
}
"""How objects of these types get their state; what else there is goes by ``__setstate__`` or attributes."""
