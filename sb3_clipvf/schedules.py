"""
Coefficients that change during training: functions of progress, and controllers that adapt to the measured KL.

Progress is SB3's ``progress_remaining``: 1 at the start of training, 0 at its end. SB3 counts a rollout before its
update, so progress may be slightly below 0 at the last update. Schedules clamp it to [0, 1].
"""

import inspect
import math
import numbers
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, TypeVar

from stable_baselines3.common.utils import ConstantSchedule as HostConstantSchedule
from stable_baselines3.common.utils import FloatSchedule
from stable_baselines3.common.utils import LinearSchedule as HostLinearSchedule

from sb3_clipvf.common.validation import as_float, wrong_type

Schedule = Callable[[float], float]

SCHEDULE_STRINGS = "`lin_x`, `cos_x`, `exp_x` or `const_x` with a number x, for example `lin_0.2`"
COEFFICIENTS = ("clip_range", "clip_range_vf", "ent_coef", "vf_coef", "kl_coef")
"""Arguments of the loss that take a schedule."""
CONTROLLERS = {"kl_coef": "adaptive_kl", "learning_rate": "adaptive_lr"}
"""Attributes of the controllers that adapt an argument, by the argument, which holds their initial value."""

# Positive, or None, which switches them off. The others are at least 0, and 0 switches them off.
_POSITIVE = ("clip_range", "clip_range_vf")

EXPONENTIAL_DECAY = 100.0
"""An ``exp_x`` schedule ends at ``x / EXPONENTIAL_DECAY``."""


def clamp_progress(progress_remaining: float) -> float:
    """Return SB3's progress clamped to [0, 1]."""
    return min(max(float(progress_remaining), 0.0), 1.0)


@dataclass(frozen=True)
class ConstantSchedule:
    """
    A constant.

    :param value: Value at any progress.
    """

    value: float

    def __call__(self, progress_remaining: float) -> float:
        """Return the value at ``progress_remaining``."""
        return self.value


@dataclass(frozen=True)
class LinearSchedule:
    """
    Linear decay from ``start`` to 0: ``start * p``.

    :param start: Value at the start of training.
    Source: Schulman et al. 2017, arXiv 1707.06347, table 5 (the factor alpha).
    """

    start: float

    def __call__(self, progress_remaining: float) -> float:
        """Return the value at ``progress_remaining``."""
        return self.start * clamp_progress(progress_remaining)


@dataclass(frozen=True)
class CosineSchedule:
    """
    Cosine decay from ``start`` to 0: ``start * (1 - cos(pi * p)) / 2``.

    :param start: Value at the start of training.
    Source: Loshchilov and Hutter 2017, arXiv 1608.03983, equation 5, without restarts and with a final value of 0.
    """

    start: float

    def __call__(self, progress_remaining: float) -> float:
        """Return the value at ``progress_remaining``."""
        return self.start * (1.0 - math.cos(math.pi * clamp_progress(progress_remaining))) / 2.0


@dataclass(frozen=True)
class ExponentialSchedule:
    """
    Exponential decay from ``start`` to ``start / 100``: ``start * 100**(p - 1)``.

    :param start: Value at the start of training.
    """

    start: float

    def __call__(self, progress_remaining: float) -> float:
        """Return the value at ``progress_remaining``."""
        return float(self.start * EXPONENTIAL_DECAY ** (clamp_progress(progress_remaining) - 1.0))


@dataclass(frozen=True)
class ClampedSchedule:
    """
    A user's function, called with progress clamped to [0, 1].

    A call raises ``TypeError`` if the function does not map one number to a number, and ``ValueError`` if the value is
    negative or not finite.

    :param function: Function of progress.
    :param name: Argument that the function was passed for, named in messages.
    """

    function: Schedule
    name: str = "schedule"

    def __call__(self, progress_remaining: float) -> float:
        """Return the value at ``progress_remaining``."""
        progress = clamp_progress(progress_remaining)
        try:
            # float(), since NumPy scalars would end up in the optimizer and in the saved file. Adding 0.0 refuses text.
            value = float(self.function(progress) + 0.0)
        except TypeError as error:
            raise _not_a_schedule(self.name, self.function, f"failed at progress {progress:g}", error) from error
        if not (math.isfinite(value) and value >= 0):
            raise ValueError(
                f"`{self.name}` must be at least 0 and finite, got {value} from {self.function!r} at "
                f"progress_remaining={progress:g}. Correct the function."
            )
        return value


_BY_PREFIX: dict[str, Callable[[float], Schedule]] = {
    "lin": LinearSchedule,
    "cos": CosineSchedule,
    "exp": ExponentialSchedule,
    "const": ConstantSchedule,
}

_KNOWN = (*_BY_PREFIX.values(), HostConstantSchedule, HostLinearSchedule)


def make_schedule(value: Any, name: str, *, positive: bool = False) -> Schedule:
    """
    Build the schedule of a coefficient.

    :param value: A number, a function of ``progress_remaining`` (1 -> 0), or a string ``lin_x``, ``cos_x``, ``exp_x``,
        ``const_x`` with x the value at the start. A function is not called here.
    :param name: Argument's name, for messages.
    :param positive: Whether a number or a string must be above 0 at the start of training, instead of at least 0,
        since None turns the coefficient off. A function may always reach 0.
    :return: Function of progress, which it clamps to [0, 1].
    :raises TypeError: If ``value`` is of a different type, or a function does not take one argument.
    :raises ValueError: If a string has a different form, or the value at the start is not finite or out of range.
    """
    if isinstance(value, str):
        schedule = _parse(value, name)
    elif isinstance(value, numbers.Real) and not isinstance(value, bool):
        schedule = ConstantSchedule(as_float(value))
    elif callable(value):
        _check_signature(value, name)
        return ClampedSchedule(value, name)
    else:
        raise wrong_type(
            name, "a number, a function of progress or a string", value, f"As a string use {SCHEDULE_STRINGS}."
        )
    start = schedule(1.0)
    if not math.isfinite(start) or start < 0 or (positive and start == 0):
        rule = "positive and finite" if positive else "at least 0 and finite"
        hint = " None turns it off." if positive else ""
        text = f"`{name}` must be {rule}, got {value!r}. Its value at the start of training is {start}.{hint}"
        raise ValueError(text)
    return schedule


def schedule_of(value: Any, name: str, cache: dict[str, tuple[Any, Schedule]]) -> Schedule | None:
    """Return the schedule of a coefficient, or None if it is None; ``cache`` holds values and their schedules."""
    positive = name in _POSITIVE
    if value is None and positive:
        return None
    if name not in cache or cache[name][0] is not value:
        cache[name] = (value, make_schedule(value, name, positive=positive))
    return cache[name][1]


def is_constant(value: Any) -> bool:
    """Return whether a coefficient, as passed by the user, is a number, a ``const_x`` string or a constant schedule."""
    if isinstance(value, str):
        return value.startswith("const_")
    return isinstance(value, numbers.Real) or type(_unwrapped(value)) in (ConstantSchedule, HostConstantSchedule)


def is_known(schedule: Schedule) -> bool:
    """Return whether a schedule from :func:`make_schedule` is ours or SB3's, so that a call has no side effects."""
    return type(_inner(schedule)) in _KNOWN


def is_zero(schedule: Schedule | None) -> bool:
    """Return whether a schedule from :func:`make_schedule` is known to be 0 at any progress."""
    inner = _inner(schedule)
    # The values of these types are multiples of the first one.
    return type(inner) in (*_BY_PREFIX.values(), HostConstantSchedule) and inner(1.0) == 0


def _inner(schedule: Schedule | None) -> Any:
    return _unwrapped(schedule.function if type(schedule) is ClampedSchedule else schedule)


def _unwrapped(schedule: Any) -> Any:
    return schedule.value_schedule if type(schedule) is FloatSchedule else schedule


def _parse(text: str, name: str) -> Schedule:
    prefix, separator, number = text.partition("_")
    try:
        # float("1_0") is 10.
        if not separator or prefix not in _BY_PREFIX or "_" in number:
            raise ValueError(prefix)
        return _BY_PREFIX[prefix](float(number))
    except ValueError:
        raise ValueError(f"`{name}` must be a schedule, got {text!r}. As a string use {SCHEDULE_STRINGS}.") from None


def _check_signature(function: Any, name: str) -> None:
    """Refuse a function that does not take one argument. It is not called: it may have a state."""
    try:
        inspect.signature(function).bind(1.0)
    except ValueError:  # some C functions have no signature
        return
    except TypeError as error:
        raise _not_a_schedule(name, function, "takes different arguments", error) from error


def _not_a_schedule(name: str, function: Any, fault: str, error: Exception) -> TypeError:
    return TypeError(
        f"`{name}` must be a function of one number that returns a number, got {function!r}, which {fault}: {error}. "
        "Write it as `lambda progress_remaining: ...`."
    )


@dataclass(frozen=True)
class AdaptiveKL:
    """
    Coefficient of the KL penalty, adapted after each update to keep the KL near a target.

    Beta is halved if ``kl < target / 1.5`` and doubled if ``kl > 1.5 * target``. The next update uses the new beta.

    :param beta: Current coefficient, in [beta_min, beta_max].
    :param target: d_targ, nats, positive.
    :param beta_min: Lower bound, positive: a beta of 0 could never grow again.
    :param beta_max: Upper bound.
    Source: Schulman et al. 2017, arXiv 1707.06347, section 4. Departure: the paper has no bounds.
    """

    beta: float
    target: float
    beta_min: float = 1e-6
    beta_max: float = 1e6

    def next(self, kl: float) -> "AdaptiveKL":
        """
        Apply the rule to the KL measured after an update.

        :param kl: Mean exact KL(pi_old || pi) over the rollout, nats. A non-finite KL counts as too large.
        :return: State for the next update.
        """
        beta = self.beta
        if not kl <= 1.5 * self.target:
            beta = beta * 2
        elif kl < self.target / 1.5:
            beta = beta / 2
        return replace(self, beta=min(max(beta, self.beta_min), self.beta_max))


@dataclass(frozen=True)
class KLAdaptiveLR:
    """
    Learning rate, adapted after each update to keep the KL near a target.

    The rate is divided by 1.5 if ``kl > 2 * target`` and multiplied by 1.5 if ``0 < kl < target / 2``.

    :param learning_rate: Current rate, in [lr_min, lr_max].
    :param target: Target KL, nats, positive.
    :param lr_min: Lower bound.
    :param lr_max: Upper bound.
    Source: rsl_rl, ``algorithms/ppo.py`` (schedule "adaptive"), with its factors and bounds. Departure: rsl_rl adapts
        at each minibatch. Adapting after the update needs no device read within it.
    """

    learning_rate: float
    target: float
    lr_min: float = 1e-5
    lr_max: float = 1e-2

    def next(self, kl: float) -> "KLAdaptiveLR":
        """
        Apply the rule to the KL measured after an update.

        :param kl: Mean exact KL(pi_old || pi) over the rollout, nats. Exactly 0 means that nothing moved or nothing was
            measured, and keeps the rate. A non-finite KL counts as too large.
        :return: State for the next update.
        """
        rate = self.learning_rate
        if not kl <= 2.0 * self.target:
            rate = max(self.lr_min, rate / 1.5)
        elif 0.0 < kl < self.target / 2.0:
            rate = min(self.lr_max, rate * 1.5)
        return replace(self, learning_rate=rate)


ControllerT = TypeVar("ControllerT", AdaptiveKL, KLAdaptiveLR)


def make_controller(
    kind: type[ControllerT], kept: ControllerT | None, target: float | None, schedule: Schedule
) -> ControllerT | None:
    """Return ``kept`` with this target, or a controller that starts at ``schedule(1.0)``; None without a target."""
    if target is None:
        return None
    return kind(schedule(1.0), target) if kept is None else replace(kept, target=target)
