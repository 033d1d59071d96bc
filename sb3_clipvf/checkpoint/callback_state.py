"""The state of a training's callbacks, found again by their place in the tree and their class."""

from collections import Counter
from collections.abc import Iterable, Iterator
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
from sb3_clipvf.checkpoint.state_attributes import CALLBACKS, read_attributes, write_attributes
from sb3_clipvf.checkpoint.vec_env_state import check_same_build, describe_vec_env, restore_vec_env, vec_env_state
from sb3_clipvf.common.messages import log
from sb3_clipvf.files.allowlist import full_name
from sb3_clipvf.files.codec import frozen

_IN_EVALUATIONS = "In evaluations: "
# What every callback has; `parent` is there where someone gave one.
_BASE = frozenset({"n_calls", "num_timesteps", "verbose", "locals", "globals", "parent", "model", "logger"})


def callback_states(root: BaseCallback) -> tuple[dict[str, Any], list[str]]:
    """
    Read the states of all callbacks.

    A class may give its own by ``training_state()``, and take it by ``load_training_state(state)``.

    :param root: What ``learn`` made of its argument.
    :return: States, by place and class; and for each class that may keep more than was read, what differs for it.
    """
    states, differences = {}, []
    for place, callback in _places(root):
        states[place], reasons = _state(callback)
        differences += [reason for reason in reasons if reason not in differences]
    return states, differences


def told_once(differences: Iterable[str]) -> list[str]:
    """
    Drop differences of evaluations that the training's environments have too.

    :param differences: Texts on what differs after a resume.
    :return: The others.
    """
    texts = list(differences)
    return [text for text in texts if not text.startswith(_IN_EVALUATIONS) or text[len(_IN_EVALUATIONS) :] not in texts]


def restore_callbacks(root: BaseCallback, states: dict[str, Any]) -> None:
    """
    Put callbacks into their states; a warning names those that are not in both trainings.

    :param root: Initialised.
    :param states: From :func:`callback_states`.
    """
    places = dict(_places(root))
    gone, new = sorted(states.keys() - places.keys()), sorted(places.keys() - states.keys())
    if gone:
        log.warning("Callbacks of the checkpoint are missing here, and their state is dropped: %s.", ", ".join(gone))
    if new:
        log.warning("Callbacks that the checkpoint does not know start anew: %s.", ", ".join(new))
    for place, callback in places.items():
        if place in states:
            _restore(callback, states[place], place)


def _places(root: BaseCallback, above: str = "") -> Iterator[tuple[str, BaseCallback]]:
    """Each callback with its place: the classes above it, its own, and which one it is of several."""
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
    # Lists keep nothing of their own, and `learn` itself puts one around a progress bar, or a function around nothing.
    if isinstance(callback, CallbackList):
        for part in callback.callbacks:
            yield from _without_lists(part)
    elif not isinstance(callback, ProgressBarCallback) and not _is_nothing(callback):
        yield callback


def _is_nothing(callback: BaseCallback) -> bool:
    return isinstance(callback, ConvertCallback) and callback.callback is None


def _state(callback: BaseCallback) -> tuple[dict[str, Any], list[str]]:
    name = full_name(type(callback))
    reasons = []
    given = None
    if _gives_state(callback):
        given = {"state": frozen(callback.training_state(), f"{name}.training_state()")}  # type: ignore[attr-defined]
    elif _may_keep_more(callback):
        reasons.append(
            f"{name} may keep more than is saved of a callback. Give it training_state() and load_training_state()."
        )
    evaluation = None
    if isinstance(callback, EvalCallback):
        state, unknown = vec_env_state(callback.eval_env)
        evaluation = {"build": describe_vec_env(callback.eval_env), "state": state}
        reasons += [f"{_IN_EVALUATIONS}{reason}" for reason in unknown]
    attributes = frozen(read_attributes(callback, _attributes(type(callback))), name)
    return {"attributes": attributes, "given": given, "evaluation": evaluation}, reasons


def _restore(callback: BaseCallback, state: dict[str, Any], place: str) -> None:
    write_attributes(callback, state["attributes"])
    if isinstance(callback, EvalCallback) and state["evaluation"] is not None:
        try:
            check_same_build(state["evaluation"]["build"], describe_vec_env(callback.eval_env))
        except EnvironmentMismatchError as error:
            log.warning("The environments of %s start anew: %s", place, error)
        else:
            restore_vec_env(callback.eval_env, state["evaluation"]["state"])
    if state["given"] is not None and _gives_state(callback):
        callback.load_training_state(state["given"]["state"])  # type: ignore[attr-defined]


def _gives_state(callback: BaseCallback) -> bool:
    return all(callable(getattr(callback, method, None)) for method in ("training_state", "load_training_state"))


def _attributes(cls: type) -> tuple[str, ...]:
    return tuple(name for base in cls.__mro__ for name in CALLBACKS.get(full_name(base), ()))


def _may_keep_more(callback: BaseCallback) -> bool:
    own = [cls for cls in type(callback).__mro__ if issubclass(cls, BaseCallback) and full_name(cls) not in CALLBACKS]
    if not own:
        return False
    if type(callback).__mro__[len(own)] is BaseCallback:
        return bool(vars(callback).keys() - _BASE)
    return any("__init__" in vars(cls) for cls in own)
