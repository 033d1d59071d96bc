"""
The tensors of a policy and of its optimizer, on which kernels work in place.

Kernels read and write at addresses. A callback may replace any tensor, module or option between two updates, so a
:class:`Binding` keeps a fingerprint of all that it depends on. Comparing it takes less time than binding again.
"""

from collections.abc import Iterable
from dataclasses import dataclass
from itertools import chain
from operator import attrgetter
from typing import Any

import numpy as np
import torch as th
from stable_baselines3.common.distributions import StateDependentNoiseDistribution
from stable_baselines3.common.policies import ActorCriticPolicy

from sb3_clipvf.engines.recognition import (
    ACTIVATIONS,
    altered_torch,
    has_hooks,
    replaced_code,
    replaced_method,
)
from sb3_clipvf.engines.support import PlainPolicy, modules_of, parameter_has_hooks, plain_policy, usable_gradient

_dtype = attrgetter("dtype")
# Attributes of modules that change what they compute.
_CONSTANTS = sorted({name for constants in ACTIVATIONS.values() for name in constants} | {"start_dim", "end_dim"})


@dataclass(frozen=True)
class Binding:
    """
    The tensors of a policy and of its optimizer, and their addresses.

    ``table`` has a row for each parameter, with the columns of :mod:`.kernels.memory`. ``tensors`` holds each
    parameter, its gradient and its two moments, and so keeps them alive. ``shapes`` has the shape of each of them.
    """

    plain: PlainPolicy
    table: np.ndarray
    tensors: tuple[tuple[th.Tensor, ...], ...]
    shapes: list[th.Size]
    fingerprint: tuple[object, ...]

    def is_current(self, policy: ActorCriticPolicy) -> bool:
        """Return whether only numbers have changed since it was bound, and all parameters have taken as many steps."""
        if _fingerprint(policy) != self.fingerprint:
            return False
        state, steps = policy.optimizer.state, set()
        for row in self.tensors:
            adam = state.get(row[0]) or {}  # a callback may have emptied it
            if row[0].grad is not row[1] or adam.get("exp_avg") is not row[2] or adam.get("exp_avg_sq") is not row[3]:
                return False
            step = adam.get("step")
            if not isinstance(step, th.Tensor):
                return False
            steps.add(step.item())
        # A view of the same memory may have a different layout.
        tensors = list(chain.from_iterable(self.tensors))
        if list(map(th.Tensor.data_ptr, tensors)) != self.table[:, 1:].ravel().tolist():
            return False
        if list(map(th.Tensor.size, tensors)) != self.shapes or not all(map(th.Tensor.is_contiguous, tensors)):
            return False
        # Kernels have one number of steps for all parameters.
        return set(map(_dtype, tensors)) == {th.float32} and len(steps) == 1


def bind(policy: ActorCriticPolicy) -> Binding:
    """
    Find the tensors of a policy and of its optimizer; create missing gradients and moments as torch does.

    :raises UnsupportedError: If the native engine cannot run the policy.
    """
    plain = plain_policy(policy)
    rows, bound = [], []
    for parameter in [*plain.actor_parameters, *plain.critic_parameters]:
        gradient = usable_gradient(parameter)
        if gradient is None:
            gradient = parameter.grad = th.zeros_like(parameter, memory_format=th.contiguous_format)
        bound.append((parameter, gradient, *moments_of(policy.optimizer, parameter)))
        rows.append(table_row(*bound[-1]))
    shapes = list(map(th.Tensor.size, chain.from_iterable(bound)))
    return Binding(plain, np.array(rows, np.int64), tuple(bound), shapes, _fingerprint(policy))


def moments_of(optimizer: th.optim.Optimizer, parameter: th.Tensor) -> list[th.Tensor]:
    """Return Adam's two moments of a parameter; create them if missing, as torch does at the first step."""
    if not optimizer.state[parameter]:
        zeros = [th.zeros_like(parameter, memory_format=th.contiguous_format) for _ in range(2)]
        optimizer.state[parameter] = {"step": th.tensor(0.0), "exp_avg": zeros[0], "exp_avg_sq": zeros[1]}
    state = optimizer.state[parameter]
    return [state["exp_avg"], state["exp_avg_sq"]]


def table_row(parameter: th.Tensor, *others: th.Tensor) -> list[int]:
    """Return a row of the kernels' table: the size of a parameter, then the addresses of all tensors."""
    return [parameter.numel(), *(tensor.data_ptr() for tensor in (parameter, *others))]


def write_steps(optimizer: th.optim.Optimizer, parameters: Iterable[th.Tensor], n_steps: int) -> None:
    """Set the number of steps in the optimizer's state of these parameters."""
    for parameter in parameters:
        optimizer.state[parameter]["step"].fill_(n_steps)


def check_gradients() -> None:
    """Raise RuntimeError if gradients are disabled: kernels would train, where a backward pass of torch cannot."""
    if not th.is_grad_enabled():
        raise RuntimeError(
            "Training needs gradients, which are disabled. Call `learn` or `train` outside of th.no_grad()."
        )


def _fingerprint(policy: ActorCriticPolicy) -> tuple[object, ...]:
    """Return what :func:`.support.plain_policy` depends on: structure, code, hooks and the optimizer's options."""
    modules = modules_of(policy)
    parameters = [parameter for module in modules for parameter in module._parameters.values()]
    dist: Any = policy.action_dist
    optimizer = policy.optimizer
    options = [value for group in optimizer.param_groups for key, value in group.items() if key not in ("params", "lr")]
    gsde: tuple[object, ...] = ()
    if isinstance(dist, StateDependentNoiseDistribution):
        gsde = (dist.full_std, dist.use_expln, dist.learn_features, dist.epsilon, dist.bijector is None)
    return (
        [(id(module), type(module)) for module in modules],
        [
            (id(parameter), parameter is not None and (parameter.requires_grad, parameter_has_hooks(parameter)))
            for parameter in parameters
        ],
        replaced_code() or altered_torch(),
        any(map(has_hooks, modules)),
        [tuple(module.__dict__) for module in modules],
        [module.__dict__.get(name) for module in modules for name in _CONSTANTS],
        (policy.squash_output, policy.normalize_images, id(policy.observation_space)),
        (id(dist), type(dist), replaced_method(dist), gsde),
        (id(optimizer), type(optimizer)),
        [id(parameter) for group in optimizer.param_groups for parameter in group["params"]],
        options,
        bool(optimizer._optimizer_step_pre_hooks or optimizer._optimizer_step_post_hooks),
        replaced_method(optimizer),
    )
