"""
A bounded policy that Stable-Baselines3 lacks: a tanh-squashed Gaussian with a state-dependent standard deviation.

SB3's on-policy policies sample from an unbounded Gaussian and clip the action for the environment, or squash with gSDE.
Here the action is ``a = tanh(u)`` with ``u ~ N(mean(s), std(s)^2)``. It lies in [-1, 1] and is scaled to the Box.
"""

import math
from collections.abc import Callable
from functools import partial
from typing import Any, ClassVar

import numpy as np
import torch as th
from gymnasium import spaces
from stable_baselines3.common.distributions import Distribution, sum_independent_dims
from stable_baselines3.common.policies import (
    ActorCriticCnnPolicy,
    ActorCriticPolicy,
    BasePolicy,
    MultiInputActorCriticPolicy,
)
from stable_baselines3.common.preprocessing import get_action_dim
from stable_baselines3.common.torch_layers import BaseFeaturesExtractor, CombinedExtractor, FlattenExtractor, NatureCNN
from torch import nn
from torch.distributions import Normal
from torch.nn.functional import softplus

from sb3_clipvf.common.validation import check_float

MIN_STD = 1e-4
"""Floor of the std before squashing: keeps log-probs and the KL finite where softplus underflows."""

# SB3's orthogonal gain of the action layer: at first, actions depend little on the state.
_ACTION_NET_GAIN = 0.01


class SquashedGaussianDistribution(Distribution):
    r"""
    Diagonal Gaussian squashed by tanh, with mean and std from the network.

    .. math::
        a = \tanh(u), \quad u \sim \mathcal{N}(\mu, \sigma^2), \quad \sigma = \mathrm{softplus}(\rho) + \sigma_{min}

        \log \pi(a) = \sum_i \log \mathcal{N}(u_i; \mu_i, \sigma_i) - \log(1 - \tanh^2 u_i)

    with the network's outputs mu and rho, and :data:`MIN_STD` as the floor. ``distribution`` is the Gaussian *before*
    squashing, a new object at every :meth:`proba_distribution`.

    :param action_dim: Number of action dimensions d, at least 1.
    Source: Haarnoja et al. 2018, arXiv 1801.01290, appendix C (eq. 20 and 21). Departures: the std is a softplus, not
        an exponential. The log-Jacobian is ``2 (log 2 - u - softplus(-2u))``, which is exact for large u as well.
    """

    distribution: Normal

    def __init__(self, action_dim: int) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.action_dim = action_dim

    def __getstate__(self) -> dict[str, Any]:
        # The Gaussian of the last forward pass may be part of a graph, which can be neither copied nor pickled.
        # Every forward pass sets it again, so copies omit it.
        return {name: value for name, value in self.__dict__.items() if name != "distribution"}

    def proba_distribution_net(self, latent_dim: int, log_std_init: float = 0.0) -> nn.Linear:
        """Create the layer of means and raw stds; at first, the std is ``exp(log_std_init)`` in every state."""
        net = nn.Linear(latent_dim, 2 * self.action_dim)
        nn.init.zeros_(net.weight.data[self.action_dim :])
        self.init_std_bias(net, log_std_init)
        return net

    def init_std_bias(self, net: nn.Linear, log_std_init: float) -> None:
        """Set the raw stds' bias so that, with weights of 0, the std is ``exp(log_std_init)``."""
        _check_log_std_init(log_std_init)
        above_floor = math.exp(log_std_init) - MIN_STD
        # Inverse of softplus; log(exp(x) - 1) would overflow for large x.
        raw_std = above_floor + math.log(-math.expm1(-above_floor))
        nn.init.constant_(net.bias.data[self.action_dim :], raw_std)

    def proba_distribution(self, params: th.Tensor) -> "SquashedGaussianDistribution":
        """Set the parameters to the layer's output, and return this object."""
        mean, raw_std = params.chunk(2, dim=-1)
        self.distribution = Normal(mean, softplus(raw_std) + MIN_STD)
        return self

    def log_prob(self, actions: th.Tensor) -> th.Tensor:
        """
        Log-density of squashed actions.

        It depends only on the actions, so that rollout and update compute the same number for a stored action. Where
        tanh rounds, above ``1 - eps`` of the dtype (|u| > 8.5 in float32), an action stands for all u beyond that
        point. Its density is their probability, spread evenly over the interval that is rounded. If the
        mean is large, a clamped u is far in the Gaussian's tail, and ratios of such densities would overflow.

        :param actions: Shape ``(n, d)``, in [-1, 1].
        :return: Shape ``(n,)``, nats.
        """
        # A buffer may hold a different dtype; the rounding is that of the rollout.
        actions = actions.to(self.distribution.mean.dtype)
        eps = th.finfo(actions.dtype).eps
        limit = 1.0 - eps
        gaussian_actions = th.atanh(actions.clamp(-limit, limit))
        density: th.Tensor = self.distribution.log_prob(gaussian_actions)  # type: ignore[no-untyped-call]
        # The next number above 1 - eps is 1 - eps / 2: values beyond their midpoint round up.
        cut_off = 0.75 * eps
        # atanh(1 - cut_off), without rounding 1 - cut_off.
        edge = 0.5 * (math.log(2.0 - cut_off) - math.log(cut_off))
        is_saturated = actions.abs() > limit
        # Elsewhere, the gradient of log_ndtr may overflow in float32, and 0 times infinity is NaN.
        beyond = (actions.sign() * self.distribution.mean - edge) / self.distribution.stddev
        distance = th.where(is_saturated, beyond, 0.0)
        saturated = th.special.log_ndtr(distance) - math.log(cut_off)
        return sum_independent_dims(th.where(is_saturated, saturated, density - _log_jacobian(gaussian_actions)))

    def entropy(self) -> th.Tensor:
        """
        Estimate the entropy ``H(a) = H(u) + E[log(1 - tanh^2 u)]``; the estimate and its gradient are unbiased.

        The first term is exact, the second uses one new reparameterised sample. ``-log_prob`` of the stored actions has
        the right mean, but an expected gradient of zero at pi_old: as an entropy bonus it would have no effect.

        :return: Shape ``(n,)``, nats.
        """
        gaussian_entropy = self.distribution.entropy()  # type: ignore[no-untyped-call]
        return sum_independent_dims(gaussian_entropy + _log_jacobian(self.distribution.rsample()))

    def sample(self) -> th.Tensor:
        """Sample actions in [-1, 1], shape ``(n, d)``, with gradients by reparameterisation."""
        return th.tanh(self.distribution.rsample())

    def mode(self) -> th.Tensor:
        """Return the squashed mean: the median of each dimension, not its mode, which may lie at a bound."""
        return th.tanh(self.distribution.mean)

    def actions_from_params(self, params: th.Tensor, deterministic: bool = False) -> th.Tensor:
        """Set the parameters, and return ``mode()`` or a sample."""
        return self.proba_distribution(params).get_actions(deterministic=deterministic)

    def log_prob_from_params(self, params: th.Tensor) -> tuple[th.Tensor, th.Tensor]:
        """Set the parameters, and return sampled actions and their log-density."""
        actions = self.actions_from_params(params)
        return actions, self.log_prob(actions)


class SquashedActorCriticPolicy(ActorCriticPolicy):
    """
    Actor-critic policy with a tanh-squashed Gaussian, whose actions stay in the Box without clipping.

    The arguments are those of SB3's ``ActorCriticPolicy``, in its order, with these differences:

    :param action_space: Box of float32 or float64 with finite bounds, of any shape.
    :param ortho_init: Whether to use orthogonal weights with SB3's gains (0.01 for the action layer) and zero biases.
        False: torch's initialisation, with zero weights for the raw stds.
    :param use_sde: Must be False.
    :param log_std_init: Initial log std before squashing, above -9.21 and at most 40.
    :param full_std: Must be True (only gSDE reads it).
    :param use_expln: Must be False (only gSDE reads it).
    :param squash_output: Must be True.
    :param features_extractor_class: Features extractor. None: that of the class (flatten, NatureCNN, or combined).
    :raises TypeError: If the action space is not a Box, or ``log_std_init`` not a number.
    :raises ValueError: If the Box is not floating point or not finite, or another argument breaks its rule.
    """

    default_features_extractor: ClassVar[type[BaseFeaturesExtractor]] = FlattenExtractor
    sb3_policy: ClassVar[str] = "MlpPolicy"
    """Alias of SB3's policy for the same observations, which error messages suggest."""

    action_space: spaces.Box
    action_net: nn.Linear
    action_dist: SquashedGaussianDistribution

    def __init__(
        self,
        observation_space: spaces.Space[Any],
        action_space: spaces.Space[Any],
        lr_schedule: Callable[[float], float],
        net_arch: list[int] | dict[str, list[int]] | None = None,
        activation_fn: type[nn.Module] = nn.Tanh,
        ortho_init: bool = True,
        use_sde: bool = False,
        log_std_init: float = 0.0,
        full_std: bool = True,
        use_expln: bool = False,
        squash_output: bool = True,
        features_extractor_class: type[BaseFeaturesExtractor] | None = None,
        features_extractor_kwargs: dict[str, Any] | None = None,
        share_features_extractor: bool = True,
        normalize_images: bool = True,
        optimizer_class: type[th.optim.Optimizer] = th.optim.Adam,
        optimizer_kwargs: dict[str, Any] | None = None,
    ) -> None:
        _check_action_space(action_space, self.sb3_policy)
        _check_log_std_init(log_std_init)
        _check_options(self.sb3_policy, use_sde, full_std, use_expln, squash_output)
        super().__init__(
            observation_space,
            action_space,
            lr_schedule,
            net_arch,
            activation_fn,
            ortho_init,
            log_std_init=log_std_init,
            # The base class squashes only with gSDE; the flag is set below.
            squash_output=False,
            features_extractor_class=features_extractor_class or self.default_features_extractor,
            features_extractor_kwargs=features_extractor_kwargs,
            share_features_extractor=share_features_extractor,
            normalize_images=normalize_images,
            optimizer_class=optimizer_class,
            optimizer_kwargs=optimizer_kwargs,
        )
        # SB3 reads it as `squash_output`: predict() and collect_rollouts() then unscale actions, and do not clip them.
        self._squash_output = True

    def _build(self, lr_schedule: Callable[[float], float]) -> None:
        # The base class builds the networks for a plain Gaussian. Replace its action layer, drop its log_std, and
        # create the optimizer for the parameters that remain.
        super()._build(lr_schedule)
        del self.log_std
        self.action_dist = SquashedGaussianDistribution(get_action_dim(self.action_space))
        self.action_net = self.action_dist.proba_distribution_net(self.mlp_extractor.latent_dim_pi, self.log_std_init)
        if self.ortho_init:
            self.action_net.apply(partial(self.init_weights, gain=_ACTION_NET_GAIN))
            self.action_dist.init_std_bias(self.action_net, self.log_std_init)
        optimizer_class: Callable[..., th.optim.Optimizer] = self.optimizer_class
        self.optimizer = optimizer_class(self.parameters(), lr=lr_schedule(1), **self.optimizer_kwargs)

    def _get_action_dist_from_latent(self, latent_pi: th.Tensor) -> SquashedGaussianDistribution:
        return self.action_dist.proba_distribution(self.action_net(latent_pi))

    def _get_constructor_parameters(self) -> dict[str, Any]:
        """Return the arguments that build this policy again; SB3 saves them with the weights."""
        data = super()._get_constructor_parameters()
        # The base class sets gSDE's arguments to None, and omits whether the extractor is shared.
        for name in ("full_std", "use_expln", "squash_output"):
            del data[name]
        data["share_features_extractor"] = self.share_features_extractor
        return data

    def scale_action(self, action: np.ndarray) -> np.ndarray:
        """
        Map actions from the Box to [-1, 1], exactly ±1 at its bounds, without overflow for any finite Box.

        :param action: Actions inside the Box, shape ``(*box)`` or ``(n, *box)``.
        :return: Same shape, in the Box's dtype; 0 in dimensions whose bounds coincide.
        """
        low, high = _bounds_float64(self.action_space)
        # Halving keeps the width of a huge float64 Box finite, but would cost a subnormal one its last bit.
        half = np.where(np.maximum(np.abs(low), np.abs(high)) > 1.0, 0.5, 1.0)
        offset = half * np.asarray(action, dtype=np.float64) - half * low
        width = half * high - half * low
        position = np.where(width > 0.0, offset / np.where(width > 0.0, width, 1.0), 0.5)
        return np.asarray(2.0 * position - 1.0, dtype=self.action_space.dtype)

    def unscale_action(self, scaled_action: np.ndarray) -> np.ndarray:
        """
        Map actions from [-1, 1] to the Box: ±1 are exactly its bounds, and rounding never crosses them.

        :param scaled_action: Shape ``(*box)`` or ``(n, *box)``. Values beyond [-1, 1] map to the nearest bound.
        :return: Same shape, in the Box's dtype.
        """
        low, high = _bounds_float64(self.action_space)
        half_scaled = 0.5 * np.asarray(scaled_action, dtype=np.float64)
        # A convex combination needs no width, which could overflow.
        action = low * (0.5 - half_scaled) + high * (0.5 + half_scaled)
        # Clip before the cast: the Box's dtype represents the bounds, so the cast cannot cross them.
        return np.asarray(np.clip(action, low, high), dtype=self.action_space.dtype)


class SquashedActorCriticCnnPolicy(SquashedActorCriticPolicy):
    """:class:`SquashedActorCriticPolicy` for images, with SB3's ``NatureCNN`` as extractor."""

    default_features_extractor = NatureCNN
    sb3_policy = "CnnPolicy"


class SquashedMultiInputActorCriticPolicy(SquashedActorCriticPolicy):
    """:class:`SquashedActorCriticPolicy` for dict observations, with SB3's ``CombinedExtractor``."""

    default_features_extractor = CombinedExtractor
    sb3_policy = "MultiInputPolicy"


POLICY_ALIASES: dict[str, type[BasePolicy]] = {
    "MlpPolicy": ActorCriticPolicy,
    "CnnPolicy": ActorCriticCnnPolicy,
    "MultiInputPolicy": MultiInputActorCriticPolicy,
    "SquashedMlpPolicy": SquashedActorCriticPolicy,
    "SquashedCnnPolicy": SquashedActorCriticCnnPolicy,
    "SquashedMultiInputPolicy": SquashedMultiInputActorCriticPolicy,
}
"""Names of policies that may be passed instead of their classes."""


def _log_jacobian(gaussian_actions: th.Tensor) -> th.Tensor:
    """Return ``log(d tanh(u) / du) = log(1 - tanh^2 u)`` elementwise, stable for any u."""
    return 2.0 * (math.log(2.0) - gaussian_actions - softplus(-2.0 * gaussian_actions))


def _bounds_float64(space: spaces.Box) -> tuple[np.ndarray, np.ndarray]:
    return space.low.astype(np.float64), space.high.astype(np.float64)


def _check_action_space(action_space: spaces.Space[Any], sb3_policy: str) -> None:
    """Check that an action space is a finite Box of float32 or float64."""
    if not isinstance(action_space, spaces.Box):
        is_discrete = isinstance(action_space, (spaces.Discrete, spaces.MultiDiscrete, spaces.MultiBinary))
        hint = f'Use "{sb3_policy}".' if is_discrete else "Flatten it into one Box in a wrapper of the environment."
        raise TypeError(f"`action_space` must be a Box for a squashed policy, got {action_space}. {hint}")
    # float16 would round the stored actions, and the update's log-prob would differ from the rollout's.
    if action_space.dtype not in (np.float32, np.float64):
        raise ValueError(
            f"`action_space` must be of dtype float32 or float64 for a squashed policy, got {action_space.dtype}. "
            "Declare the environment's Box with dtype=np.float32."
        )
    infinite = np.argwhere(~(np.isfinite(action_space.low) & np.isfinite(action_space.high)))
    if len(infinite):
        raise ValueError(
            f"`action_space` must have finite bounds for a squashed policy, got infinite ones in {len(infinite)} "
            f"dimension(s), the first at {infinite[0].tolist()}. Give the environment's Box finite bounds, for example "
            "with gymnasium.wrappers.TransformAction."
        )


def _check_log_std_init(log_std_init: float) -> None:
    # A softplus above the floor exceeds MIN_STD, and float32 holds the variance exp(2 * 40).
    hint = "It is the log of the std before tanh: actions are nearly uniform at 0, narrow below -2."
    check_float("log_std_init", log_std_init, hint, math.log(MIN_STD), 40.0, above_low=True)


def _check_options(sb3_policy: str, use_sde: bool, full_std: bool, use_expln: bool, squash_output: bool) -> None:
    """Check the arguments of SB3's signature that a squashed policy does not support."""
    if use_sde:
        raise ValueError(
            "`use_sde` must be False for a squashed policy, got True. "
            f'For gSDE with squashing use "{sb3_policy}" with use_sde=True and policy_kwargs=dict(squash_output=True).'
        )
    for name, value, required in (
        ("full_std", full_std, True),
        ("use_expln", use_expln, False),
        ("squash_output", squash_output, True),
    ):
        if value != required:
            raise ValueError(
                f"`{name}` must be {required} for a squashed policy, got {value}. "
                f'Leave it out, or use "{sb3_policy}", which reads it.'
            )
