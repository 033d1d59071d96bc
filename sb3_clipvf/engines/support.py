"""
Whether an engine other than autograd can run a policy: its structure, sizes, parameters and optimizer.

:mod:`.recognition` checks that it runs the original code of SB3's and torch's classes.
"""

import itertools
import os
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, cast

import torch as th
from gymnasium import spaces
from stable_baselines3.common.distributions import DiagGaussianDistribution, StateDependentNoiseDistribution
from stable_baselines3.common.policies import ActorCriticPolicy
from stable_baselines3.common.preprocessing import get_action_dim, get_flattened_obs_dim, is_image_space
from stable_baselines3.common.torch_layers import FlattenExtractor, MlpExtractor
from torch import nn

from sb3_clipvf.distributions import n_action_numbers, n_outputs
from sb3_clipvf.engines.recognition import (
    ACTIVATIONS,
    OPTIMIZERS,
    STATIC_MODULES,
    UnsupportedError,
    check_code,
    has_hooks,
    replaced_method,
    why_unknown_buffer,
)

_GAUSSIANS = (DiagGaussianDistribution, StateDependentNoiseDistribution)
# SB3's default, which its policies never change.
_GSDE_EPSILON = 1e-6
_MISFIT = "the sizes of its layers do not fit each other, its observations or actions"


@dataclass(frozen=True)
class PlainPolicy:
    """
    The parts of a policy that consists of two MLPs and, for a Gaussian, its log standard deviations.

    ``actor`` maps observations to logits or means, ``critic`` to values; ``activation`` is that of all
    hidden layers. ``log_std`` has the shape ``(action_dim,)``, for gSDE ``(latent_dim, action_dim)`` or
    ``(latent_dim, 1)``.
    """

    actor: list[nn.Linear]
    critic: list[nn.Linear]
    activation: type[nn.Module]
    dist: Any
    log_std: nn.Parameter | None

    @property
    def actor_parameters(self) -> list[nn.Parameter]:
        """Weight and bias of each layer, then the log standard deviations."""
        return [*_parameters(self.actor), *([] if self.log_std is None else [self.log_std])]

    @property
    def critic_parameters(self) -> list[nn.Parameter]:
        """Weight and bias of each layer."""
        return _parameters(self.critic)


def _parameters(layers: list[nn.Linear]) -> list[nn.Parameter]:
    return [cast(nn.Parameter, parameter) for layer in layers for parameter in (layer.weight, layer.bias)]


def why_not_native(policy: ActorCriticPolicy, buffer: Any) -> str | None:
    """Return why the native engine cannot run a policy with this rollout buffer, as half a sentence, or None."""
    reason = why_unknown_buffer(buffer)
    if reason is not None:
        return reason
    try:
        _check_compiler()
        plain_policy(policy)
    except UnsupportedError as unsupported:
        return str(unsupported)
    return None


def why_not_fused(policy: ActorCriticPolicy) -> str | None:
    """Return why the fused engine cannot run a policy, as half a sentence, or None. Its networks may be of any kind."""
    try:
        _check_compiler()
        check_code(policy)
        _check_device(policy)
        _check_gaussian(policy)
        _check_parameters(policy)
        _check_optimizer(policy)
        head = policy.action_net  # another module's width is known when it has run
        if type(head) is nn.Linear and head.weight.shape[:1] != (n_outputs(policy.action_dist),):
            raise UnsupportedError(_MISFIT)
    except UnsupportedError as unsupported:
        return str(unsupported)
    return None


def why_not_static(policy: ActorCriticPolicy, buffer: Any) -> str | None:
    """Return why the operations of a minibatch may differ between two calls, as half a sentence, or None."""
    reason = why_unknown_buffer(buffer, may_be_on_device=True)
    if reason is not None:
        return reason
    try:
        check_code(policy, may_squash=True)
        _check_diagonal_gaussian(policy)
        if th.is_autocast_enabled(policy.device.type):
            raise UnsupportedError("torch's autocast is on")
        modules = [module for module in policy.modules() if module is not policy]
        for module in modules:
            if type(module) not in STATIC_MODULES:
                raise UnsupportedError(
                    f"it has a {type(module).__name__}, which may not run the same operations each time"
                )
        _check_modules(modules)
        _check_parameters(policy)
        if any(map(parameter_has_hooks, policy.parameters())):
            raise UnsupportedError("it has hooks")
        _check_optimizer(policy)
    except UnsupportedError as unsupported:
        return str(unsupported)
    return None


def why_not_cuda_graph(policy: ActorCriticPolicy, buffer: Any) -> str | None:
    """Return why the CUDA graph engine cannot run a policy with this rollout buffer, as half a sentence, or None."""
    if policy.device.type != "cuda":
        return f"it is on the device {policy.device}"
    reason = why_not_static(policy, buffer)
    if reason is not None:  # it may lack the parts of SB3's policies
        return reason
    dist = policy.action_dist
    if isinstance(dist, StateDependentNoiseDistribution) and not dist.full_std:
        return "its gSDE has full_std=False, with which SB3 copies from the host at each step"
    if any(group.get("fused") or group.get("capturable") for group in policy.optimizer.param_groups):
        return "its optimizer keeps the number of steps on the device"
    return None


def why_not_bf16(policy: ActorCriticPolicy, buffer: Any) -> str | None:
    """Return why the CUDA graph engine cannot run a policy in bfloat16, as half a sentence, or None."""
    if isinstance(getattr(policy, "action_dist", None), StateDependentNoiseDistribution):
        return "its gSDE computes with features, which would be rounded"
    return why_not_cuda_graph(policy, buffer)


def plain_policy(policy: ActorCriticPolicy) -> PlainPolicy:
    """
    Return the parts of a policy that the native engine can run.

    :raises UnsupportedError: If the engine cannot run the policy.
    """
    if type(policy) is not ActorCriticPolicy:
        raise UnsupportedError(f"its class is {type(policy).__name__}, and only MlpPolicy itself is compiled")
    check_code(policy)
    if policy.squash_output:
        raise UnsupportedError("it squashes its actions")
    _check_observations(policy)
    _check_device(policy)
    _check_extractors(policy)
    hidden_actor, actor_activation = _hidden_layers(policy.mlp_extractor.policy_net)
    hidden_critic, critic_activation = _hidden_layers(policy.mlp_extractor.value_net)
    heads = (policy.action_net, policy.value_net)
    if any(type(head) is not nn.Linear or head.bias is None for head in heads):
        raise UnsupportedError("its last layers are not torch.nn.Linear with a bias")
    _check_modules(modules_of(policy))
    activations = {activation for activation in (actor_activation, critic_activation) if activation is not None}
    if len(activations) > 1:
        raise UnsupportedError("actor and critic have different activations")
    dist = policy.action_dist
    plain = PlainPolicy(
        actor=[*hidden_actor, policy.action_net],  # type: ignore[list-item]
        critic=[*hidden_critic, policy.value_net],
        activation=activations.pop() if activations else nn.Tanh,
        dist=dist,
        log_std=policy.log_std if isinstance(dist, _GAUSSIANS) else None,
    )
    _check_gaussian(policy)
    _check_gsde(policy, latent_dim=plain.actor[-1].in_features)
    _check_tensors(policy, plain)
    _check_optimizer(policy)
    _check_memory(policy)
    if len(set(steps_made(policy.optimizer, policy.parameters()))) > 1:
        raise UnsupportedError("its optimizer has taken different numbers of steps for its parameters")
    return plain


def modules_of(policy: ActorCriticPolicy) -> list[Any]:
    """Return the modules that a plain policy's forward pass calls; another policy may lack some of them."""
    extractor = policy.mlp_extractor
    # A shared extractor is one object.
    features = dict.fromkeys((policy.features_extractor, policy.pi_features_extractor, policy.vf_features_extractor))
    modules: list[Any] = [policy, extractor, *features, policy.action_net, policy.value_net]
    modules += [getattr(module, "flatten", None) for module in features]
    for network in (getattr(extractor, "policy_net", None), getattr(extractor, "value_net", None)):
        modules += [network, *([] if network is None else network._modules.values())]
    return [module for module in modules if module is not None]


def steps_made(optimizer: th.optim.Optimizer, parameters: Iterable[th.Tensor]) -> list[int]:
    """Return the number of steps that the optimizer has taken for each parameter; 0 for one without state."""
    states = [optimizer.state.get(parameter) for parameter in parameters]
    return [int(state["step"]) if state else 0 for state in states]


def usable_gradient(parameter: th.Tensor) -> th.Tensor | None:
    """Return a parameter's gradient if kernels can write to it, or None."""
    gradient = parameter.grad
    fits = (
        gradient is not None
        and gradient.shape == parameter.shape  # torch keeps it when ``parameter.data`` is replaced
        and gradient.is_contiguous()
        and gradient.dtype == th.float32
    )
    return gradient if fits else None


def share_memory(tensors: Iterable[th.Tensor]) -> bool:
    """Return whether any two of several contiguous tensors overlap in memory."""
    ranges = sorted((tensor.data_ptr(), tensor.data_ptr() + tensor.nbytes) for tensor in tensors if tensor.numel())
    return any(end > start for (_, end), (start, _) in itertools.pairwise(ranges))


def parameter_has_hooks(parameter: Any) -> bool:
    """Return whether a backward pass calls hooks of a parameter."""
    return bool(parameter._backward_hooks or getattr(parameter, "_post_accumulate_grad_hooks", None))


# ------------------------------------------------------------------ networks of the native engine


def _check_observations(policy: ActorCriticPolicy) -> None:
    space = policy.observation_space
    if not isinstance(space, spaces.Box):
        raise UnsupportedError(f"its observations are {type(space).__name__}")
    if is_image_space(space) and policy.normalize_images:
        raise UnsupportedError("its observations are images")


def _check_extractors(policy: ActorCriticPolicy) -> None:
    if type(policy.mlp_extractor) is not MlpExtractor:
        raise UnsupportedError(f"its mlp_extractor is {type(policy.mlp_extractor).__name__}")
    for extractor in {policy.features_extractor, policy.pi_features_extractor, policy.vf_features_extractor}:
        if type(extractor) is not FlattenExtractor:
            raise UnsupportedError(f"its features extractor is {type(extractor).__name__}")
        flatten = extractor.flatten
        if type(flatten) is not nn.Flatten or (flatten.start_dim, flatten.end_dim) != (1, -1):
            raise UnsupportedError(f"its features extractor flattens by {flatten}")


def _hidden_layers(network: nn.Module) -> tuple[list[nn.Linear], type[nn.Module] | None]:
    """Return the linear layers of a network, which alternate with activations, and the type of these."""
    if type(network) is not nn.Sequential:
        raise UnsupportedError(f"its network is a {type(network).__name__}, not torch.nn.Sequential")
    layers: list[nn.Linear] = []
    activation: type[nn.Module] | None = None
    modules = list(network._modules.values())  # children() omits a module that occurs again
    for index, module in enumerate(modules):
        if index % 2 == 0:
            if type(module) is not nn.Linear or module.bias is None:
                raise UnsupportedError(
                    f"its network has a {type(module).__name__} where kernels expect torch.nn.Linear"
                )
            layers.append(module)
        else:
            constants = ACTIVATIONS.get(type(module))
            if constants is None or any(getattr(module, name) != value for name, value in constants.items()):
                raise UnsupportedError(f"its activation is {module}")
            if activation not in (None, type(module)):
                raise UnsupportedError("its layers have different activations")
            activation = type(module)
    if len(modules) % 2:
        raise UnsupportedError("its last hidden layer has no activation")
    return layers, activation


def _check_modules(modules: Iterable[Any]) -> None:
    for module in modules:
        if has_hooks(module):
            raise UnsupportedError("it has hooks")
        name = replaced_method(module)
        if name is not None:
            raise UnsupportedError(f"the {name}() of a {type(module).__name__} was replaced")


def _check_gsde(policy: ActorCriticPolicy, latent_dim: int) -> None:
    dist = policy.action_dist
    if not isinstance(dist, StateDependentNoiseDistribution):
        return
    if dist.learn_features:
        raise UnsupportedError("its gSDE learns features")
    if dist.epsilon != _GSDE_EPSILON:
        raise UnsupportedError(f"its gSDE has the epsilon {dist.epsilon}")
    _check_log_std(policy, (latent_dim, dist.action_dim if dist.full_std else 1))


def _check_tensors(policy: ActorCriticPolicy, plain: PlainPolicy) -> None:
    parameters = [*plain.actor_parameters, *plain.critic_parameters]
    identities = {id(parameter) for parameter in parameters}
    if {id(parameter) for parameter in policy.parameters()} != identities or len(identities) != len(parameters):
        raise UnsupportedError("it has parameters other than those of its two networks")
    _check_parameters(policy)
    if any(map(parameter_has_hooks, parameters)):
        raise UnsupportedError("it has hooks")
    # Kernels rely on the sizes: they would read and write beyond smaller tensors.
    n_observed = get_flattened_obs_dim(policy.observation_space)
    for layers, n_out in ((plain.actor, n_outputs(plain.dist)), (plain.critic, 1)):
        sizes = [n_observed, *(layer.out_features for layer in layers)]
        shapes = [(after, before) for before, after in itertools.pairwise(sizes)]
        fits = all(
            layer.in_features == shape[1] and layer.weight.shape == shape and layer.bias.shape == shape[:1]
            for layer, shape in zip(layers, shapes, strict=True)
        )
        if not fits or sizes[-1] != n_out:
            raise UnsupportedError(_MISFIT)
    if n_action_numbers(plain.dist) != get_action_dim(policy.action_space):
        raise UnsupportedError("its action distribution does not fit its actions")


def _check_memory(policy: ActorCriticPolicy) -> None:
    """Check that no two tensors overlap, since two threads would write to them at the same time."""
    tensors: list[th.Tensor] = []
    for parameter in policy.parameters():
        gradient, state = usable_gradient(parameter), policy.optimizer.state.get(parameter)
        tensors += [parameter] if gradient is None else [parameter, gradient]
        tensors += [state["exp_avg"], state["exp_avg_sq"]] if state else []
    if share_memory(tensors):
        raise UnsupportedError("some of its parameters, gradients or moments share memory")


# ------------------------------------------------------------------ several engines


def _check_compiler() -> None:
    # As numba reads it, which is not imported for policies without kernels
    if os.environ.get("NUMBA_DISABLE_JIT", "0").strip() not in ("", "0"):
        raise UnsupportedError("NUMBA_DISABLE_JIT switches off the compilation of kernels")


def _check_device(policy: ActorCriticPolicy) -> None:
    if policy.device.type != "cpu":
        raise UnsupportedError(f"it is on the device {policy.device}")


def _check_gaussian(policy: ActorCriticPolicy) -> None:
    dist = policy.action_dist
    if isinstance(dist, StateDependentNoiseDistribution) and dist.bijector is not None:
        raise UnsupportedError("it squashes its actions")
    _check_diagonal_gaussian(policy)


def _check_diagonal_gaussian(policy: ActorCriticPolicy) -> None:
    dist = policy.action_dist
    if isinstance(dist, DiagGaussianDistribution):
        _check_log_std(policy, (dist.action_dim,))


def _check_log_std(policy: ActorCriticPolicy, shape: tuple[int, ...]) -> None:
    if policy.log_std.shape != shape:
        raise UnsupportedError(f"its log_std has the shape {tuple(policy.log_std.shape)} instead of SB3's {shape}")


def _check_parameters(policy: ActorCriticPolicy) -> None:
    for parameter in policy.parameters():
        if type(parameter) is not nn.Parameter:
            raise UnsupportedError(f"one of its parameters is a {type(parameter).__name__}")
        if parameter.dtype != th.float32 or not parameter.is_contiguous():
            raise UnsupportedError("its parameters are not contiguous float32 tensors")
        if not parameter.requires_grad:
            raise UnsupportedError("some of its parameters are frozen")


def _check_optimizer(policy: ActorCriticPolicy) -> None:
    optimizer = policy.optimizer
    if type(optimizer) not in OPTIMIZERS:
        raise UnsupportedError(f"its optimizer is {type(optimizer).__name__}, not Adam or AdamW")
    if len(optimizer.param_groups) != 1:
        raise UnsupportedError("its optimizer has several parameter groups")
    group = optimizer.param_groups[0]
    if {id(parameter) for parameter in group["params"]} != {id(parameter) for parameter in policy.parameters()}:
        raise UnsupportedError("its optimizer has different parameters")
    on = [option for option in ("amsgrad", "maximize", "differentiable", "capturable") if group.get(option)]
    if on:
        raise UnsupportedError(f"its optimizer uses {on[0]}")
    numbers = (group["lr"], *group["betas"], group["eps"], group["weight_decay"])
    if any(isinstance(number, th.Tensor) for number in numbers):
        raise UnsupportedError("its optimizer's options are tensors")
    if any(getattr(optimizer, hook, None) for hook in ("_optimizer_step_pre_hooks", "_optimizer_step_post_hooks")):
        raise UnsupportedError("its optimizer has hooks")
    for parameter in group["params"]:
        state = optimizer.state.get(parameter)
        if state:  # else the first step creates it
            _check_state(state, parameter)


def _check_state(state: dict[str, Any], parameter: th.Tensor) -> None:
    """Check that Adam's state of a parameter is what kernels read; a callback or a file may have replaced it."""
    if not isinstance(state.get("step"), th.Tensor):
        raise UnsupportedError("its optimizer has no tensors with the numbers of steps")
    for moment in (state.get("exp_avg"), state.get("exp_avg_sq")):
        if not (
            type(moment) is th.Tensor
            and moment.dtype == th.float32
            and moment.is_contiguous()
            and moment.shape == parameter.shape
            and moment.device == parameter.device
        ):
            raise UnsupportedError("its optimizer's moments are not contiguous float32 tensors like its parameters")
