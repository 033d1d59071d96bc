"""
The functions that a file may have called, each with its arguments checked, and how listed objects get their state.

``safe_objects`` has the list as a whole. NumPy's compiled code believes what it is given here: sizes, flags and types
that no honest file has are refused.
"""

import importlib
import io
import math
import pathlib
import re
from collections import OrderedDict, deque
from collections.abc import Callable, Mapping
from dataclasses import dataclass
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


@dataclass(frozen=True)
class Maker:
    """
    What a pickle gets in the place of a function that it may call; it can do nothing else with it.

    :param make: Does the same with checked arguments.
    """

    make: Callable[..., Any]


def find(module: str, name: str) -> Any:
    """
    Find what a file names.

    :param module: Module.
    :param name: Name in it, without a dot.
    :return: A class, or a :class:`Maker` in the place of what may be called.
    :raises NotAllowedError: If it is not on the list.
    :raises ImportError, AttributeError: If it is, and does not exist here.
    """
    full = f"{module}.{name}"
    if "." in name:
        raise NotAllowedError(full)
    if full in MADE:
        return Maker(MADE[full])
    if full in _RESTORED or full in _NAMED:
        return getattr(importlib.import_module(module), name)
    if module in _MODULES_OF_NAMED:
        cls = getattr(importlib.import_module(module), name)
        # Not what the module imported for itself.
        if isinstance(cls, type) and cls.__module__ == module:
            return cls
    raise NotAllowedError(full)


def create(cls: Any, args: tuple[Any, ...]) -> Any:
    """
    Make an empty object, without its constructor.

    :param cls: Its class.
    :param args: Must be empty.
    :return: The object.
    :raises NotAllowedError: If the class is not one whose objects a file may hold.
    """
    if not isinstance(cls, type) or full_name(cls) not in _RESTORED or args:
        raise NotAllowedError(f"an object of {full_name(cls)}")
    empty: Any = object.__new__(cls)
    return empty


def restore(instance: Any, state: Any) -> None:
    """
    Give an object its state.

    :param instance: The object, which the file made.
    :param state: As the file has it.
    :raises NotAllowedError: If the object is none to be changed, or the state is not of an honest file's form.
    """
    name = full_name(type(instance))
    if name in STATES:
        STATES[name](instance, state)
    elif name in _RESTORED and type(state) is dict and all(type(key) is str for key in state):
        if hasattr(instance, "__setstate__"):
            instance.__setstate__(state)
        else:
            vars(instance).update(state)
        if name.startswith(_SPACES_PACKAGE):
            # Fails where a part is missing: it compares them all.
            _ = instance == instance
    else:
        raise NotAllowedError(f"a change of an object of {name}")


_SPACES_PACKAGE = "gymnasium.spaces."
_SPACES = {
    "box": "Box",
    "dict": "Dict",
    "discrete": "Discrete",
    "multi_binary": "MultiBinary",
    "multi_discrete": "MultiDiscrete",
    "tuple": "Tuple",
}
_OWN_SCHEDULES = "Constant Linear Cosine Exponential Clamped".split()

_RESTORED = frozenset(
    {
        *(f"{_SPACES_PACKAGE}{module}.{name}" for module, name in _SPACES.items()),
        *(f"sb3_clipvf.schedules.{name}Schedule" for name in _OWN_SCHEDULES),
        "sb3_clipvf.envs.normalize.FastVecNormalize",
        "sb3_clipvf.schedules.AdaptiveKL",
        "sb3_clipvf.schedules.KLAdaptiveLR",
        "rl_zoo3.utils.SimpleLinearSchedule",
        *(f"stable_baselines3.common.buffers.{name}ReplayBuffer" for name in ("", "Dict")),
        *(
            f"stable_baselines3.common.noise.{name}ActionNoise"
            for name in ("Normal", "OrnsteinUhlenbeck", "Vectorized")
        ),
        "stable_baselines3.common.running_mean_std.RunningMeanStd",
        *(f"stable_baselines3.common.utils.{name}Schedule" for name in ("Constant", "Float", "Linear")),
        "stable_baselines3.common.vec_env.vec_normalize.VecNormalize",
    }
)

_NAMED = frozenset(
    {
        *(f"builtins.{name}" for name in "bool bytes dict float int list str tuple".split()),
        *(f"numpy.{name}" for name in "ndarray bool bool_ float16 float32 float64".split()),
        *(f"numpy.{sign}int{bits}" for sign in ("", "u") for bits in (8, 16, 32, 64)),
        *(f"numpy.random._pcg64.{name}" for name in BIT_GENERATORS),
        "numpy.random.bit_generator.SeedSequence",
        *(f"torch.{name}" for name in "bfloat16 bool float16 float32 float64 int8 int16 int32 int64 uint8".split()),
        "torch.nn.modules.linear.Identity",
    }
)

# Modules of nothing but policies, features extractors, buffers, activations and optimizers.
_MODULES_OF_NAMED = frozenset(
    {
        "sb3_clipvf.policies",
        "sb3_clipvf.rollout",
        *(f"sb3_contrib.{name}.policies" for name in "ars crossq qrdqn tqc".split()),
        *(f"sb3_contrib.common.{name}" for name in ("maskable.buffers", "maskable.policies")),
        *(f"sb3_contrib.common.{name}" for name in ("recurrent.buffers", "recurrent.policies")),
        *(f"stable_baselines3.{name}.policies" for name in "common dqn sac td3".split()),
        "stable_baselines3.common.buffers",
        "stable_baselines3.common.sb2_compat.rmsprop_tf_like",
        "stable_baselines3.common.torch_layers",
        "stable_baselines3.her.her_replay_buffer",
        "torch.nn.modules.activation",
        *(f"torch.optim.{name}" for name in "adadelta adagrad adam adamax adamw asgd lbfgs nadam radam".split()),
        *(f"torch.optim.{name}" for name in "rmsprop rprop sgd sparse_adam".split()),
    }
)
