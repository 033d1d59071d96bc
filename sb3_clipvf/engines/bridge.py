"""Conversions between PPO and kernels: settings, statistics, actions and random numbers."""

import math
from contextlib import nullcontext
from typing import Any

import numpy as np
import torch as th
from stable_baselines3.common import distributions as sb3
from stable_baselines3.common.distributions import Distribution

from sb3_clipvf import objectives
from sb3_clipvf.common.nonfinite import BadMinibatchError
from sb3_clipvf.distributions import category_counts, dist_param_dim, n_action_numbers
from sb3_clipvf.engines.epochs import MinibatchStatistics, UpdateRecord
from sb3_clipvf.engines.interface import UpdateCoefficients, UpdateSettings
from sb3_clipvf.engines.kernels import inputs
from sb3_clipvf.engines.kernels.losses import CLIPPED_MAX, CLIPPED_PREDICTION, NOT_CLIPPED
from sb3_clipvf.engines.kernels.totals import STAT, TOTAL

KINDS: dict[type[Distribution], int] = {
    sb3.CategoricalDistribution: inputs.CATEGORICAL,
    sb3.MultiCategoricalDistribution: inputs.CATEGORICAL,
    sb3.BernoulliDistribution: inputs.BERNOULLI,
    sb3.DiagGaussianDistribution: inputs.GAUSSIAN,
    sb3.StateDependentNoiseDistribution: inputs.STATE_DEPENDENT,
}
"""Kernels' constant for each action distribution."""

# Types of observations that kernels convert a minibatch at a time.
_OBS_TYPES = {
    np.dtype(np.float32): inputs.FLOAT32,
    np.dtype(np.float64): inputs.FLOAT64,
    np.dtype(np.uint8): inputs.UINT8,
    np.dtype(np.int8): inputs.INT8,
    np.dtype(np.bool_): inputs.UINT8,
}


def hyperparameters_of(
    settings: UpdateSettings,
    coefficients: UpdateCoefficients,
    optimizer: th.optim.Optimizer,
    n_steps: int,
    buffer: Any,
) -> np.ndarray:
    """
    Return settings, coefficients and the optimizer's options as :class:`.kernels.inputs.Hyperparameters`, float64.

    ``n_steps`` is the number of steps that the optimizer has taken, and ``buffer`` holds the rollout.
    """
    group = optimizer.param_groups[0]
    in_rollout = settings.normalizes_rollout
    shift, scale = 0.0, 1.0
    # Else not read, since a user's buffer may keep its advantages under another name.
    advantages = buffer.advantages if in_rollout else np.empty(0)
    if in_rollout and settings.group.size > 1:
        moments = settings.group.moments(advantages)
        shift, scale = moments.mean, moments.sample_std + objectives.ADVANTAGE_EPS
    elif in_rollout and advantages.size > 1:
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
        # With this option, torch's Adam decouples weight decay as AdamW does.
        decoupled=float(group.get("decoupled_weight_decay", isinstance(optimizer, th.optim.AdamW))),
        skips=float(settings.on_nonfinite == "skip"),
    )
    return np.array(hyperparameters, np.float64)


def changed(hyper: np.ndarray, **numbers: float) -> np.ndarray:
    """Return a copy of packed hyperparameters with some values changed."""
    return np.array(inputs.Hyperparameters(*hyper)._replace(**numbers), np.float64)


def set_advantage_moments(hyper: np.ndarray, mean: float, divisor: float) -> None:
    """Make kernels normalise advantages as ``(advantages - mean) / divisor``."""
    hyper[:] = changed(hyper, normalize=0.0, shift=mean, scale=divisor)


def _or_infinite(number: float | None) -> float:
    return math.inf if number is None else float(number)


def statistics_of(stats: np.ndarray, coefficients: UpdateCoefficients, measure_kl: bool) -> MinibatchStatistics:
    """Return a minibatch's terms and statistics from a kernel's array, indexed by :data:`.kernels.totals.STAT`."""
    numbers = stats.tolist()
    return MinibatchStatistics(
        policy_loss=numbers[STAT.policy_loss],
        value_loss=numbers[STAT.value_loss],
        entropy_loss=numbers[STAT.entropy_loss],
        kl=numbers[STAT.kl] if measure_kl else None,
        loss=numbers[STAT.loss],
        approx_kl=numbers[STAT.approx_kl],
        ratio_max=numbers[STAT.ratio_max],
        clip_fraction=None if coefficients.clip_range is None else numbers[STAT.clip_fraction],
        vf_clip_fraction=None if coefficients.clip_range_vf is None else numbers[STAT.vf_clip_fraction],
        grad_norm=None,
    )


def record_of(
    totals: np.ndarray, coefficients: UpdateCoefficients, settings: UpdateSettings, skipped: BadMinibatchError | None
) -> UpdateRecord:
    """Return the kernels' totals as the record of a single minibatch, which holds their means."""
    sums, n_in_epoch, n_epochs = totals.tolist(), totals[TOTAL.n_in_epoch], int(totals[TOTAL.n_epochs])
    n = sums[TOTAL.n_minibatches]
    mean = MinibatchStatistics(
        policy_loss=sums[TOTAL.policy_loss] / n,
        value_loss=sums[TOTAL.value_loss] / n,
        entropy_loss=sums[TOTAL.entropy_loss] / n,
        kl=sums[TOTAL.kl] / max(n_in_epoch, 1) if settings.measures_kl(n_epochs - 1, coefficients) else None,
        loss=sums[TOTAL.last_loss],
        approx_kl=sums[TOTAL.approx_kl] / max(n_in_epoch, 1),
        ratio_max=sums[TOTAL.ratio_max],
        clip_fraction=None if coefficients.clip_range is None else sums[TOTAL.clip_fraction] / n,
        vf_clip_fraction=None if coefficients.clip_range_vf is None else sums[TOTAL.vf_clip_fraction] / n,
        grad_norm=sums[TOTAL.grad_norm] / sums[TOTAL.n_steps] if sums[TOTAL.n_steps] else None,
    )
    return UpdateRecord(
        [mean],
        n_epochs=n_epochs,
        epoch_start=0 if n_in_epoch else 1,  # all minibatches of the last epoch may have been skipped
        n_skipped=int(totals[TOTAL.n_skipped]),
        skipped=skipped,
        stopped_at_kl=sums[TOTAL.stopped_at_kl] or None,
    )


def as_floats(array: np.ndarray) -> np.ndarray:
    """
    Return an array of the type that kernels are compiled for: float32, contiguous, aligned and writable.

    A kernel called with an array of a different type would be compiled again. Numbers beyond float32 become infinite,
    and a later check raises an error about them.
    """
    if type(array) is np.ndarray and array.dtype == np.float32 and array.flags.carray:
        return array  # a shortcut: the code below returns it, too
    with nullcontext() if array.dtype == np.float32 else np.errstate(over="ignore"):
        return np.require(array, np.float32, ["C", "A", "W", "E"])


def rollout_of(buffer: Any, has_dist_params: bool) -> inputs.RolloutArrays:
    """Return the arrays of a complete rollout as kernels read them; arrays of other types are cast."""
    n = buffer.buffer_size * buffer.n_envs
    observations, obs_type = buffer.observations, _OBS_TYPES.get(buffer.observations.dtype)
    if obs_type is None:
        observations, obs_type = as_floats(observations), inputs.FLOAT32
    return inputs.RolloutArrays(
        observations=np.require(observations, requirements=["C", "A", "W", "E"]).reshape(n, -1).view(np.uint8),
        obs_type=obs_type,
        actions=as_floats(buffer.actions).reshape(n, -1),
        old_values=as_floats(buffer.values).reshape(n),
        old_log_prob=as_floats(buffer.log_probs).reshape(n),
        advantages=as_floats(buffer.advantages).reshape(n),
        returns=as_floats(buffer.returns).reshape(n),
        old_dist=as_floats(buffer.dist_params).reshape(n, -1) if has_dist_params else np.empty((0, 0), np.float32),
        n_steps=int(buffer.buffer_size),
        n_envs=int(buffer.n_envs),
    )


def check_stored(dist: Distribution, actions: np.ndarray, old_dist: np.ndarray) -> None:
    """
    Check the widths of stored actions and distributions, and the range of actions: kernels would read out of bounds.

    ``actions`` are ``(n, action_dim)``, and ``old_dist`` the old distributions' parameters, ``(n, k)``, or ``(0, 0)``.
    """
    widths = {"dist_params": (old_dist, dist_param_dim(dist)), "actions": (actions, n_action_numbers(dist))}
    for name, (rows, width) in widths.items():
        if len(rows) and rows.shape[1] != width:
            raise ValueError(
                f"`rollout_buffer.{name}` must have {width} numbers per step, as {type(dist).__name__} has, got "
                f"{rows.shape[1]}. Correct the callback or the buffer class that stores them."
            )
    counts = category_counts(dist)
    if not len(counts):
        return
    in_range = (actions >= 0) & (actions < counts)
    if not in_range.all():
        wrong = actions[~in_range.all(axis=1)][0]
        raise ValueError(
            f"`rollout_buffer.actions` must be from 0 to below {counts.tolist()}, as the policy returns them, got "
            f"{wrong.tolist()}. Correct the callback or the buffer class that stores them."
        )


class Noise:
    """
    Random numbers for the actions of a step, drawn as torch's own distributions draw theirs.

    Therefore, a seed leads to the same actions on every engine, as long as the policies agree up to rounding.
    """

    def __init__(self, dist: Distribution) -> None:
        self._method = {inputs.GAUSSIAN: "normal_", inputs.BERNOULLI: "uniform_"}.get(KINDS[type(dist)], "exponential_")
        self._widths = category_counts(dist).tolist() or [n_action_numbers(dist)]
        self._n_rows = -1

    def next(self, n_rows: int) -> np.ndarray:
        """Draw the numbers of the next step, shape ``(n_rows, k)``; the next call overwrites them."""
        if n_rows != self._n_rows:
            parts = [th.empty(n_rows, width) for width in self._widths]
            self._draws = [getattr(part, self._method) for part in parts]
            self._arrays = [part.numpy() for part in parts]
            self._n_rows = n_rows
        for draw in self._draws:
            draw()
        return self._arrays[0] if len(self._arrays) == 1 else np.concatenate(self._arrays, axis=1)


def exploration_matrices(dist: sb3.StateDependentNoiseDistribution, n_envs: int, latent_dim: int) -> np.ndarray:
    """Return the matrices of SB3's ``get_noise``, stacked by rows: one for each environment, or one for all."""
    one_each = n_envs > 1 and n_envs == len(dist.exploration_matrices)
    matrices = (dist.exploration_matrices if one_each else dist.exploration_mat).detach().numpy()
    rows = matrices.reshape((n_envs if one_each else 1) * latent_dim, dist.action_dim)
    return as_floats(rows)
