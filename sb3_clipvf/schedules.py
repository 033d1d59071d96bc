"""
Coefficients that change during training: functions of progress, and controllers that follow the measured KL.

Progress is SB3's ``progress_remaining``: 1 at the start of training, 0 at its end. SB3 may pass a value slightly below
0 at the last update, because it counts the rollout before it updates; schedules here see it clamped to [0, 1].
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

from sb3_clipvf.common.validation import as_float

Schedule = Callable[[float], float]

SCHEDULE_STRINGS = "`lin_x`, `cos_x`, `exp_x` or `const_x` with a number x, for example `lin_0.2`"
COEFFICIENTS = ("clip_range", "clip_range_vf", "ent_coef", "vf_coef", "kl_coef")
"""Arguments of the loss that take a schedule."""

# Positive, or None, which switches them off. The others are at least 0, and 0 switches them off.
_POSITIVE = ("clip_range", "clip_range_vf")

EXPONENTIAL_DECAY = 100.0
"""An ``exp_x`` schedule ends at ``x / EXPONENTIAL_DECAY``."""


def clamp_progress(progress_remaining: float) -> float:
    """
    Hold progress within the horizon.

    :param progress_remaining: SB3's progress, any finite number.
    :return: The same within [0, 1].
    """
    return min(max(float(progress_remaining), 0.0), 1.0)


@dataclass(frozen=True)
class ConstantSchedule:
    """
    The same value throughout.

    :param value: Returned at any progress.
    """

    value: float

    def __call__(self, progress_remaining: float) -> float:
        """:return: The value at ``progress_remaining``."""
        return self.value


@dataclass(frozen=True)
class LinearSchedule:
    """
    From ``start`` to 0 along a line: ``start * p``.

    :param start: Value at the start of training.
    Source: Schulman et al. 2017, arXiv 1707.06347, table 5 (the factor alpha).
    """

    start: float

    def __call__(self, progress_remaining: float) -> float:
        """:return: The value at ``progress_remaining``."""
        return self.start * clamp_progress(progress_remaining)


@dataclass(frozen=True)
class CosineSchedule:
    """
    From ``start`` to 0 along half a cosine: ``start * (1 - cos(pi * p)) / 2``.

    :param start: Value at the start of training.
    Source: Loshchilov and Hutter 2017, arXiv 1608.03983, equation 5, without restarts and with a final value of 0.
    """

    start: float

    def __call__(self, progress_remaining: float) -> float:
        """:return: The value at ``progress_remaining``."""
        return self.start * (1.0 - math.cos(math.pi * clamp_progress(progress_remaining))) / 2.0


@dataclass(frozen=True)
class ExponentialSchedule:
    """
    From ``start`` to ``start / 100`` by a constant factor a step: ``start * 100**(p - 1)``.

    :param start: Value at the start of training.
    """

    start: float

    def __call__(self, progress_remaining: float) -> float:
        """:return: The value at ``progress_remaining``."""
        return float(self.start * EXPONENTIAL_DECAY ** (clamp_progress(progress_remaining) - 1.0))


@dataclass(frozen=True)
class ClampedSchedule:
    """
    A schedule of the user's, called with progress held within [0, 1].

    :param function: Progress to value.
    :param name: The argument that it was given for, for messages.
    """

    function: Schedule
    name: str = "schedule"

    def __call__(self, progress_remaining: float) -> float:
        """
        Call the user's function.

        :return: The value at ``progress_remaining``, at least 0.
        :raises TypeError: If the function does not turn one number into a number.
        :raises ValueError: If the value is negative or not finite.
        """
        progress = clamp_progress(progress_remaining)
        try:
            # float(): NumPy scalars would end up in the optimizer and in the saved file.
            value = float(self.function(progress) + 0.0)  # text is no number, whatever float() makes of it
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


_WITHOUT_EFFECT = (*_BY_PREFIX.values(), HostConstantSchedule, HostLinearSchedule)


def is_constant(value: Any) -> bool:
    """
    Tell whether a coefficient as the user gave it is a plain number or a ``const_x`` string.

    :param value: A number, a schedule or a string.
    :return: False for everything that may change with progress.
    """
    if isinstance(value, str):
        return value.startswith("const_")
    # SB3 and the RL Zoo wrap plain numbers in objects of their own.
    inner = getattr(value, "value_schedule", value)
    return isinstance(value, numbers.Real) or type(inner).__name__ == "ConstantSchedule"


def is_known(schedule: Schedule) -> bool:
    """
    Return whether a schedule may be called at any time, without side effects.

    :param schedule: From :func:`make_schedule`.
    :return: True for those of this module and of SB3, False for functions of the user's.
    """
    inner: Any = schedule.function if type(schedule) is ClampedSchedule else schedule
    if type(inner) is FloatSchedule:
        inner = inner.value_schedule
    return type(inner) in _WITHOUT_EFFECT


def make_schedule(value: Any, name: str, *, positive: bool = False) -> Schedule:
    """
    Build the schedule of a coefficient from what the user gave.

    :param value: A finite number, a function of SB3's progress_remaining (1 -> 0), or a string ``lin_x``, ``cos_x``,
        ``exp_x``, ``const_x`` with x its value at the start.
    :param name: The argument's name, for messages.
    :param positive: Whether the value must be above 0 at the start of training; else it may be 0. A function may
        reach 0 in any case, since annealing does.
    :return: Function of progress, which it clamps to [0, 1]. A function of the user's is not called before that.
    :raises TypeError: If ``value`` is none of these.
    :raises ValueError: If a string is not understood, or a number is not finite, or out of range.
    """
    rule = "positive and finite" if positive else "at least 0 and finite"
    if isinstance(value, str):
        schedule = _parse(value, name)
        start = schedule(1.0)
        in_range = start > 0 if positive else start >= 0
    elif isinstance(value, bool) or not (isinstance(value, numbers.Real) or callable(value)):
        raise TypeError(
            f"`{name}` must be a number, a function of progress or a string, got {value!r} of type "
            f"{type(value).__name__}. As a string use {SCHEDULE_STRINGS}."
        )
    elif isinstance(value, numbers.Real):
        start = as_float(value)
        schedule = ConstantSchedule(start)
        in_range = start > 0 if positive else start >= 0
    else:
        _check_signature(value, name)
        return ClampedSchedule(value, name)
    if not (math.isfinite(start) and in_range):
        raise ValueError(f"`{name}` must be {rule}, got {value!r}. Its value at the start of training is {start}.")
    return schedule


def schedule_of(value: Any, name: str, cache: dict[str, tuple[Any, Schedule]]) -> Schedule | None:
    """Return the schedule of a coefficient, or None if it is None; ``cache`` holds values and their schedules."""
    positive = name in _POSITIVE
    if value is None and positive:
        return None
    if name not in cache or cache[name][0] is not value:
        cache[name] = (value, make_schedule(value, name, positive=positive))
    return cache[name][1]


def _parse(text: str, name: str) -> Schedule:
    prefix, separator, number = text.partition("_")
    try:
        # Python takes "1_0" for 10.
        if not separator or prefix not in _BY_PREFIX or "_" in number:
            raise ValueError(prefix)
        return _BY_PREFIX[prefix](float(number))
    except ValueError:
        raise ValueError(f"`{name}` must be a schedule, got {text!r}. As a string use {SCHEDULE_STRINGS}.") from None


def _check_signature(function: Any, name: str) -> None:
    """Refuse a function of other arguments without calling it: one with a state would be a call ahead of SB3's."""
    try:
        inspect.signature(function).bind(1.0)
    except ValueError:  # some functions in C have no signature
        return
    except TypeError as error:
        raise _not_a_schedule(name, function, "takes other arguments", error) from error


def _not_a_schedule(name: str, function: Any, fault: str, error: Exception) -> TypeError:
    return TypeError(
        f"`{name}` must be a function of one number that returns a number, got {function!r}, which {fault}: {error}. "
        "Write it as `lambda progress_remaining: ...`."
    )


@dataclass(frozen=True)
class AdaptiveKL:
    """
    The KL penalty's coefficient, adapted once an update so that the KL stays near a target.

    ``d < target / 1.5``: beta is halved; ``d > 1.5 * target``: beta is doubled; in between it stays. The new beta
    serves the next update.

    :param beta: Current coefficient, in [beta_min, beta_max].
    :param target: d_targ, nats, positive.
    :param beta_min: Lower bound, positive: a beta of 0 could never grow again.
    :param beta_max: Upper bound.
    Source: Schulman et al. 2017, arXiv 1707.06347, section 4. The bounds are ours; the paper has none.
    """

    beta: float
    target: float
    beta_min: float = 1e-6
    beta_max: float = 1e6

    def next(self, kl: float) -> "AdaptiveKL":
        """
        Apply the rule to the KL measured after an update.

        :param kl: Mean exact KL(pi_old || pi) over the rollout, nats. A KL that is not finite means that the policy
            left every bound, and counts as too large.
        :return: The state for the next update.
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
    A learning rate adapted once an update so that the KL stays near a target.

    ``kl > 2 * target``: divided by 1.5; ``0 < kl < target / 2``: multiplied by 1.5; else it stays.

    :param learning_rate: Current rate, in [lr_min, lr_max].
    :param target: nats, positive.
    :param lr_min: Lower bound.
    :param lr_max: Upper bound.
    Source: rsl_rl, ``algorithms/ppo.py`` (schedule "adaptive"), with its factors and bounds. Departure: rsl_rl adapts
        at each minibatch; here it is once an update, from the KL after it, so that the update needs no device read.
    """

    learning_rate: float
    target: float
    lr_min: float = 1e-5
    lr_max: float = 1e-2

    def next(self, kl: float) -> "KLAdaptiveLR":
        """
        Apply the rule to the KL measured after an update.

        :param kl: Mean exact KL(pi_old || pi) over the rollout, nats. Exactly 0 says that nothing moved or nothing was
            measured, and leaves the rate; a KL that is not finite counts as too large.
        :return: The state for the next update.
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
