"""Evaluations that do not affect training, and the progress bar over all processes."""

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
from stable_baselines3.common.callbacks import BaseCallback, CallbackList, EvalCallback, ProgressBarCallback
from stable_baselines3.common.evaluation import evaluate_policy
from stable_baselines3.common.vec_env import sync_envs_normalization, unwrap_vec_normalize

from sb3_clipvf.checkpoint.best_model import read_score, read_statistics, write_best_model, write_copy
from sb3_clipvf.checkpoint.random_state import global_states, set_global_states, set_space_states, space_states
from sb3_clipvf.common.messages import log
from sb3_clipvf.envs.episode_ends import check_end
from sb3_clipvf.envs.layers import stepped_objects
from sb3_clipvf.files.atomic import atomic_write, remove_unfinished

BEST_MODEL = "best_model.zip"
BEST_STATISTICS = "best_vecnormalize.pkl"


class IsolatedEvalCallback(EvalCallback):
    """
    SB3's ``EvalCallback``, whose evaluations do not affect training.

    Each evaluation starts from the current random states: Python's, NumPy's, torch's, and those of the model's
    spaces. They are restored at its end, with the policy's mode and its gSDE noise. The statistics of ``VecNormalize``
    are those of training at that moment, and are not updated. Rewards are not normalised.

    The best model is ``best_model.zip`` in ``best_model_save_path``, with its statistics in the same zip. The zip is
    replaced atomically; then ``best_vecnormalize.pkl``, a copy of the statistics for ``VecNormalize.load``, is written.
    A process that reads both during a save may get files of two saves. A resumed run replaces the model only by one
    that is at least as good.

    If an environment reports ``is_success`` in some episodes only, the others count as failures.

    Arguments are those of ``EvalCallback``.

    :raises ValueError: At the start of training, if ``eval_env`` shares an environment with the training, or if only
        one of the two has a ``VecNormalize``; in an evaluation, if a wrapper outside of ``Monitor`` ends an episode.
    """

    def _init_callback(self) -> None:
        training, evaluation = self.training_env, self.eval_env
        # The dict keeps the objects alive: a dead object's id may be used again.
        used = {id(item): item for item in stepped_objects(training)}
        shared = next((item for item in stepped_objects(evaluation) if id(item) in used), None)
        if shared is not None:
            raise ValueError(
                f"`eval_env` must not share environments with the training, got the same {type(shared).__name__}: an "
                "evaluation would end their running episodes. Build separate ones."
            )
        is_normalized = unwrap_vec_normalize(evaluation) is not None
        if is_normalized != (self.model.get_vec_normalize_env() is not None):
            what, hint = "no VecNormalize", "Wrap it: VecNormalize(eval_env, training=False, norm_reward=False)."
            if is_normalized:
                what, hint = "a VecNormalize", "Pass it without one, or also wrap the training environments."
            raise ValueError(
                "`eval_env` must have a VecNormalize if and only if the training environments have one, got "
                f"{what}. {hint}"
            )
        super()._init_callback()
        log_folder = None if self.log_path is None else Path(self.log_path).parent
        for folder in (self.best_model_save_path, log_folder):
            if folder is not None:
                remove_unfinished(Path(folder), r"evaluations\.npz|best_model\.zip|best_vecnormalize\.pkl")

    def _on_step(self) -> bool:
        if self.eval_freq <= 0 or self.n_calls % self.eval_freq != 0:
            return True
        with self._isolated():
            returns, lengths = self._evaluate()
        if self.log_path is not None:
            self._write_history(returns, lengths)
        self.last_mean_reward = float(np.mean(returns))
        self._report(returns, lengths)
        continues = True
        if self.last_mean_reward > self.best_mean_reward:
            self._print("New best mean reward!")
            if self.best_model_save_path is not None:
                self._save_best(Path(self.best_model_save_path))
            self.best_mean_reward = self.last_mean_reward
            if self.callback_on_new_best is not None:
                continues = self.callback_on_new_best.on_step()
        if self.callback is not None:
            continues = continues and self._on_event()
        return continues

    # ------------------------------------------------------------------ evaluating

    @contextmanager
    def _isolated(self) -> Iterator[None]:
        """Freeze the statistics of ``eval_env``, and restore all training state that an evaluation changes."""
        policy, normalizer = self.model.policy, unwrap_vec_normalize(self.eval_env)
        random_states, drawn, was_training = global_states(), space_states(self.model), policy.training
        distribution = getattr(policy, "action_dist", None)  # with gSDE, it holds the rollout's noise
        noise = {} if distribution is None else dict(vars(distribution))
        if normalizer is not None:
            modes = normalizer.training, normalizer.norm_reward
            normalizer.training = normalizer.norm_reward = False
        try:
            yield
        finally:
            if normalizer is not None:
                normalizer.training, normalizer.norm_reward = modes
            set_global_states(random_states)
            set_space_states(self.model, drawn)
            policy.set_training_mode(was_training)
            if distribution is not None:
                vars(distribution).clear()
                vars(distribution).update(noise)

    def _evaluate(self) -> tuple[list[float], list[int]]:
        if self.model.get_vec_normalize_env() is not None:
            sync_envs_normalization(self.training_env, self.eval_env)
        reports_success = bool(self._is_success_buffer)
        self._is_success_buffer = []
        returns, lengths = evaluate_policy(
            self.model,
            self.eval_env,
            n_eval_episodes=self.n_eval_episodes,
            render=self.render,
            deterministic=self.deterministic,
            return_episode_rewards=True,
            warn=self.warn,
            callback=self._log_success_callback,
        )
        # An environment may report `is_success` only for successes, so episodes before the first one have none.
        if reports_success or any(success is not None for success in self._is_success_buffer):
            self._is_success_buffer = [False if success is None else success for success in self._is_success_buffer]
        else:
            self._is_success_buffer = []
        return list(returns), list(lengths)  # type: ignore[arg-type]

    def _log_success_callback(self, locals_: dict[str, Any], globals_: dict[str, Any]) -> None:
        info = locals_["info"]
        check_end(locals_, globals_, "eval_env")
        # The condition under which `evaluate_policy` counts an episode.
        if locals_["done"] and (not locals_["is_monitor_wrapped"] or "episode" in info):
            self._is_success_buffer.append(info.get("is_success"))

    # ------------------------------------------------------------------ reporting

    def _write_history(self, returns: list[float], lengths: list[int]) -> None:
        self.evaluations_timesteps.append(self.num_timesteps)
        self.evaluations_results.append(returns)
        self.evaluations_length.append(lengths)
        successes = {}
        if self._is_success_buffer:
            earlier = self.evaluations_results[len(self.evaluations_successes) : -1]
            self.evaluations_successes += [[False] * len(row) for row in earlier]
            self.evaluations_successes.append(self._is_success_buffer)
            successes = {"successes": _table(self.evaluations_successes)}
        with atomic_write(f"{self.log_path}.npz") as file:
            np.savez(
                file,
                timesteps=self.evaluations_timesteps,
                results=_table(self.evaluations_results),
                ep_lengths=_table(self.evaluations_length),
                **successes,  # type: ignore[arg-type]
            )

    def _report(self, returns: list[float], lengths: list[int]) -> None:
        # SB3's lines and names.
        mean, std = np.mean(returns), np.std(returns)
        self._print(f"Eval num_timesteps={self.num_timesteps}, episode_reward={mean:.2f} +/- {std:.2f}")
        self._print(f"Episode length: {np.mean(lengths):.2f} +/- {np.std(lengths):.2f}")
        self.logger.record("eval/mean_reward", self.last_mean_reward)
        self.logger.record("eval/mean_ep_length", np.mean(lengths))
        if self._is_success_buffer:
            success_rate = np.mean(self._is_success_buffer)
            self._print(f"Success rate: {100 * success_rate:.2f}%")
            self.logger.record("eval/success_rate", success_rate)
        self.logger.record("time/total_timesteps", self.num_timesteps, exclude="tensorboard")
        self.logger.dump(self.num_timesteps)

    def _print(self, line: str) -> None:
        if self.verbose >= 1:
            sys.stdout.write(f"{line}\n")

    # ------------------------------------------------------------------ the best model

    def _save_best(self, folder: Path) -> None:
        path = folder / BEST_MODEL
        score = {
            "mean_reward": self.last_mean_reward,
            "num_timesteps": self.num_timesteps,
            "training": getattr(self.model, "_training_id", None),
        }
        try:
            earlier = read_score(path) or {}
        except ValueError as error:
            log.warning("%s is replaced: %s", path, error)
            earlier = {}
        # A killed run may have evaluated after its last checkpoint, which the resumed run does not know.
        is_of_this_training = earlier.get("training") is not None and earlier["training"] == score["training"]
        if is_of_this_training and earlier["mean_reward"] > self.last_mean_reward:
            text = "%s is kept: its mean return is %s, of step %s"
            log.info(text, path, earlier["mean_reward"], earlier.get("num_timesteps"))
            statistics = read_statistics(path)
        else:
            statistics = write_best_model(path, self.model, score)
        write_copy(folder / BEST_STATISTICS, statistics)


class WholeProgressBar(ProgressBarCallback):
    """SB3's progress bar, over the steps of all processes; it stops at its total, which the last rollout may exceed."""

    def _on_step(self) -> bool:
        left = max(self.locals["total_timesteps"] - self.num_timesteps, 0)
        self.pbar.update((self.pbar.total or 0) - left - self.pbar.n)
        return True


def count_all_steps(callback: BaseCallback) -> None:
    """Convert SB3's progress bars, also those in lists, to :class:`WholeProgressBar`."""
    if type(callback) is CallbackList:
        for child in callback.callbacks:
            count_all_steps(child)
    elif type(callback) is ProgressBarCallback:
        callback.__class__ = WholeProgressBar  # in-place: the RL Zoo closes the bar that it has created


def _table(rows: list[list[Any]]) -> np.ndarray:
    """Return an array of evaluations. Shorter rows end in NaN, since ``n_eval_episodes`` may change."""
    width = max(map(len, rows))
    return np.array([row if len(row) == width else [*row, *[np.nan] * (width - len(row))] for row in rows])
