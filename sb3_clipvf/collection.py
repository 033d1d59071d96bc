"""What a rollout needs of the policy at each step: actions, what environments take, values where episodes were cut."""

from typing import Any

import numpy as np
import torch as th
from gymnasium import spaces
from stable_baselines3.common.policies import ActorCriticPolicy

from sb3_clipvf.distributions import dist_param_dim, dist_params, refreshed_dist


@th.no_grad()
def act(
    policy: ActorCriticPolicy, observations: Any, *, with_dist_params: bool
) -> tuple[np.ndarray, th.Tensor, th.Tensor, dict[str, th.Tensor]]:
    """
    Sample one action for each environment.

    :param policy: pi_old.
    :param observations: On the policy's device, ``n_envs`` of them.
    :param with_dist_params: Whether the distribution's parameters are wanted.
    :return: Actions ``(n_envs, ...)``, values ``(n_envs, 1)``, log-probs ``(n_envs,)``, and ``{"dist_params": ...}`` of
        shape ``(n_envs, k)``; an empty dict where it is not wanted, or the distribution is of an unknown type.
    """
    stale = getattr(policy.action_dist, "distribution", None) if with_dist_params else None
    actions, values, log_probs = policy(observations)
    row = {}
    if with_dist_params:
        dist = refreshed_dist(policy, observations, stale)
        if dist_param_dim(dist) is not None:
            row = {"dist_params": dist_params(dist)}
    return actions.cpu().numpy(), values, log_probs, row


def to_env(policy: ActorCriticPolicy, action_space: spaces.Space[Any], actions: np.ndarray) -> np.ndarray:
    """
    Turn the policy's actions into what the environments take; log-probs and the buffer keep the policy's own.

    :param policy: Says whether it squashes its actions.
    :param action_space: Of one environment.
    :param actions: Shape ``(n_envs, ...)``.
    :return: Scaled from [-1, 1] where the policy squashes, else clipped to the bounds of a Box.
    """
    if not isinstance(action_space, spaces.Box):
        return actions
    if policy.squash_output:
        return np.asarray(policy.unscale_action(actions))
    return np.asarray(np.clip(actions, action_space.low, action_space.high))


def bootstrap_truncated(
    policy: ActorCriticPolicy, rewards: np.ndarray, dones: np.ndarray, infos: list[dict[str, Any]], gamma: float
) -> np.ndarray:
    """
    Add gamma * V(final observation) where an episode was cut off rather than ended, by one forward pass for all.

    :param policy: Gives the values.
    :param rewards: Of this step, shape ``(n_envs,)``; left as they are, since callbacks read them.
    :param dones: Whether an episode was cut off or ended, shape ``(n_envs,)``.
    :param infos: One dict an environment, with SB3's ``TimeLimit.truncated`` and ``terminal_observation``.
    :param gamma: Discount factor.
    :return: A copy with the values added, or ``rewards`` itself where nothing was cut off.
    Source: Pardo et al. 2018, arXiv 1712.00378.
    """
    truncated = [
        index
        for index in np.flatnonzero(dones)
        if infos[index].get("TimeLimit.truncated", False) and infos[index].get("terminal_observation") is not None
    ]
    if not truncated:
        return rewards
    final_obs: Any = [infos[index]["terminal_observation"] for index in truncated]
    if isinstance(policy.observation_space, spaces.Dict):
        stacked: Any = {key: np.stack([obs[key] for obs in final_obs]) for key in policy.observation_space.spaces}
    else:
        stacked = np.stack(final_obs)
    with th.no_grad():
        final_values = policy.predict_values(policy.obs_to_tensor(stacked)[0])
    # Environments may give integers, which cannot hold the values.
    bootstrapped = rewards.astype(np.result_type(rewards, np.float32))
    bootstrapped[truncated] += gamma * final_values.cpu().numpy().reshape(-1)
    return bootstrapped
