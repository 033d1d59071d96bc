"""
What a file may be made of: the list that ``safe_pickle`` goes by.

Three kinds of names. *Made* ones are functions and classes that may be called; each call goes through a function here
that checks the arguments, and a file never gets hold of the original. *Restored* ones are classes whose objects a file
may hold: they are made empty, without their constructor, and get their attributes. *Named* ones are classes that a file
may only name, such as a policy's; whoever loads the model builds them.

To be put on the list, a class must do no harm whoever calls it with whatever arguments: no file, no process, no import
by name. ``functools.partial``, ``operator.attrgetter`` or ``numpy.load`` would open everything else.
"""

import importlib
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from sb3_clipvf.safe_makers import BIT_GENERATORS, MADE, STATES, NotAllowedError, full_name


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
