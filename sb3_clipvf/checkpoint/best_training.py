"""The callback that keeps the best model of a training, by the mean return of the training's own episodes."""

from __future__ import annotations

import io
import json
import logging
import math
import os
import re
from dataclasses import asdict, dataclass
from pathlib import Path

from stable_baselines3.common.callbacks import BaseCallback

from sb3_clipvf.common.messages import log
from sb3_clipvf.common.validation import check_int
from sb3_clipvf.files.atomic import TEMPORARY_FILE, atomic_write, write_error
from sb3_clipvf.files.statistics import save_statistics

_logger = log

_FORMAT = 1
_PLAIN_STATISTICS = "vecnormalize.pkl"
_VERSION_FILE = re.compile(r"\d{6,}\.(zip|pkl)")


@dataclass(frozen=True)
class _Manifest:
    """
    The content of ``<name_prefix>.json``: which pair of files is the best model. It is written after them.

    :param best_mean_reward: mean return of the training episodes in the window, in the environment's reward units
    :param num_timesteps: environment steps of the training when the model was saved
    :param n_episodes: number of episodes in that mean
    :param version: counts the saves in the folder, from 1
    :param model: path of the model's zip, relative to the manifest's folder, with ``/``
    :param vecnormalize: the same for the VecNormalize statistics, None where the environment has none
    :param format: version of this layout
    """

    best_mean_reward: float
    num_timesteps: int
    n_episodes: int
    version: int
    model: str
    vecnormalize: str | None
    format: int = _FORMAT

    def files(self) -> tuple[str, ...]:
        return (self.model,) if self.vecnormalize is None else (self.model, self.vecnormalize)

    @staticmethod
    def read(path: Path) -> _Manifest | None:
        """:return: the manifest at ``path``, None where there is none. :raises ValueError: where it is not readable."""
        try:
            text = path.read_text(encoding="utf-8")
        except FileNotFoundError:
            return None
        try:
            manifest = _Manifest(**json.loads(text))
            if manifest.format != _FORMAT or not math.isfinite(manifest.best_mean_reward):
                raise ValueError(f"format {manifest.format}, best_mean_reward {manifest.best_mean_reward}")
        except (TypeError, ValueError) as error:
            raise ValueError(
                f"`{path}` must be a manifest of SaveBestTrainingReward (format {_FORMAT}), got another content "
                f"({error}). Move the file away, or choose another folder."
            ) from error
        return manifest


def load_best_training(
    path: str | os.PathLike[str], name_prefix: str = "best_training_model"
) -> tuple[Path, Path | None]:
    """
    Find the newest complete pair of model and VecNormalize statistics that :class:`SaveBestTrainingReward` saved.

    The two files belong together even where the training was killed while it saved; the plain file names
    (``best_training_model.zip``, ``vecnormalize.pkl``) give no such promise, as no system renames two files at once.

    :param path: the callback's ``save_path``
    :param name_prefix: the callback's ``name_prefix``
    :return: the model's zip, for ``ClipPPO.load``, and the statistics for ``VecNormalize.load``, None where the
        environment had no VecNormalize
    :raises FileNotFoundError: where the folder holds no saved model, or one of its files was removed
    :raises ValueError: where the manifest is not one of this callback
    """
    folder = Path(path)
    manifest_path = folder / f"{name_prefix}.json"
    manifest = _Manifest.read(manifest_path)
    if manifest is None:
        raise FileNotFoundError(
            f"{manifest_path} was not found. `path` must be the folder that SaveBestTrainingReward saved into, and "
            "`name_prefix` its prefix; a training that ended fewer than `min_episodes` episodes saves nothing."
        )
    for name in manifest.files():
        if not (folder / name).is_file():
            raise FileNotFoundError(
                f"{folder / name} was not found, but {manifest_path} names it as the best model. Bring the file back, "
                "or remove the manifest to begin anew."
            )
    statistics = None if manifest.vecnormalize is None else folder / manifest.vecnormalize
    return folder / manifest.model, statistics


class SaveBestTrainingReward(BaseCallback):
    """
    Keep the model with the best mean return of the training episodes, with its VecNormalize statistics.

    The mean is the logged ``rollout/ep_rew_mean``: over the last ``stats_window_size`` episodes (100 unless the
    algorithm was given another number), as Monitor recorded them, before VecNormalize. It is compared at the end of
    each rollout, before the update, so the saved policy is the one that collected the last of these episodes.

    Files in ``save_path``, a folder for this callback alone (replaced atomically, one after the other):

    - ``<name_prefix>.zip`` and ``vecnormalize.pkl``: the best model and its statistics, under plain names;
    - ``<name_prefix>.json``: the best mean return, its environment step, and the names of the matching pair;
    - ``<name_prefix>_versions/``: that pair, and the one before it. :func:`load_best_training` finds the pair.

    No save is ever half done: the pair in the manifest stays complete through a kill, a full disk or a power cut.

    :param save_path: folder to save into; made where it does not exist
    :param name_prefix: first part of the file names, without a folder
    :param min_episodes: number of episodes in the window from which a mean counts, at most ``stats_window_size``.
        None (default): a full window, since a mean of few episodes is often high by luck and would then stand
        unbeaten. Where a training ends without reaching it, a warning says so.
    :param check_freq: also compare every ``check_freq`` calls, that is every ``check_freq * n_envs`` environment
        steps; None (default): at the end of rollouts only
    :param resume: start from the best mean return that ``save_path`` already holds, so that an interrupted training
        goes on; False: the first full mean replaces it
    :param verbose: 1: log each save at INFO level to the logger ``sb3_clipvf``
    :raises ValueError, TypeError: for values outside these rules
    :raises OSError: while training, where a file cannot be written; the best model so far stays as it was
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
        self._manifest: _Manifest | None = None
        self._most_episodes = 0
        self._started = False
        self._warned: set[str] = set()

    @property
    def manifest_path(self) -> Path:
        """The file that names the best model's pair."""
        return self.save_path / f"{self.name_prefix}.json"

    def _window(self) -> int:
        buffer = self.model.ep_info_buffer
        return 0 if buffer is None or buffer.maxlen is None else buffer.maxlen

    def _n_required(self) -> int:
        return self._window() if self.min_episodes is None else self.min_episodes

    def _warn_once(self, key: str, text: str) -> None:
        if key not in self._warned:
            self._warned.add(key)
            _logger.warning(text)

    def _init_callback(self) -> None:
        if self._n_required() > self._window():
            raise ValueError(
                f"`min_episodes` must be at most the model's `stats_window_size` ({self._window()}), got "
                f"{self.min_episodes}. The mean is taken over that window; pass a larger `stats_window_size` to it."
            )
        if self._started:  # learn() is called again: the best so far is known
            return
        try:
            self.save_path.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise write_error(self.save_path, error) from error
        self._manifest = _Manifest.read(self.manifest_path)
        self._started = True
        if self._manifest is None or not self.resume:
            return
        self.best_mean_reward = self._manifest.best_mean_reward
        load_best_training(self.save_path, self.name_prefix)  # raises where a file of the pair is missing
        self._publish(self._manifest)  # a kill may have come between the manifest and the plain names
        text = (
            f"{self.manifest_path} holds a best mean training return of {self.best_mean_reward:.2f}; only a better one "
            "replaces it. For a new training choose another `save_path`, or pass resume=False."
        )
        # A model at step 0 may be a new training in an old folder, which would then save nothing for long.
        _logger.log(logging.WARNING if self.model.num_timesteps == 0 else logging.INFO, text)

    def _on_step(self) -> bool:
        if self.check_freq is not None and self.n_calls % self.check_freq == 0:
            self._save_if_best()
        return True

    def _on_rollout_end(self) -> None:
        self._save_if_best()

    def _on_training_end(self) -> None:
        if not self._started:  # the RL Zoo ends callbacks also where `learn` fails before it begins
            return
        if self.best_mean_reward == -math.inf and self._most_episodes < self._n_required():
            self._warn_once(
                "never",
                f"SaveBestTrainingReward saved no model: {self._most_episodes} training episodes ended, and "
                f"{self._n_required()} are needed. Pass a smaller `min_episodes`, or train longer; if no episode is "
                "counted at all, wrap the environment in Monitor or VecMonitor.",
            )

    def _save_if_best(self) -> None:
        episodes = self.model.ep_info_buffer or ()
        returns = [float(episode["r"]) for episode in episodes]
        self._most_episodes = max(self._most_episodes, len(returns))
        if len(returns) < self._n_required():
            return
        mean_reward = math.fsum(returns) / len(returns)
        if not math.isfinite(mean_reward):
            self._warn_once(
                "finite", f"The mean training return is {mean_reward}: SaveBestTrainingReward saves no model of it."
            )
        elif mean_reward > self.best_mean_reward:
            self._save(mean_reward, len(returns))

    def _save(self, mean_reward: float, n_episodes: int) -> None:
        """Write the pair under new names, then the manifest, then the plain names. The order is the safety."""
        self.num_timesteps = self.model.num_timesteps
        version = 1 if self._manifest is None else self._manifest.version + 1
        versions = f"{self.name_prefix}_versions"
        vec_normalize = self.model.get_vec_normalize_env()
        manifest = _Manifest(
            best_mean_reward=mean_reward,
            num_timesteps=self.num_timesteps,
            n_episodes=n_episodes,
            version=version,
            model=f"{versions}/{version:06d}.zip",
            vecnormalize=None if vec_normalize is None else f"{versions}/{version:06d}.pkl",
        )
        # In memory first: torch turns an error of the disk in the middle of its zip into another, misleading one.
        buffer = io.BytesIO()
        self.model.save(buffer)
        try:
            (self.save_path / versions).mkdir(exist_ok=True)
        except OSError as error:
            raise write_error(self.save_path / versions, error) from error
        try:
            with atomic_write(self.save_path / manifest.model) as file:
                file.write(buffer.getbuffer())
            if vec_normalize is not None and manifest.vecnormalize is not None:
                save_statistics(vec_normalize, self.save_path / manifest.vecnormalize)
            with atomic_write(self.manifest_path) as file:
                file.write(json.dumps(asdict(manifest), indent=2).encode() + b"\n")
        except OSError:  # leave a full disk no fuller than it was; the manifest may be the new one already
            self._remove_all_but(_Manifest.read(self.manifest_path), self._manifest)
            raise
        previous, self._manifest = self._manifest, manifest
        self.best_mean_reward = mean_reward
        self._publish(manifest)
        if previous is not None and previous.vecnormalize is not None and vec_normalize is None:
            (self.save_path / _PLAIN_STATISTICS).unlink(missing_ok=True)  # they would not belong to this model
        self._remove_all_but(manifest, previous)
        if self.verbose >= 1:
            text = "New best mean training return %.2f over %d episodes at step %d, saved to %s"
            _logger.info(text, mean_reward, n_episodes, self.num_timesteps, self.save_path)

    def _publish(self, manifest: _Manifest) -> None:
        """Copy the pair to its plain names: copies, since a program that writes to a link would change the pair."""
        copies = {self.save_path / f"{self.name_prefix}.zip": self.save_path / manifest.model}
        if manifest.vecnormalize is not None:
            copies[self.save_path / _PLAIN_STATISTICS] = self.save_path / manifest.vecnormalize
        for plain, source in copies.items():
            content = source.read_bytes()
            with atomic_write(plain) as file:
                file.write(content)

    def _remove_all_but(self, *manifests: _Manifest | None) -> None:
        """Remove older pairs and what a killed save left; the pair before the newest stays for who reads just now."""
        kept = {Path(name).name for manifest in manifests if manifest is not None for name in manifest.files()}
        versions = self.save_path / f"{self.name_prefix}_versions"
        for path in list(versions.iterdir()):
            ours = _VERSION_FILE.fullmatch(path.name) or TEMPORARY_FILE.fullmatch(path.name)
            if ours and path.name not in kept:
                path.unlink(missing_ok=True)
