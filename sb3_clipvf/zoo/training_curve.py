"""Training episodes of a run, from the files of SB3's ``Monitor``."""

import csv
import json
import os
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np


@dataclass(frozen=True)
class TrainingCurve:
    """
    Training episodes of a run, in the order in which they ended.

    :param steps: Environment steps of all environments together at the end of each episode, ``(n,)``, ascending.
    :param returns: Returns in reward units, ``(n,)``.
    :param seconds: Seconds from the start of training to the end of each episode, ``(n,)``; NaN if a file shows that
        its clock has started again, as a continued training does.
    :param env_id: Id of the environment; "" if unknown.
    """

    steps: np.ndarray
    returns: np.ndarray
    seconds: np.ndarray
    env_id: str = ""

    @property
    def training_seconds(self) -> float | None:
        """Seconds to the end of the last episode, a little before the end of training; None if no episode ended."""
        return float(self.seconds[-1]) if len(self.seconds) > 0 and self.seconds[-1] > 0 else None

    @property
    def steps_per_second(self) -> float | None:
        """Environment steps per second up to the end of the last episode; None if no episode ended."""
        return float(self.steps[-1] / self.seconds[-1]) if self.training_seconds else None


def read_training_curve(
    folder: str | os.PathLike[str],
    num_timesteps: int | None = None,
    started: float | None = None,
    n_processes: int = 1,
) -> TrainingCurve:
    """
    Read the training episodes of a run from its monitor files.

    The environments step together, so an episode that ends after ``k`` steps of its own environment ends at step
    ``k * n_envs * n_processes`` of the training. If one file serves all environments, its column ``total_timesteps``
    has ``k * n_envs``. Without this column (SB3's ``VecMonitor``, earlier versions), the step is the sum of the lengths
    so far, which is too low by the steps of the episodes that have not ended. Monitor counts frames below Atari's
    frame skip: if its count is a multiple of the training's, steps are divided by that (whole) number.

    :param folder: Folder of the run, with ``<i>.monitor.csv``, or ``monitor.csv`` of SB3's ``VecMonitor``.
    :param num_timesteps: Environment steps of the whole run; None if unknown.
    :param started: Start of training (s since 1970); None: the time at which its environments were created.
    :param n_processes: Processes of the run, of which the first one wrote the files.
    :return: The episodes; empty if no episode ended or there are no monitor files.
    :raises ValueError: If a monitor file is damaged, or the files are of several trainings.
    """
    files = [read_monitor(path) for path in monitor_paths(folder)]
    is_continued = any(np.any(np.diff([end for _, _, end in file.episodes]) < 0) for file in files)
    if len(files) > 1 and not is_continued:
        _check_one_training(files)
    first_start = min((file.start for file in files), default=0.0)
    rows = [
        (own_steps * len(files) * n_processes, file.start - first_start + end, episode_return)
        for file in files
        for episode_return, own_steps, end in file.episodes
    ]
    # Steps first: the time may have started again.
    rows.sort(key=lambda row: row[:2])
    steps, seconds, returns = (np.array([row[i] for row in rows], dtype=np.float64) for i in range(3))
    if is_continued:
        seconds[:] = np.nan
    if num_timesteps and len(steps) > 0:
        steps = steps / frame_skip(steps[-1], num_timesteps)
    if started is not None:
        seconds += first_start - started
    return TrainingCurve(steps, returns, seconds, files[0].env_id if files else "")


def monitor_paths(folder: str | os.PathLike[str]) -> list[Path]:
    """Return the Monitor files of a run, sorted, without those of evaluations beside others."""
    paths = sorted(Path(folder).glob("*monitor.csv"))
    return [path for path in paths if not is_of_evaluations(path.name)] or paths


def is_of_evaluations(name: str) -> bool:
    """Return whether a file or folder is named as one of evaluations, such as ``eval_env`` or ``my_test``."""
    return re.search(r"(?:^|[_-])(?:eval|test)", name, re.IGNORECASE) is not None


def frame_skip(n_frames: float, num_timesteps: float) -> int:
    """Return the frames of a step if Monitor has counted ``n_frames`` in a training of ``num_timesteps`` steps."""
    return max(1, round(n_frames / num_timesteps))


@dataclass(frozen=True)
class MonitorFile:
    """
    Start (s since 1970), environment and episodes of a file.

    An episode has its return, the steps of the file's environments at its end, and the seconds from the start.
    """

    path: Path
    start: float
    env_id: str
    episodes: list[tuple[float, int, float]]


def read_monitor(path: Path) -> MonitorFile:
    """
    Read a file of SB3's ``Monitor``; a cut last line is left out.

    :raises ValueError: If the file has no header or is damaged.
    """
    episodes, steps, cut = [], 0, ""
    with path.open(newline="", encoding="utf-8", errors="replace") as file:
        try:
            header = json.loads(file.readline().lstrip("#"))
            start, env_id = float(header["t_start"]), str(header.get("env_id") or "")
            env_id = "" if env_id == "None" else env_id  # of an environment that is not registered
        except (ValueError, TypeError, KeyError) as error:
            raise ValueError(
                f"{path} must begin with the header of SB3's Monitor, but does not ({type(error).__name__}: {error}). "
                "Remove it if its training has ended."
            ) from error
        try:
            # A kill may have cut the last line.
            for number, row in enumerate(csv.DictReader(line for line in file if line.endswith("\n")), 3):
                if cut:
                    raise csv.Error(cut)
                try:
                    episode_return, length, end = float(row["r"]), int(row["l"]), float(row["t"])
                    steps = int(row["total_timesteps"]) if "total_timesteps" in row else steps + length
                    episodes.append((episode_return, steps, end))
                except (TypeError, ValueError) as error:
                    cut = f"line {number}: {error}"
        except (KeyError, csv.Error) as error:
            reason = cut or f"{type(error).__name__}: {error}"
            raise ValueError(
                f"{path} must have the columns of SB3's Monitor, but is damaged ({reason}). "
                f"Remove {'the line' if cut else 'it'} if its training has ended."
            ) from error
    return MonitorFile(path, start, env_id, episodes)


def _check_one_training(files: Sequence[MonitorFile]) -> None:
    """
    Raise ValueError if files of separate environments cannot be of one training, in which they step together.

    By the time of an episode's end, all have made the same number of steps. A resume may begin new episodes, so that
    environments lose different numbers of steps.
    """
    rows = sorted((file.start + end, steps, file.path) for file in files for _, steps, end in file.episodes)
    longest = max((np.diff([0, *(steps for _, steps, _ in file.episodes)]).max(initial=0) for file in files), default=0)
    most, first = 0, files[0].path
    for _, steps, path in rows:
        if most - steps > most / 2 + longest:
            raise ValueError(
                f"{path.parent} must hold one training, got {first.name} and {path.name}, whose environments did not "
                "step together: they are of several trainings or of evaluations, or a wrapper outside of Monitor ends "
                "episodes, which Monitor then lacks. Keep each training in its own folder, inside of Monitor."
            )
        if steps > most:
            most, first = steps, path
