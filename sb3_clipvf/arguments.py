"""Checks of ClipPPO's arguments, warnings about them, and the arguments that make it SB3's PPO."""

import contextlib
import difflib
import inspect
import math
import os
import re
import warnings
from collections import deque
from collections.abc import Iterator, Mapping
from functools import partial
from itertools import takewhile
from numbers import Real
from typing import Any

from stable_baselines3.common.buffers import BaseBuffer, DictRolloutBuffer, RolloutBuffer
from stable_baselines3.common.on_policy_algorithm import OnPolicyAlgorithm
from stable_baselines3.common.policies import ActorCriticPolicy, BasePolicy

from sb3_clipvf.common import validation
from sb3_clipvf.common.messages import log
from sb3_clipvf.distributed import current_group
from sb3_clipvf.engines.selection import check_engine_name
from sb3_clipvf.rollout import TensorRolloutBuffer, is_known_class
from sb3_clipvf.schedules import (
    CONTROLLERS,
    AdaptiveKL,
    KLAdaptiveLR,
    Schedule,
    clamp_progress,
    is_constant,
    is_known,
    make_schedule,
)

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
"""Arguments under which ClipPPO is SB3's PPO: the same seed gives the same weights."""

# What ClipPPO itself passes, so that `policy_kwargs` and `rollout_buffer_kwargs` must not.
_PASSED_TO_POLICY = ("observation_space", "action_space", "lr_schedule", "use_sde")
_PASSED_TO_BUFFER = ("buffer_size", "observation_space", "action_space", "device", "gamma", "gae_lambda", "n_envs")
# What `load` builds from other attributes, and what to pass instead.
_BUILT = {
    "policy": "The file holds the policy's class. Pass `policy_class` to replace it.",
    "lr_schedule": "Pass `learning_rate`.",
}
_OF_ANY_NAME = (inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD)


def constructor_arguments(cls: type[Any]) -> list[str]:
    """Return the names of the arguments of a class's constructor, and of its bases' constructors down to SB3's."""
    names: dict[str, None] = {}
    for base in takewhile(lambda base: base is not OnPolicyAlgorithm, cls.__mro__):
        if (init := vars(base).get("__init__")) is not None:
            _, *parameters = inspect.signature(init).parameters.values()
            names |= {parameter.name: None for parameter in parameters if parameter.kind not in _OF_ANY_NAME}
    names.pop("_init_setup_model", None)
    return list(names)


def check_what_sb3_reads(policy: Any, rollout_buffer_kwargs: Any, verbose: Any) -> None:
    """Check the arguments that SB3's own constructor reads, before the model has attributes to check."""
    if not isinstance(policy, str):
        _check_policy_class("policy", policy, "Or pass an alias, such as 'MlpPolicy'.")
    _check_is_dict("rollout_buffer_kwargs", rollout_buffer_kwargs)
    validation.check_verbose(verbose)


def check_arguments(values: Mapping[str, Any]) -> dict[str, Any]:
    """Check all arguments, which are attributes of a model; return those that are converted, such as numbers."""
    buffer = _buffer_class(values)
    _check_classes({**values, **buffer})
    checked = {**buffer, "use_sde": validation.as_bool("use_sde", values["use_sde"]), **check_changes(values)}
    check_engine_name(values["engine"])
    return {**checked, **_episodes(values, checked["_stats_window_size"])}


def check_changes(values: Mapping[str, Any]) -> dict[str, Any]:
    """Check the arguments that callbacks may change and the next update reads; return those that are converted."""
    checked = {**_checked_sizes(values), **_checked_numbers(values)}
    normalizes = validation.as_bool("normalize_advantage", values["normalize_advantage"])
    checked["normalize_advantage"] = normalizes
    _check_normalization({**values, **checked})
    _check_choices(values)
    _check_controllers({**values, **checked})
    return checked


def discounts(values: Mapping[str, Any], buffer: Any, agreed: Mapping[str, Any]) -> dict[str, Any]:
    """
    Return ``gamma`` and ``gae_lambda`` for the model and its buffer: the values that were replaced on one of them.

    A buffer of the user's own class may define them differently, and keeps them: the result is empty.

    :param values: Attributes of the model, which prevail if both were replaced.
    :param buffer: Rollout buffer.
    :param agreed: Values that both had before.
    """
    if not is_known_class(type(buffer)):
        return {}
    return {name: getattr(buffer, name) if values[name] == old else values[name] for name, old in agreed.items()}


def _buffer_class(values: Mapping[str, Any]) -> dict[str, Any]:
    """Return the class in a ``functools.partial``, and its keywords as ``rollout_buffer_kwargs``."""
    buffer_class, kwargs = values["rollout_buffer_class"], values["rollout_buffer_kwargs"]
    if isinstance(buffer_class, partial) and not buffer_class.args and isinstance(kwargs, dict | None):
        # What ClipPPO passes replaces the partial's keywords, as in a call.
        own = {name: value for name, value in buffer_class.keywords.items() if name not in _PASSED_TO_BUFFER}
        buffer_class, kwargs = buffer_class.func, {**own, **(kwargs or {})}
    if values["_loads_sb3"] and buffer_class in (RolloutBuffer, DictRolloutBuffer):
        # A file of SB3 names SB3's own buffer even if the user chose none. Ours draws the same minibatches.
        buffer_class = None
    return {"rollout_buffer_class": buffer_class, "rollout_buffer_kwargs": kwargs}


def _episodes(values: Mapping[str, Any], window: int) -> dict[str, Any]:
    """Return the statistics of a loaded model's latest episodes for a window that may differ from the file's."""
    kept = {name: values[name] for name in ("ep_info_buffer", "ep_success_buffer")}
    return {name: deque(episodes, maxlen=window) for name, episodes in kept.items() if isinstance(episodes, deque)}


def _check_choices(values: Mapping[str, Any]) -> None:
    """Check the arguments whose value is one of several words."""
    for name, words, hint in (
        ("vf_clip", ("max", "prediction"), "SB3's form is 'prediction'."),
        ("vf_clip_units", ("return_std", "absolute"), "SB3 clips in 'absolute' return units."),
        ("advantage_scope", ("minibatch", "rollout"), "SB3 normalises each 'minibatch'."),
        ("on_nonfinite", ("raise", "skip"), "'skip' skips minibatches that are not finite."),
    ):
        validation.check_choice(name, values[name], words, hint)


def _check_classes(values: Mapping[str, Any]) -> None:
    _check_policy_class("policy_class", values["policy_class"], "Pass the class itself, not an alias.")
    if values["rollout_buffer_class"] is not None:
        validation.check_class(
            "rollout_buffer_class", values["rollout_buffer_class"], BaseBuffer, "None selects TensorRolloutBuffer."
        )
    for name, called, taken in (
        ("policy_kwargs", values["policy_class"], _PASSED_TO_POLICY),
        ("rollout_buffer_kwargs", values["rollout_buffer_class"] or TensorRolloutBuffer, _PASSED_TO_BUFFER),
    ):
        kwargs = values[name]
        _check_is_dict(name, kwargs)
        validation.check_keywords(name, kwargs or {}, called, taken, "Correct the key, or leave it out.")
    validation.check_type(
        "tensorboard_log", values["tensorboard_log"], (str, os.PathLike), "the path of a folder", "None turns it off."
    )


def _check_policy_class(name: str, policy: Any, hint: str) -> None:
    # SB3 needs only these methods, although it annotates an ActorCriticPolicy.
    needed = ("forward", "evaluate_actions", "predict_values")
    is_base = isinstance(policy, type) and issubclass(policy, BasePolicy)
    if not (is_base and all(callable(getattr(policy, method, None)) for method in needed)):
        validation.check_class(name, policy, ActorCriticPolicy, hint)


def _check_is_dict(name: str, kwargs: Any) -> None:
    validation.check_type(name, kwargs, dict, "a dict", "None means an empty one.")


def _checked_sizes(values: Mapping[str, Any]) -> dict[str, Any]:
    sizes: dict[str, Any] = {}
    for name, low, hint in (
        ("n_steps", 1, "SB3's default is 2048."),
        ("batch_size", 1, "SB3's default is 64."),
        ("n_epochs", 1, "SB3's default is 10."),
        ("sde_sample_freq", -1, "-1 draws noise once per rollout."),
    ):
        sizes[name] = validation.check_int(name, values[name], low, hint)
    if sizes["sde_sample_freq"] == 0:
        raise ValueError("`sde_sample_freq` must be -1 or at least 1, got 0. -1 draws noise once per rollout.")
    # None is a window of all episodes for SB3, whose deque then has no limit.
    window = validation.MAX_INT if values["_stats_window_size"] is None else values["_stats_window_size"]
    sizes["_stats_window_size"] = validation.check_int("stats_window_size", window, 1, "SB3's default is 100.")
    sizes["verbose"] = validation.check_verbose(values["verbose"])
    if values["seed"] is not None:
        hint = "None leaves the random states alone."
        sizes["seed"] = validation.check_int("seed", values["seed"], 0, hint, maximum=validation.MAX_SEED)
    return sizes


def _check_normalization(values: Mapping[str, Any]) -> None:
    if not values["normalize_advantage"]:
        return
    if values["batch_size"] == 1 and values["advantage_scope"] == "minibatch":
        raise ValueError(
            "`batch_size` must be greater than 1 to normalise advantages in minibatches, got 1. Raise it, or set "
            "advantage_scope='rollout' or normalize_advantage=False."
        )
    if values["env"] is not None and values["n_steps"] * values["n_envs"] * current_group().size == 1:
        raise ValueError(
            "`n_steps` must be such that n_steps * n_envs is greater than 1 to normalise advantages, got n_steps=1 and "
            "n_envs=1. Raise it, or set normalize_advantage=False."
        )


def _checked_numbers(values: Mapping[str, Any]) -> dict[str, Any]:
    numbers = {
        "gamma": validation.check_float("gamma", values["gamma"], "SB3's default is 0.99.", 0.0, 1.0),
        "gae_lambda": validation.check_float("gae_lambda", values["gae_lambda"], "SB3's default is 0.95.", 0.0, 1.0),
    }
    norm = values["max_grad_norm"]
    if isinstance(norm, Real) and norm == math.inf:
        numbers["max_grad_norm"] = math.inf
    else:
        hint = "SB3's default is 0.5. Infinity is legal too: it sets no bound."
        numbers["max_grad_norm"] = validation.check_float("max_grad_norm", norm, hint, above_low=True)
    for name in ("target_kl", "adaptive_kl_target", "lr_kl_target"):
        if values[name] is not None:
            numbers[name] = validation.check_float(name, values[name], "None turns it off.", above_low=True)
    return numbers


def _check_controllers(values: Mapping[str, Any]) -> None:
    kl_coef, learning_rate = values["kl_coef"], values["learning_rate"]
    if values["adaptive_kl_target"] is not None:
        if not is_constant(kl_coef):
            raise ValueError(
                f"`kl_coef` must be a number if `adaptive_kl_target` is set, got {kl_coef!r}. Beta either follows a "
                "schedule or adapts: remove one of the two."
            )
        beta = make_schedule(kl_coef, "kl_coef")(1.0)
        if beta == 0:
            raise ValueError(
                f"`kl_coef` must be positive if `adaptive_kl_target` is set, got {kl_coef!r}: doubling and halving "
                "never leave 0. Start at 1.0, as the paper does."
            )
        low, high = AdaptiveKL.beta_min, AdaptiveKL.beta_max
        if not low <= beta <= high:
            raise ValueError(
                f"`kl_coef` must be in [{low:g}, {high:g}] if `adaptive_kl_target` is set, got {kl_coef!r}: it "
                "adapts within these bounds. Start at 1.0, as the paper does."
            )
    if values["lr_kl_target"] is None:
        return
    if not is_constant(learning_rate):
        raise ValueError(
            f"`learning_rate` must be a number if `lr_kl_target` is set, got {learning_rate!r}. The rate either "
            "follows a schedule or adapts: remove one of the two."
        )
    # A loaded model continues from its adapted rate. The Zoo sets the initial rate to 0 if it only evaluates.
    if values["adaptive_lr"] is None:
        low, high = KLAdaptiveLR.lr_min, KLAdaptiveLR.lr_max
        if not low <= make_schedule(learning_rate, "learning_rate")(1.0) <= high:
            raise ValueError(
                f"`learning_rate` must be in [{low:g}, {high:g}] if `lr_kl_target` is set, got {learning_rate!r}: "
                "it adapts within these bounds. SB3's default is 3e-4."
            )


def warn_about_truncated_minibatches(values: Mapping[str, Any]) -> None:
    """Warn, as SB3 does, if the rollout is not a multiple of the minibatch."""
    batch_size, n_steps, n_envs = values["batch_size"], values["n_steps"], values["n_envs"]
    buffer_size = n_envs * n_steps
    rest = buffer_size % batch_size
    if values["env"] is None or rest == 0:
        return
    if rest == buffer_size:
        warnings.warn(
            # SB3's first words: its users may filter warnings by them.
            f"You have specified a mini-batch size of {batch_size}, but the rollout has n_steps * n_envs = "
            f"{buffer_size} transitions: each epoch is one minibatch of {buffer_size} (n_steps={n_steps}, "
            f"n_envs={n_envs}).",
            stacklevel=3,
        )
        return
    in_minibatches = values["normalize_advantage"] and values["advantage_scope"] == "minibatch"
    is_alone = in_minibatches and rest * current_group().size == 1
    consequence = " It is not normalised, having no spread." if is_alone else ""
    warnings.warn(
        f"You have specified a mini-batch size of {batch_size}, but because the rollout has n_steps * n_envs = "
        f"{buffer_size} transitions, after every {buffer_size // batch_size} untruncated mini-batches there will "
        f"be a truncated mini-batch of size {rest}.{consequence} We recommend a `batch_size` that is a factor of "
        f"n_steps * n_envs (n_steps={n_steps}, n_envs={n_envs}).",
        stacklevel=3,
    )


def warn_about_early_end(
    schedules: Mapping[str, Schedule], *, rollout: int, done: int, to_do: int, on_command_line: bool = False
) -> bool:
    """
    Warn if a call of ``learn`` uses only the second half of its schedules; return whether it has warned.

    As in SB3, progress is measured over the ``done`` steps before the call and its ``to_do`` steps, and a rollout
    counts before its update. A call of one rollout therefore updates at progress 0. The user's own functions are
    skipped, since calling them may change them.
    """
    first = clamp_progress(1.0 - (done + rollout) / (done + to_do)) if to_do else 1.0
    known = {name: schedule for name, schedule in schedules.items() if first < 0.5 and is_known(schedule)}
    annealed = {name: schedule for name, schedule in known.items() if schedule(1.0) != schedule(0.0)}
    if not annealed:
        return False
    if to_do <= rollout:
        values = " and ".join(f"`{name}` is {schedule(0.0):.3g}" for name, schedule in annealed.items())
        what = f"collects one rollout: {values} in its only update"
    else:
        values = ", ".join(
            f"`{name}` is {schedule(first):.3g} in its first update and {schedule(0.0):.3g} in its last"
            for name, schedule in annealed.items()
        )
        what = f"uses only the second half of its schedules: {values}"
    constants = {name: f"{schedule(1.0):.3g}" for name, schedule in annealed.items()}
    if on_command_line:
        params = " ".join(f"{name}:{value}" for name, value in constants.items())
        hint = f"Train for more rollouts of {rollout} steps (`-n`), or use constant values: `-params {params}`."
    else:
        arguments = ", ".join(f"{name}={value}" for name, value in constants.items())
        hint = (
            "If you train in several calls, pass schedule_timesteps=<all steps> to the first one and "
            f"reset_num_timesteps=False to the others. Or use constant values: {arguments}."
        )
    training, end = ("The run", "the run") if on_command_line else ("learn()", "each call")
    log.warning("%s %s. As in SB3, schedules end with %s. %s", training, what, end, hint)
    return True


def warn_about_n_envs(values: Mapping[str, Any], n_envs_before: int) -> None:
    """Warn that the number of environments differs from the file's, which changes the rollout and its minibatches."""
    n_envs, n_steps, batch_size = values["n_envs"], values["n_steps"], values["batch_size"]
    size, size_before = n_steps * n_envs, n_steps * n_envs_before
    log.warning(
        "`env` has %d environments, and the model was saved with %d: a rollout of n_steps=%d steps of each now has %d "
        "transitions instead of %d, and an epoch %d minibatches of batch_size=%d instead of %d.",
        n_envs,
        n_envs_before,
        n_steps,
        size,
        size_before,
        math.ceil(size / batch_size),
        batch_size,
        math.ceil(size_before / batch_size),
    )


def values_to_load(
    file: Mapping[str, Any],
    given: dict[str, Any],
    custom_objects: dict[str, Any],
    cls: type[Any],
) -> dict[str, Any]:
    """
    Return the attributes that replace the file's when a model is loaded: ``given`` by the user, and what follows.

    A KL controller continues from the file's state, unless the user changes its initial value. A file of another SB3
    algorithm lacks ClipPPO's own arguments: they get the values of ``custom_objects``, which SB3 would ignore, or of
    :data:`SB3_EQUIVALENT`, and a warning names them.
    """
    values = dict(given)
    if "stats_window_size" in values:
        values["_stats_window_size"] = values.pop("stats_window_size")
    _check_names(values, cls, file)
    initial = {**custom_objects, **values}
    if "learning_rate" not in values and custom_objects.get("learning_rate") == 0:
        del initial["learning_rate"]  # the Zoo passes 0 to evaluate
    for name, controller in CONTROLLERS.items():
        if name in initial and initial[name] != file.get(name):
            values.setdefault(controller, None)
    if file.get("sde_sample_freq") == 0 and "sde_sample_freq" not in initial:
        values["sde_sample_freq"] = -1  # SB3 reads 0 as -1
    if "vf_clip" in file:
        return values
    absent = {name: value for name, value in SB3_EQUIVALENT.items() if name not in file and name not in values}
    chosen = {name: custom_objects.get(name, value) for name, value in absent.items()}
    listed = ", ".join(f"{name}={value!r}" for name, value in chosen.items())
    warnings.warn(
        f"The file was not saved by ClipPPO, so it lacks some of its arguments. They are set to {listed}. "
        "To change them, pass them to `load`.",
        stacklevel=3,
    )
    return {"_loads_sb3": True, **chosen, **values}


@contextlib.contextmanager
def named_at_load(file: Mapping[str, Any], replaced: Mapping[str, Any]) -> Iterator[None]:
    """Add to errors about arguments of a model's file how to load it with other values, unless the user passed them."""
    try:
        yield
    except (TypeError, ValueError) as error:
        found = re.match(r"`(\w+)` must ", str(error))
        if found and {found[1], f"_{found[1]}"} & (file.keys() - replaced.keys()):
            error.args = (f"{error} To load the file with another value, pass `{found[1]}=...` to `load`.",)
        raise


def _check_names(values: dict[str, Any], cls: type[Any], file: Mapping[str, Any]) -> None:
    legal = {*constructor_arguments(cls), *file, "_stats_window_size", "adaptive_kl", "adaptive_lr"} - _BUILT.keys()
    for name in values:
        if name in _BUILT:
            raise TypeError(f"`{name}` must not be passed to `load`, got {values[name]!r}. {_BUILT[name]}")
        if name not in legal:
            nearest = difflib.get_close_matches(name, legal, n=1)
            hint = f"Did you mean {nearest[0]!r}?" if nearest else "See the arguments of its constructor."
            raise TypeError(f"`{name}` must be an argument of {cls.__name__}, got {values[name]!r} for it. {hint}")
