"""What the engines that call kernels share: translating what kernels are given and give back."""

import math
from typing import Any, cast

import numpy as np
import torch as th
from gymnasium import spaces
from stable_baselines3.common.distributions import (
    BernoulliDistribution,
    CategoricalDistribution,
    DiagGaussianDistribution,
    Distribution,
    MultiCategoricalDistribution,
    StateDependentNoiseDistribution,
)

from sb3_clipvf import objectives
from sb3_clipvf.common.nonfinite import BadMinibatchError
from sb3_clipvf.distributions import dist_param_dim
from sb3_clipvf.engines.binding import n_action_numbers
from sb3_clipvf.engines.interface import UpdateCoefficients, UpdateSettings, UpdateStatistics, named_terms
from sb3_clipvf.engines.kernels import inputs
from sb3_clipvf.engines.kernels.losses import CLIPPED_MAX, CLIPPED_PREDICTION, NOT_CLIPPED
from sb3_clipvf.engines.kernels.totals import STAT, TOTAL

_KINDS: dict[type[Distribution], int] = {
    CategoricalDistribution: inputs.CATEGORICAL,
    MultiCategoricalDistribution: inputs.CATEGORICAL,
    BernoulliDistribution: inputs.BERNOULLI,
    DiagGaussianDistribution: inputs.GAUSSIAN,
    StateDependentNoiseDistribution: inputs.STATE_DEPENDENT,
}


def kind_of(dist: Distribution) -> int:
    """
    Say which kind the kernels call a distribution.

    :param dist: One that they know.
    :return: A kind of :mod:`.kernels.inputs`.
    """
    return _KINDS[type(dist)]


def widths_of(dist: Distribution) -> np.ndarray:
    """
    List how many actions the categorical distributions have that a distribution consists of.

    :param dist: Any that the kernels know.
    :return: int64; empty where it is of another kind.
    """
    if isinstance(dist, CategoricalDistribution):
        return np.array([dist.action_dim], np.int64)
    return np.array(dist.action_dims if isinstance(dist, MultiCategoricalDistribution) else [], np.int64)


def check_stored(dist: Distribution, actions: np.ndarray, old_dist: np.ndarray) -> None:
    """
    Refuse what a rollout may hold that a distribution does not have: kernels would read beyond its rows.

    :param dist: Any that the kernels know.
    :param actions: Shape ``(n, action_dim)``, as the rollout holds them.
    :param old_dist: Parameters of the old distribution, shape ``(n, k)``; ``(0, 0)`` without.
    :raises ValueError: If one is no action of the distribution, or rows are wider or narrower than its own.
    """
    width = dist_param_dim(dist)
    if old_dist.size and old_dist.shape[1] != width:
        raise ValueError(
            f"`rollout_buffer.dist_params` must have {width} numbers a step, as {type(dist).__name__} has, got "
            f"{old_dist.shape[1]}. Correct the callback or the buffer class that stores them."
        )
    if actions.shape[1] != n_action_numbers(dist):
        raise ValueError(
            f"`rollout_buffer.actions` must have {n_action_numbers(dist)} numbers an action, as the policy gives them, "
            f"got {actions.shape[1]}. Correct the callback or the buffer class that stores them."
        )
    widths = widths_of(dist)
    if not len(widths):
        return
    are_known = (actions >= 0) & (actions < widths)
    if not are_known.all():
        wrong = actions[~are_known.all(axis=1)][0]
        raise ValueError(
            f"`rollout_buffer.actions` must count from 0 to below {widths.tolist()}, as the policy gives them, got "
            f"{wrong.tolist()}. Correct the callback or the buffer class that stores them."
        )


def update_numbers(
    settings: UpdateSettings,
    coefficients: UpdateCoefficients,
    optimizer: th.optim.Optimizer,
    n_steps: int,
    advantages: np.ndarray,
) -> np.ndarray:
    """
    Collect what an update needs beside the rollout.

    :param settings: What stays the same over all updates.
    :param coefficients: Of this update.
    :param optimizer: Adam or AdamW with one parameter group.
    :param n_steps: Steps that it has made.
    :param advantages: Of the rollout, where they are normalised over it.
    :return: float64, for :func:`sb3_clipvf.engines.kernels.inputs.unpack_hyperparameters`.
    """
    group = optimizer.param_groups[0]
    in_rollout = settings.normalize_advantage and settings.advantage_scope == "rollout"
    shift, scale = 0.0, 1.0
    if in_rollout and advantages.size > 1:
        shift = float(advantages.mean(dtype=np.float64))
        scale = float(advantages.std(dtype=np.float64, ddof=1)) + objectives.ADVANTAGE_EPS
    form = NOT_CLIPPED
    if coefficients.clip_range_vf is not None:
        form = CLIPPED_MAX if settings.vf_clip == "max" else CLIPPED_PREDICTION
    with_kl = [float(epoch) for epoch in range(settings.n_epochs) if settings.measures_kl(epoch, coefficients)]
    hyperparameters = inputs.Hyperparameters(
        clip_range=_or_infinite(coefficients.clip_range),
        value_form=float(form),
        clip_range_vf=_or_infinite(coefficients.clip_range_vf),
        ent_coef=float(coefficients.ent_coef),
        vf_coef=float(coefficients.vf_coef),
        kl_coef=float(coefficients.kl_coef),
        normalize=float(settings.normalize_advantage and not in_rollout),
        shift=shift,
        scale=scale,
        advantage_eps=objectives.ADVANTAGE_EPS,
        max_grad_norm=float(settings.max_grad_norm),
        target_kl=_or_infinite(settings.target_kl),
        kl_from_epoch=min(with_kl, default=math.inf),
        step=float(n_steps),
        learning_rate=float(group["lr"]),
        beta1=float(group["betas"][0]),
        beta2=float(group["betas"][1]),
        eps=float(group["eps"]),
        weight_decay=float(group["weight_decay"]),
        # torch's Adam takes AdamW's form by this option, too.
        decoupled=float(group.get("decoupled_weight_decay", isinstance(optimizer, th.optim.AdamW))),
        skips=float(settings.on_nonfinite == "skip"),
    )
    return np.array(hyperparameters, np.float64)


def statistics_of(
    totals: np.ndarray,
    coefficients: UpdateCoefficients,
    settings: UpdateSettings,
    kl_after: float | None,
    skipped: BadMinibatchError | None,
) -> UpdateStatistics:
    """
    Turn the kernels' totals into what an engine gives back.

    :param totals: Sums over minibatches, from the kernels.
    :param coefficients: Of this update.
    :param settings: What stays the same over all updates.
    :param kl_after: Exact KL over the rollout after the update, nats; None if not asked for.
    :param skipped: The first minibatch that was skipped, or None.
    :return: Statistics.
    """
    looked_at, in_epoch = totals[TOTAL.n_minibatches], totals[TOTAL.n_in_epoch]
    names = {
        "policy_gradient_loss": TOTAL.policy_loss,
        "value_loss": TOTAL.value_loss,
        "entropy_loss": TOTAL.entropy_loss,
    }
    if coefficients.clip_range is not None:
        names["clip_fraction"] = TOTAL.clip_fraction
    if coefficients.clip_range_vf is not None:
        names["vf_clip_fraction"] = TOTAL.vf_clip_fraction
    means = {name: _scalar(totals[place] / looked_at) for name, place in names.items()}
    if totals[TOTAL.n_steps]:
        means["grad_norm"] = _scalar(totals[TOTAL.grad_norm] / totals[TOTAL.n_steps])
    n_epochs = int(totals[TOTAL.n_epochs])
    # All of the last epoch may have been skipped.
    knows_kl = settings.measures_kl(n_epochs - 1, coefficients) and in_epoch > 0
    stopped_at = float(totals[TOTAL.stopped_at_kl])
    return UpdateStatistics(
        means=means,
        last_loss=_scalar(totals[TOTAL.last_loss]),
        approx_kl=_scalar(totals[TOTAL.approx_kl] / in_epoch if in_epoch else math.nan),
        kl=_scalar(totals[TOTAL.kl] / in_epoch) if knows_kl else None,
        kl_after=None if kl_after is None else _scalar(kl_after),
        ratio_max=_scalar(totals[TOTAL.ratio_max]),
        n_epochs=n_epochs,
        stopped_at_kl=stopped_at or None,
        n_skipped=int(totals[TOTAL.n_skipped]),
        skipped=skipped,
    )


def terms_of(told: np.ndarray, coefficients: UpdateCoefficients) -> dict[str, float]:
    """
    Name the terms of a minibatch's loss, and its gradient norm.

    :param told: What the kernels told of the minibatch.
    :param coefficients: Of this update.
    :return: As :class:`BadMinibatchError` takes them.
    """
    return named_terms(
        coefficients,
        policy_loss=float(told[STAT.policy_loss]),
        value_loss=float(told[STAT.value_loss]),
        entropy_loss=float(told[STAT.entropy_loss]),
        kl=float(told[STAT.kl]),
        loss=float(told[STAT.loss]),
        grad_norm=math.sqrt(told[STAT.actor_squares] + told[STAT.critic_squares]),
    )


def _scalar(number: float) -> th.Tensor:
    return th.tensor(number, dtype=th.float64)


def _or_infinite(number: float | None) -> float:
    return math.inf if number is None else float(number)


class Noise:
    """
    Random numbers for the actions of a step, drawn as torch's own distributions draw theirs.

    So a seed gives the same actions on every engine, as long as the policies agree to rounding.

    :param kind: Of the distribution, as kernels call it.
    :param action_dim: Numbers of an action.
    :param widths: Actions of each categorical distribution, if it is of that kind.
    """

    def __init__(self, kind: int, action_dim: int, widths: list[int]) -> None:
        self._kind = kind
        self._widths = widths or [action_dim]
        self._n_rows = -1

    def next(self, n_rows: int) -> np.ndarray:
        """
        Draw the numbers of the next step.

        :param n_rows: Number of environments that act.
        :return: Shape ``(n_rows, k)``; good until the next call.
        """
        if n_rows != self._n_rows:
            # Kernels only read them, so that each step's numbers may overwrite the last one's.
            self._parts = [th.empty(n_rows, width) for width in self._widths]
            self._arrays = [part.numpy() for part in self._parts]
            self._n_rows = n_rows
        for part in self._parts:
            if self._kind == inputs.GAUSSIAN:
                part.normal_()
            elif self._kind == inputs.BERNOULLI:
                part.uniform_()
            else:
                part.exponential_()
        return self._arrays[0] if len(self._arrays) == 1 else np.concatenate(self._arrays, axis=1)


def as_policy_gives(actions: np.ndarray, space: spaces.Space[Any]) -> np.ndarray:
    """
    Give actions the type and the shape that SB3's policies give them.

    :param actions: float32, shape ``(n, action_dim)``.
    :param space: Of the policy's actions.
    :return: Shape ``(n, ...)``.
    """
    if isinstance(space, spaces.Discrete):
        return actions.reshape(-1).astype(np.int64)
    if isinstance(space, spaces.MultiDiscrete):
        return actions.astype(np.int64)
    return np.asarray(actions.reshape(-1, *cast(tuple[int, ...], space.shape)))
