"""
Recognition of code: whether a policy runs the original code of SB3 and torch, which kernels restate.

A kernel computes what a class does only while the class has its original functions. Users may change any of them: by
a subclass, by a method assigned to an object, by a function assigned to a class or a module, or by a switch of torch.
Therefore, this module stores these functions at import, and compares them by identity before each rollout and each
update. The autograd engine runs policies that are not recognised.
"""

import functools
import sys
from collections.abc import Iterable, Mapping
from pathlib import Path
from types import FunctionType
from typing import Any

import stable_baselines3
import torch as th
from stable_baselines3.common import distributions as sb3_distributions
from stable_baselines3.common import policies as sb3_policies
from stable_baselines3.common import preprocessing as sb3_preprocessing
from stable_baselines3.common import torch_layers as sb3_layers
from stable_baselines3.common.distributions import DiagGaussianDistribution, StateDependentNoiseDistribution
from stable_baselines3.common.policies import ActorCriticPolicy
from torch import nn
from torch.optim import optimizer as torch_optimizer

from sb3_clipvf import distributions, objectives, policies, rollout
from sb3_clipvf.common import tensors
from sb3_clipvf.engines import autograd, epochs, reduction
from sb3_clipvf.engines.autograd import AutogradEngine, AutogradUpdate
from sb3_clipvf.engines.device_buffer import DeviceRolloutBuffer
from sb3_clipvf.rollout import TensorRolloutBuffer

ACTIVATIONS: dict[type[nn.Module], dict[str, float]] = {
    nn.Tanh: {},
    nn.ReLU: {},
    nn.ELU: {"alpha": 1.0},
    nn.LeakyReLU: {"negative_slope": 0.01},
    nn.SiLU: {},
}
"""Activations that kernels compute, and the values of their constants in kernels."""

DISTRIBUTIONS = (
    sb3_distributions.CategoricalDistribution,
    sb3_distributions.MultiCategoricalDistribution,
    sb3_distributions.BernoulliDistribution,
    DiagGaussianDistribution,
    StateDependentNoiseDistribution,
)
"""Action distributions that kernels compute."""

STATIC_MODULES = frozenset(
    (
        *ACTIVATIONS,
        *(nn.Sequential, nn.ModuleList, nn.ModuleDict, nn.Identity, nn.Flatten, nn.Linear, nn.LayerNorm),
        *(nn.Conv1d, nn.Conv2d, nn.Conv3d, nn.MaxPool1d, nn.MaxPool2d, nn.AvgPool1d, nn.AvgPool2d),
        *(nn.GELU, nn.Sigmoid, nn.Softplus, nn.Softsign, nn.Mish, nn.Hardtanh, nn.ReLU6, nn.CELU, nn.SELU),
        *(sb3_layers.MlpExtractor, sb3_layers.FlattenExtractor, sb3_layers.CombinedExtractor, sb3_layers.NatureCNN),
    )
)
"""Modules that run the same operations at each call, without random numbers or state of their own."""

SQUASHED_POLICIES = (
    policies.SquashedActorCriticPolicy,
    policies.SquashedActorCriticCnnPolicy,
    policies.SquashedMultiInputActorCriticPolicy,
)
"""This package's own policies, whose distribution no kernel computes."""

OPTIMIZERS = (th.optim.Adam, th.optim.AdamW)
"""Optimizers whose steps kernels compute."""

# Classes whose methods kernels restate.
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
    AutogradUpdate,
    TensorRolloutBuffer,
    *SQUASHED_POLICIES,
    policies.SquashedGaussianDistribution,
)
# Modules whose functions these methods call by a global name.
_MODULES = (
    sb3_policies,
    sb3_distributions,
    sb3_layers,
    sb3_preprocessing,
    sys.modules["torch.optim.adam"],
    sys.modules["torch.nn.utils.clip_grad"],
    sys.modules["torch.distributions.normal"],
    sys.modules["torch.distributions.categorical"],
    sys.modules["torch.distributions.bernoulli"],
    sys.modules["torch.distributions.utils"],
    objectives,
    distributions,
    policies,
    tensors,
    autograd,
    reduction,
    epochs,
    rollout,
)
# Functions that these methods call, of modules and classes with too many functions to compare all.
_FUNCTIONS: dict[Any, str] = {
    th: "tanh relu exp log min max clamp maximum where cat stack ones_like split broadcast_tensors",
    th.Tensor: "backward float flatten __mul__ __add__ __sub__ __truediv__ __neg__",
    th.autograd: "backward",
    nn.utils: "clip_grad_norm_",
    nn.functional: "linear relu elu leaky_relu silu softplus conv2d mse_loss softmax binary_cross_entropy_with_logits",
}
# Folders of the original code.
_PACKAGES = tuple(
    str(Path(str(module.__file__)).parent)
    for module in (th, stable_baselines3, objectives, sys.modules["contextlib"], sys.modules["typing_extensions"])
)
# Functions that create, copy or show objects. torch.compile() replaces two of them for the whole process.
_NOT_COMPUTING = frozenset(("__init__", "__init_subclass__", "__setstate__", "__getstate__", "__repr__", "__dir__"))

# Names that a subclass of SB3's policies may define without changing its losses.
_HARMLESS = frozenset(
    "__init__ __module__ __qualname__ __doc__ __annotations__ __parameters__ __orig_bases__ __abstractmethods__ "
    "__slots__ __dict__ __weakref__ __firstlineno__ __static_attributes__ __annotate_func__ __annotations_cache__ "
    "_abc_impl _build _build_mlp_extractor _get_constructor_parameters _dummy_schedule init_weights "
    "make_features_extractor forward predict _predict predict_values get_distribution obs_to_tensor "
    "set_training_mode reset_noise save load load_from_vector parameters_to_vector is_vectorized_observation "
    "scale_action unscale_action".split()
)
# Attributes of SB3's policies that a subclass might define as properties, which could return anything.
_POLICY_PARTS = frozenset(
    "action_dist action_net value_net log_std mlp_extractor features_extractor pi_features_extractor "
    "vf_features_extractor share_features_extractor normalize_images optimizer observation_space action_space".split()
)
# Methods of the rollout buffer that create minibatches.
_BUFFER_METHODS = ("get", "draw_rows", "in_order", "_rows", "_gather", "_flat_tensors", "_to_flat", "_get_samples")


class UnsupportedError(Exception):
    """Reason why an engine cannot run a policy, as half a sentence for the log."""


def check_code(policy: Any, *, may_squash: bool = False) -> None:
    """
    Check that a policy acts and computes its losses by SB3's own code, and that torch runs as it does by default.

    With ``may_squash``, it may also be one of this package's squashed policies.

    :raises UnsupportedError: If this is not certain.
    """
    is_squashed = may_squash and type(policy) in SQUASHED_POLICIES
    for reason in (replaced_code(), altered_torch(), None if is_squashed else _own_code(policy)):
        if reason is not None:
            raise UnsupportedError(reason)
    for owner, known in ((policy, ActorCriticPolicy), (policy.action_dist, None), (policy.optimizer, None)):
        name = replaced_method(owner, known)
        if name is not None:
            of = "" if owner is policy else f"{type(owner).__name__}."
            raise UnsupportedError(f"its {of}{name}() was replaced")
    if has_hooks(policy):
        raise UnsupportedError("it has hooks")
    known_dists = (policies.SquashedGaussianDistribution,) if is_squashed else DISTRIBUTIONS
    if type(policy.action_dist) not in known_dists:
        raise UnsupportedError(f"its action distribution is {type(policy.action_dist).__name__}")
    is_gaussian = isinstance(policy.action_dist, DiagGaussianDistribution | StateDependentNoiseDistribution)
    if is_gaussian and policy._parameters.get("log_std") is not policy.log_std:
        raise UnsupportedError("its log_std is not a parameter")


def why_unknown_buffer(buffer: Any, *, may_be_on_device: bool = False) -> str | None:
    """
    Return why an engine cannot read a rollout buffer's fields instead of its minibatches, or None if it can.

    These fields are arrays. With ``may_be_on_device``, they may also be the tensors of ``DeviceRolloutBuffer``.
    """
    is_on_device = may_be_on_device and type(buffer) is DeviceRolloutBuffer
    if not is_on_device and (
        not isinstance(buffer, TensorRolloutBuffer)
        or any(getattr(type(buffer), name) is not _buffer_methods[name] for name in _BUFFER_METHODS)
    ):
        return f"its rollout buffer is {type(buffer).__name__}"
    name = next((name for name in _BUFFER_METHODS if name in buffer.__dict__), None)
    return None if name is None else f"the {name}() of its rollout buffer was replaced"


def has_own_add(buffer: Any) -> bool:
    """Return whether a rollout buffer stores steps by code other than ``TensorRolloutBuffer.add``."""
    return getattr(buffer.add, "__func__", None) is not _buffer_methods["add"]


def has_hooks(module: nn.Module) -> bool:
    """Return whether a module itself has hooks; those of its submodules do not count."""
    own = module.__dict__
    return bool(
        own["_forward_hooks"] or own["_forward_pre_hooks"] or own["_backward_hooks"] or own["_backward_pre_hooks"]
    )


def replaced_method(owner: Any, known: Any = None) -> str | None:
    """
    Return the name of an object's attribute that hides one of its class, or None.

    Objects of the known classes have no such attributes by themselves. ``known`` is a base class to compare with
    instead of the object's own class.
    """
    known = type(owner) if known is None else known
    names = _class_names(known)
    return None if names.isdisjoint(owner.__dict__) else min(names & owner.__dict__.keys())


def altered_torch() -> str | None:
    """Return which process-wide switch of torch changes its numbers, as half a sentence, or None."""
    if th.get_default_dtype() is not th.float32:
        return f"torch's default dtype is {th.get_default_dtype()}"
    if th._C._len_torch_function_stack() and not _modes_are_known():
        return "torch has a default device or a function mode"
    if th._C._len_torch_dispatch_stack():
        return "torch has a dispatch mode"
    if th.is_autocast_enabled("cpu"):
        return "torch's autocast is on"
    if th.is_anomaly_enabled():
        return "torch's anomaly detection is on"
    if th._C._autograd._top_saved_tensors_default_hooks(False) is not None:
        return "torch has hooks on saved tensors"
    if nn.modules.module._has_any_global_hook():  # type: ignore[no-untyped-call]
        return "torch has hooks on all modules"
    if torch_optimizer._global_optimizer_pre_hooks or torch_optimizer._global_optimizer_post_hooks:
        return "torch has hooks on all optimizers"
    return None


def replaced_code() -> str | None:
    """Return which function of the known classes and modules was replaced, as half a sentence, or None."""
    global _accepted, _accepted_functions
    if _namespaces != _accepted:
        for owner, original in _originals.items():
            name = original.replaced()
            if name is not None:
                return f"{owner.__name__}.{name} was replaced"
        _accepted = [dict(namespace) for namespace in _namespaces]
    functions = [getattr(owner, name) for owner, name in _original_functions]
    if functions != _accepted_functions:
        for ((owner, name), original), function in zip(_original_functions.items(), functions, strict=True):
            if _unwrapped(function) is not original or _comes_from_elsewhere(original):
                return f"{owner.__name__}.{name} was replaced"
        _accepted_functions = functions
    return None


def _modes_are_known() -> bool:
    """Return whether all function modes of torch leave its numbers as they are."""
    modes = th.overrides._get_current_function_mode_stack()  # type: ignore[no-untyped-call]
    return all(getattr(mode, "changes_no_numbers", False) or _is_default_cpu(mode) for mode in modes)


def _is_default_cpu(mode: Any) -> bool:
    return isinstance(mode, th.utils._device.DeviceContext) and mode.device.type == "cpu"


@functools.cache
def _class_names(owner: Any) -> frozenset[str]:
    return frozenset(name for base in owner.__mro__ for name in vars(base)) - {"__dict__", "__doc__", "__module__"}


def _own_code(policy: Any) -> str | None:
    """Return which definition of a policy's own class may change its losses, as half a sentence, or None."""
    plain: Any = ActorCriticPolicy
    if type(policy) is plain:
        return None
    bases = type(policy).__mro__
    if plain not in bases:
        return f"its class {type(policy).__name__} is not derived from ActorCriticPolicy"
    inherited = _class_names(plain) | _POLICY_PARTS
    for base in bases[: bases.index(plain)]:
        names = [name for name in vars(base) if name not in _HARMLESS and (name in inherited or name.startswith("__"))]
        if names:
            return f"its class overrides {names[0]}{'()' if callable(vars(base)[names[0]]) else ''}"
    # A mixin between SB3's classes.
    others = [base for base in bases[bases.index(plain) :] if base not in plain.__mro__]
    return f"its class is derived from {others[0].__name__}" if others else None


class _Original:
    """The code of a class or a module as it was at import."""

    def __init__(self, owner: Any) -> None:
        self._owner = owner
        self._present: Mapping[str, Any] = vars(owner)  # a live view
        self.code: dict[str, Any] = {
            name: _unwrapped(value) for name, value in self._present.items() if _is_code(name, value)
        }
        self._replaced_before: list[str] = [name for name, value in self.code.items() if _comes_from_elsewhere(value)]

    def replaced(self) -> str | None:
        """Return the name of a function that was replaced, also before this package was imported, or None."""
        if self._replaced_before:
            return self._replaced_before[0]
        for name, value in self.code.items():
            if _unwrapped(self._present.get(name)) is not value:
                return name
        if not isinstance(self._owner, type):
            return None
        # A function added to a class may hide an inherited one.
        added = [name for name, value in self._present.items() if name not in self.code and _is_code(name, value)]
        return next((name for name in added if _unwrapped(self._present[name]) is not self._inherited(name)), None)

    def _inherited(self, name: str) -> object:
        bases = self._owner.__mro__[1:-1]
        return next((_originals[base].code[name] for base in bases if name in _originals[base].code), None)


def _is_code(name: str, value: object) -> bool:
    return name not in _NOT_COMPUTING and (callable(value) or hasattr(value, "__get__"))


def _unwrapped(value: Any) -> Any:
    """Return a function without the wrappers that torch adds at the first optimizer and in torch.compile()."""
    while True:
        if hasattr(value, "_torchdynamo_orig_callable"):
            value = value._torchdynamo_orig_callable
        elif getattr(value, "hooked", False) and not _comes_from_elsewhere(value):
            value = value.__wrapped__
        else:
            return value


def _comes_from_elsewhere(value: Any) -> bool:
    value = value.fget if isinstance(value, property) else value
    function = getattr(value, "__func__", value)  # of static methods and class methods
    return isinstance(function, FunctionType) and not function.__code__.co_filename.startswith((*_PACKAGES, "<frozen"))


def _with_bases(classes: Iterable[type[Any]]) -> list[type[Any]]:
    return list(dict.fromkeys(base for owner in classes for base in owner.__mro__ if base is not object))


_originals: dict[Any, _Original] = {owner: _Original(owner) for owner in (*_with_bases(_CLASSES), *_MODULES)}
_original_functions = {
    (owner, name): _unwrapped(getattr(owner, name)) for owner, names in _FUNCTIONS.items() for name in names.split()
}
_buffer_methods = {name: getattr(TensorRolloutBuffer, name) for name in (*_BUFFER_METHODS, "add")}
_namespaces = [vars(owner) for owner in _originals]
# Contents that passed the full check; comparing with them first takes less time.
_accepted: list[dict[str, Any]] = []
_accepted_functions: list[Any] = []
