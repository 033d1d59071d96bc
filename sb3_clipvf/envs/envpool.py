"""SB3's ``VecEnv`` over an EnvPool."""

from typing import Any

import numpy as np
from gymnasium.vector import VectorEnv

from sb3_clipvf.envs.rows import copy_batch, put_rows, take_rows
from sb3_clipvf.envs.vector import BatchedVecEnv, Step, keep_final_obs


class EnvPoolVecEnv(BatchedVecEnv):
    """
    SB3's ``VecEnv`` over an EnvPool of ``env_type="gymnasium"``.

    EnvPool resets in the next step. The adapter takes that step at once for the rows that ended, so it never returns a
    reset as a transition. After a lost life of ``episodic_life``, the same game continues. Seeds are fixed when a pool
    is created: after ``seed``, the next reset creates the same pool again with these seeds.

    An episode that terminates on the very step of the time limit counts as truncated, as EnvPool reports it.
    """

    # Bookkeeping of the pool, not information of the environment.
    _UNWANTED_INFOS = frozenset({"env_id", "players", "elapsed_step"})

    def __init__(self, env: Any, **kwargs: Any) -> None:
        if not isinstance(env, VectorEnv):
            raise ValueError(
                f"`env_type` must be 'gymnasium', got {type(env).__name__}. Create it with envpool.make_gymnasium."
            )
        pool: Any = env
        config = pool.config
        if pool.is_async:
            raise ValueError(
                f"`batch_size` must be `num_envs`, got {config['batch_size']} of {config['num_envs']}: SB3 steps all "
                "environments together. Omit it."
            )
        if config.get("max_num_players", 1) != 1:
            raise ValueError(
                f"`max_num_players` must be 1, got {config['max_num_players']}: SB3 trains one agent per environment. "
                "Choose another task."
            )
        self._has_lives = bool(config.get("episodic_life", False))
        # Infos of Atari games hold the rewards before clipping.
        self._true_rewards_key = "reward" if "reward_clip" in config else None
        super().__init__(pool, self._n_rows(config), pool.observation_space, pool.action_space, **kwargs)

    def _n_rows(self, config: dict[str, Any]) -> int:
        return int(config["num_envs"])

    def _reset_all(self, seeds: list[int] | None, options: dict[str, Any] | None) -> tuple[Any, dict[str, Any]]:
        if options:
            raise ValueError(f"`options` must be empty for an EnvPool, got {options}. Pass them to envpool.make.")
        if seeds is not None:
            self.env = _seeded(self.env, seeds)
        obs, infos = self.env.reset()
        return copy_batch(self.observation_space, obs), infos

    def _step_all(self, actions: np.ndarray) -> Step:
        return self._step_from(self.env.step(actions))

    def _step_from(self, returned: tuple[Any, ...]) -> Step:
        obs, rewards, terminated, truncated, infos = returned
        return Step(
            copy_batch(self.observation_space, obs),
            rewards,
            rewards if self._true_rewards_key is None else infos[self._true_rewards_key],
            terminated,
            truncated,
            infos,
        )

    def _begin_next(self, step: Step, ended: np.ndarray, infos: list[dict[str, Any]]) -> np.ndarray:
        over = np.ones(len(ended), dtype=bool)
        if self._has_lives:
            over = step.truncated[ended] | (np.asarray(step.infos["terminated"])[ended] != 0)
        keep_final_obs(infos, step.obs, ended)
        # This step resets the rows and ignores their actions.
        first_obs, _, _, _, reset_infos = self.env.step(np.asarray(self._actions)[ended], ended.astype(np.int32))
        put_rows(step.obs, ended, first_obs)
        for index, row in zip(ended.tolist(), self._info_rows(reset_infos, len(ended)), strict=True):
            self.reset_infos[index] = row
        return over

    def _render(self) -> np.ndarray:
        return np.asarray(self.env.render(np.arange(self.num_envs)))


class SparedEnvPoolVecEnv(EnvPoolVecEnv):
    """
    SB3's ``VecEnv`` over an EnvPool with two environments per row: one plays, one waits, already reset.

    When a row's episode ends, the waiting environment takes over in the same step. The other one resets during the next
    step of all rows, while :class:`EnvPoolVecEnv` takes a separate step for the reset. Environments ``i`` and
    ``num_envs / 2 + i`` take turns in row ``i``, at the ends of its episodes only, so equal seeds give equal streams.
    """

    def __init__(self, env: Any, **kwargs: Any) -> None:
        super().__init__(env, **kwargs)
        self._first_obs: Any = None
        self._first_infos: list[dict[str, Any]] = []
        self._begin_turns()

    def _begin_turns(self) -> None:
        self._playing = np.arange(self.num_envs, dtype=np.int32)
        self._waiting = self._playing + self.num_envs
        # Rows whose waiting environment has not reset yet.
        self._not_reset = np.empty(0, dtype=np.int64)

    def _n_rows(self, config: dict[str, Any]) -> int:
        if self._has_lives:
            raise ValueError(
                "`spares` must be False for a pool with `episodic_life`, got True: after a lost life the row "
                "continues the same game. Omit one of them."
            )
        if config["num_envs"] % 2:
            raise ValueError(
                f"`num_envs` must be even with `spares`, got {config['num_envs']}: half of them play. Create the pool "
                "with twice as many environments as you want rows."
            )
        return int(config["num_envs"]) // 2

    def _reset_all(self, seeds: list[int] | None, options: dict[str, Any] | None) -> tuple[Any, dict[str, Any]]:
        if seeds is not None:
            seeds = seeds + [seed + 2**30 for seed in seeds]  # those of further rows and processes follow the rows'
        obs, infos = super()._reset_all(seeds, options)
        self._begin_turns()
        self._first_obs = take_rows(obs, self._waiting)
        self._first_infos = self._info_rows(take_rows(infos, self._waiting), self.num_envs)
        return take_rows(obs, self._playing), take_rows(infos, self._playing)

    def _step_all(self, actions: np.ndarray) -> Step:
        reset = self._not_reset
        n_reset = len(reset)
        if not n_reset:
            return self._step_from(self.env.step(actions, self._playing))
        # Resets come first, since they take longer than steps; they ignore their actions.
        returned = self.env.step(
            np.concatenate((np.asarray(actions)[reset], actions)),
            np.concatenate((self._waiting[reset], self._playing)),
        )
        obs, *_, infos = returned
        put_rows(self._first_obs, reset, take_rows(obs, slice(n_reset)))
        for row, info in zip(reset.tolist(), self._info_rows(take_rows(infos, slice(n_reset)), n_reset), strict=True):
            self._first_infos[row] = info
        self._not_reset = reset[:0]
        return self._step_from(take_rows(returned, slice(n_reset, None)))

    def _begin_next(self, step: Step, ended: np.ndarray, infos: list[dict[str, Any]]) -> np.ndarray:
        keep_final_obs(infos, step.obs, ended)
        for index in ended.tolist():
            self.reset_infos[index] = self._first_infos[index]
        put_rows(step.obs, ended, take_rows(self._first_obs, ended))
        self._playing[ended], self._waiting[ended] = self._waiting[ended], self._playing[ended]
        self._not_reset = ended
        return np.ones(len(ended), dtype=bool)

    def _render(self) -> np.ndarray:
        return np.asarray(self.env.render(self._playing))


def _seeded(pool: Any, seeds: list[int]) -> Any:
    # Seeds must fit an int32.
    config = pool.spec.config._replace(env_seed=[seed % 2**31 for seed in seeds])
    seeded = type(pool)(type(pool.spec)(config))
    for name, value in vars(pool).items():
        # envpool.make sets these from outside.
        if name.startswith("_render_"):
            setattr(seeded, name, value)
    pool.close()
    return seeded
