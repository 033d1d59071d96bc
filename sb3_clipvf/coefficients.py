"""The coefficients of an update: what the user gave, at the progress that training has made."""

from typing import TYPE_CHECKING, cast

import numpy as np

from sb3_clipvf import schedules
from sb3_clipvf.common.messages import log
from sb3_clipvf.engines.interface import UpdateCoefficients
from sb3_clipvf.schedules import Schedule, clamp_progress, is_known

if TYPE_CHECKING:
    from sb3_clipvf.clip_ppo import ClipPPO

NAMES = schedules.COEFFICIENTS

SPREAD_EPS = 1e-6
"""Returns whose standard deviation is below this share of the largest one differ by rounding alone."""


def schedule_of(model: "ClipPPO", name: str) -> Schedule | None:
    """
    The schedule of a coefficient; built anew when the attribute was replaced, as callbacks do.

    :param model: Keeps the schedules that were built.
    :param name: One of :data:`NAMES`.
    :return: Function of progress, or None where the coefficient is None.
    :raises TypeError: If the attribute is no coefficient.
    :raises ValueError: If it is out of range.
    """
    return schedules.schedule_of(getattr(model, name), name, model._schedules)


def update_coefficients(model: "ClipPPO") -> UpdateCoefficients:
    """
    Read all coefficients for one update.

    ``clip_range_vf`` in units of the returns' standard deviation is turned into return units. Where the returns have no
    spread there is no unit, and the value loss of this update is not clipped.

    :param model: With a complete rollout.
    :return: Numbers.
    """
    progress = model._current_progress_remaining
    values = {name: None if (schedule := schedule_of(model, name)) is None else schedule(progress) for name in NAMES}
    if values["clip_range_vf"] is not None and model.vf_clip_units == "return_std":
        returns = model.rollout_buffer.returns
        spread = float(np.std(returns))
        has_spread = spread > SPREAD_EPS * float(np.max(np.abs(returns)))
        values["clip_range_vf"] = values["clip_range_vf"] * spread if has_spread else None
    if model.adaptive_kl is not None:
        values["kl_coef"] = model.adaptive_kl.beta
    return UpdateCoefficients(
        clip_range=values["clip_range"],
        clip_range_vf=values["clip_range_vf"],
        ent_coef=cast(float, values["ent_coef"]),
        vf_coef=cast(float, values["vf_coef"]),
        kl_coef=cast(float, values["kl_coef"]),
    )


def warn_of_early_end(
    model: "ClipPPO", total_timesteps: int, reset_num_timesteps: bool, *, on_command_line: bool = False
) -> None:
    """
    Warn once if the schedules are in their second half during a whole call of ``learn``, with their values there.

    As in SB3, progress is counted after a rollout was collected, and over the steps of this call and those before it:
    a call of one rollout updates at progress 0, and so does nearly each of many continued calls. Functions of the user
    are not among the schedules: calling them once more may change what they return.

    :param model: About to learn.
    :param total_timesteps: Environment steps of this call.
    :param reset_num_timesteps: Whether counting starts at 0.
    :param on_command_line: Whether the user can change options of the command, rather than arguments of ``learn``.
    """
    if model._schedule_timesteps is not None or model._warned_of_early_end or not total_timesteps:
        return
    rollout = model.n_steps * model.n_envs
    before = 0 if reset_num_timesteps else model.num_timesteps
    first = clamp_progress(1.0 - (before + rollout) / (before + total_timesteps))
    annealed = {} if first >= 0.5 else _annealed(model)
    if not annealed:
        return
    model._warned_of_early_end = True
    if total_timesteps <= rollout:
        values = " and ".join(f"`{name}` is {schedule(0.0):.3g}" for name, schedule in annealed.items())
        what = f"collects one rollout: {values} in its only update"
    else:
        values = ", ".join(
            f"`{name}` is {schedule(first):.3g} in its first update and {schedule(0.0):.3g} in its last"
            for name, schedule in annealed.items()
        )
        what = f"is at the end of its schedules: {values}"
    constants = {name: f"{schedule(1.0):.3g}" for name, schedule in annealed.items()}
    if on_command_line:
        params = " ".join(f"{name}:{value}" for name, value in constants.items())
        way_out = f"Train for more rollouts of {rollout} steps (`-n`), or at constant values: `-params {params}`."
    else:
        arguments = ", ".join(f"{name}={value}" for name, value in constants.items())
        way_out = (
            "Where training runs over several calls, pass schedule_timesteps=<all of its steps> to the first one and "
            f"reset_num_timesteps=False to the others. Or train at constant values: {arguments}."
        )
    training = "The training" if on_command_line else "learn()"
    log.warning("%s %s, since schedules end with it, as in SB3. %s", training, what, way_out)


def _annealed(model: "ClipPPO") -> dict[str, Schedule]:
    """:return: The schedules that change with progress, by coefficient, without functions of the user."""
    by_name = {"learning_rate": model.lr_schedule, **{name: schedule_of(model, name) for name in NAMES}}
    known = {name: schedule for name, schedule in by_name.items() if schedule is not None and is_known(schedule)}
    return {name: schedule for name, schedule in known.items() if schedule(1.0) != schedule(0.0)}
