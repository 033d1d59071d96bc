"""
Which policies fast engines may run: those made of known code only. The reference runs all others.

Kernels restate what SB3's and torch's classes compute. They are right only while those classes compute it themselves,
so this module keeps their functions at import and compares by identity before each rollout and each update.
"""

import functools
import operator
import sys
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from types import FunctionType
from typing import Any, cast

import stable_baselines3
import torch as th
from stable_baselines3.common import distributions as sb3_distributions
from stable_baselines3.common import policies as sb3_policies
from stable_baselines3.common import torch_layers as sb3_layers
from stable_baselines3.common.distributions import DiagGaussianDistribution, StateDependentNoiseDistribution
from stable_baselines3.common.policies import ActorCriticPolicy
from torch import nn
from torch.optim import optimizer as torch_optimizer

from sb3_clipvf import distributions, objectives, rollout
from sb3_clipvf.engines.autograd import AutogradEngine
from sb3_clipvf.rollout import TensorRolloutBuffer

ACTIVATIONS: dict[type[nn.Module], dict[str, float]] = {
    nn.Tanh: {},
    nn.ReLU: {},
    nn.ELU: {"alpha": 1.0},
    nn.LeakyReLU: {"negative_slope": 0.01},
    nn.SiLU: {},
}
"""Activations that kernels know, with the constants that they know them with."""

DISTRIBUTIONS = (
    sb3_distributions.CategoricalDistribution,
    sb3_distributions.MultiCategoricalDistribution,
    sb3_distributions.BernoulliDistribution,
    DiagGaussianDistribution,
    StateDependentNoiseDistribution,
)
"""Action distributions that kernels know."""

OPTIMIZERS = (th.optim.Adam, th.optim.AdamW)
"""Optimizers whose steps kernels know."""

_CLASSES = (
    ActorCriticPolicy,
    sb3_layers.MlpExtractor,
    sb3_layers.FlattenExtractor,
    sb3_layers.CombinedExtractor,
    sb3_layers.NatureCNN,
    nn.Linear,
    nn.Sequential,
    nn.Flatten,
    *ACTIVATIONS,
    *DISTRIBUTIONS,
    th.distributions.Normal,
    th.distributions.Categorical,
    th.distributions.Bernoulli,
    *OPTIMIZERS,
    AutogradEngine,
    TensorRolloutBuffer,
)
# Functions that methods of these classes call by a global name.
_MODULES = (
    sb3_policies,
    sb3_distributions,
    sb3_layers,
    sys.modules["torch.optim.adam"],
    sys.modules["torch.distributions.normal"],
    sys.modules["torch.distributions.categorical"],
    sys.modules["torch.distributions.bernoulli"],
    objectives,
    distributions,
    rollout,
)
# The same, of modules and classes that have too many others.
_FUNCTIONS: tuple[tuple[Any, tuple[str, ...]], ...] = (
    (
        th,
        ("tanh", "relu", "exp", "log", "min", "max", "clamp", "maximum", "where", "cat", "stack", "ones_like", "split"),
    ),
    (th.Tensor, ("backward", "float", "flatten", "__mul__", "__add__", "__sub__", "__truediv__", "__neg__")),
    (th.autograd, ("backward",)),
    (nn.utils, ("clip_grad_norm_",)),
    (nn.functional, ("linear", "relu", "elu", "leaky_relu", "silu", "softplus", "conv2d")),
)
_PACKAGES = tuple(
    str(Path(str(module.__file__)).parent)
    for module in (th, stable_baselines3, objectives, sys.modules["contextlib"], sys.modules["typing_extensions"])
)

# What a subclass of SB3's policies may define without changing what its losses are computed from.
_HARMLESS = frozenset(
    "__init__ __module__ __qualname__ __doc__ __annotations__ __parameters__ __orig_bases__ __abstractmethods__ "
    "__slots__ __dict__ __weakref__ __firstlineno__ __static_attributes__ __annotate_func__ __annotations_cache__ "
    "_abc_impl _build _build_mlp_extractor _get_constructor_parameters _dummy_schedule init_weights "
    "make_features_extractor forward predict _predict predict_values get_distribution obs_to_tensor "
    "set_training_mode reset_noise save load load_from_vector parameters_to_vector is_vectorized_observation "
    "scale_action unscale_action".split()
)
_POLICY_PARTS = frozenset(
    "action_dist action_net value_net log_std mlp_extractor features_extractor pi_features_extractor "
    "vf_features_extractor share_features_extractor normalize_images optimizer observation_space action_space".split()
)
# What minibatches of the buffer are made by.
_BUFFER_METHODS = ("get", "in_order", "_rows", "_gather", "_flat_tensors", "_to_flat", "_get_samples")


class NotPlainError(Exception):
    """Why a policy cannot run on a fast engine: half a sentence for the log."""


def check_known(policy: Any) -> None:
    """
    Check that a policy acts and computes its losses by SB3's own code, and that torch runs as it does by default.

    :param policy: Any policy.
    :raises NotPlainError: If it does not, or that is not known.
    """
    for reason in (replaced_code(), altered_torch(), _own_code(policy)):
        if reason is not None:
            raise NotPlainError(reason)
    for owner, known in ((policy, ActorCriticPolicy), (policy.action_dist, None), (policy.optimizer, None)):
        name = replaced_method(owner, known)
        if name is not None:
            of = "" if owner is policy else f"{type(owner).__name__}."
            raise NotPlainError(f"its {of}{name}() was replaced")
    if has_hooks(policy):
        raise NotPlainError("it has hooks")
    if type(policy.action_dist) not in DISTRIBUTIONS:
        raise NotPlainError(f"its action distribution is {type(policy.action_dist).__name__}")
    is_gaussian = isinstance(policy.action_dist, DiagGaussianDistribution | StateDependentNoiseDistribution)
    if is_gaussian and policy._parameters.get("log_std") is not policy.log_std:
        raise NotPlainError("its log_std is no parameter")


def why_unknown_buffer(buffer: Any) -> str | None:
    """
    Return why kernels cannot read a rollout buffer's memory instead of its minibatches.

    :param buffer: Any rollout buffer.
    :return: Half a sentence, or None where they can.
    """
    if not isinstance(buffer, TensorRolloutBuffer) or any(
        getattr(type(buffer), name) is not _kept_methods[name] for name in _BUFFER_METHODS
    ):
        return f"its rollout buffer is {type(buffer).__name__}"
    own = buffer.__dict__
    name = next((name for name in _BUFFER_METHODS if name in own), None)
    return None if name is None else f"the {name}() of its rollout buffer was replaced"


def has_own_add(buffer: Any) -> bool:
    """
    Return whether a rollout buffer stores steps by code of its own, which expects SB3's tensors.

    :param buffer: Any rollout buffer.
    :return: False for the ``add`` of ``TensorRolloutBuffer``.
    """
    return getattr(buffer.add, "__func__", None) is not _kept_methods["add"]


def has_hooks(module: nn.Module) -> bool:
    """
    Return whether a module has hooks.

    :param module: Module, whose submodules are not looked at.
    :return: True where calling it calls a hook.
    """
    own = module.__dict__
    return bool(
        own["_forward_hooks"] or own["_forward_pre_hooks"] or own["_backward_hooks"] or own["_backward_pre_hooks"]
    )


def replaced_method(owner: Any, known: Any = None) -> str | None:
    """
    Return the name of an attribute of an object that hides one of its class.

    :param owner: An object of a known class, none of which has such attributes by itself.
    :param known: Class to look at; None: the object's own.
    :return: The first name, or None.
    """
    known = known or type(owner)
    names = _class_names(known)
    return None if names.isdisjoint(owner.__dict__) else min(names & owner.__dict__.keys())


@functools.cache
def _class_names(owner: Any) -> frozenset[str]:
    return frozenset(name for base in owner.__mro__ for name in vars(base)) - {"__dict__", "__doc__", "__module__"}


def _own_code(policy: Any) -> str | None:
    """What a policy's class has of its own that its losses may depend on, half a sentence; None: nothing."""
    plain: Any = ActorCriticPolicy
    if type(policy) is plain:
        return None
    bases = type(policy).__mro__
    if plain not in bases:
        return f"its class {type(policy).__name__} is none of SB3's ActorCriticPolicy"
    legal = _class_names(plain) | _POLICY_PARTS
    for base in bases[: bases.index(plain)]:
        names = [name for name in vars(base) if name not in _HARMLESS and (name in legal or name.startswith("__"))]
        if names:
            return f"its {names[0]}{'()' if callable(vars(base)[names[0]]) else ''} is its own"
    # A mixin between SB3's classes.
    others = [base for base in bases[bases.index(plain) :] if base not in plain.__mro__]
    return f"its class is derived from {others[0].__name__}" if others else None


# ------------------------------------------------------------------ code that was replaced in its classes and modules


# They run when objects are made, copied or shown; torch.compile() replaces two of them for the whole process.
_NOT_COMPUTING = frozenset(("__init__", "__init_subclass__", "__setstate__", "__getstate__", "__repr__", "__dir__"))


def _is_code(name: str, value: object) -> bool:
    return name not in _NOT_COMPUTING and (callable(value) or hasattr(value, "__get__"))


def _function_of(value: Any) -> Any:
    value = value.fget if isinstance(value, property) else value
    return getattr(value, "__func__", value)  # of static methods and class methods


def _comes_from_elsewhere(value: Any) -> bool:
    function = _function_of(value)
    return isinstance(function, FunctionType) and not function.__code__.co_filename.startswith((*_PACKAGES, "<frozen"))


def _unwrapped(value: Any) -> Any:
    """The function in what torch itself puts around it: at the first optimizer, and for torch.compile()."""
    while True:
        if hasattr(value, "_torchdynamo_orig_callable"):
            value = value._torchdynamo_orig_callable
        elif getattr(value, "hooked", False) and not _comes_from_elsewhere(value):
            value = value.__wrapped__
        else:
            return value


class _Kept:
    """The code of a class or a module, as it was at import."""

    def __init__(self, owner: Any, names: Iterable[str] | None = None) -> None:
        self.name = owner.__name__
        self._names = None if names is None else tuple(names)
        self.owner = owner
        self._is_class = names is None and isinstance(owner, type)
        self.values: Callable[[Any], Any] = operator.attrgetter(*(self._names or ("__name__",)))
        self.code = {name: _unwrapped(value) for name, value in self.now().items() if _is_code(name, value)}
        # Replaced before this package was imported.
        self.foreign = [name for name, value in self.code.items() if _comes_from_elsewhere(value)]

    def now(self) -> Mapping[str, Any]:
        if self._names is None:
            return cast(Mapping[str, Any], vars(self.owner))
        return {name: getattr(self.owner, name) for name in self._names}

    def replaced(self) -> str | None:
        """The name of what is other code now, or None."""
        if self.foreign:
            return self.foreign[0]
        now = self.now()
        for name, value in self.code.items():
            if _unwrapped(now.get(name)) is not value:
                return name
        if not self._is_class:
            return None
        added = (name for name, value in now.items() if name not in self.code and _is_code(name, value))
        return next((name for name in added if _unwrapped(now[name]) is not self._inherited(name)), None)

    def _inherited(self, name: str) -> object:
        return next((_kept[base].code[name] for base in self.owner.__mro__[1:-1] if name in _kept[base].code), None)


def _bases(classes: Iterable[type[Any]]) -> list[type[Any]]:
    return list(dict.fromkeys(base for owner in classes for base in owner.__mro__ if base is not object))


_kept = {owner: _Kept(owner) for owner in (*_bases(_CLASSES), *_MODULES)}
_kept_functions = [_Kept(owner, names) for owner, names in _FUNCTIONS]
_kept_methods = {name: getattr(TensorRolloutBuffer, name) for name in (*_BUFFER_METHODS, "add")}
_namespaces = [vars(owner) for owner in _kept]
# Contents of the namespaces that were found to be all right, to compare at little cost.
_accepted: list[dict[str, Any]] = []
_accepted_functions: list[Any] = []


def replaced_code() -> str | None:
    """
    Return which function of the known classes and modules was replaced.

    :return: Half a sentence, or None where none was.
    """
    global _accepted, _accepted_functions
    if _namespaces != _accepted:
        for kept in _kept.values():
            name = kept.replaced()
            if name is not None:
                return f"{kept.name}.{name} was replaced"
        _accepted = [dict(namespace) for namespace in _namespaces]
    functions = [kept.values(kept.owner) for kept in _kept_functions]
    if functions != _accepted_functions:
        for kept in _kept_functions:
            name = kept.replaced()
            if name is not None:  # torch's own wrappers may be all that differs
                return f"{kept.name}.{name} was replaced"
        _accepted_functions = functions
    return None


def altered_torch() -> str | None:
    """
    Return which process-wide switch of torch changes what it computes.

    :return: Half a sentence, or None where all have their defaults.
    """
    if th.get_default_dtype() is not th.float32:
        return f"torch's default dtype is {th.get_default_dtype()}"
    if th._C._len_torch_function_stack() and not _only_cpu_is_default():
        return "torch runs with a default device or in a mode of its own"
    if th._C._len_torch_dispatch_stack():
        return "torch runs in a mode of its own"
    if th.is_autocast_enabled("cpu"):
        return "torch runs with autocast"
    if th.is_anomaly_enabled():
        return "torch looks for anomalies"
    if nn.modules.module._has_any_global_hook():  # type: ignore[no-untyped-call]
        return "torch has hooks on all modules"
    if torch_optimizer._global_optimizer_pre_hooks or torch_optimizer._global_optimizer_post_hooks:
        return "torch has hooks on all optimizers"
    return None


def _only_cpu_is_default() -> bool:
    modes = th.overrides._get_current_function_mode_stack()  # type: ignore[no-untyped-call]
    return all(isinstance(mode, th.utils._device.DeviceContext) and mode.device.type == "cpu" for mode in modes)
