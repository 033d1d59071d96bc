"""Returns and lengths of the episodes of many environments, as SB3's ``Monitor`` keeps them for one."""

import time
from os import PathLike, fspath
from typing import Any

import numpy as np
from stable_baselines3.common.monitor import ResultsWriter


class EpisodeStatistics:
    """
    Running return and length of each environment's episode.

    :param n_envs: Number of environments.
    """

    def __init__(self, n_envs: int) -> None:
        self.started_at = time.time()
        self.returns = np.zeros(n_envs, np.float64)
        self.lengths = np.zeros(n_envs, np.int64)

    def restart(self) -> None:
        """Forget the running episodes, as all environments begin new ones."""
        self.returns[:] = 0.0
        self.lengths[:] = 0

    def add(self, rewards: np.ndarray) -> None:
        """
        Count one step of every environment.

        :param rewards: True rewards, shape ``(n_envs,)``, any real dtype.
        """
        self.returns += rewards
        self.lengths += 1

    def finish(self, index: int) -> dict[str, Any]:
        """
        End one environment's episode.

        :param index: Which environment.
        :return: ``r``, its return to six decimals, ``l``, its length in steps of the agent, and ``t``, seconds since
            these statistics were made.
        """
        episode = {
            "r": round(float(self.returns[index]), 6),
            "l": int(self.lengths[index]),
            "t": round(time.time() - self.started_at, 6),
        }
        self.returns[index] = 0.0
        self.lengths[index] = 0
        return episode


def are_statistics(value: Any) -> bool:
    """
    Tell an episode's statistics from anything else that an environment calls ``episode``.

    :param value: What stands in the infos under that key, or None.
    :return: Whether it is a dict with ``r``, ``l`` and ``t``.
    """
    return isinstance(value, dict) and {"r", "l", "t"} <= value.keys()


class EpisodeFile:
    """
    A file of finished episodes that SB3's ``load_results`` and the RL Zoo's plots read.

    :param path: File; ``.monitor.csv`` is appended where its name lacks it. One that is there is replaced.
    :param started_at: When the episodes' time counts from, in seconds since the epoch.
    :param env_id: Environment's name for the file's head.
    """

    def __init__(self, path: str | PathLike[str], started_at: float, env_id: str) -> None:
        self._writer = ResultsWriter(fspath(path), header={"t_start": started_at, "env_id": env_id})

    def write(self, episode: dict[str, Any]) -> None:
        """
        Append one episode.

        :param episode: With ``r``, ``l`` and ``t``; anything else in it is left out.
        """
        self._writer.write_row({key: episode[key] for key in ("r", "l", "t")})

    def close(self) -> None:
        """Close the file."""
        self._writer.close()
