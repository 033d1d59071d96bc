"""The training of a run as all of its files show it: its episodes, its log, its clock, and its model's own numbers."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np

from sb3_clipvf.zoo.comparison.series import Series, earlier_logs, read_logs
from sb3_clipvf.zoo.training_curve import frame_skip, read_training_curve

VERSIONS = ("Stable-Baselines3", "PyTorch", "Gymnasium", "Numpy", "Python")
"""Packages whose versions a model's file holds."""

_EPISODES_OF_LOG = "rollout/ep_rew_mean"
_FEWEST_ROWS = 10


@dataclass(frozen=True)
class Training:
    """
    The training of a run.

    :param env_id: Id of the environment; "" if no Monitor file names it.
    :param episodes: Returns of the training episodes.
    :param is_mean: Whether ``episodes`` are means of 100 episodes, from the log, since there are no Monitor files.
    :param log: Series of SB3's logger, by key.
    :param is_resumed: Whether the run was resumed, so that its times are not known.
    """

    env_id: str
    episodes: Series
    is_mean: bool
    log: Mapping[str, Series]
    is_resumed: bool


@dataclass(frozen=True)
class SavedModel:
    """
    What the file of a model holds about its training.

    :param num_timesteps: Environment steps of the training; None if unknown, as without a model.
    :param started: Start of the training (s since 1970); None if it was resumed or the time is unknown.
    :param is_resumed: Whether the training was resumed.
    :param versions: Versions of packages by name.
    """

    num_timesteps: int | None = None
    started: float | None = None
    is_resumed: bool = False
    versions: Mapping[str, str] = field(default_factory=dict)


def read_saved_model(path: Path, problems: list[str]) -> SavedModel:
    """Read what a model's file holds about its training; add a message if it is damaged."""
    from sb3_clipvf.files.archive import entries_of, read_bytes, reason_of  # imports torch

    if not path.is_file():
        return SavedModel()
    with noting(problems):
        entries = dict(entries_of(*read_bytes(path, "zip")))
        try:
            data = dict(json.loads(entries["data"]))
            versions = re.findall(r"^- ([\w-]+): (\S+)$", entries.get("system_info.txt", b"").decode(), re.MULTILINE)
            first_step = data.get("_num_timesteps_at_start")
            return SavedModel(
                int(data["num_timesteps"]),
                data["start_time"] / 1e9 if first_step == 0 and data.get("start_time") else None,
                bool(first_step),
                {name: version for name, version in versions if name in VERSIONS},
            )
        except (ValueError, TypeError, KeyError) as error:
            raise ValueError(
                f"{path} must hold a model of SB3, but is damaged ({reason_of(error)}). Restore the run's own file."
            ) from error
    return SavedModel()


def read_training(
    folder: Path, model: SavedModel, n_processes: int, problems: list[str], inner: Sequence[Path] = ()
) -> Training:
    """
    Read the training of a run from its Monitor files, its log and its final model.

    :param folder: Folder of the run.
    :param model: What the final model holds.
    :param n_processes: Processes of the run.
    :param problems: Messages, to which those about files that were left out are added.
    :param inner: Real paths of folders in it that belong to other runs.
    :return: The training.
    """
    env_id, episodes, log = "", Series.of([]), {}
    with noting(problems):
        curve = read_training_curve(folder, model.num_timesteps, model.started, n_processes)
        env_id, episodes = curve.env_id, Series(curve.steps, curve.seconds, curve.returns)
    # SB3 begins a folder for each training, but Monitor replaces its file.
    earlier = earlier_logs(folder, inner)
    if earlier:
        names = ", ".join(path.name for path in earlier)
        problems.append(
            f"{folder} holds logs of earlier trainings, which were left out: {names}. Keep each in its own folder."
        )
    with noting(problems):
        log = read_logs(folder, [*inner, *earlier])
    if model.num_timesteps is None:
        episodes = _without_frame_skip(episodes, log)
    # Each process starts its clock again.
    is_resumed = model.is_resumed or bool(np.isnan(episodes.seconds).any())
    is_resumed = is_resumed or any((np.diff(one.seconds) < 0).any() for one in log.values())
    if is_resumed:
        episodes = episodes.without_seconds()
    log = {key: (one.without_seconds() if is_resumed else one).timed(episodes) for key, one in log.items()}
    is_mean = len(episodes.steps) == 0 and _EPISODES_OF_LOG in log
    return Training(env_id, log[_EPISODES_OF_LOG] if is_mean else episodes, is_mean, log, is_resumed)


def _without_frame_skip(episodes: Series, log: Mapping[str, Series]) -> Series:
    """Return episodes at the steps of the training, which its log counts, if Monitor has counted frames."""
    logged = max(log.values(), key=lambda one: len(one.steps), default=Series.of([]))
    # The log lags behind by up to a row.
    if len(episodes.steps) == 0 or len(logged.steps) < _FEWEST_ROWS:
        return episodes
    skip = frame_skip(episodes.steps[-1], logged.steps[-1])
    # Evaluations, or trainings that this log lacks, also add steps, but later. Frames are counted faster than steps.
    n_first = np.searchsorted(episodes.steps, logged.steps[-1], side="right")
    faster = _steps_per_second(episodes, n_first) / _steps_per_second(logged, len(logged.steps))
    return replace(episodes, steps=episodes.steps / skip) if faster > skip**0.5 else episodes


def _steps_per_second(series: Series, n_values: int) -> float:
    """Return the speed between the first and the last of the first ``n_values`` values; NaN if unknown."""
    steps, seconds = (np.ptp(column[:n_values]) if n_values else 0.0 for column in (series.steps, series.seconds))
    return float(steps / seconds) if seconds > 0 else np.nan


@contextmanager
def noting(problems: list[str]) -> Iterator[None]:
    """Add the error of a damaged file to the messages and skip the file."""
    try:
        yield
    except (ValueError, OSError) as error:
        problems.append(str(error))
