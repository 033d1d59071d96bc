"""
Whether a run's callbacks may read the actions, values or log-probabilities of a step.

If none may, kernels write steps straight into the buffer.
"""

from stable_baselines3.common.callbacks import BaseCallback, CallbackList, ConvertCallback

_CALLBACKS = {
    "stable_baselines3.common.callbacks": (
        "CheckpointCallback EvalCallback EveryNTimesteps LogEveryNTimesteps ProgressBarCallback "
        "StopTrainingOnMaxEpisodes StopTrainingOnNoModelImprovement StopTrainingOnRewardThreshold"
    ),
    "rl_zoo3.callbacks": "RawStatisticsCallback SaveVecNormalizeCallback TrialEvalCallback",
    "sb3_clipvf.callbacks": "IsolatedEvalCallback WholeProgressBar",
    "sb3_clipvf.checkpoint.best_training": "SaveBestTrainingReward",
    "sb3_clipvf.checkpoint.training_checkpoint": "TrainingCheckpoint",
}
"""Callbacks that read no actions, values or log-probabilities of a step, by module."""


def may_read_actions(callback: BaseCallback) -> bool:
    """Return whether a callback may read actions, values or log-probabilities of a step, as any but known ones may."""
    if type(callback) is CallbackList:
        return any(map(may_read_actions, callback.callbacks))
    if type(callback) is ConvertCallback:
        return callback.callback is not None
    cls = type(callback)
    is_known = cls.__qualname__ in _CALLBACKS.get(cls.__module__, "").split()
    if not is_known or any(name in vars(callback) for name in ("on_step", "_on_step", "update_locals")):
        return True
    children = (vars(callback).get(name) for name in ("callback", "callback_on_new_best"))
    return any(may_read_actions(child) for child in children if child is not None)


def is_noop(callback: BaseCallback) -> bool:
    """Return whether the callback is a no-op (SB3's wrapper around ``None``, or a list of these)."""
    if type(callback) is CallbackList:
        return all(is_noop(child) for child in callback.callbacks)
    return type(callback) is ConvertCallback and callback.callback is None
