"""The callback that writes checkpoints during training."""

import contextlib
import inspect
import logging
import math
import os
import time
import uuid
from collections.abc import Iterable
from pathlib import Path
from typing import Any, cast

import numpy as np
from stable_baselines3.common.callbacks import BaseCallback

from sb3_clipvf.checkpoint.callback_state import without_repeats
from sb3_clipvf.checkpoint.errors import (
    DamagedCheckpointError,
    FolderInUseError,
    NotACheckpointError,
    UnsavableModelError,
)
from sb3_clipvf.checkpoint.file import (
    CheckpointManifest,
    checkpoint_paths,
    file_bytes,
    read_manifest,
    sorted_checkpoints,
)
from sb3_clipvf.checkpoint.protocol import ResumableModel
from sb3_clipvf.checkpoint.random_state import generator_from, generator_state
from sb3_clipvf.checkpoint.resume import draw_seed, finish_resume, reset_environments
from sb3_clipvf.checkpoint.rollout_callback import RolloutCallback
from sb3_clipvf.checkpoint.signals import SignalWatch, is_learning
from sb3_clipvf.checkpoint.training_state import TrainingState, training_state
from sb3_clipvf.checkpoint.vec_env_state import describe_vec_env, vec_env_state
from sb3_clipvf.common.messages import log
from sb3_clipvf.common.validation import check_bool, check_choice, check_int, ensure_writable_folder
from sb3_clipvf.distributed import current_group, is_ended_by_nonfinite
from sb3_clipvf.files.atomic import UnsyncedFolderError, atomic_write, remove_unfinished

BEST_NAME = "best_checkpoint.zip"

COPY_SHARE = 0.01
"""Largest share of a run's time for copies of its state in memory. A signal writes the latest copy."""

_NO_SIGNALS = (
    "`on_signal` of TrainingCheckpoint has no effect: learn() runs outside of the main thread, or the process ignores "
    "SIGTERM and SIGINT. These will write no last checkpoint. Pass on_signal=False if you do not need it."
)


class TrainingCheckpoint(RolloutCallback):
    """
    Write checkpoints from which ``ClipPPO.resume`` continues as if the run had never been interrupted.

    A checkpoint holds the whole training state between two rollouts in one file, replaced atomically:
    ``checkpoint_<timesteps>.zip`` in the folder. It is also an SB3 model, for ``ClipPPO.load`` and the Zoo.

    It is written after each update that reaches or passes a multiple of ``every_timesteps``, and at the end of
    training. With the first one, the log lists what a resumed run will not repeat exactly. Put this callback first in a
    list, so that the checkpoint precedes what others do at the start of a rollout.

    :param every_timesteps: Environment steps, over all environments, between two checkpoints.
    :param path: Folder for the checkpoints of one run; it is created if it does not exist.
    :param keep_last: Number of newest checkpoints to keep.
    :param keep_best: Whether to keep the checkpoint with the best mean return of the training episodes, over a full
        window of ``stats_window_size`` of them, as ``best_checkpoint.zip``.
    :param reset_envs: Whether all environments begin new episodes after each checkpoint, with seeds from the
        checkpoint, in this run and in the resumed one. Use it for environments whose state cannot be saved, but
        which a seeded reset determines: their resume is then exact. Running episodes are cut off. One more checkpoint
        is written at the start.
    :param on_error: What to do if a checkpoint cannot be written. "warn": log an error and continue training.
        "raise": end it. Earlier checkpoints are kept in both cases. It also applies if an attribute of the model cannot
        be written, or if another run has written checkpoints into the folder since the start: its files stay. An old
        checkpoint that cannot be removed never ends training: a warning is logged once, and the removal is tried again
        after each new checkpoint.
    :param on_signal: Whether SIGTERM and SIGINT write a last checkpoint at once and end the process, with exit code 143
        or 130. It is the latest copy in memory, of the last update or a slightly earlier one. Copies take at most 1 %
        of the time. With ``reset_envs`` and environments whose state cannot be saved, there are no copies: the last
        regular checkpoint remains. Outside of the main thread, Python handles no signals: a warning is logged.
    :param verbose: 1: log each checkpoint at INFO level to the logger ``sb3_clipvf``.
    :raises ValueError, TypeError: If an argument is outside these rules, or if the folder holds checkpoints of another
        run when a new one starts.
    :raises OSError: At the start, if the folder cannot be written to; later, with ``on_error="raise"``.
    """

    differences_level = logging.WARNING
    """Logging level of the messages about what a resumed run will not repeat exactly."""

    def __init__(
        self,
        every_timesteps: int,
        path: str | os.PathLike[str],
        *,
        keep_last: int = 3,
        keep_best: bool = True,
        reset_envs: bool = False,
        on_error: str = "warn",
        on_signal: bool = True,
        verbose: int = 0,
    ) -> None:
        super().__init__(verbose)
        self.every_timesteps = check_int("every_timesteps", every_timesteps, 1, "Pass a number of environment steps.")
        self.path = Path(path)
        self.keep_last = check_int("keep_last", keep_last, 1, "The newest checkpoint must stay.")
        for name, value in (("keep_best", keep_best), ("reset_envs", reset_envs), ("on_signal", on_signal)):
            check_bool(name, value)
        check_choice("on_error", on_error, ("warn", "raise"), "'warn' continues the training.")
        self.keep_best = keep_best
        self.reset_envs = reset_envs
        self.on_error = on_error
        self.on_signal = on_signal
        self.best_mean_return = -math.inf
        self._generator: np.random.Generator | None = None
        self._is_reset = False
        self._is_exact = True
        self._multiples = 0
        self._serial = 0
        self._kept: list[Path] = []
        self._saved_start: int | None = None  # step at which training started, if its checkpoint is in the folder
        self._build: dict[str, Any] = {}
        self._root: BaseCallback = self
        self._watch: SignalWatch | None = None
        self._unwritten: TrainingState | None = None
        self._next_copy = 0.0
        self._logged: set[str] = set()

    # ------------------------------------------------------------------ state of this callback in a checkpoint

    def training_state(self) -> dict[str, Any]:
        """Return the state of this callback, for :meth:`load_training_state`."""
        return {
            "generator": generator_state(self._generator),
            "every_timesteps": self.every_timesteps,
            "reset_envs": self.reset_envs,
            "is_reset": self._is_reset,
        }

    def load_training_state(self, state: dict[str, Any]) -> None:
        """Restore the state of the callback that wrote a checkpoint, from :meth:`training_state`."""
        ours = {"every_timesteps": self.every_timesteps, "reset_envs": self.reset_envs}
        changed = [name for name, value in ours.items() if state[name] != value]
        if changed and (self.reset_envs or state["reset_envs"]):
            log.warning(
                "Environments are reset at different times than in the interrupted run: %s of TrainingCheckpoint "
                "differ from the checkpoint's. Pass the same values for an exact resume.",
                " and ".join(changed),
            )
        generator = generator_from(state["generator"]) if self.reset_envs else None
        if generator is not None:
            if state["is_reset"]:
                draw_seed(generator)  # `resume` has used this seed
            self._generator = generator
            self._multiples = self._model.num_timesteps // self.every_timesteps  # there is a checkpoint at step 0

    # ------------------------------------------------------------------ events

    def _init_callback(self) -> None:
        if not isinstance(self.model, ResumableModel):
            raise TypeError(
                f"`model` must be a ClipPPO, got {type(self.model).__name__}, which cannot be resumed. Use SB3's "
                "CheckpointCallback for it."
            )
        ensure_writable_folder("path", self.path, "Choose another one.")

    def _on_training_start(self) -> None:
        model = self._model
        if self.reset_envs and current_group().size > 1:
            raise ValueError(
                "`reset_envs` must be False in a run on several processes, got True. Use environments whose state "
                "can be saved for an exact resume."
            )
        model._checkpoint_folder = self.path
        self._root = self.locals["callback"]
        self._build = describe_vec_env(self.training_env)
        self._is_exact = not vec_env_state(self.training_env)[1]
        self._multiples = model.num_timesteps // self.every_timesteps
        if model._training_id is None:
            model._training_id = uuid.uuid4().hex
        self._scan_folder()
        if self.reset_envs and self._generator is None:
            # A checkpoint at step 0, so that an exact one exists whenever the process ends.
            self._multiples = -1 if model.num_timesteps == 0 else self._multiples
            self._generator = np.random.default_rng(model.seed)
        if self.on_signal:
            watch = SignalWatch(model, self.save_last)
            self._watch = watch if watch.start() else None
            if self._watch is None and _NO_SIGNALS not in self._logged:
                self._logged.add(_NO_SIGNALS)
                log.warning(_NO_SIGNALS)

    def _on_rollout_start(self) -> None:
        # Nothing has been drawn for this rollout yet.
        multiples = self._model.num_timesteps // self.every_timesteps
        is_due = multiples > self._multiples
        self._multiples = multiples
        if is_due:
            self._save_and_reset()
        elif self._watch is not None and (self._is_exact or not self.reset_envs) and not self._is_at_saved_start():
            self._copy_if_time_allows()

    def _on_step(self) -> bool:
        return True

    def _on_training_end(self) -> None:
        try:
            # The RL Zoo calls this a second time, even if `learn` failed or there is no model.
            if "model" in vars(self) and is_learning(self._model, inspect.currentframe()):
                finish_resume(self._model, self._root)  # if nothing remained to be trained
                self._save_and_reset()
        finally:
            # Not before the write: a signal in it would end the process, and the copy in memory would be lost.
            if self._watch is not None:
                self._watch.stop()
                self._watch = None
            self._unwritten = None

    # ------------------------------------------------------------------ saving

    @property
    def _model(self) -> ResumableModel:
        return cast(ResumableModel, self.model)

    def _state(self, *, is_reset: bool) -> TrainingState | None:
        """Return the training state; None if it cannot be stored, and training continues all the same."""
        self._is_reset = is_reset
        generator = generator_state(self._generator) if is_reset else None
        try:
            return training_state(self._model, self._root, self._build, generator)
        except UnsavableModelError as error:
            if self.on_error == "raise":
                raise
            if str(error) not in self._logged:
                self._logged.add(str(error))
                log.error("Checkpoints from step %d on are not written: %s", self._model.num_timesteps, error)
            return None

    def _copy_if_time_allows(self) -> None:
        # A resume may start at any update, so not every update needs a copy.
        started = time.perf_counter()
        if started >= self._next_copy:
            self._unwritten = self._state(is_reset=False) or self._unwritten
            now = time.perf_counter()
            self._next_copy = now + (now - started) / COPY_SHARE

    def _is_at_saved_start(self) -> bool:
        """Return whether nothing was trained since the checkpoint at which training started."""
        return self._model.num_timesteps == self._saved_start

    def _save_and_reset(self) -> None:
        # The callbacks of this run may lack some whose states are in that file.
        if self._is_at_saved_start():
            return
        state = self._state(is_reset=self.reset_envs)
        if state is not None:
            self._unwritten = state
            self._write(state)
        if self._generator is not None:
            reset_environments(self._model, self.training_env, self._generator)

    @property
    def newest(self) -> Path | None:
        """Newest checkpoint of this run, or None."""
        return self._kept[-1] if self._kept else None

    def save_last(self, reason: str, *, at_start: bool = True) -> None:
        """
        Write the copy in memory unless a file holds it, and log what ends the training.

        :param reason: What ends the training.
        :param at_start: Whether to write a copy from before the first step.
        :raises OSError: If the copy cannot be written, with ``on_error="raise"``.
        """
        copy = self._unwritten
        # After a NonFiniteError, also in another process, the copy may hold non-finite weights.
        if copy is not None and (at_start or copy.num_timesteps > 0) and not is_ended_by_nonfinite():
            self._write(copy)
        log.warning("%s ends the training. Its last checkpoint: %s.", reason, self.newest or "none")

    def _write(self, state: TrainingState) -> None:
        with contextlib.nullcontext() if self._watch is None else self._watch.deferring():
            self._write_file(state)

    def _write_file(self, state: TrainingState) -> None:
        self._log_differences(state)
        path = self.path / f"checkpoint_{state.num_timesteps}.zip"
        try:
            content = file_bytes(state, self._serial + 1)
            # Not the files that this run has written and keeps: `keep_last` may be large.
            self._own_manifests(found for found in checkpoint_paths(self.path) if found not in self._kept[1:])
            unsynced = _put(path, content)
        except OSError as error:
            self._report_error(f"The checkpoint of step {state.num_timesteps}", error)
            return
        self._serial += 1
        self._unwritten = None
        self._kept = [*(kept for kept in self._kept if kept != path), path]
        best_error = None
        if self.keep_best and state.mean_return is not None and state.mean_return > self.best_mean_return:
            try:
                best_unsynced = _put(self.path / BEST_NAME, content)
                unsynced = unsynced or best_unsynced
                self.best_mean_return = state.mean_return
            except OSError as error:
                best_error = error
        if unsynced is None:
            # Also without a new best file: old ones may be what fills the disk.
            self._remove_old()
            if self.verbose >= 1:
                size = len(content) // 1024
                log.info("Checkpoint of step %d written to %s (%d KiB)", state.num_timesteps, path, size)
        else:
            self._report_error(f"The checkpoint of step {state.num_timesteps}", unsynced)
        if best_error is not None:
            self._report_error(f"{BEST_NAME} of step {state.num_timesteps}", best_error)

    def _report_error(self, name: str, error: OSError) -> None:
        if self.on_error == "raise":
            raise error
        what = "may be lost" if isinstance(error, UnsyncedFolderError) else "was not written"
        log.error("%s %s: %s", name, what, error)

    def _remove_old(self) -> None:
        """Remove all but the newest checkpoints. One that cannot be removed is tried again after the next."""
        old, newest = self._kept[: -self.keep_last], self._kept[-self.keep_last :]
        failed = []
        for path in old:
            try:
                path.unlink(missing_ok=True)
            except OSError as error:
                failed.append(path)
                text = "Old checkpoints cannot be removed: %s. This is tried again after each new checkpoint."
                if text not in self._logged:
                    self._logged.add(text)
                    log.warning(text, error)
        self._kept = [*failed, *newest]

    def _log_differences(self, state: TrainingState) -> None:
        for difference in without_repeats(state.differences):
            if difference not in self._logged:
                self._logged.add(difference)
                text = "A resumed run will differ from an uninterrupted one: %s"
                log.log(self.differences_level, text, difference)

    def _scan_folder(self) -> None:
        """Find earlier checkpoints, continue their serial numbers, and remove temporary files of killed writes."""
        best = self.path / BEST_NAME
        manifests = self._own_manifests(sorted_checkpoints(self.path))
        remove_unfinished(self.path, r"(best_)?checkpoint_?\d*\.zip|nonfinite_\d+(_process\d+)?\.npz")
        mean_return = manifests.pop(best).mean_return if best in manifests else None
        steps = self._model.num_timesteps
        start = manifests.get(self.path / f"checkpoint_{steps}.zip")
        # With another end, the file of this run differs from it.
        is_saved = start is not None and start.total_timesteps == self._model._total_timesteps
        self._saved_start = steps if is_saved else None
        if mean_return is not None:
            self.best_mean_return = max(self.best_mean_return, mean_return)
        self._kept = list(manifests)
        # `resume` has logged the differences of earlier checkpoints.
        self._logged.update(text for found in manifests.values() for text in found.differences)
        self._serial = max((found.serial for found in manifests.values()), default=0)

    def _own_manifests(self, paths: Iterable[Path]) -> dict[Path, CheckpointManifest]:
        """Return the manifests of checkpoints and of the best one; raise if one of them is of another run."""
        manifests = {}
        for path in [*paths, self.path / BEST_NAME]:
            # Unreadable files stay: resume() reports them.
            with contextlib.suppress(DamagedCheckpointError, NotACheckpointError, OSError):
                manifests[path] = read_manifest(path)
        others = [path.name for path, found in manifests.items() if found.training != self._model._training_id]
        if others:
            raise FolderInUseError(
                f"`path` must be a folder without checkpoints of another run, got {self.path} with "
                f"{', '.join(others)}. Continue that run with ClipPPO.resume, or choose another folder."
            )
        return manifests


def _put(path: Path, content: bytes) -> UnsyncedFolderError | None:
    """Write a file. If only its folder could not be synced, return the error: the file counts as written."""
    try:
        with atomic_write(path) as file:
            file.write(content)
    except UnsyncedFolderError as error:
        return error
    return None
