"""SB3's ``VecEnv`` over ale-py's ``AtariVectorEnv``."""

import warnings
from typing import Any

import numpy as np
from gymnasium.vector import AutoresetMode, VectorEnv

from sb3_clipvf.envs.gymnasium_vector import GymnasiumVecEnv
from sb3_clipvf.envs.rows import own_row
from sb3_clipvf.envs.vector import Step


class AtariVecEnv(GymnasiumVecEnv):
    """
    SB3's ``VecEnv`` over ``AtariVectorEnv``.

    With ``life_loss_info=True`` a lost life ends a row while the game goes on, as with SB3's ``EpisodicLifeEnv``;
    ``info["episode"]`` then comes with the game's end. That needs SAME_STEP mode, in which the infos tell the two
    apart. With ``reward_clipping=True``, its default, the true rewards are lost: make it with False, and this adapter
    with ``clip_rewards=True``.

    :param env: An ``AtariVectorEnv`` that steps all its environments together.
    :param kwargs: Those of ``BatchedVecEnv``.
    """

    _UNWANTED_INFOS = frozenset({"final_obs", "final_info", "env_id"})

    def __init__(self, env: VectorEnv[Any, Any, Any], **kwargs: Any) -> None:
        core: Any = env.unwrapped
        if core.batch_size != core.num_envs:
            raise ValueError(
                f"`batch_size` must be `num_envs` or 0, got {core.batch_size} of {core.num_envs}: SB3 steps all "
                "environments together. Leave it away."
            )
        super().__init__(env, **kwargs)
        self._masks_reset = self._masks_reset or type(env) is type(core)
        self._earlier_frames = np.zeros(self.num_envs, np.int64)
        if core.spec is not None and core.spec.kwargs.get("reward_clipping", True):
            warnings.warn(
                "AtariVectorEnv clips rewards, so the returns in info['episode'] are those of clipped ones. Make it "
                "with reward_clipping=False, and as_vec_env with clip_rewards=True.",
                stacklevel=3,
            )

    def _seed_argument(self, seeds: list[int]) -> Any:
        # It takes what fits an int32; negative ones mean none.
        return np.array([seed % 2**31 for seed in seeds], np.int64)

    def _begin(self, seeds: list[int] | None, options: dict[str, Any] | None) -> tuple[Any, dict[str, Any]]:
        obs, infos = super()._begin(seeds, options)
        self._earlier_frames = _earlier_frames(infos)
        return obs, infos

    def _renew(self, step: Step, ended: np.ndarray, infos: list[dict[str, Any]]) -> np.ndarray:
        if self.autoreset_mode is AutoresetMode.SAME_STEP:
            return self._renewed_or_alive(step, ended, infos)
        if np.any(step.terminated[ended] & (np.asarray(step.infos["lives"])[ended] > 0)):
            raise ValueError(
                "`autoreset_mode` must be SAME_STEP where episodes end with lives left (`life_loss_info`, "
                "`episodic_life`), got NEXT_STEP, in which nothing tells whether the game goes on. Make the "
                "environment with autoreset_mode='SameStep'."
            )
        return super()._renew(step, ended, infos)

    def _renewed_or_alive(self, step: Step, ended: np.ndarray, infos: list[dict[str, Any]]) -> np.ndarray:
        # Frames of earlier games: they change when a game ends, and only then.
        earlier_frames = _earlier_frames(step.infos)
        over: np.ndarray = earlier_frames[ended] != self._earlier_frames[ended]
        self._earlier_frames = earlier_frames
        if over.any():
            self._renewed_by_env(step, ended[over], infos)
        for index in ended[~over].tolist():
            infos[index]["terminal_observation"] = own_row(step.obs, index)
        return over


def _earlier_frames(infos: dict[str, Any]) -> np.ndarray:
    return np.array(infos["frame_number"], np.int64) - np.array(infos["episode_frame_number"], np.int64)
