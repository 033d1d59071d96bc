"""Isaac Lab's environments as tensor environments."""

from typing import Any

import numpy as np
import torch as th
from gymnasium import spaces

from sb3_clipvf.common.validation import check_float
from sb3_clipvf.envs.tensor import TensorObs, TensorStep


class IsaacLabTensorEnv:
    """
    A :class:`.TensorVecEnv` over an environment with the interface of Isaac Lab's ``ManagerBasedRLEnv``.

    Its ``step`` returns a dict of observations by group, rewards, terminated, truncated and extras, all on its device,
    and resets rows whose episode ended. Final observations are not part of it, so a truncated episode uses the value
    of the observation before its last step. The tests use a stand-in with these shapes, not Isaac Lab itself.

    :param env: Environment, for example from ``gymnasium.make("Isaac-Ant-v0", cfg=...)``.
    :param group: Group of observations that the policy reads. It may be a tensor or a dict of tensors.
    :param action_bound: Bound of actions if the space has none, since ClipPPO needs one. Finite bounds stay. 100 is
        that of Isaac Lab's own wrapper for SB3.
    :raises ValueError: If there is no such group, or ``action_bound`` is not beyond an action's only bound.
    """

    def __init__(self, env: Any, group: str = "policy", action_bound: float = 100.0) -> None:
        core = env.unwrapped
        groups = core.single_observation_space.spaces
        if group not in groups:
            raise ValueError(
                f"`group` must be one of the environment's groups of observations, {', '.join(map(repr, groups))}, got "
                f"{group!r}. Choose one of them."
            )
        bound = check_float("action_bound", action_bound, "Isaac Lab's wrapper for SB3 uses 100.", above_low=True)
        self.env, self.group = env, group
        self.num_envs, self.device = int(core.num_envs), th.device(core.device)
        self.observation_space: spaces.Space[Any] = groups[group]
        self.action_space = _bounded(core.single_action_space, bound)

    def reset_tensors(self, seed: int | None = None) -> TensorObs:
        """Begin an episode in every environment."""
        observations, _ = self.env.reset(seed=seed)
        return observations[self.group]  # type: ignore[no-any-return]

    def step_tensors(self, actions: th.Tensor) -> TensorStep:
        """Step all environments."""
        observations, rewards, terminated, truncated, extras = self.env.step(actions)
        return TensorStep(observations[self.group], rewards, terminated, truncated, None, extras)

    def close(self) -> None:
        """Close the simulation."""
        self.env.close()


def _bounded(space: spaces.Space[Any], bound: float) -> spaces.Space[Any]:
    if not isinstance(space, spaces.Box) or space.is_bounded("both"):
        return space
    low = np.where(np.isfinite(space.low), space.low, -bound).astype(np.float32)
    high = np.where(np.isfinite(space.high), space.high, bound).astype(np.float32)
    if (low >= high)[np.isinf(space.low) | np.isinf(space.high)].any():
        raise ValueError(
            f"`action_bound` must be beyond all finite bounds of the action space, got {bound} for {space}. Pass a "
            "larger one."
        )
    return spaces.Box(low, high)
