"""What kernels are told of a policy: its tensors, and whether these and its optimizer can be worked on in place."""

import itertools
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, cast

import numpy as np
import torch as th
from gymnasium import spaces
from stable_baselines3.common.distributions import (
    CategoricalDistribution,
    DiagGaussianDistribution,
    MultiCategoricalDistribution,
    StateDependentNoiseDistribution,
)
from stable_baselines3.common.policies import ActorCriticPolicy
from stable_baselines3.common.preprocessing import get_action_dim, get_flattened_obs_dim, is_image_space
from stable_baselines3.common.torch_layers import FlattenExtractor, MlpExtractor
from torch import nn

from sb3_clipvf.distributions import dist_param_dim
from sb3_clipvf.engines.recognition import (
    ACTIVATIONS,
    OPTIMIZERS,
    NotPlainError,
    altered_torch,
    check_known,
    has_hooks,
    replaced_code,
    replaced_method,
    why_unknown_buffer,
)

_GAUSSIANS = (DiagGaussianDistribution, StateDependentNoiseDistribution)
# SB3's own: no policy of SB3 takes another as an argument.
_GSDE_EPSILON = 1e-6
# What activations of one type may differ by.
_CONSTANTS = sorted({name for constants in ACTIVATIONS.values() for name in constants} | {"start_dim", "end_dim"})


@dataclass(frozen=True)
class PlainPolicy:
    """
    A policy that is nothing but two MLPs and, for a Gaussian, its log standard deviations.

    :param actor: Linear layers from the observation to logits or means.
    :param critic: Linear layers from the observation to the value.
    :param activation: Of the hidden layers; Tanh where there are none.
    :param dist: SB3's action distribution.
    :param log_std: Shape ``(action_dim,)``, for gSDE ``(latent_dim, action_dim)`` or ``(latent_dim, 1)``; or None.
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
    """
    Return why the native engine cannot run a policy.

    :param policy: Any policy.
    :param buffer: Its rollout buffer.
    :return: Half a sentence, or None where it can.
    """
    reason = why_unknown_buffer(buffer)
    if reason is not None:
        return reason
    try:
        plain_policy(policy)
    except NotPlainError as not_plain:
        return str(not_plain)
    return None


def why_not_fused(policy: ActorCriticPolicy) -> str | None:
    """
    Return why the fused engine cannot run a policy.

    :param policy: Any policy, with networks of any kind.
    :return: Half a sentence, or None where it can.
    """
    try:
        check_known(policy)
        if policy.device.type != "cpu":
            raise NotPlainError(f"it is on the device {policy.device}")
        check_gaussian(policy)
        check_parameters(policy)
        check_optimizer(policy)
    except NotPlainError as not_plain:
        return str(not_plain)
    return None


def plain_policy(policy: ActorCriticPolicy) -> PlainPolicy:
    """
    Find the parts of a policy that kernels can run.

    :param policy: Any of SB3's.
    :return: Its parts.
    :raises NotPlainError: If it is more than kernels know.
    """
    if type(policy) is not ActorCriticPolicy:
        raise NotPlainError(f"its class is {type(policy).__name__}, and only MlpPolicy itself is compiled")
    check_known(policy)
    if policy.squash_output:
        raise NotPlainError("it squashes its actions")
    _check_observations(policy)
    _check_extractors(policy)
    hidden_actor, actor_activation = _hidden_layers(policy.mlp_extractor.policy_net)
    hidden_critic, critic_activation = _hidden_layers(policy.mlp_extractor.value_net)
    heads = (policy.action_net, policy.value_net)
    if any(type(head) is not nn.Linear or head.bias is None for head in heads):
        raise NotPlainError("its last layers are not torch.nn.Linear with a bias")
    _check_modules(_modules_of(policy))
    activations = {activation for activation in (actor_activation, critic_activation) if activation is not None}
    if len(activations) > 1:
        raise NotPlainError("actor and critic have different activations")
    plain = PlainPolicy(
        actor=[*hidden_actor, policy.action_net],  # type: ignore[list-item]
        critic=[*hidden_critic, policy.value_net],
        activation=activations.pop() if activations else nn.Tanh,
        dist=policy.action_dist,
        log_std=policy.log_std if isinstance(policy.action_dist, _GAUSSIANS) else None,
    )
    check_gaussian(policy)
    _check_gsde(policy, latent_dim=plain.actor[-1].in_features)
    _check_tensors(policy, plain)
    check_optimizer(policy)
    return plain


def _check_extractors(policy: ActorCriticPolicy) -> None:
    if type(policy.mlp_extractor) is not MlpExtractor:
        raise NotPlainError(f"its mlp_extractor is {type(policy.mlp_extractor).__name__}")
    for extractor in {policy.features_extractor, policy.pi_features_extractor, policy.vf_features_extractor}:
        if type(extractor) is not FlattenExtractor:
            raise NotPlainError(f"its features extractor is {type(extractor).__name__}")
        flatten = extractor.flatten
        if type(flatten) is not nn.Flatten or (flatten.start_dim, flatten.end_dim) != (1, -1):
            raise NotPlainError(f"its features extractor flattens by {flatten}")


def _modules_of(policy: ActorCriticPolicy) -> list[Any]:
    """All modules of a plain policy that a forward pass calls; where it is not plain, as many as are there."""
    extractor = policy.mlp_extractor
    # One object where it is shared.
    features = dict.fromkeys((policy.features_extractor, policy.pi_features_extractor, policy.vf_features_extractor))
    modules: list[Any] = [policy, extractor, *features, policy.action_net, policy.value_net]
    modules += [getattr(module, "flatten", None) for module in features]
    for network in (getattr(extractor, "policy_net", None), getattr(extractor, "value_net", None)):
        modules += [network, *([] if network is None else network._modules.values())]
    return [module for module in modules if module is not None]


def _check_modules(modules: Iterable[Any]) -> None:
    for module in modules:
        if has_hooks(module):
            raise NotPlainError("it has hooks")
        name = replaced_method(module)
        if name is not None:
            raise NotPlainError(f"the {name}() of a {type(module).__name__} was replaced")


def _check_observations(policy: ActorCriticPolicy) -> None:
    space = policy.observation_space
    if not isinstance(space, spaces.Box):
        raise NotPlainError(f"its observations are {type(space).__name__}")
    if is_image_space(space) and policy.normalize_images:
        raise NotPlainError("its observations are images")
    if policy.device.type != "cpu":
        raise NotPlainError(f"it is on the device {policy.device}")


def _hidden_layers(network: nn.Module) -> tuple[list[nn.Linear], type[nn.Module] | None]:
    if type(network) is not nn.Sequential:
        raise NotPlainError(f"its network is a {type(network).__name__}, not torch.nn.Sequential")
    layers: list[nn.Linear] = []
    activation: type[nn.Module] | None = None
    modules = list(network._modules.values())  # children() passes over a module that comes again
    for index, module in enumerate(modules):
        if index % 2 == 0:
            if type(module) is not nn.Linear or module.bias is None:
                raise NotPlainError(f"its network has a {type(module).__name__} where kernels expect torch.nn.Linear")
            layers.append(module)
        else:
            values = ACTIVATIONS.get(type(module))
            if values is None or any(getattr(module, name) != value for name, value in values.items()):
                raise NotPlainError(f"its activation is {module}")
            if activation not in (None, type(module)):
                raise NotPlainError("its layers have different activations")
            activation = type(module)
    if len(modules) % 2:
        raise NotPlainError("its last hidden layer has no activation")
    return layers, activation


def check_gaussian(policy: ActorCriticPolicy) -> None:
    """
    Make sure that a Gaussian, where the policy has one, is neither squashed nor of another form than SB3 builds it.

    :param policy: With any action distribution.
    :raises NotPlainError: If it is.
    """
    dist = policy.action_dist
    if isinstance(dist, StateDependentNoiseDistribution) and dist.bijector is not None:
        raise NotPlainError("it squashes its actions")
    if isinstance(dist, DiagGaussianDistribution):
        _check_log_std(policy, (dist.action_dim,))


def _check_gsde(policy: ActorCriticPolicy, latent_dim: int) -> None:
    dist = policy.action_dist
    if not isinstance(dist, StateDependentNoiseDistribution):
        return
    if dist.learn_features:
        raise NotPlainError("its gSDE learns features")
    if dist.epsilon != _GSDE_EPSILON:
        raise NotPlainError(f"its gSDE has the epsilon {dist.epsilon}")
    _check_log_std(policy, (latent_dim, dist.action_dim if dist.full_std else 1))


def _check_log_std(policy: ActorCriticPolicy, shape: tuple[int, ...]) -> None:
    if policy.log_std.shape != shape:
        raise NotPlainError(f"its log_std has the shape {tuple(policy.log_std.shape)} where SB3's has {shape}")


def _check_tensors(policy: ActorCriticPolicy, plain: PlainPolicy) -> None:
    parameters = [*plain.actor_parameters, *plain.critic_parameters]
    if {id(p) for p in policy.parameters()} != {id(p) for p in parameters} or len({id(p) for p in parameters}) != len(
        parameters
    ):
        raise NotPlainError("it has parameters beside those of its two networks")
    check_parameters(policy)
    if any(map(_has_hooks, parameters)):
        raise NotPlainError("it has hooks")
    _check_shapes(policy, plain)


def check_parameters(policy: ActorCriticPolicy) -> None:
    """
    Check that kernels can do Adam's steps on a policy's parameters.

    :param policy: Any of SB3's.
    :raises NotPlainError: If they cannot.
    """
    for parameter in policy.parameters():
        if type(parameter) is not nn.Parameter:
            raise NotPlainError(f"one of its parameters is a {type(parameter).__name__}")
        if parameter.dtype != th.float32 or not parameter.is_contiguous():
            raise NotPlainError("its parameters are not contiguous float32 tensors")
        if not parameter.requires_grad:
            raise NotPlainError("some of its parameters are frozen")


def _check_shapes(policy: ActorCriticPolicy, plain: PlainPolicy) -> None:
    """Kernels take sizes as they are given: where tensors are smaller, they would read and write beyond them."""
    n_observed = get_flattened_obs_dim(policy.observation_space)
    for layers, n_outputs in ((plain.actor, n_outputs_of(plain.dist)), (plain.critic, 1)):
        sizes = [n_observed, *(layer.out_features for layer in layers)]
        shapes = [(n_out, n_in) for n_in, n_out in itertools.pairwise(sizes)]
        fits = all(
            layer.in_features == shape[1] and layer.weight.shape == shape and layer.bias.shape == shape[:1]
            for layer, shape in zip(layers, shapes, strict=True)
        )
        if not fits or sizes[-1] != n_outputs:
            raise NotPlainError("the sizes of its layers do not fit each other, its observations or its actions")
    if n_action_numbers(plain.dist) != get_action_dim(policy.action_space):
        raise NotPlainError("its action distribution does not fit its actions")


def n_outputs_of(dist: Any) -> int:
    """
    Return how many numbers the actor's last layer must give.

    :param dist: An action distribution that kernels know.
    :return: Logits, or means of a Gaussian.
    """
    width = cast(int, dist_param_dim(dist))
    return width // 2 if isinstance(dist, _GAUSSIANS) else width


def n_action_numbers(dist: Any) -> int:
    """
    Return how many numbers one action has.

    :param dist: An action distribution that kernels know.
    :return: Columns of the stored actions.
    """
    if isinstance(dist, CategoricalDistribution):
        return 1
    return len(dist.action_dims) if isinstance(dist, MultiCategoricalDistribution) else n_outputs_of(dist)


def _has_hooks(parameter: Any) -> bool:
    return bool(parameter._backward_hooks or getattr(parameter, "_post_accumulate_grad_hooks", None))


def check_optimizer(policy: ActorCriticPolicy) -> None:
    """
    Make sure that kernels can do an optimizer's steps.

    :param policy: With its optimizer.
    :raises NotPlainError: If they cannot.
    """
    optimizer = policy.optimizer
    if type(optimizer) not in OPTIMIZERS:
        raise NotPlainError(f"its optimizer is {type(optimizer).__name__}, not Adam or AdamW")
    if len(optimizer.param_groups) != 1:
        raise NotPlainError("its optimizer has several parameter groups")
    group = optimizer.param_groups[0]
    if {id(parameter) for parameter in group["params"]} != {id(parameter) for parameter in policy.parameters()}:
        raise NotPlainError("its optimizer holds other parameters")
    on = [option for option in ("amsgrad", "maximize", "differentiable", "capturable") if group.get(option)]
    if on:
        raise NotPlainError(f"its optimizer runs with {on[0]}")
    numbers = (group["lr"], *group["betas"], group["eps"], group["weight_decay"])
    if any(isinstance(number, th.Tensor) for number in numbers):
        raise NotPlainError("its optimizer's numbers are tensors")
    if any(getattr(optimizer, hook, None) for hook in ("_optimizer_step_pre_hooks", "_optimizer_step_post_hooks")):
        raise NotPlainError("its optimizer has hooks")
    states = [optimizer.state.get(parameter, {}) for parameter in group["params"]]
    steps = {float(state["step"]) for state in states if state} | {0.0 for state in states if not state}
    if len(steps) > 1:
        raise NotPlainError("its optimizer has made different numbers of steps for its parameters")


@dataclass(frozen=True)
class Binding:
    """
    Tensors of a policy and of its optimizer, and where they lie.

    :param plain: The policy's parts.
    :param table: Addresses, one row a parameter, as the kernels take them.
    :param tensors: Of each parameter: itself, its gradient and its moments, kept alive.
    :param fingerprint: From :func:`fingerprint`.
    """

    plain: PlainPolicy
    table: np.ndarray
    tensors: tuple[tuple[th.Tensor, ...], ...]
    fingerprint: tuple[object, ...]

    def holds(self, policy: ActorCriticPolicy) -> bool:
        """
        Tell whether a policy still consists of these tensors, in these places, and of nothing else.

        :param policy: The policy that was bound.
        :return: False where someone has changed more than the tensors' values.
        """
        if fingerprint(policy) != self.fingerprint:
            return False
        state = policy.optimizer.state
        for row, addresses in zip(self.tensors, self.table[:, 1:].tolist(), strict=True):
            own = state.get(row[0]) or {}  # someone may have emptied it
            if row[0].grad is not row[1] or own.get("exp_avg") is not row[2] or own.get("exp_avg_sq") is not row[3]:
                return False
            if [tensor.data_ptr() for tensor in row] != addresses:
                return False
        return True


def fingerprint(policy: ActorCriticPolicy) -> tuple[object, ...]:
    """
    What :func:`plain_policy` depends on, as something to compare: much faster than looking into the policy.

    :param policy: The policy.
    :return: Equal as long as nobody has changed the policy's build, its hooks or its optimizer's options.
    """
    modules = _modules_of(policy)
    parameters = [parameter for module in modules for parameter in module._parameters.values()]
    optimizer = policy.optimizer
    options = [value for group in optimizer.param_groups for key, value in group.items() if key not in ("params", "lr")]
    return (
        [(id(module), type(module)) for module in modules],
        [
            (id(parameter), parameter is not None and (parameter.requires_grad, _has_hooks(parameter)))
            for parameter in parameters
        ],
        replaced_code() or altered_torch(),
        any(map(has_hooks, modules)),
        [tuple(module.__dict__) for module in modules],
        [module.__dict__.get(name) for module in modules for name in _CONSTANTS],
        (policy.squash_output, policy.normalize_images, id(policy.observation_space)),
        (
            id(policy.action_dist),
            type(policy.action_dist),
            replaced_method(policy.action_dist),
            _gsde_options(policy.action_dist),
        ),
        (id(optimizer), type(optimizer)),
        [id(parameter) for group in optimizer.param_groups for parameter in group["params"]],
        options,
        bool(optimizer._optimizer_step_pre_hooks or optimizer._optimizer_step_post_hooks),
        replaced_method(optimizer),
    )


def _gsde_options(dist: Any) -> tuple[object, ...]:
    if not isinstance(dist, StateDependentNoiseDistribution):
        return ()
    return (dist.full_std, dist.use_expln, dist.learn_features, dist.epsilon, dist.bijector is None)


def bind(policy: ActorCriticPolicy) -> Binding:
    """
    Find the tensors of a policy and of its optimizer; gradients and moments that are missing are made as torch does.

    :param policy: Its gradients and its optimizer's state may be filled with zeros.
    :return: The binding, good until someone replaces a tensor.
    :raises NotPlainError: If the policy is more than kernels know.
    """
    plain = plain_policy(policy)
    rows, bound = [], []
    for parameter in [*plain.actor_parameters, *plain.critic_parameters]:
        if parameter.grad is None or not parameter.grad.is_contiguous() or parameter.grad.dtype != th.float32:
            parameter.grad = th.zeros_like(parameter, memory_format=th.contiguous_format)
        moments = moments_of(policy.optimizer, parameter)
        if any(m.dtype != th.float32 or not m.is_contiguous() or m.shape != parameter.shape for m in moments):
            raise NotPlainError("its optimizer's moments are not contiguous float32 tensors")
        bound.append((parameter, parameter.grad, *moments))
        rows.append(table_row(*bound[-1]))
    return Binding(plain, np.array(rows, np.int64), tuple(bound), fingerprint(policy))


def moments_of(optimizer: th.optim.Optimizer, parameter: th.Tensor) -> list[th.Tensor]:
    """
    Find Adam's moments of a parameter; where there are none, they are made as torch does at the first step.

    :param optimizer: Adam or AdamW.
    :param parameter: One of its parameters.
    :return: First and second moment.
    """
    if not optimizer.state[parameter]:
        zeros = [th.zeros_like(parameter, memory_format=th.contiguous_format) for _ in range(2)]
        optimizer.state[parameter] = {"step": th.tensor(0.0), "exp_avg": zeros[0], "exp_avg_sq": zeros[1]}
    state = optimizer.state[parameter]
    return [state["exp_avg"], state["exp_avg_sq"]]


def table_row(parameter: th.Tensor, *others: th.Tensor) -> list[int]:
    """
    Make the row of a parameter in the table that kernels take.

    :param parameter: The parameter.
    :param others: Its gradient and its moments.
    :return: Its size, and the addresses of all.
    """
    return [parameter.numel(), *(tensor.data_ptr() for tensor in (parameter, *others))]


def n_steps_made(binding: Binding, policy: ActorCriticPolicy) -> int:
    """
    Read how many steps the optimizer has made.

    :param binding: Of the policy.
    :param policy: The policy.
    :return: Steps.
    """
    return int(policy.optimizer.state[binding.tensors[0][0]]["step"])


def write_steps(policy: ActorCriticPolicy, n_steps: int) -> None:
    """
    Tell the optimizer how many steps were made.

    :param policy: With an optimizer that :func:`bind` has seen.
    :param n_steps: In all.
    """
    for state in policy.optimizer.state.values():
        state["step"].fill_(n_steps)
