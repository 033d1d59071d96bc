"""A policy's step whose operations are the same each time, and read nothing from the device."""

from typing import Any, cast

import torch as th
from stable_baselines3.common.distributions import (
    BernoulliDistribution,
    CategoricalDistribution,
    MultiCategoricalDistribution,
)

from sb3_clipvf.distributions import dist_params


def sampled(policy: Any, observations: Any) -> tuple[th.Tensor, ...]:
    """
    Run SB3's ``ActorCriticPolicy.forward``, whose sampling from categorical distributions reads from the device.

    Return actions, values, log-probabilities, the distributions' parameters, and all of these in one float tensor.
    """
    features = policy.extract_features(observations)
    if policy.share_features_extractor:
        latent_pi, latent_vf = policy.mlp_extractor(features)
    else:
        latent_pi = policy.mlp_extractor.forward_actor(features[0])
        latent_vf = policy.mlp_extractor.forward_critic(features[1])
    values = policy.value_net(latent_vf)
    dist = policy._get_action_dist_from_latent(latent_pi)
    if isinstance(dist, CategoricalDistribution):
        actions = _first_event(dist.distribution.probs)
    elif isinstance(dist, MultiCategoricalDistribution):
        actions = th.stack([_first_event(part.probs) for part in cast(Any, dist.distribution)], dim=1)
    elif isinstance(dist, BernoulliDistribution):  # torch's sampling ends the process if a probability is NaN
        actions = (th.rand_like(dist.distribution.probs) < dist.distribution.probs).float()
    else:
        actions = dist.sample()
    log_prob, params = dist.log_prob(actions), dist_params(dist)
    n = len(values)
    numbers = th.cat([actions.reshape(n, -1).float(), values, log_prob.reshape(n, 1), params], dim=1)
    return actions.reshape(-1, *policy.action_space.shape), values, log_prob, params, numbers


def _first_event(probs: th.Tensor) -> th.Tensor:
    """Draw categories as ``torch.multinomial`` does: the first event of Poisson processes with these rates."""
    return (probs / th.empty_like(probs).exponential_()).argmax(dim=-1)
