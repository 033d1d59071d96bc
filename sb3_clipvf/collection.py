"""What a rollout needs at each step beside actions: what environments take, and values where episodes were cut off."""

import copy
from typing import Any

import numpy as np
from gymnasium import spaces
from stable_baselines3.common.policies import ActorCriticPolicy

from sb3_clipvf.engines import Engine


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
    # np.clip does the same in several times the time.
    return np.asarray(np.minimum(np.maximum(actions, action_space.low), action_space.high))


def copy_of(observations: Any) -> Any:
    """
    Copy observations, since some VecEnvs write the next step into the same arrays.

    :param observations: An array, or a dict or tuple of such.
    :return: The same with memory of its own.
    """
    return observations.copy() if isinstance(observations, np.ndarray) else copy.deepcopy(observations)


def bootstrap_truncated(
    engine: Engine, rewards: np.ndarray, dones: np.ndarray, infos: list[dict[str, Any]], gamma: float
) -> np.ndarray:
    """
    Add gamma * V(final observation) where an episode was cut off rather than ended, by one forward pass for all.

    :param engine: Gives the values.
    :param rewards: Of this step, shape ``(n_envs,)``; left as they are, since callbacks read them.
    :param dones: Whether an episode was cut off or ended, shape ``(n_envs,)``.
    :param infos: One dict an environment, with SB3's ``TimeLimit.truncated`` and ``terminal_observation``.
    :param gamma: Discount factor.
    :return: A copy with the values added, or ``rewards`` itself where nothing was cut off.
    Source: Pardo et al. 2018, arXiv 1712.00378.
    """
    if not dones.any():
        return rewards
    truncated = [
        index
        for index in np.flatnonzero(dones)
        if infos[index].get("TimeLimit.truncated", False) and infos[index].get("terminal_observation") is not None
    ]
    if not truncated:
        return rewards
    final_obs: Any = [infos[index]["terminal_observation"] for index in truncated]
    space = engine.policy.observation_space
    if isinstance(space, spaces.Dict):
        stacked: Any = {key: np.stack([obs[key] for obs in final_obs]) for key in space.spaces}
    else:
        stacked = np.stack(final_obs)
    final_values = engine.predict_values(engine.policy.obs_to_tensor(stacked)[0])
    # Environments may give integers, which cannot hold the values.
    bootstrapped = rewards.astype(np.result_type(rewards, np.float32))
    bootstrapped[truncated] += gamma * final_values.cpu().numpy().reshape(-1)
    return bootstrapped
