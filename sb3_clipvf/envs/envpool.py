"""SB3's ``VecEnv`` over an EnvPool."""

from typing import Any

import numpy as np
from gymnasium.vector import VectorEnv

from sb3_clipvf.envs.rows import fill_infos, own_batch, own_row, put_rows
from sb3_clipvf.envs.vector import BatchedVecEnv, Step


class EnvPoolVecEnv(BatchedVecEnv):
    """
    SB3's ``VecEnv`` over an EnvPool of ``env_type="gymnasium"``.

    EnvPool resets in the next step. The adapter takes that step at once, for the rows that ended alone, so what it
    gives never is a transition, and a lost life of ``episodic_life`` goes on with the same game. Seeds are fixed when a
    pool is made: after ``seed`` the next reset makes the same pool anew, with these.

    An episode that ends by itself exactly on the step of the limit counts as truncated, as EnvPool reports it.

    :param env: The pool, with as many rows in a batch as environments.
    :param kwargs: Those of :class:`BatchedVecEnv`.
    """

    # Bookkeeping of the pool, not information of the environment.
    _UNWANTED_INFOS = frozenset({"env_id", "players", "elapsed_step"})

    def __init__(self, env: Any, **kwargs: Any) -> None:
        if not isinstance(env, VectorEnv):
            raise ValueError(
                f"`env_type` must be 'gymnasium', got {type(env).__name__}. Make it with envpool.make_gymnasium."
            )
        pool: Any = env
        config = pool.config
        if pool.is_async:
            raise ValueError(
                f"`batch_size` must be `num_envs`, got {config['batch_size']} of {config['num_envs']}: SB3 steps all "
                "environments together. Leave it away."
            )
        if config.get("max_num_players", 1) != 1:
            raise ValueError(
                f"`max_num_players` must be 1, got {config['max_num_players']}: SB3 trains one agent an environment. "
                "Choose another task."
            )
        self._has_lives = bool(config.get("episodic_life", False))
        # Atari games say there what the game gave, before clipping.
        self._true_rewards = "reward" if "reward_clip" in config else None
        super().__init__(pool, config["num_envs"], pool.observation_space, pool.action_space, **kwargs)

    def _begin(self, seeds: list[int] | None, options: dict[str, Any] | None) -> tuple[Any, dict[str, Any]]:
        if options:
            raise ValueError(f"`options` must be empty for an EnvPool, got {options}. Give them to envpool.make.")
        if seeds is not None:
            self.env = _seeded(self.env, seeds)
        obs, infos = self.env.reset()
        return own_batch(self.observation_space, obs), infos

    def _advance(self, actions: np.ndarray) -> Step:
        obs, rewards, terminated, truncated, infos = self.env.step(actions)
        return Step(
            own_batch(self.observation_space, obs),
            rewards,
            rewards if self._true_rewards is None else infos[self._true_rewards],
            terminated,
            truncated,
            infos,
        )

    def _renew(self, step: Step, ended: np.ndarray, infos: list[dict[str, Any]]) -> np.ndarray:
        over = np.ones(len(ended), dtype=bool)
        if self._has_lives:
            over = step.truncated[ended] | (np.asarray(step.infos["terminated"])[ended] != 0)
        for index in ended.tolist():
            infos[index]["terminal_observation"] = own_row(step.obs, index)
        # Their actions are ignored: these rows reset.
        first_obs, _, _, _, reset_infos = self.env.step(np.asarray(self._actions)[ended], ended.astype(np.int32))
        put_rows(step.obs, ended, first_obs)
        rows: list[dict[str, Any]] = [{} for _ in ended]
        fill_infos(rows, reset_infos, self._UNWANTED_INFOS)
        for index, row in zip(ended.tolist(), rows, strict=True):
            self.reset_infos[index] = row
        return over

    def _render(self) -> np.ndarray:
        images: np.ndarray = self.env.render(np.arange(self.num_envs))
        return images


def _seeded(pool: Any, seeds: list[int]) -> Any:
    # EnvPool takes what fits an int32.
    config = pool.spec.config._replace(env_seed=[seed % 2**31 for seed in seeds])
    seeded = type(pool)(type(pool.spec)(config))
    for name, value in vars(pool).items():
        # Set from outside, by envpool.make.
        if name.startswith("_render_"):
            setattr(seeded, name, value)
    pool.close()
    return seeded
