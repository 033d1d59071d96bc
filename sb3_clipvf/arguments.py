"""ClipPPO's arguments: the checks that need several of them, and what makes them SB3's."""

import difflib
import inspect
import math
import numbers
import os
import warnings
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from stable_baselines3.common.buffers import BaseBuffer
from stable_baselines3.common.policies import ActorCriticPolicy, BasePolicy

from sb3_clipvf.common import validation
from sb3_clipvf.engines.selection import check_engine_name
from sb3_clipvf.rollout import TensorRolloutBuffer
from sb3_clipvf.schedules import AdaptiveKL, KLAdaptiveLR, is_constant, make_schedule

if TYPE_CHECKING:
    from sb3_clipvf.clip_ppo import ClipPPO

SB3_EQUIVALENT: dict[str, Any] = {
    "clip_range": 0.2,
    "clip_range_vf": None,
    "kl_coef": 0.0,
    "adaptive_kl_target": None,
    "vf_clip": "prediction",
    "vf_clip_units": "absolute",
    "advantage_scope": "minibatch",
    "lr_kl_target": None,
    "on_nonfinite": "raise",
    "engine": "autograd",
}
"""Arguments under which ClipPPO is SB3's PPO: with the same seed it ends with the same weights."""

MAX_SEED = 2**32 - 1
"""NumPy's generator takes no larger one."""

_OF_EACH_POLICY = ("observation_space", "action_space", "lr_schedule", "use_sde")
_OF_EACH_BUFFER = ("buffer_size", "observation_space", "action_space", "device", "gamma", "gae_lambda", "n_envs")


def check_what_sb3_reads(policy: Any, rollout_buffer_kwargs: Any, verbose: Any) -> None:
    """
    Check the arguments that SB3's constructor looks into, before the model has attributes that can be checked.

    :param policy: Alias or class.
    :param rollout_buffer_kwargs: Arguments of the buffer, or None.
    :param verbose: How much is shown.
    :raises TypeError: If one is of the wrong type.
    :raises ValueError: If ``verbose`` is out of range.
    """
    if not isinstance(policy, str):
        _check_policy_class(policy)
    _check_is_dict("rollout_buffer_kwargs", rollout_buffer_kwargs)
    validation.check_verbose(verbose)


def check_arguments(model: "ClipPPO") -> None:
    """
    Check all arguments of a model, of its constructor or of a file, and make its numbers plain ints and floats.

    :param model: With its attributes set and nothing built yet.
    :raises ValueError: If one is out of range, or two contradict each other.
    :raises TypeError: If one is of the wrong type.
    """
    _check_parts(model)
    _check_sizes(model)
    _check_numbers(model)
    for name in ("normalize_advantage", "use_sde"):
        validation.check_bool(name, getattr(model, name))
    check_words(model)
    check_engine_name(model.engine)
    _check_controllers(model)


def check_words(model: "ClipPPO") -> None:
    """
    Check the arguments that are one of several words; callbacks may change them between updates.

    :param model: With its attributes set.
    :raises ValueError: If one is none of its words.
    """
    validation.check_choice("vf_clip", model.vf_clip, ("max", "prediction"), "SB3's form is 'prediction'.")
    validation.check_choice(
        "vf_clip_units", model.vf_clip_units, ("return_std", "absolute"), "SB3 counts in 'absolute' return units."
    )
    validation.check_choice(
        "advantage_scope", model.advantage_scope, ("minibatch", "rollout"), "SB3 normalises each 'minibatch'."
    )
    validation.check_choice(
        "on_nonfinite", model.on_nonfinite, ("raise", "skip"), "'skip' leaves out minibatches that are not finite."
    )


def _check_parts(model: "ClipPPO") -> None:
    _check_policy_class(model.policy_class)
    if model.rollout_buffer_class is not None:
        validation.check_class("rollout_buffer_class", model.rollout_buffer_class, BaseBuffer, "None takes ours.")
    for name, called, taken in (
        ("policy_kwargs", model.policy_class, _OF_EACH_POLICY),
        ("rollout_buffer_kwargs", model.rollout_buffer_class or TensorRolloutBuffer, _OF_EACH_BUFFER),
    ):
        kwargs = getattr(model, name)
        _check_is_dict(name, kwargs)
        validation.check_keywords(name, kwargs or {}, called, taken, "Correct the key, or leave it out.")
    validation.check_type(
        "tensorboard_log", model.tensorboard_log, (str, os.PathLike), "the path of a folder", "None turns it off."
    )


def _check_policy_class(policy: Any) -> None:
    # SB3 asks for no more of a policy, whatever its annotations say.
    needed = ("forward", "evaluate_actions", "predict_values")
    is_base = isinstance(policy, type) and issubclass(policy, BasePolicy)
    if not (is_base and all(callable(getattr(policy, name, None)) for name in needed)):
        validation.check_class("policy", policy, ActorCriticPolicy, "Or pass an alias, such as 'MlpPolicy'.")


def _check_is_dict(name: str, kwargs: Any) -> None:
    validation.check_type(name, kwargs, dict, "a dict", "None stands for an empty one.")


def _check_sizes(model: "ClipPPO") -> None:
    model.n_steps = validation.check_int("n_steps", model.n_steps, 1, "SB3's default is 2048.")
    model.batch_size = validation.check_int("batch_size", model.batch_size, 1, "SB3's default is 64.")
    model.n_epochs = validation.check_int("n_epochs", model.n_epochs, 1, "SB3's default is 10.")
    window = validation.check_int("stats_window_size", model._stats_window_size, 1, "SB3's default is 100.")
    model._stats_window_size = window
    way_out = "-1 draws noise once a rollout."
    model.sde_sample_freq = validation.check_int("sde_sample_freq", model.sde_sample_freq, -1, way_out)
    validation.check_verbose(model.verbose)
    if model.seed is not None:
        way_out = "None leaves the random states alone."
        model.seed = validation.check_int("seed", model.seed, 0, way_out, maximum=MAX_SEED)
    if not model.normalize_advantage:
        return
    if model.batch_size == 1 and model.advantage_scope == "minibatch":
        raise ValueError(
            "`batch_size` must be greater than 1 to normalise advantages in minibatches, got 1. Raise it, or set "
            "advantage_scope='rollout' or normalize_advantage=False."
        )
    if model.env is not None and model.n_steps * model.n_envs == 1:
        raise ValueError(
            "`n_steps` must be such that n_steps * n_envs is greater than 1 to normalise advantages, got n_steps=1 and "
            "n_envs=1. Raise it, or set normalize_advantage=False."
        )


def _check_numbers(model: "ClipPPO") -> None:
    model.gamma = validation.check_float("gamma", model.gamma, "SB3's default is 0.99.", 0.0, 1.0)
    model.gae_lambda = validation.check_float("gae_lambda", model.gae_lambda, "SB3's default is 0.95.", 0.0, 1.0)
    if isinstance(model.max_grad_norm, numbers.Real) and model.max_grad_norm == math.inf:
        model.max_grad_norm = math.inf
    else:
        way_out = "SB3's default is 0.5. Infinity is legal too: it sets no bound."
        model.max_grad_norm = validation.check_float("max_grad_norm", model.max_grad_norm, way_out, above_low=True)
    for name in ("target_kl", "adaptive_kl_target", "lr_kl_target"):
        if getattr(model, name) is not None:
            value = validation.check_float(name, getattr(model, name), "None turns it off.", above_low=True)
            setattr(model, name, value)


def _check_controllers(model: "ClipPPO") -> None:
    if model.adaptive_kl_target is not None:
        if not is_constant(model.kl_coef):
            raise ValueError(
                f"`kl_coef` must be a number where `adaptive_kl_target` is set, got {model.kl_coef!r}. Either beta "
                "follows a schedule or it adapts: drop one of the two."
            )
        beta = make_schedule(model.kl_coef, "kl_coef")(1.0)
        if beta == 0:
            raise ValueError(
                f"`kl_coef` must be positive where `adaptive_kl_target` is set, got {model.kl_coef!r}: doubling and "
                "halving never leave 0. Start at 1.0, as the paper does."
            )
        low, high = AdaptiveKL.beta_min, AdaptiveKL.beta_max
        if not low <= beta <= high:
            raise ValueError(
                f"`kl_coef` must be in [{low:g}, {high:g}] where `adaptive_kl_target` is set, got {model.kl_coef!r}: "
                "it adapts within these bounds. Start at 1.0, as the paper does."
            )
    if model.lr_kl_target is not None and not is_constant(model.learning_rate):
        raise ValueError(
            f"`learning_rate` must be a number where `lr_kl_target` is set, got {model.learning_rate!r}. Either the "
            "rate follows a schedule or it adapts: drop one of the two."
        )
    # A file brings the adapted rate, and the Zoo replaces the initial one by 0 where it only evaluates.
    if model.lr_kl_target is not None and model.adaptive_lr is None:
        low, high = KLAdaptiveLR.lr_min, KLAdaptiveLR.lr_max
        if not low <= make_schedule(model.learning_rate, "learning_rate")(1.0) <= high:
            raise ValueError(
                f"`learning_rate` must be in [{low:g}, {high:g}] where `lr_kl_target` is set, got "
                f"{model.learning_rate!r}: it adapts within these bounds. SB3's default is 3e-4."
            )


def warn_of_truncated_minibatches(model: "ClipPPO") -> None:
    """
    Warn where the rollout is no multiple of the minibatch, as SB3 does.

    :param model: Fully built.
    """
    if model.env is None:
        return
    buffer_size = model.n_envs * model.n_steps
    rest = buffer_size % model.batch_size
    if rest == 0:
        return
    is_alone = rest == 1 and model.normalize_advantage and model.advantage_scope == "minibatch"
    consequence = " It is not normalised, having no spread." if is_alone else ""
    warnings.warn(
        f"You have specified a mini-batch size of {model.batch_size}, but because the rollout has n_steps * n_envs = "
        f"{buffer_size} transitions, after every {buffer_size // model.batch_size} untruncated mini-batches there will "
        f"be a truncated mini-batch of size {rest}.{consequence} We recommend a `batch_size` that is a factor of "
        f"n_steps * n_envs (n_steps={model.n_steps}, n_envs={model.n_envs}).",
        stacklevel=3,
    )


def values_to_load(
    file: Mapping[str, Any],
    given: dict[str, Any],
    custom_objects: dict[str, Any],
    cls: type[Any],
) -> dict[str, Any]:
    """
    Complete the values that the user passed to ``load``.

    A controller goes on from the file's state, unless the user changes where it starts. For what a file of another
    algorithm of SB3 does not hold, the values of :data:`SB3_EQUIVALENT` are taken, and a warning names them.

    :param file: The model's attributes in the file: plain ones as they are, others as their description.
    :param given: The user's values, by argument.
    :param custom_objects: Values that replace the file's while it is read; SB3 passes over those that it does not hold.
    :param cls: The class that is loaded.
    :return: Values that replace the file's.
    :raises TypeError: If a value is for nothing that the class or the file has.
    """
    values = dict(given)
    if "stats_window_size" in values:
        values["_stats_window_size"] = values.pop("stats_window_size")
    _check_names(values, cls, file)
    if "kl_coef" in custom_objects or values.get("kl_coef", file.get("kl_coef")) != file.get("kl_coef"):
        values.setdefault("adaptive_kl", None)
    if values.get("learning_rate", file.get("learning_rate")) != file.get("learning_rate"):
        values.setdefault("adaptive_lr", None)
    if "vf_clip" in file:
        return values
    absent = {name: value for name, value in SB3_EQUIVALENT.items() if name not in file and name not in values}
    chosen = {name: custom_objects.get(name, value) for name, value in absent.items()}
    listed = ", ".join(f"{name}={value!r}" for name, value in chosen.items())
    warnings.warn(
        "The file was saved by another algorithm of SB3. ClipPPO takes its values, and for what it does not hold: "
        f"{listed}. Pass them to `load` to change them.",
        stacklevel=3,
    )
    return {"_loads_sb3": True, **chosen, **values}


def _check_names(values: dict[str, Any], cls: type[Any], file: Mapping[str, Any]) -> None:
    legal = {*inspect.signature(cls.__init__).parameters, *file, "_stats_window_size", "adaptive_kl", "adaptive_lr"}
    for name in values:
        if name not in legal:
            nearest = difflib.get_close_matches(name, legal, n=1)
            hint = f"Did you mean {nearest[0]!r}?" if nearest else "See the arguments of its constructor."
            raise TypeError(f"`{name}` must be an argument of {cls.__name__}, got {values[name]!r} for it. {hint}")
