"""Which attributes of environments, wrappers and callbacks are state, by the full name of the class that has them."""

from collections.abc import Collection, Iterable
from typing import Any

from sb3_clipvf.files.allowlist import full_name

_TOY = "gymnasium.envs.toy_text"
_CLASSIC = "gymnasium.envs.classic_control"
_WRAPPERS = "gymnasium.wrappers"
_VEC = "stable_baselines3.common.vec_env"
_ATARI = "stable_baselines3.common.atari_wrappers"
_CALLBACKS = "stable_baselines3.common.callbacks"
_ZOO = "rl_zoo3.wrappers"
_NORMALIZE = (
    "norm_obs norm_reward norm_obs_keys clip_obs clip_reward gamma epsilon training returns old_obs old_reward "
    "ret_rms.mean ret_rms.var ret_rms.count"
)

ATTRIBUTES = {
    # Environments. Those on MuJoCo are in mujoco_state.
    f"{_CLASSIC}.cartpole.CartPoleEnv": "state steps_beyond_terminated",
    f"{_CLASSIC}.pendulum.PendulumEnv": "state last_u",
    f"{_CLASSIC}.mountain_car.MountainCarEnv": "state",
    f"{_CLASSIC}.continuous_mountain_car.Continuous_MountainCarEnv": "state",
    f"{_CLASSIC}.acrobot.AcrobotEnv": "state",
    f"{_TOY}.frozen_lake.FrozenLakeEnv": "s lastaction",
    f"{_TOY}.cliffwalking.CliffWalkingEnv": "s lastaction",
    f"{_TOY}.taxi.TaxiEnv": "s lastaction fickle_step taxi_orientation",
    f"{_TOY}.blackjack.BlackjackEnv": "dealer player",
    # Wrappers of one environment
    f"{_WRAPPERS}.common.OrderEnforcing": "_has_reset",
    f"{_WRAPPERS}.common.TimeLimit": "_elapsed_steps",
    "rl_zoo3.gym_patches.PatchedTimeLimit": "_elapsed_steps",  # the Zoo replaces Gymnasium's by it
    f"{_WRAPPERS}.common.Autoreset": "autoreset",
    f"{_WRAPPERS}.common.RecordEpisodeStatistics": (
        "episode_count episode_returns episode_lengths time_queue return_queue length_queue"
    ),
    f"{_WRAPPERS}.stateful_action.StickyAction": "last_action is_sticky_actions num_repeats repeats_taken",
    f"{_WRAPPERS}.stateful_observation.DelayObservation": "observation_queue",
    f"{_WRAPPERS}.stateful_observation.TimeAwareObservation": "timesteps",
    f"{_WRAPPERS}.stateful_observation.FrameStackObservation": "obs_queue padding_value",
    f"{_WRAPPERS}.stateful_observation.MaxAndSkipObservation": "_obs_buffer",
    f"{_WRAPPERS}.stateful_observation.NormalizeObservation": "obs_rms.mean obs_rms.var obs_rms.count",
    f"{_WRAPPERS}.stateful_reward.NormalizeReward": "return_rms.mean return_rms.var return_rms.count discounted_reward",
    "stable_baselines3.common.monitor.Monitor": "rewards needs_reset total_steps current_reset_info t_start",
    f"{_ATARI}.StickyActionEnv": "_sticky_action",
    f"{_ATARI}.EpisodicLifeEnv": "lives was_real_done",
    f"{_ATARI}.MaxAndSkipEnv": "_obs_buffer",
    f"{_ZOO}.TruncatedOnSuccessWrapper": "current_successes",
    f"{_ZOO}.ActionSmoothingWrapper": "smoothed_action",
    f"{_ZOO}.DelayedRewardWrapper": "current_step accumulated_reward",
    f"{_ZOO}.HistoryWrapper": "obs_history action_history",
    f"{_ZOO}.HistoryWrapperObsDict": "obs_history action_history",
    # Wrappers of vectorised environments. Their state beyond plain attributes is in vec_env_state.
    f"{_VEC}.vec_normalize.VecNormalize": _NORMALIZE,
    "sb3_clipvf.envs.normalize.FastVecNormalize": _NORMALIZE,
    "sb3_clipvf.envs.tensor_normalize.TensorVecNormalize": _NORMALIZE,
    f"{_VEC}.vec_monitor.VecMonitor": "episode_returns episode_lengths episode_count t_start",
    f"{_VEC}.vec_video_recorder.VecVideoRecorder": "step_id",
    # Callbacks, which also have the attributes of their base classes
    f"{_CALLBACKS}.BaseCallback": "n_calls num_timesteps",
    f"{_CALLBACKS}.EvalCallback": (
        "best_mean_reward last_mean_reward evaluations_results evaluations_timesteps evaluations_length "
        "evaluations_successes _is_success_buffer"
    ),
    f"{_CALLBACKS}.EveryNTimesteps": "last_time_trigger",
    f"{_CALLBACKS}.StopTrainingOnMaxEpisodes": "n_episodes",
    f"{_CALLBACKS}.StopTrainingOnNoModelImprovement": "last_best_mean_reward no_improvement_evals",
    "rl_zoo3.callbacks.RawStatisticsCallback": "_timesteps_counter",
    "rl_zoo3.callbacks.TrialEvalCallback": "eval_idx is_pruned",
}
"""
Names of attributes by class, separated by spaces. ``obs_rms.mean`` is the attribute ``mean`` of ``obs_rms``.

A class derived from one of these is not listed: it may have attributes of its own.
"""

_STATELESS = {
    f"{_WRAPPERS}.common": "PassiveEnvChecker",
    f"{_WRAPPERS}.stateful_action": "RepeatAction",
    _ATARI: "NoopResetEnv FireResetEnv ClipRewardEnv WarpFrame AtariWrapper",
    _ZOO: "FrameSkip MaskVelocityWrapper YAMLCompatResizeObservation",
    f"{_VEC}.vec_frame_stack": "VecFrameStack",
    f"{_VEC}.vec_transpose": "VecTransposeImage",
    f"{_VEC}.vec_extract_dict_obs": "VecExtractDictObs",
    f"{_VEC}.vec_check_nan": "VecCheckNan",
    # Innermost layers, without their environments. Seeds and the adapters' statistics are in vec_env_state.
    f"{_VEC}.dummy_vec_env": "DummyVecEnv",
    f"{_VEC}.subproc_vec_env": "SubprocVecEnv",
    "sb3_clipvf.envs.dummy": "FastDummyVecEnv",
    "sb3_clipvf.envs.subproc": "FastSubprocVecEnv",
    "sb3_clipvf.envs.gymnasium_vector": "GymnasiumVecEnv SeparateVecEnv CartPoleVecEnv AtariVecEnv",
    "sb3_clipvf.envs.envpool": "EnvPoolVecEnv SparedEnvPoolVecEnv",
    "sb3_clipvf.envs.tensor": "TensorEnvAdapter",
    # `callback_state` names functions in a ConvertCallback that may have a state.
    _CALLBACKS: (
        "CallbackList EventCallback ConvertCallback CheckpointCallback StopTrainingOnRewardThreshold LogEveryNTimesteps"
    ),
    "rl_zoo3.callbacks": "SaveVecNormalizeCallback",
    "sb3_clipvf.callbacks": "IsolatedEvalCallback",  # it has the attributes of its base class only
    "sb3_clipvf.checkpoint.rollout_callback": "RolloutCallback",
    # These have methods for their state.
    "sb3_clipvf.checkpoint.best_training": "SaveBestTrainingReward",
    "sb3_clipvf.checkpoint.training_checkpoint": "TrainingCheckpoint",
    "sb3_clipvf.checkpoint.resumable": "ResumableEnv",
    "sb3_clipvf.envs.episode_ends": "EpisodeEnds",  # it keeps no state between steps
}
ATTRIBUTES |= {f"{module}.{name}": "" for module, names in _STATELESS.items() for name in names.split()}

STATELESS_MODULES = tuple(f"{_WRAPPERS}.transform_{kind}" for kind in ("action", "observation", "reward"))
"""Modules whose wrappers keep no state between steps."""


def read_attributes(target: Any, names: str) -> dict[str, Any]:
    """Return those of the named attributes that an object has, by name; the values are not copied."""
    values = {}
    for name in names.split():
        owner, last = _owner(target, name)
        if last in vars(owner):
            values[name] = vars(owner)[last]
    return values


def write_attributes(target: Any, values: dict[str, Any], names: str) -> None:
    """Set attributes of an object to the values from :func:`read_attributes` for the same ``names``; refuse others."""
    check_names(values, names.split(), full_name(type(target)))
    for name, value in values.items():
        owner, last = _owner(target, name)
        vars(owner)[last] = value


def check_names(found: Iterable[str], allowed: Collection[str], what: str) -> None:
    """Refuse names of a file that its writer does not write: a crafted file would set any attribute."""
    others = [name for name in found if name not in allowed]
    if others:
        raise ValueError(
            f"The state of {what} in the checkpoint must hold only {', '.join(allowed) or 'no attributes'}, got "
            f"{', '.join(map(repr, others))[:300]}. Use a checkpoint that this version of sb3_clipvf wrote."
        )


def _owner(target: Any, name: str) -> tuple[Any, str]:
    first, _, rest = name.partition(".")
    return (target, first) if not rest else _owner(vars(target)[first], rest)
