"""Find and report episodes that a wrapper outside of SB3's ``Monitor`` ends, such as ``TimeLimit``."""

import time
from enum import Enum, auto
from typing import Any

import gymnasium as gym
from stable_baselines3.common.env_util import unwrap_wrapper
from stable_baselines3.common.monitor import Monitor
from stable_baselines3.common.vec_env import VecEnv

from sb3_clipvf.envs.rows import copy_of

MONITOR_ADVICE = "Put Monitor outside of that wrapper, or use VecMonitor instead."


class UnreportedEnd(Enum):
    """State of an episode that ended without a report of ``Monitor``, or of Gymnasium's ``RecordEpisodeStatistics``."""

    LOST = auto()  #: A wrapper outside of it ended the episode.
    RUNNING = auto()  #: It still counts the steps, for example after the loss of a life.
    UNKNOWN = auto()  #: There is no such wrapper, or its attributes cannot be read.


def unreported_end(venv: VecEnv, index: int, length: int = 1) -> UnreportedEnd:
    """Return the state of the episode, of at least ``length`` steps, that the last step ended without a report."""
    try:
        if not venv.env_is_wrapped(Monitor, [index])[0]:
            return UnreportedEnd.UNKNOWN
        is_lost = _counted_steps(venv, index) < length
    except Exception:  # any environment may raise any error; this check must not end the training
        return UnreportedEnd.UNKNOWN
    return UnreportedEnd.LOST if is_lost else UnreportedEnd.RUNNING


def _counted_steps(venv: VecEnv, index: int) -> int:
    """Return the steps that ``Monitor``, or Gymnasium's ``RecordEpisodeStatistics``, has counted in this episode."""
    try:
        venv.get_attr("current_reset_info", [index])  # only Monitor has it; an environment may have `rewards`
        rewards: list[float] = venv.get_attr("rewards", [index])[0]
        return len(rewards)
    except AttributeError:
        return int(venv.get_attr("episode_lengths", [index])[0])


def check_end(locals_: dict[str, Any], globals_: dict[str, Any], name: str = "env") -> None:
    """Raise if an episode ends unreported. SB3's ``evaluate_policy``, which calls this, would wait forever."""
    if not locals_["done"] or not locals_["is_monitor_wrapped"] or "episode" in locals_["info"]:
        return
    length = int(locals_["current_lengths"][locals_["i"]])
    if unreported_end(locals_["env"], locals_["i"], length) is UnreportedEnd.LOST:
        raise ValueError(
            f"`{name}` must report the end of each episode, got one that a wrapper outside of Monitor ended after "
            f"{length} steps, as TimeLimit does. {MONITOR_ADVICE}"
        )


class EpisodeEnds(gym.Wrapper[Any, Any, Any, Any]):
    """
    Report the episodes that a wrapper around ``Monitor`` ends, such as ``TimeLimit`` in ``env_wrapper`` of the RL Zoo.

    If an episode ends without a report of ``Monitor``, the environment is reset at once. The next ``reset`` without
    seed and options, which SB3's vectorised environments call within the same step, returns the result of that reset.
    If the reset reached ``Monitor``, the episode is over, with the return and length that ``Monitor`` counted. If not,
    the game continues, as after the loss of a life in SB3's ``AtariWrapper``.
    """

    def __init__(self, env: gym.Env[Any, Any]) -> None:
        super().__init__(env)
        self._monitor: Any = unwrap_wrapper(env, Monitor)
        self._pending_reset: tuple[Any, dict[str, Any]] | None = None

    def step(self, action: Any) -> tuple[Any, Any, bool, bool, dict[str, Any]]:
        """Step the environment, and add ``episode`` to the info if an episode is over."""
        self._pending_reset = None
        obs, reward, terminated, truncated, info = self.env.step(action)
        if (terminated or truncated) and "episode" not in info and self._monitor is not None:
            obs = copy_of(obs)  # a reset may write to the same memory
            episode = self._ended(info)
            if episode is not None:
                info["episode"] = episode
        return obs, reward, terminated, truncated, info

    def reset(self, **kwargs: Any) -> tuple[Any, dict[str, Any]]:
        """Reset the environment, or return the result of the reset in the last step."""
        pending, self._pending_reset = self._pending_reset, None
        has_arguments = any(value is not None for value in kwargs.values())
        return pending if pending is not None and not has_arguments else self.env.reset(**kwargs)

    def _ended(self, info: dict[str, Any]) -> dict[str, Any] | None:
        monitor = self._monitor
        if monitor.needs_reset:  # it reported the end, but a wrapper replaced the info
            last = (monitor.episode_returns[-1], monitor.episode_lengths[-1], monitor.episode_times[-1])
            return {"r": round(last[0], 6), "l": last[1], "t": round(last[2], 6)}
        rewards, n_reported = monitor.rewards, len(monitor.episode_returns)
        more = {**{key: info.get(key) for key in monitor.info_keywords}, **monitor.current_reset_info}
        self._pending_reset = self.env.reset()
        if monitor.rewards is rewards or len(monitor.episode_returns) > n_reported:
            return None
        seconds = time.time() - monitor.t_start
        episode = {"r": round(sum(rewards), 6), "l": len(rewards), "t": round(seconds, 6), **more}
        monitor.episode_returns.append(sum(rewards))
        monitor.episode_lengths.append(len(rewards))
        monitor.episode_times.append(seconds)
        if monitor.results_writer:
            monitor.results_writer.write_row(episode)
        return episode
