"""The state of a run's callbacks, which a resume matches by their class and their place among the callbacks."""

from abc import ABC
from collections import Counter
from collections.abc import Iterable, Iterator
from types import CodeType, FunctionType
from typing import Any

from stable_baselines3.common.callbacks import (
    BaseCallback,
    CallbackList,
    ConvertCallback,
    EvalCallback,
    EventCallback,
    ProgressBarCallback,
)

from sb3_clipvf.checkpoint.errors import EnvironmentMismatchError
from sb3_clipvf.checkpoint.state_attributes import ATTRIBUTES, read_attributes, write_attributes
from sb3_clipvf.checkpoint.vec_env_state import check_same_build, describe_vec_env, restore_vec_env, vec_env_state
from sb3_clipvf.common.messages import log
from sb3_clipvf.files.allowlist import full_name
from sb3_clipvf.files.codec import frozen

_IN_EVALUATIONS = "In evaluations: "
# Attributes of every callback; `parent` only if it was set.
_BASE = frozenset({"n_calls", "num_timesteps", "verbose", "locals", "globals", "parent", "model", "logger"})


def callback_states(root: BaseCallback) -> tuple[dict[str, Any], list[str]]:
    """
    Return the states of all callbacks, by place, and a text for each class with state that may be missing.

    A class may define ``training_state()`` and ``load_training_state(state)``. A resumed training calls the latter
    after ``_on_training_start``, before its first rollout.
    """
    states, differences = {}, []
    places = list(_places(root))
    known = {id(callback) for _, callback in places}
    for place, callback in places:
        states[place], reasons = _state(callback, known)
        differences += [reason for reason in reasons if reason not in differences]
    return states, differences


def compare_callbacks(root: BaseCallback, states: dict[str, Any]) -> None:
    """Warn of callbacks that only the checkpoint or only ``root`` has; set attributes that their start may read."""
    places = dict(_places(root))
    missing, new = sorted(states.keys() - places.keys()), sorted(places.keys() - states.keys())
    if missing:
        text = "Callbacks of the checkpoint are missing: %s. Pass them to learn() to keep their state."
        log.warning(text, ", ".join(missing))
    if new:
        log.warning("Callbacks that are not in the checkpoint start without a state: %s.", ", ".join(new))
    for place, callback in places.items():
        if place in states:
            # Copies: `restore_callbacks` sets them again.
            write_attributes(callback, frozen(states[place]["attributes"]), _attribute_names(callback))


def restore_callbacks(root: BaseCallback, states: dict[str, Any]) -> None:
    """Restore the states of callbacks that have started."""
    for place, callback in _places(root):
        if place in states:
            _restore(callback, states[place], place)


def without_repeats(differences: Iterable[str]) -> list[str]:
    """Drop those differences of evaluation environments that the training's environments also have."""
    texts = list(differences)
    return [text for text in texts if not text.startswith(_IN_EVALUATIONS) or text[len(_IN_EVALUATIONS) :] not in texts]


def _places(root: BaseCallback, above: str = "") -> Iterator[tuple[str, BaseCallback]]:
    """Yield each callback with its place: the classes above it, its own, and its number among several."""
    counts: Counter[str] = Counter()
    for callback in _without_lists(root):
        name = f"{above}{type(callback).__name__}"
        counts[name] += 1
        place = name if counts[name] == 1 else f"{name}[{counts[name]}]"
        yield place, callback
        for child in ("callback", "callback_on_new_best"):
            inner = vars(callback).get(child)
            if isinstance(callback, EventCallback) and isinstance(inner, BaseCallback):
                yield from _places(inner, f"{place}.{child}.")


def _without_lists(callback: BaseCallback) -> Iterator[BaseCallback]:
    # With a progress bar, `learn` creates a list by itself; it also wraps None.
    is_none = isinstance(callback, ConvertCallback) and callback.callback is None
    if isinstance(callback, CallbackList):
        if type(callback) is not CallbackList:
            yield callback
        for part in callback.callbacks:
            yield from _without_lists(part)
    elif not isinstance(callback, ProgressBarCallback) and not is_none:
        yield callback


def _state(callback: BaseCallback, known: set[int]) -> tuple[dict[str, Any], list[str]]:
    """Return the state of a callback; ``known`` are the ids of all callbacks whose states are returned."""
    name = full_name(type(callback))
    given = evaluation = None
    reasons = []
    if _has_own_state(callback):
        try:
            own_state = callback.training_state()  # type: ignore[attr-defined]
            given = {"state": frozen(own_state, f"{name}.training_state()")}
        except TypeError as error:
            reasons.append(f"{name} ({error}) starts again at a resume.")
    if _may_have_own_attributes(callback) and not _saves_own_attributes(callback):
        reasons.append(f"{name} may have unsaved state. Define training_state() and load_training_state() in it.")
    function = callback.callback if isinstance(callback, ConvertCallback) else None
    # What a method of another callback keeps, such as SB3's LogEveryNTimesteps._log_data, is that callback's state.
    if function is not None and id(getattr(function, "__self__", None)) not in known and _may_keep_state(function):
        own = full_name(function if hasattr(function, "__qualname__") else type(function))
        text = "may have unsaved state. Use a callback class with training_state() and load_training_state() instead."
        reasons.append(f"{own} {text}")
    if isinstance(callback, EvalCallback):
        state, unknown = vec_env_state(callback.eval_env)
        evaluation = {"build": describe_vec_env(callback.eval_env), "state": state}
        reasons += [f"{_IN_EVALUATIONS}{reason}" for reason in unknown]
    attributes = frozen(read_attributes(callback, _attribute_names(callback)), name)
    return {"attributes": attributes, "given": given, "evaluation": evaluation}, reasons


def _restore(callback: BaseCallback, state: dict[str, Any], place: str) -> None:
    write_attributes(callback, state["attributes"], _attribute_names(callback))
    if isinstance(callback, EvalCallback) and state["evaluation"] is not None:
        try:
            check_same_build(state["evaluation"]["build"], describe_vec_env(callback.eval_env))
        except EnvironmentMismatchError as error:
            log.warning("The environments of %s begin new episodes: %s", place, error)
        else:
            restore_vec_env(callback.eval_env, state["evaluation"]["state"])
    if state["given"] is not None and _has_own_state(callback):
        callback.load_training_state(state["given"]["state"])  # type: ignore[attr-defined]


def _attribute_names(callback: BaseCallback) -> str:
    return " ".join(ATTRIBUTES.get(full_name(base), "") for base in type(callback).__mro__)


def _has_own_state(callback: BaseCallback) -> bool:
    return all(callable(getattr(callback, method, None)) for method in ("training_state", "load_training_state"))


def _may_keep_state(function: Any) -> bool:
    """Return whether a function can reach anything that lasts, besides its arguments and builtins."""
    if not isinstance(function, FunctionType):
        return True
    code, outside = function.__code__, function.__globals__.keys()
    has_own = function.__closure__ or function.__defaults__ or function.__kwdefaults__ or vars(function)
    has_inner = any(isinstance(constant, CodeType) for constant in code.co_consts)
    return bool(has_own) or has_inner or not outside.isdisjoint(code.co_names)


def _saves_own_attributes(callback: BaseCallback) -> bool:
    """Return whether the methods for the state are not those of a class in ``ATTRIBUTES``, from which it is derived."""
    owners = (cls for cls in type(callback).__mro__ if "training_state" in vars(cls))
    return _has_own_state(callback) and full_name(next(owners, type(callback))) not in ATTRIBUTES


def _may_have_own_attributes(callback: BaseCallback) -> bool:
    """Return whether a class that is not in ``ATTRIBUTES`` has set attributes of its own, or may have done so."""
    classes = type(callback).__mro__
    own = [cls for cls in classes if full_name(cls) not in ATTRIBUTES and cls not in (ABC, object)]
    if next(cls for cls in classes if cls not in own) is BaseCallback:
        return bool(vars(callback).keys() - _BASE)
    # The attributes that a known class sets are not listed, so any method may have set others.
    return any(isinstance(value, FunctionType) for cls in own for value in vars(cls).values())
