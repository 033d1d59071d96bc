"""The coefficients of an update: what the user gave, at the progress that training has made."""

from typing import TYPE_CHECKING, cast

import numpy as np

from sb3_clipvf.engines import UpdateCoefficients
from sb3_clipvf.messages import log
from sb3_clipvf.schedules import Schedule, is_constant, make_schedule

if TYPE_CHECKING:
    from sb3_clipvf.clip_ppo import ClipPPO

NAMES = ("clip_range", "clip_range_vf", "ent_coef", "vf_coef", "kl_coef")
_POSITIVE = ("clip_range", "clip_range_vf")
# None switches these off; the others take 0 for that.
_OPTIONAL = ("clip_range", "clip_range_vf")

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
    value = getattr(model, name)
    if value is None and name in _OPTIONAL:
        return None
    if name not in model._schedules or model._schedules[name][0] is not value:
        model._schedules[name] = (value, make_schedule(value, name, positive=name in _POSITIVE))
    return model._schedules[name][1]


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


def warn_of_early_end(model: "ClipPPO", total_timesteps: int, reset_num_timesteps: bool) -> None:
    """
    Say where a call of ``learn`` leaves schedules at their end for most or all of it.

    As in SB3, progress is counted after a rollout was collected, and over the steps of this call and those before it:
    a call of one rollout updates at progress 0, and so does nearly each of many continued calls.

    :param model: About to learn.
    :param total_timesteps: Environment steps of this call.
    :param reset_num_timesteps: Whether counting starts at 0.
    """
    if model._schedule_timesteps is not None or model._warned_of_early_end:
        return
    one_rollout = total_timesteps <= model.n_steps * model.n_envs
    continued = not reset_num_timesteps and model.num_timesteps > 0
    given = {name: getattr(model, name) for name in ("learning_rate", *NAMES)}
    annealed = [name for name, value in given.items() if isinstance(value, str) and not is_constant(value)]
    if annealed and (one_rollout or continued):
        model._warned_of_early_end = True
        log.warning(
            "learn() ends the schedules of %s with this call, so it updates at or near their end values (as in SB3). "
            "Where training goes over several calls, pass schedule_timesteps=<all of its steps>, or constant values.",
            ", ".join(annealed),
        )
