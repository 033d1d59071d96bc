"""Run a policy in a minibatch of static tensors (see the package): its parameters, its precision, its images."""

from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any, cast

import torch as th
from gymnasium import spaces
from stable_baselines3.common.policies import ActorCriticPolicy
from stable_baselines3.common.preprocessing import is_image_space
from torch import nn


@contextmanager
def replaced_parameters(policy: ActorCriticPolicy, leaves: list[th.Tensor]) -> Iterator[None]:
    """
    Replace a policy's parameters with other tensors, within the context.

    ``torch.func.functional_call`` leaves the tensors in modules that a policy has under several names.
    """
    by_parameter = dict(zip(map(id, policy.parameters()), leaves, strict=True))
    places = [
        (module._parameters, name, parameter)
        for module in policy.modules()
        for name, parameter in module._parameters.items()
        if parameter is not None
    ]
    try:
        for parameters, name, parameter in places:
            parameters[name] = cast(nn.Parameter, by_parameter[id(parameter)])
        yield
    finally:
        for parameters, name, parameter in places:
            parameters[name] = parameter


@contextmanager
def reduced_precision(policy: ActorCriticPolicy, dtype: th.dtype | None) -> Iterator[None]:
    """Run the policy's networks in ``dtype`` within the context, except the last layers, on which ratios depend."""
    if dtype is None:
        yield
        return
    kind, heads = policy.device.type, (policy.action_net, policy.value_net)

    def in_full_precision(head: nn.Module, latent: th.Tensor) -> Any:
        with th.autocast(kind, enabled=False):
            return type(head).forward(head, latent.float())

    try:
        for head in heads:
            vars(head)["forward"] = partial(in_full_precision, head)
        # Each weight is cast once per minibatch; the cache would keep the casts of all minibatches.
        with th.autocast(kind, dtype, cache_enabled=False):
            yield
    finally:
        for head in heads:
            del vars(head)["forward"]


class ImageScaling:
    """
    SB3's scaling of images to [0, 1], by one operation.

    SB3 converts to float32, and divides the result. If there are convolutions, images get the layout "channels last",
    in which convolutions of a GPU compute. Others would be converted to it in each layer.
    """

    def __init__(self, policy: ActorCriticPolicy) -> None:
        space = policy.observation_space
        parts = space.spaces if isinstance(space, spaces.Dict) else {"": space}
        self._policy = policy
        self._keys = [key for key, part in parts.items() if policy.normalize_images and is_image_space(part)]
        has_convolutions = any(isinstance(module, nn.Conv2d) for module in policy.modules())
        self._layout = th.channels_last if has_convolutions else th.contiguous_format

    def __call__(self, parts: dict[str, th.Tensor]) -> dict[str, th.Tensor]:
        """Return observations by key, with scaled images."""
        return parts | {key: self._scaled(parts[key]) for key in self._keys}

    @contextmanager
    def policy_scaling_off(self) -> Iterator[None]:
        """Disable the policy's own image scaling within the context."""
        before = self._policy.normalize_images
        self._policy.normalize_images = False
        try:
            yield
        finally:
            self._policy.normalize_images = before

    def _scaled(self, images: th.Tensor) -> th.Tensor:
        layout = self._layout if images.dim() == 4 else th.contiguous_format
        scaled = th.empty(images.shape, dtype=th.float32, device=images.device, memory_format=layout)
        return th.div(images, 255.0, out=scaled)
