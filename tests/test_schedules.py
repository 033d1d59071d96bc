"""Schedules as functions of progress, their strings, and the KL controllers."""

import functools
import math
import pickle
from typing import Any

import numpy as np
import pytest
from stable_baselines3.common.utils import ConstantSchedule as HostConstantSchedule
from stable_baselines3.common.utils import FloatSchedule
from stable_baselines3.common.utils import LinearSchedule as HostLinearSchedule

from sb3_clipvf.schedules import (
    AdaptiveKL,
    ClampedSchedule,
    ConstantSchedule,
    CosineSchedule,
    ExponentialSchedule,
    KLAdaptiveLR,
    LinearSchedule,
    clamp_progress,
    is_constant,
    is_zero,
    make_controller,
    make_schedule,
    schedule_of,
)

# Rounding of two or three float64 operations.
EXACT = 1e-12


class TestSchedules:
    @pytest.mark.parametrize(
        ("text", "expected"),
        [
            # progress:   1, 3/4, 1/2, 1/4, 0
            ("const_0.2", [0.2, 0.2, 0.2, 0.2, 0.2]),
            ("lin_0.2", [0.2, 0.15, 0.1, 0.05, 0]),
            # (1 - cos(pi p)) / 2: cos(3 pi / 4) = -sqrt(1/2), cos(pi / 4) = sqrt(1/2)
            ("cos_2", [2, 1 + math.sqrt(0.5), 1, 1 - math.sqrt(0.5), 0]),
            # 100^(p - 1): 100^(-1/4) = 1 / sqrt(10), 100^(-1/2) = 1/10, 100^(-3/4) = 1 / (10 sqrt(10))
            ("exp_3", [3, 3 / math.sqrt(10), 0.3, 0.3 / math.sqrt(10), 0.03]),
        ],
    )
    def test_golden(self, text: str, expected: list[float]) -> None:
        schedule = make_schedule(text, "clip_range")
        assert [schedule(p) for p in (1.0, 0.75, 0.5, 0.25, 0.0)] == pytest.approx(expected, abs=EXACT)

    @pytest.mark.parametrize("number", [3, 3.5, np.float32(0.5), np.int64(2)])
    def test_a_number_becomes_a_constant_plain_float(self, number: Any) -> None:
        schedule = make_schedule(number, "vf_coef")
        assert schedule == ConstantSchedule(float(number))
        assert type(schedule(0.3)) is float

    @pytest.mark.parametrize("text", ["const_0.2", "lin_0.2", "cos_0.2", "exp_0.2"])
    def test_strings_are_clamped_to_the_horizon(self, text: str) -> None:
        schedule = make_schedule(text, "clip_range")
        assert schedule(-0.5) == schedule(0.0) >= 0
        assert schedule(1.5) == schedule(1.0) == pytest.approx(0.2, abs=EXACT)

    def test_a_users_function_sees_progress_within_the_horizon(self) -> None:
        seen: list[float] = []

        def schedule(progress_remaining: float) -> np.float32:
            seen.append(progress_remaining)
            return np.float32(0.5)

        value = make_schedule(schedule, "ent_coef")(-0.1)
        # Clamped, and not called before
        assert seen == [0.0]
        # NumPy scalars would end up in the optimizer and in the saved file
        assert type(value) is float

    def test_clamp_progress(self) -> None:
        assert [clamp_progress(p) for p in (-1, -1e-9, 0, 0.25, 1, 1 + 1e-9, 7)] == [0, 0, 0, 0.25, 1, 1, 1]

    @pytest.mark.parametrize(
        "schedule", [ConstantSchedule(0.5), LinearSchedule(0.5), CosineSchedule(0.5), ExponentialSchedule(0.5)]
    )
    def test_schedules_are_immutable_and_can_be_pickled(self, schedule: Any) -> None:
        copy = pickle.loads(pickle.dumps(schedule))
        assert copy == schedule
        assert copy(0.3) == schedule(0.3)
        with pytest.raises(AttributeError, match="cannot assign"):
            schedule.start = 1.0

    def test_sb3s_schedules_are_functions_as_well(self) -> None:
        schedule = make_schedule(HostLinearSchedule(1.0, 0.0, 0.5), "learning_rate")
        assert isinstance(schedule, ClampedSchedule)
        # SB3's end_fraction 0.5: the end value from the middle of training on
        assert [schedule(p) for p in (1.0, 0.75, 0.5, 0.0)] == pytest.approx([1, 0.5, 0, 0], abs=EXACT)

    def test_zero_is_the_lowest_start_unless_it_must_be_positive(self) -> None:
        assert make_schedule(0, "ent_coef")(1.0) == 0
        assert make_schedule("lin_0", "ent_coef")(1.0) == 0
        assert make_schedule(1e-9, "clip_range", positive=True)(1.0) == 1e-9
        # A function may start at 0 in any case, as warm-ups do
        assert make_schedule(lambda p: 1 - p, "clip_range", positive=True)(1.0) == 0

    @pytest.mark.parametrize(
        "value",
        [0.1, 1, np.float64(0.1), "const_0.1", HostConstantSchedule(0.1), FloatSchedule(0.1), ConstantSchedule(0.1)],
    )
    def test_constants_are_recognised(self, value: Any) -> None:
        assert is_constant(value)

    @pytest.mark.parametrize(
        "value",
        ["lin_0.1", "exp_0.1", lambda p: 0.1, LinearSchedule(0.1), FloatSchedule(lambda p: 0.1)],
    )
    def test_schedules_that_may_change_are_not_constant(self, value: Any) -> None:
        assert not is_constant(value)


ZEROS = [0, "const_0", "lin_0", "cos_0", "exp_0", LinearSchedule(0.0), HostConstantSchedule(0.0), FloatSchedule(0.0)]


@pytest.mark.parametrize("value", ZEROS)
def test_schedules_that_stay_zero(value: Any) -> None:
    assert is_zero(make_schedule(value, "kl_coef"))


@pytest.mark.parametrize("value", [1e-9, "lin_0.1", HostLinearSchedule(0.0, 1.0, 1.0), lambda p: 0.0])
def test_schedules_that_may_leave_zero(value: Any) -> None:
    assert not is_zero(make_schedule(value, "kl_coef"))


class TestScheduleOf:
    def test_a_schedule_is_built_again_only_when_its_value_is_replaced(self) -> None:
        cache: dict[str, Any] = {}
        first = schedule_of("lin_0.2", "clip_range", cache)
        assert schedule_of("lin_0.2", "clip_range", cache) is first
        assert schedule_of("lin_0.4", "clip_range", cache) == LinearSchedule(0.4)

    def test_none_switches_ranges_off(self) -> None:
        assert schedule_of(None, "clip_range", {}) is schedule_of(None, "clip_range_vf", {}) is None
        with pytest.raises(TypeError, match="`ent_coef` must be a number, a function of progress or a string, got Non"):
            schedule_of(None, "ent_coef", {})

    def test_only_ranges_must_be_positive(self) -> None:
        assert schedule_of(0, "kl_coef", {}) == ConstantSchedule(0.0)
        with pytest.raises(ValueError, match="`clip_range_vf` must be positive"):
            schedule_of(0, "clip_range_vf", {})


class TestBadSchedules:
    @pytest.mark.parametrize(
        "text", ["0.2", "", "lin", "lin_", "lin_x", "linear_0.2", "LIN_0.2", "step_0.2", "lin-0.2", "_0.2", "lin_1_0"]
    )
    def test_unknown_strings(self, text: str) -> None:
        message = (
            rf"`clip_range` must be a schedule, got '{text}'\. As a string use `lin_x`, `cos_x`, `exp_x` or `const_x`"
        )
        with pytest.raises(ValueError, match=message):
            make_schedule(text, "clip_range")

    @pytest.mark.parametrize("value", [None, [0.2], {"lin": 0.2}, True, 1j])
    def test_wrong_types(self, value: Any) -> None:
        message = r"`vf_coef` must be a number, a function of progress or a string, got .* of type .*`lin_x`"
        with pytest.raises(TypeError, match=message):
            make_schedule(value, "vf_coef")

    @pytest.mark.parametrize("value", [-1e-9, math.nan, math.inf, "lin_-1", "const_nan", "cos_inf"])
    def test_out_of_range(self, value: Any) -> None:
        message = r"`ent_coef` must be at least 0 and finite, got .* Its value at the start of training is"
        with pytest.raises(ValueError, match=message):
            make_schedule(value, "ent_coef")

    @pytest.mark.parametrize("value", [0, 0.0, "lin_0", "const_0", -0.2, math.inf])
    def test_not_positive(self, value: Any) -> None:
        with pytest.raises(ValueError, match=r"`clip_range` must be positive and finite, got .* None turns it off\.$"):
            make_schedule(value, "clip_range", positive=True)

    @pytest.mark.parametrize("function", [lambda: 0.2, lambda p, q: 0.2, lambda *, p: 0.2])
    def test_functions_of_other_arguments_are_refused_uncalled(self, function: Any) -> None:
        message = r"`clip_range` must be a function of one number that returns a number, .* `lambda progress_remaining"
        with pytest.raises(TypeError, match=message):
            make_schedule(function, "clip_range")

    @pytest.mark.parametrize("function", [lambda p: None, lambda p: p + "", ConstantSchedule])
    def test_functions_that_return_no_number_are_refused_when_they_are_called(self, function: Any) -> None:
        schedule = make_schedule(function, "clip_range")
        message = (
            r"`clip_range` must be a function of one number that returns a number, got .*, which failed at progress "
            r"0\.5: .* `lambda progress_remaining"
        )
        with pytest.raises(TypeError, match=message):
            schedule(0.5)
        with pytest.raises(TypeError, match=message):
            make_schedule(lambda _: "0.2", "clip_range")(0.5)

    @pytest.mark.parametrize("function", [abs, math.sqrt, functools.partial(pow, 0.5), np.square])
    def test_functions_in_c_are_functions_as_well(self, function: Any) -> None:
        assert make_schedule(function, "clip_range")(1.0) in (0.5, 1.0)

    @pytest.mark.parametrize("bad", [-1e-9, math.nan, math.inf, -math.inf])
    def test_functions_with_values_out_of_range(self, bad: float) -> None:
        message = r"`ent_coef` must be at least 0 and finite, got .* from <function .* at progress_remaining="
        with pytest.raises(ValueError, match=message + r"1\. Correct the function\."):
            make_schedule(lambda p: bad, "ent_coef")(1.0)
        schedule = make_schedule(lambda p: bad if p < 0.5 else 0.0, "ent_coef")
        assert schedule(0.5) == 0
        with pytest.raises(ValueError, match=message + r"0\.25\. Correct the function\."):
            schedule(0.25)


class TestAdaptiveKL:
    # Targets of 1.5 make the thresholds, 1 and 2.25, exact in floating point.
    STATE = AdaptiveKL(beta=4.0, target=1.5, beta_min=1.0, beta_max=16.0)

    @pytest.mark.parametrize(
        ("kl", "beta"),
        [
            (0.0, 2.0),
            (0.999, 2.0),
            (1.0, 4.0),  # d < d_targ / 1.5 is strict
            (1.5, 4.0),
            (2.25, 4.0),  # d > 1.5 d_targ is strict
            (2.251, 8.0),
            (math.inf, 8.0),
            (math.nan, 8.0),  # the KL overflowed: too large
        ],
    )
    def test_rule(self, kl: float, beta: float) -> None:
        assert self.STATE.next(kl) == AdaptiveKL(beta=beta, target=1.5, beta_min=1.0, beta_max=16.0)

    def test_bounds(self) -> None:
        state = self.STATE
        for _ in range(10):
            state = state.next(0.0)
        assert state.beta == 1.0
        for _ in range(10):
            state = state.next(100.0)
        assert state.beta == 16.0

    def test_default_bounds_leave_room(self) -> None:
        state = AdaptiveKL(beta=1.0, target=0.01)
        assert (state.beta_min, state.beta_max) == (1e-6, 1e6)

    def test_it_is_immutable_and_can_be_pickled(self) -> None:
        with pytest.raises(AttributeError, match="cannot assign"):
            self.STATE.beta = 1.0  # type: ignore[misc]
        assert pickle.loads(pickle.dumps(self.STATE)) == self.STATE


class TestKLAdaptiveLR:
    # Thresholds: half of the target, 0.5, and twice the target, 2.
    STATE = KLAdaptiveLR(learning_rate=3e-4, target=1.0, lr_min=1e-4, lr_max=1e-3)

    @pytest.mark.parametrize(
        ("kl", "rate"),
        [
            (0.0, 3e-4),  # nothing moved, or nothing was measured
            (1e-12, 4.5e-4),
            (0.499, 4.5e-4),
            (0.5, 3e-4),
            (1.0, 3e-4),
            (2.0, 3e-4),
            (2.001, 2e-4),
            (math.inf, 2e-4),
            (math.nan, 2e-4),
        ],
    )
    def test_rule(self, kl: float, rate: float) -> None:
        state = self.STATE.next(kl)
        assert state.learning_rate == pytest.approx(rate, rel=EXACT)
        assert (state.target, state.lr_min, state.lr_max) == (1.0, 1e-4, 1e-3)

    def test_bounds(self) -> None:
        state = self.STATE
        for _ in range(10):
            state = state.next(0.1)
        assert state.learning_rate == 1e-3
        for _ in range(10):
            state = state.next(100.0)
        assert state.learning_rate == 1e-4

    def test_default_bounds(self) -> None:
        state = KLAdaptiveLR(learning_rate=3e-4, target=0.01)
        assert (state.lr_min, state.lr_max) == (1e-5, 1e-2)


@pytest.mark.parametrize("kind", [AdaptiveKL, KLAdaptiveLR])
class TestMakeController:
    def test_without_a_target_there_is_none(self, kind: Any) -> None:
        assert make_controller(kind, kind(0.1, 0.01), None, LinearSchedule(3e-4)) is None

    def test_it_starts_at_the_schedules_initial_value(self, kind: Any) -> None:
        assert make_controller(kind, None, 0.01, LinearSchedule(3e-4)) == kind(3e-4, 0.01)

    def test_a_kept_one_changes_only_its_target(self, kind: Any) -> None:
        assert make_controller(kind, kind(0.1, 0.01), 0.02, LinearSchedule(3e-4)) == kind(0.1, 0.02)
