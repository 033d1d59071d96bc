"""SB3's ``VecEnv`` over an EnvPool."""

from typing import Any

import numpy as np
from gymnasium.vector import VectorEnv

from sb3_clipvf.envs.rows import fill_infos, own_batch, own_row, put_rows, take_rows
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
        super().__init__(pool, self._n_rows(config), pool.observation_space, pool.action_space, **kwargs)

    def _n_rows(self, config: dict[str, Any]) -> int:
        return int(config["num_envs"])

    def _begin(self, seeds: list[int] | None, options: dict[str, Any] | None) -> tuple[Any, dict[str, Any]]:
        if options:
            raise ValueError(f"`options` must be empty for an EnvPool, got {options}. Give them to envpool.make.")
        if seeds is not None:
            self.env = _seeded(self.env, seeds)
        obs, infos = self.env.reset()
        return own_batch(self.observation_space, obs), infos

    def _advance(self, actions: np.ndarray) -> Step:
        return self._answer(self.env.step(actions))

    def _answer(self, answer: tuple[Any, ...]) -> Step:
        obs, rewards, terminated, truncated, infos = answer
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
        for index, row in zip(ended.tolist(), self._rows_of(reset_infos, len(ended)), strict=True):
            self.reset_infos[index] = row
        return over

    def _rows_of(self, infos: dict[str, Any], n_rows: int) -> list[dict[str, Any]]:
        rows: list[dict[str, Any]] = [{} for _ in range(n_rows)]
        fill_infos(rows, infos, self._UNWANTED_INFOS)
        return rows

    def _render(self) -> np.ndarray:
        images: np.ndarray = self.env.render(np.arange(self.num_envs))
        return images


class SparedEnvPoolVecEnv(EnvPoolVecEnv):
    """
    SB3's ``VecEnv`` over an EnvPool with two environments a row, of which one plays and one waits, already reset.

    Where a row's episode ends, its spare goes on in the same step, and the environment that ended resets beside the
    next step of all rows. :class:`EnvPoolVecEnv` has to wait for that reset alone. Which environment plays depends on
    the row's own episodes only, so that equal seeds give equal streams.

    :param env: The pool: environment ``i`` and ``num_envs / 2 + i`` take turns in row ``i``.
    :param kwargs: Those of :class:`BatchedVecEnv`.
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
                "`spares` must be False for a pool with `episodic_life`, got True: after a lost life the row goes on "
                "in the same game. Leave one of them away."
            )
        if config["num_envs"] % 2:
            raise ValueError(
                f"`num_envs` must be even with `spares`, got {config['num_envs']}: half of them play. Make the pool "
                "with twice as many environments as you want rows."
            )
        return int(config["num_envs"]) // 2

    def _begin(self, seeds: list[int] | None, options: dict[str, Any] | None) -> tuple[Any, dict[str, Any]]:
        if seeds is not None:
            seeds = seeds + [seed + self.num_envs for seed in seeds]
        obs, infos = super()._begin(seeds, options)
        self._begin_turns()
        self._first_obs = take_rows(obs, self._waiting)
        self._first_infos = self._rows_of(take_rows(infos, self._waiting), self.num_envs)
        return take_rows(obs, self._playing), take_rows(infos, self._playing)

    def _advance(self, actions: np.ndarray) -> Step:
        reset = self._not_reset
        n_reset = len(reset)
        if not n_reset:
            return self._answer(self.env.step(actions, self._playing))
        # Resets come first, since they take longer than steps. Their actions are ignored.
        answer = self.env.step(
            np.concatenate((np.asarray(actions)[reset], actions)),
            np.concatenate((self._waiting[reset], self._playing)),
        )
        obs, *_, infos = answer
        put_rows(self._first_obs, reset, take_rows(obs, slice(n_reset)))
        for row, info in zip(reset.tolist(), self._rows_of(take_rows(infos, slice(n_reset)), n_reset), strict=True):
            self._first_infos[row] = info
        self._not_reset = reset[:0]
        return self._answer(take_rows(answer, slice(n_reset, None)))

    def _renew(self, step: Step, ended: np.ndarray, infos: list[dict[str, Any]]) -> np.ndarray:
        for index in ended.tolist():
            infos[index]["terminal_observation"] = own_row(step.obs, index)
            self.reset_infos[index] = self._first_infos[index]
        put_rows(step.obs, ended, take_rows(self._first_obs, ended))
        self._playing[ended], self._waiting[ended] = self._waiting[ended], self._playing[ended]
        self._not_reset = ended
        return np.ones(len(ended), dtype=bool)

    def _render(self) -> np.ndarray:
        images: np.ndarray = self.env.render(self._playing)
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
