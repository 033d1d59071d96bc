"""
The allowlist: classes and functions that a file may name, and how a file may set the state of objects.

A listed function is called through a stand-in that checks the arguments first. NumPy's compiled code trusts sizes,
flags and types, so those that NumPy itself never writes are refused.
"""

import importlib
import io
import math
import pathlib
import re
from collections import OrderedDict, deque
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from enum import Enum
from typing import Any

import numpy as np
import torch as th
from numpy.random import bit_generator as numpy_bit_generator
from stable_baselines3.common.type_aliases import TrainFreq, TrainFrequencyUnit
from stable_baselines3.her.goal_selection_strategy import GoalSelectionStrategy


class NotAllowedError(Exception):
    """A file asks for something that is not on the list; the message names it."""


@dataclass(frozen=True)
class CheckedFunction:
    """Stand-in for a listed function: ``call`` checks the arguments, then does the same."""

    call: Callable[..., Any]


def full_name(value: Any) -> str:
    """Return ``module.name`` of a class or function, or of the type of another object."""
    named = value if hasattr(value, "__qualname__") else type(value)
    return f"{named.__module__}.{named.__qualname__}"


def find(module: str, name: str) -> Any:
    """Return the listed class that a file names, or a :class:`CheckedFunction` for what it may call."""
    full = f"{module}.{name}"
    if "." in name:
        raise NotAllowedError(full)
    if full in _CALLED:
        return CheckedFunction(_CALLED[full])
    if full in _RESTORED or full in _NAMED:
        return getattr(importlib.import_module(module), name)
    if module in _MODULES_OF_NAMED:
        cls = getattr(importlib.import_module(module), name)
        # Skip what the module itself imports.
        if isinstance(cls, type) and cls.__module__ == module:
            return cls
    raise NotAllowedError(full)


def call(full: str, *args: Any) -> Any:
    """Call a listed function by its full name, with checked arguments."""
    return _CALLED[full](*args)


def create(cls: Any, args: tuple[Any, ...]) -> Any:
    """Return an object of a listed class, without calling its constructor; ``args`` must be empty."""
    if not isinstance(cls, type) or full_name(cls) not in _RESTORED or args:
        raise NotAllowedError(f"an object of {full_name(cls)}")
    return object.__new__(cls)


def restore(instance: Any, state: Any) -> None:
    """Set the state of an object from the file, if its class is listed and the state has the usual form."""
    name = full_name(type(instance))
    if name in _STATES:
        _STATES[name](instance, state)
    elif name in _RESTORED and type(state) is dict and all(type(key) is str for key in state):
        if hasattr(instance, "__setstate__"):
            instance.__setstate__(state)
        else:
            vars(instance).update(state)
        if name.startswith("gymnasium.spaces."):
            # The comparison reads every part, so it fails if one is missing.
            _ = instance == instance
    else:
        raise NotAllowedError(f"a change of an object of {name}")


# ---------------------------------------------------------------------- names

_BIT_GENERATORS = ("PCG64", "PCG64DXSM")  # Gymnasium's spaces use PCG64


def _names(module: str, names: str) -> frozenset[str]:
    return frozenset(f"{module}.{name}" for name in names.split())


# Classes whose objects a file may hold.
_RESTORED = (
    _names("gymnasium.spaces", "box.Box dict.Dict discrete.Discrete tuple.Tuple")
    | _names("gymnasium.spaces", "multi_binary.MultiBinary multi_discrete.MultiDiscrete")
    | _names("rl_zoo3.utils", "SimpleLinearSchedule")
    | _names("sb3_clipvf.envs.normalize", "FastVecNormalize")
    | _names("sb3_clipvf.schedules", "AdaptiveKL KLAdaptiveLR ClampedSchedule ConstantSchedule CosineSchedule")
    | _names("sb3_clipvf.schedules", "ExponentialSchedule LinearSchedule")
    | _names("stable_baselines3.common.buffers", "DictReplayBuffer ReplayBuffer")
    | _names("stable_baselines3.common.noise", "NormalActionNoise OrnsteinUhlenbeckActionNoise VectorizedActionNoise")
    | _names("stable_baselines3.common.running_mean_std", "RunningMeanStd")
    | _names("stable_baselines3.common.utils", "ConstantSchedule FloatSchedule LinearSchedule")
    | _names("stable_baselines3.common.vec_env.vec_normalize", "VecNormalize")
)

# Classes that a file may name, but of which it may hold no objects.
_NAMED = (
    _names("builtins", "bool bytes dict float int list str tuple")
    | _names("numpy", "ndarray bool bool_ float16 float32 float64 int8 int16 int32 int64 uint8 uint16 uint32 uint64")
    | _names("numpy.random", "_pcg64.PCG64 _pcg64.PCG64DXSM bit_generator.SeedSequence")
    | _names("torch", "bfloat16 bool float16 float32 float64 int8 int16 int32 int64 uint8")
    | _names("torch.nn.modules.linear", "Identity")
)

# Modules that define only policies, features extractors, buffers, activations and optimizers.
_MODULES_OF_NAMED = (
    _names("sb3_clipvf", "policies rollout")
    | _names("sb3_contrib", "ars.policies crossq.policies qrdqn.policies tqc.policies")
    | _names("sb3_contrib.common", "maskable.buffers maskable.policies recurrent.buffers recurrent.policies")
    | _names("stable_baselines3", "dqn.policies her.her_replay_buffer sac.policies td3.policies")
    | _names("stable_baselines3.common", "buffers policies sb2_compat.rmsprop_tf_like torch_layers")
    | _names("torch.nn.modules", "activation")
    | _names("torch.optim", "adadelta adagrad adam adamax adamw asgd lbfgs nadam radam rmsprop rprop sgd sparse_adam")
)


def _check(is_usual: bool, what: str) -> None:
    if not is_usual:
        raise NotAllowedError(f"unusual arguments of {what}")


def _is_ints(value: Any) -> bool:
    return type(value) is tuple and all(type(item) is int and item >= 0 for item in value)


# ---------------------------------------------------------------------- collections, paths, enumerations


def _ordered_dict(*args: Any) -> OrderedDict[Any, Any]:
    _check(not args, "collections.OrderedDict")
    return OrderedDict()


def _deque(items: Any = (), maxlen: Any = None) -> deque[Any]:
    _check(type(items) in (tuple, list) and (maxlen is None or type(maxlen) is int), "collections.deque")
    return deque(items, maxlen)


def _path(*parts: Any) -> pathlib.Path:
    _check(all(type(part) is str for part in parts), "pathlib.Path")
    return pathlib.Path(*parts)


def _train_freq(frequency: Any, unit: Any) -> TrainFreq:
    _check(type(frequency) is int and isinstance(unit, TrainFrequencyUnit | str), "TrainFreq")
    return TrainFreq(frequency, TrainFrequencyUnit(unit))


def _member_of(enumeration: type[Enum]) -> Callable[[Any], Enum]:
    # One argument only: with more, the call would create a new enumeration.
    return lambda value: enumeration(value)


# ---------------------------------------------------------------------- numpy

_DTYPE = re.compile(r"[<>|=]?[biufc]\d{1,2}")


def _dtype(text: Any, align: Any = False, copy: Any = True) -> np.dtype[Any]:
    # Numbers only: object arrays hold anything, and other dtypes need parts of the state that can crash NumPy.
    if type(text) is not str or _DTYPE.fullmatch(text) is None:
        raise NotAllowedError(f"numpy.dtype({text!r})")
    _check(align in (False, 0) and copy in (True, 1), "numpy.dtype")
    return np.dtype(text, False, True)


def _set_dtype(dtype: Any, state: Any) -> None:
    _check(type(state) is tuple and len(state) == 8, "numpy.dtype")
    _check(state[0] in (3, 4) and state[1] in ("<", ">", "|", "="), "numpy.dtype")
    # The rest would set sizes and flags that NumPy relies on.
    _check(state[2:] == (None, None, None, -1, -1, 0), "numpy.dtype")
    dtype.__setstate__(state)


def _array(cls: Any, shape: Any, kind: Any) -> np.ndarray:
    # Empty: `_set_array` sets shape and values, and NumPy checks that they match.
    _check(cls is np.ndarray and shape == (0,) and kind in (b"b", "b"), "numpy's _reconstruct")
    return np.ndarray((0,), "b")


def _set_array(array: Any, state: Any) -> None:
    _check(type(state) is tuple and len(state) == 5, "numpy.ndarray")
    version, shape, dtype, is_fortran, raw = state
    _check(type(version) is int and _is_ints(shape) and isinstance(dtype, np.dtype), "numpy.ndarray")
    _check(type(is_fortran) is bool and type(raw) is bytes, "numpy.ndarray")
    array.__setstate__(state)


def _array_of_buffer(raw: Any, dtype: Any, shape: Any, order: Any) -> np.ndarray:
    _check(type(raw) in (bytes, bytearray) and isinstance(dtype, np.dtype), "numpy's _frombuffer")
    _check(_is_ints(shape) and order in ("C", "F"), "numpy's _frombuffer")
    _check(len(raw) == math.prod(shape) * dtype.itemsize, "numpy's _frombuffer")
    return np.frombuffer(raw, dtype=dtype).reshape(shape, order=order) if raw else np.empty(shape, dtype)


def _scalar(dtype: Any, raw: Any) -> Any:
    _check(isinstance(dtype, np.dtype) and type(raw) is bytes and len(raw) == dtype.itemsize, "numpy's scalar")
    return np.frombuffer(raw, dtype=dtype, count=1)[0]


def _bit_generator(kind: Any) -> Any:
    name = kind if type(kind) is str else getattr(kind, "__name__", "")
    if name not in _BIT_GENERATORS or not (type(kind) is str or kind is getattr(np.random, name)):
        raise NotAllowedError(f"the random generator {kind!r}")
    return getattr(np.random, name)()


def _generator(bit_generator: Any, *_: Any) -> np.random.Generator:
    # Older versions of NumPy pass the name of the bit generator, and its constructor.
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
    _check(cls is np.random.SeedSequence and type(checksum) is int and state is None, "numpy's SeedSequence")
    return numpy_bit_generator.__pyx_unpickle_SeedSequence(cls, checksum, None)  # type: ignore[attr-defined]


def _set_seed_sequence(seeds: Any, state: Any) -> None:
    _check(type(state) is tuple and len(state) == 5, "numpy's SeedSequence")
    entropy, n_spawned, pool, pool_size, spawn_key = state
    is_entropy = entropy is None or type(entropy) is int or type(entropy) is list and _is_ints(tuple(entropy))
    _check(is_entropy and type(n_spawned) is int and _is_ints(spawn_key), "numpy's SeedSequence")
    # Its compiled code relies on this form of the pool.
    is_pool = isinstance(pool, np.ndarray) and pool.dtype == np.uint32 and pool.shape == (pool_size,)
    _check(is_pool and type(pool_size) is int and pool_size >= 4, "numpy's SeedSequence")
    seeds.__setstate__(state)


# ---------------------------------------------------------------------- torch


def _storage(raw: Any) -> Any:
    # torch's own `_load_from_bytes` unpickles anything. It is passed torch's older format: a zip could expand.
    _check(type(raw) is bytes and raw[:2] != b"PK", "torch.storage._load_from_bytes")
    storage = th.load(io.BytesIO(raw), map_location="cpu", weights_only=True)
    _check(isinstance(storage, th.TypedStorage | th.UntypedStorage), "torch.storage._load_from_bytes")
    return storage


def _tensor(storage: Any, offset: Any, size: Any, stride: Any, requires_grad: Any, *_: Any) -> th.Tensor:
    _check(isinstance(storage, th.TypedStorage), "torch._utils._rebuild_tensor_v2")
    _check(_is_ints((offset,)) and _is_ints(tuple(size)) and _is_ints(tuple(stride)), "torch._utils._rebuild_tensor_v2")
    # A view of fewer values would expand as soon as it is copied.
    _check(math.prod(size) <= storage.size(), "torch._utils._rebuild_tensor_v2")
    # Without backward hooks, which are functions.
    rebuild: Any = th._utils._rebuild_tensor_v2
    return rebuild(storage, offset, tuple(size), tuple(stride), requires_grad is True, OrderedDict())  # type: ignore[no-any-return]


def _parameter(data: Any, requires_grad: Any, *_: Any) -> th.nn.Parameter:
    _check(isinstance(data, th.Tensor), "torch._utils._rebuild_parameter")
    return th.nn.Parameter(data, requires_grad is True)


def _size(items: Any) -> th.Size:
    _check(_is_ints(items), "torch.Size")
    return th.Size(items)


def _device(*args: Any) -> th.device:
    _check(all(type(arg) in (str, int) for arg in args), "torch.device")
    return th.device(*args)


# ---------------------------------------------------------------------- tables of these functions

_MULTIARRAY = ("numpy.core.multiarray", "numpy._core.multiarray")

# Functions and classes that a file may call.
_CALLED: Mapping[str, Callable[..., Any]] = {
    "collections.OrderedDict": _ordered_dict,
    "collections.deque": _deque,
    "numpy.dtype": _dtype,
    **{f"{module}._reconstruct": _array for module in _MULTIARRAY},
    **{f"{module}.scalar": _scalar for module in _MULTIARRAY},
    **{f"numpy.{core}.numeric._frombuffer": _array_of_buffer for core in ("core", "_core")},
    "numpy.random._pickle.__bit_generator_ctor": _bit_generator,
    "numpy.random._pickle.__generator_ctor": _generator,
    "numpy.random.bit_generator.__pyx_unpickle_SeedSequence": _seed_sequence,
    **{f"pathlib.{name}Path": _path for name in ("Posix", "Windows", "_local.Posix", "_local.Windows")},
    "stable_baselines3.common.type_aliases.TrainFreq": _train_freq,
    "stable_baselines3.common.type_aliases.TrainFrequencyUnit": _member_of(TrainFrequencyUnit),
    "stable_baselines3.her.goal_selection_strategy.GoalSelectionStrategy": _member_of(GoalSelectionStrategy),
    "torch.Size": _size,
    "torch.device": _device,
    "torch._utils._rebuild_parameter": _parameter,
    "torch._utils._rebuild_tensor_v2": _tensor,
    "torch.storage._load_from_bytes": _storage,
}

# Functions that set the state of objects of these types; others have `__setstate__` or attributes.
_STATES: Mapping[str, Callable[[Any, Any], None]] = {
    # Each numeric type has its own dtype class.
    **{full_name(np.dtype(code)): _set_dtype for code in np.typecodes["All"] if _DTYPE.fullmatch(np.dtype(code).str)},
    "numpy.ndarray": _set_array,
    "numpy.random._generator.Generator": _set_generator,
    **{f"numpy.random._pcg64.{name}": _set_bit_generator for name in _BIT_GENERATORS},
    "numpy.random.bit_generator.SeedSequence": _set_seed_sequence,
}
