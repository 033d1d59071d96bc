"""The update of a training: run by its engine, ended or gone on with where minibatches were not finite."""

from typing import TYPE_CHECKING

from sb3_clipvf.common.messages import log
from sb3_clipvf.common.nonfinite import MAX_UPDATES_WITH_SKIPS, BadMinibatchError
from sb3_clipvf.engines.interface import Engine, UpdateCoefficients, UpdateStatistics
from sb3_clipvf.guards.diagnosis import update_error
from sb3_clipvf.rollout import check_complete

if TYPE_CHECKING:
    from sb3_clipvf.clip_ppo import ClipPPO


def guarded_update(model: "ClipPPO", engine: Engine, coefficients: UpdateCoefficients) -> UpdateStatistics:
    """
    Run an update, and tell of minibatches that were not finite.

    :param model: With a complete rollout; it counts the updates in a row that have skipped some.
    :param engine: Its engine.
    :param coefficients: Of this update.
    :return: Statistics.
    :raises NonFiniteError: At the first of them, or where too many were skipped.
    """
    try:
        statistics = engine.update(model.rollout_buffer, coefficients)
    except BadMinibatchError as bad:
        all_skipped = "training has ended since all minibatches of the update were skipped."
        raise update_error(model, bad, all_skipped if model.on_nonfinite == "skip" else "") from None
    except AssertionError:
        check_complete(model.rollout_buffer)  # SB3's `get` asserts it without a word
        raise
    model._updates_with_skips = model._updates_with_skips + 1 if statistics.n_skipped else 0
    if statistics.skipped is None:
        return statistics
    if model._updates_with_skips > MAX_UPDATES_WITH_SKIPS:
        in_a_row = f"training has ended since {model._updates_with_skips} updates in a row have skipped minibatches."
        raise update_error(model, statistics.skipped, in_a_row)
    if model._updates_with_skips == 1:
        log.warning(
            "%d minibatches were skipped in the update at num_timesteps=%d, the first one since %s. "
            "`train/skipped_minibatches` counts them; training ends after %d updates in a row that skip some.",
            statistics.n_skipped,
            model.num_timesteps,
            statistics.skipped,
            MAX_UPDATES_WITH_SKIPS + 1,
        )
    return statistics
