"""Which attributes of environments, wrappers and callbacks change while they run, by the class that has them."""

from typing import Any

_CLASSIC = "gymnasium.envs.classic_control"
_TOY = "gymnasium.envs.toy_text"
_WRAPPERS = "gymnasium.wrappers"
_ATARI = "stable_baselines3.common.atari_wrappers"
_ZOO = "rl_zoo3.wrappers"

# Subclasses are other classes: what they add is not known here.
ENVIRONMENTS: dict[str, tuple[str, ...]] = {
    f"{_CLASSIC}.cartpole.CartPoleEnv": ("state", "steps_beyond_terminated"),
    f"{_CLASSIC}.pendulum.PendulumEnv": ("state", "last_u"),
    f"{_CLASSIC}.mountain_car.MountainCarEnv": ("state",),
    f"{_CLASSIC}.continuous_mountain_car.Continuous_MountainCarEnv": ("state",),
    f"{_CLASSIC}.acrobot.AcrobotEnv": ("state",),
    f"{_TOY}.frozen_lake.FrozenLakeEnv": ("s", "lastaction"),
    f"{_TOY}.cliffwalking.CliffWalkingEnv": ("s", "lastaction"),
    f"{_TOY}.taxi.TaxiEnv": ("s", "lastaction", "fickle_step", "taxi_orientation"),
    f"{_TOY}.blackjack.BlackjackEnv": ("dealer", "player"),
}
"""Environments of Gymnasium, by full name; MuJoCo's are in ``mujoco_state``."""

WRAPPERS: dict[str, tuple[str, ...]] = {
    f"{_WRAPPERS}.common.PassiveEnvChecker": (),
    f"{_WRAPPERS}.common.OrderEnforcing": ("_has_reset",),
    f"{_WRAPPERS}.common.TimeLimit": ("_elapsed_steps",),
    # The Zoo puts it in the place of Gymnasium's.
    "rl_zoo3.gym_patches.PatchedTimeLimit": ("_elapsed_steps",),
    f"{_WRAPPERS}.common.Autoreset": ("autoreset",),
    f"{_WRAPPERS}.common.RecordEpisodeStatistics": (
        "episode_count",
        "episode_returns",
        "episode_lengths",
        "time_queue",
        "return_queue",
        "length_queue",
    ),
    f"{_WRAPPERS}.stateful_action.StickyAction": ("last_action", "is_sticky_actions", "num_repeats", "repeats_taken"),
    f"{_WRAPPERS}.stateful_action.RepeatAction": (),
    f"{_WRAPPERS}.stateful_observation.DelayObservation": ("observation_queue",),
    f"{_WRAPPERS}.stateful_observation.TimeAwareObservation": ("timesteps",),
    f"{_WRAPPERS}.stateful_observation.FrameStackObservation": ("obs_queue", "padding_value"),
    f"{_WRAPPERS}.stateful_observation.NormalizeObservation": ("obs_rms.mean", "obs_rms.var", "obs_rms.count"),
    f"{_WRAPPERS}.stateful_observation.MaxAndSkipObservation": (),
    f"{_WRAPPERS}.stateful_reward.NormalizeReward": (
        "return_rms.mean",
        "return_rms.var",
        "return_rms.count",
        "discounted_reward",
    ),
    "stable_baselines3.common.monitor.Monitor": (
        "rewards",
        "needs_reset",
        "total_steps",
        "current_reset_info",
        "t_start",
    ),
    f"{_ATARI}.StickyActionEnv": ("_sticky_action",),
    f"{_ATARI}.NoopResetEnv": (),
    f"{_ATARI}.FireResetEnv": (),
    f"{_ATARI}.EpisodicLifeEnv": ("lives", "was_real_done"),
    f"{_ATARI}.MaxAndSkipEnv": ("_obs_buffer",),
    f"{_ATARI}.ClipRewardEnv": (),
    f"{_ATARI}.WarpFrame": (),
    f"{_ATARI}.AtariWrapper": (),
    f"{_ZOO}.TruncatedOnSuccessWrapper": ("current_successes",),
    f"{_ZOO}.ActionSmoothingWrapper": ("smoothed_action",),
    f"{_ZOO}.DelayedRewardWrapper": ("current_step", "accumulated_reward"),
    f"{_ZOO}.HistoryWrapper": ("obs_history", "action_history"),
    f"{_ZOO}.HistoryWrapperObsDict": ("obs_history", "action_history"),
    f"{_ZOO}.FrameSkip": (),
    f"{_ZOO}.MaskVelocityWrapper": (),
    f"{_ZOO}.YAMLCompatResizeObservation": (),
    "sb3_clipvf.checkpoint.resumable.ResumableEnv": (),
    # Between two steps it keeps nothing.
    "sb3_clipvf.envs.episode_ends.EpisodeEnds": (),
}
"""Wrappers of single environments, by full name."""

STATELESS_MODULES = (
    f"{_WRAPPERS}.transform_action",
    f"{_WRAPPERS}.transform_observation",
    f"{_WRAPPERS}.transform_reward",
)
"""Modules all of whose wrappers keep nothing from one step to the next."""

_VEC = "stable_baselines3.common.vec_env"
_NORMALIZE = (
    "norm_obs",
    "norm_reward",
    "norm_obs_keys",
    "clip_obs",
    "clip_reward",
    "gamma",
    "epsilon",
    "training",
    "returns",
    "old_obs",
    "old_reward",
    "ret_rms.mean",
    "ret_rms.var",
    "ret_rms.count",
)

VEC_WRAPPERS: dict[str, tuple[str, ...]] = {
    f"{_VEC}.vec_normalize.VecNormalize": _NORMALIZE,
    "sb3_clipvf.envs.normalize.FastVecNormalize": _NORMALIZE,
    f"{_VEC}.vec_frame_stack.VecFrameStack": (),
    f"{_VEC}.vec_transpose.VecTransposeImage": (),
    f"{_VEC}.vec_extract_dict_obs.VecExtractDictObs": (),
    f"{_VEC}.vec_check_nan.VecCheckNan": (),
    f"{_VEC}.vec_monitor.VecMonitor": ("episode_returns", "episode_lengths", "episode_count", "t_start"),
    f"{_VEC}.vec_video_recorder.VecVideoRecorder": ("step_id",),
}
"""Wrappers of many environments, by full name; what is no plain attribute is in ``environments``."""

_CALLBACKS = "stable_baselines3.common.callbacks"
_EVALUATION = (
    "best_mean_reward",
    "last_mean_reward",
    "evaluations_results",
    "evaluations_timesteps",
    "evaluations_length",
    "evaluations_successes",
    "_is_success_buffer",
)

CALLBACKS: dict[str, tuple[str, ...]] = {
    f"{_CALLBACKS}.BaseCallback": ("n_calls", "num_timesteps"),
    f"{_CALLBACKS}.EventCallback": (),
    f"{_CALLBACKS}.ConvertCallback": (),
    f"{_CALLBACKS}.CheckpointCallback": (),
    f"{_CALLBACKS}.EvalCallback": _EVALUATION,
    f"{_CALLBACKS}.StopTrainingOnRewardThreshold": (),
    f"{_CALLBACKS}.EveryNTimesteps": ("last_time_trigger",),
    f"{_CALLBACKS}.LogEveryNTimesteps": (),
    f"{_CALLBACKS}.StopTrainingOnMaxEpisodes": ("n_episodes",),
    f"{_CALLBACKS}.StopTrainingOnNoModelImprovement": ("last_best_mean_reward", "no_improvement_evals"),
    "rl_zoo3.callbacks.SaveVecNormalizeCallback": (),
    "rl_zoo3.callbacks.RawStatisticsCallback": ("_timesteps_counter",),
    "rl_zoo3.callbacks.TrialEvalCallback": ("eval_idx", "is_pruned"),
    # What it knows stands in the folder that it writes to.
    "sb3_clipvf.checkpoint.best_training.SaveBestTrainingReward": (),
}
"""Callbacks, by full name; a class has the attributes of its base classes as well."""


def read_attributes(target: Any, names: tuple[str, ...]) -> dict[str, Any]:
    """
    Read attributes.

    :param target: The object.
    :param names: Their names, dotted where they belong to an attribute; those that it lacks are left out.
    :return: The values, by name; they still belong to the object.
    """
    values = {}
    for name in names:
        owner, last = _owner(target, name)
        if last in vars(owner):
            values[name] = vars(owner)[last]
    return values


def write_attributes(target: Any, values: dict[str, Any]) -> None:
    """
    Set attributes.

    :param target: The object.
    :param values: By name, as :func:`read_attributes` gave them.
    """
    for name, value in values.items():
        owner, last = _owner(target, name)
        vars(owner)[last] = value


def _owner(target: Any, name: str) -> tuple[Any, str]:
    first, _, rest = name.partition(".")
    return (target, first) if not rest else _owner(vars(target)[first], rest)
