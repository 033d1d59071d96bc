"""The callback that keeps the best model of a run, by the mean return of its training episodes."""

import json
import logging
import math
import os
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sb3_clipvf.checkpoint.best_model import read_score, read_statistics, write_best_model, write_copy
from sb3_clipvf.checkpoint.rollout_callback import RolloutCallback
from sb3_clipvf.common.messages import log
from sb3_clipvf.common.validation import check_int, ensure_writable_folder
from sb3_clipvf.files.atomic import remove_unfinished
from sb3_clipvf.files.statistics import STATISTICS_FILE

_FORMAT = 1
"""Version of the layout of ``<name_prefix>.json``."""


def load_best_training(
    path: str | os.PathLike[str], name_prefix: str = "best_training_model"
) -> tuple[Path, Path | None]:
    """
    Find the model and the ``VecNormalize`` statistics that :class:`SaveBestTrainingReward` saved.

    If a kill came between the writes of the zip and of its copies, the copies are completed. If a run saves into the
    folder at the same time, the two files may be of two saves until that save ends.

    :param path: The callback's ``save_path``.
    :param name_prefix: The callback's ``name_prefix``.
    :return: The model's zip, for ``ClipPPO.load``, and the statistics, for ``VecNormalize.load``; None if the
        environment had no ``VecNormalize``.
    :raises FileNotFoundError: If the folder holds no saved model, or one of its files was removed.
    :raises ValueError: If the files are damaged, or are not those of this callback.
    """
    best = _find_best(Path(path), name_prefix)
    if best is None:
        raise FileNotFoundError(
            f"{Path(path, name_prefix)}.zip was not found. `path` must be the folder that SaveBestTrainingReward saved "
            "into, and `name_prefix` its prefix; a run with fewer than `min_episodes` episodes saves nothing."
        )
    return best.model, best.statistics


class SaveBestTrainingReward(RolloutCallback):
    """
    Keep the model with the best mean return of the training episodes, with its ``VecNormalize`` statistics.

    The mean is the logged ``rollout/ep_rew_mean``: over the last ``stats_window_size`` episodes (100 by default), as
    ``Monitor`` recorded them, before ``VecNormalize``. It is compared at the end of each rollout, before the update, so
    the saved policy is the one that collected the last of these episodes.

    Files in ``save_path``, which is a folder for this callback alone:

    - ``<name_prefix>.zip``: the best model, with its statistics and its mean return;
    - ``vecnormalize.pkl``: a copy of the statistics;
    - ``<name_prefix>.json``: the best mean return, its environment step, and the names of the two files.

    The zip alone is always consistent: it is replaced atomically, and a kill, a full disk or a power cut leaves the
    earlier best model or the new one. The copies are written after it. A process that reads the zip and a copy during a
    save may get files of two saves. If a kill came between the writes, :func:`load_best_training` completes the copies.

    :param save_path: Folder to save into; it is created if it does not exist.
    :param name_prefix: First part of the file names, without a folder.
    :param min_episodes: Number of episodes in the window from which a mean counts, at most ``stats_window_size``. None
        (default): a full window, since the mean of few episodes may be high by chance, and later ones rarely exceed it.
        A warning is logged if a run ends without reaching it.
    :param check_freq: Number of calls after which means are also compared within a rollout, that is every
        ``check_freq * n_envs`` environment steps. None (default): only at the end of rollouts.
    :param resume: Whether only a mean above that in ``save_path`` replaces the model, as a resumed run needs.
        False: the first mean that counts replaces it, unless this run saved it before ``ClipPPO.resume``.
    :param verbose: 1: log each save at INFO level to the logger ``sb3_clipvf``.
    :raises ValueError, TypeError: If an argument is outside these rules.
    :raises OSError: While training, if a file cannot be written, or statistics of an earlier model removed.
    """

    def __init__(
        self,
        save_path: str | os.PathLike[str],
        name_prefix: str = "best_training_model",
        min_episodes: int | None = None,
        check_freq: int | None = None,
        resume: bool = True,
        verbose: int = 0,
    ) -> None:
        super().__init__(verbose)
        if min_episodes is not None:
            min_episodes = check_int("min_episodes", min_episodes, 1, "None means a full window of episodes.")
        if check_freq is not None:
            check_freq = check_int("check_freq", check_freq, 1, "None means at the end of rollouts only.")
        if not name_prefix or Path(name_prefix).name != name_prefix:
            raise ValueError(
                f"`name_prefix` must be a file name without a folder, got {name_prefix!r}. `save_path` takes folders."
            )
        self.save_path = Path(save_path)
        self.name_prefix = name_prefix
        self.min_episodes = min_episodes
        self.check_freq = check_freq
        self.resume = resume
        self.best_mean_reward = -math.inf
        self._most_episodes = 0
        self._is_started = False
        self._warned: set[str] = set()

    def training_state(self) -> dict[str, Any]:
        """Return the state of this callback, for :meth:`load_training_state`."""
        return {"best_mean_reward": self.best_mean_reward, "most_episodes": self._most_episodes}

    def load_training_state(self, state: dict[str, Any]) -> None:
        """Restore the state of the callback in the interrupted training, from :meth:`training_state`."""
        self._most_episodes = state["most_episodes"]
        if not self.resume and state["best_mean_reward"] > -math.inf:
            # The training has saved it. Since the checkpoint, it may have saved a better one.
            best = _find_best(self.save_path, self.name_prefix)
            self.best_mean_reward = -math.inf if best is None else best.mean_reward

    def _init_callback(self) -> None:
        if self._n_required() > self._window():
            raise ValueError(
                f"`min_episodes` must be at most the model's `stats_window_size` ({self._window()}), got "
                f"{self.min_episodes}. The mean is taken over that window; pass a larger `stats_window_size` to it."
            )
        if self._is_started:  # an earlier learn() has read the best so far
            return
        ensure_writable_folder("save_path", self.save_path, "Choose another one.")
        remove_unfinished(self.save_path, rf"{re.escape(self.name_prefix)}\.(zip|json)|{re.escape(STATISTICS_FILE)}")
        best = _find_best(self.save_path, self.name_prefix) if self.resume else None
        self._is_started = True
        if best is None:
            return
        self.best_mean_reward = best.mean_reward
        # At step 0, this may be a new run in an old folder, which would save nothing for a long time.
        text = (
            f"{self.save_path} holds a best mean training return of {self.best_mean_reward:.2f}; only a better one "
            "replaces it. For a new run, choose another `save_path`, or pass resume=False."
        )
        log.log(logging.WARNING if self.model.num_timesteps == 0 else logging.INFO, text)

    def _on_step(self) -> bool:
        if self.check_freq is not None and self.n_calls % self.check_freq == 0:
            self._save_if_best()
        return True

    def _on_rollout_end(self) -> None:
        self._save_if_best()

    def _on_training_end(self) -> None:
        if not self._is_started:  # the RL Zoo calls this even if `learn` failed before it began
            return
        if self.best_mean_reward == -math.inf and self._most_episodes < self._n_required():
            self._warn_once(
                f"SaveBestTrainingReward saved no model: {self._most_episodes} training episodes ended, and "
                f"{self._n_required()} are needed. Pass a smaller `min_episodes`, or train longer; if no episode is "
                "counted at all, wrap the environment in Monitor or VecMonitor."
            )

    def _window(self) -> int:
        return getattr(self.model.ep_info_buffer, "maxlen", None) or 0

    def _n_required(self) -> int:
        return self._window() if self.min_episodes is None else self.min_episodes

    def _save_if_best(self) -> None:
        returns = [float(episode["r"]) for episode in self.model.ep_info_buffer or ()]
        self._most_episodes = max(self._most_episodes, len(returns))
        if len(returns) < self._n_required():
            return
        mean_reward = math.fsum(returns) / len(returns)
        if not math.isfinite(mean_reward):
            self._warn_once(f"The mean training return is {mean_reward}: its model is not saved. Correct the rewards.")
        elif mean_reward > self.best_mean_reward:
            self._save(mean_reward, len(returns))

    def _save(self, mean_reward: float, n_episodes: int) -> None:
        score = {"mean_reward": mean_reward, "num_timesteps": self.model.num_timesteps, "n_episodes": n_episodes}
        model = self.save_path / f"{self.name_prefix}.zip"
        statistics = write_best_model(model, self.model, score)
        self.best_mean_reward = mean_reward
        _write_copies(model, score, statistics)
        if self.verbose >= 1:
            text = "New best mean training return %.2f over %d episodes at step %d, saved to %s"
            log.info(text, mean_reward, n_episodes, self.model.num_timesteps, self.save_path)

    def _warn_once(self, text: str) -> None:
        if text not in self._warned:
            self._warned.add(text)
            log.warning(text)


@dataclass(frozen=True)
class _Best:
    mean_reward: float
    model: Path
    statistics: Path | None


def _find_best(folder: Path, name_prefix: str) -> _Best | None:
    """Return the best model of a folder, and complete the copies beside its zip; None if there is no model."""
    model = folder / f"{name_prefix}.zip"
    score = _read_score(model)
    if score is None:
        return _read_manifest(folder / f"{name_prefix}.json")
    while True:
        best = _write_copies(model, score, read_statistics(model))
        # A run in progress may have replaced the zip, and its copies, before these older copies were written.
        before, score = score, _read_score(model)
        if score is None or score == before:
            return best


def _read_score(model: Path) -> dict[str, Any] | None:
    try:
        return read_score(model)
    except ValueError as error:
        raise ValueError(
            f"{model} must be a model that SaveBestTrainingReward saved, but {error}. Move it away, or choose another "
            "folder."
        ) from error


def _write_copies(model: Path, score: dict[str, Any], statistics: bytes | None) -> _Best:
    """Write the statistics and the manifest of a best model beside its zip."""
    content = {
        "best_mean_reward": score["mean_reward"],
        **{name: value for name, value in score.items() if name != "mean_reward"},
        "model": model.name,
        "vecnormalize": None if statistics is None else STATISTICS_FILE,
        "format": _FORMAT,
    }
    write_copy(model.with_name(STATISTICS_FILE), statistics)
    write_copy(model.with_suffix(".json"), json.dumps(content, indent=2).encode() + b"\n")
    return _Best(score["mean_reward"], model, None if statistics is None else model.with_name(STATISTICS_FILE))


def _read_manifest(path: Path) -> _Best | None:
    """Read a manifest of version 0.1.0, which names two files: its models do not hold their statistics."""
    if not path.exists():
        return None
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        statistics = content["vecnormalize"] and path.parent / content["vecnormalize"]
        best = _Best(float(content["best_mean_reward"]), path.parent / content["model"], statistics)
        if content["format"] != _FORMAT or not math.isfinite(best.mean_reward):
            raise ValueError(f"format {content['format']}, best_mean_reward {best.mean_reward}")
    except (KeyError, TypeError, ValueError) as error:
        raise ValueError(
            f"`{path}` must be a manifest of SaveBestTrainingReward (format {_FORMAT}), got different content "
            f"({error}). Move the file away, or choose another folder."
        ) from error
    for file in (best.model, best.statistics):
        if file is not None and not file.is_file():
            raise FileNotFoundError(
                f"{file} was not found, but {path} names it as the best model. Restore the file, or remove the "
                "manifest to start again."
            )
    return best
