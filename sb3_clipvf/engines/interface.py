"""What an engine is given and what it gives back: plain data, shared by all engines."""

from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol

import numpy as np
import torch as th
from stable_baselines3.common.policies import ActorCriticPolicy

from sb3_clipvf.common.nonfinite import BadMinibatchError


@dataclass(frozen=True)
class UpdateSettings:
    """
    What an update needs to know beside its coefficients; equal settings mean that an engine can be used again.

    :param batch_size: Transitions in each minibatch.
    :param n_epochs: Passes over the rollout.
    :param normalize_advantage: Whether advantages are normalised.
    :param advantage_scope: "minibatch" or "rollout": over what they are normalised.
    :param vf_clip: "max" or "prediction": the form of the clipped value loss.
    :param max_grad_norm: Bound on the joint gradient norm.
    :param target_kl: Leave the update before a step whose minibatch exceeds 1.5 times this (estimator k3, nats).
    :param measure_kl_after: Whether to measure the exact KL over the whole rollout after the last step.
    :param has_dist_params: Whether minibatches hold the old distribution's parameters.
    :param discrete_actions: Whether actions are class indices, which policies take as integers of shape ``(n,)``.
    :param needs_kl: Whether an argument needs the exact KL; else it is measured only where that costs no forward pass.
    :param on_nonfinite: "raise" or "skip": whether the first minibatch whose loss or gradient norm is not finite ends
        the update, or is left out. It makes no step in either case.
    """

    batch_size: int
    n_epochs: int
    normalize_advantage: bool
    advantage_scope: str
    vf_clip: str
    max_grad_norm: float
    target_kl: float | None
    measure_kl_after: bool
    has_dist_params: bool
    discrete_actions: bool
    needs_kl: bool = False
    on_nonfinite: str = "raise"

    def measures_kl(self, epoch: int, coefficients: "UpdateCoefficients") -> bool:
        """
        Tell whether an epoch's minibatches measure the exact KL.

        :param epoch: Counts from 0.
        :param coefficients: Of this update.
        :return: True where the loss holds it, and in each epoch that may be the last one, whose mean is logged.
        """
        may_be_last = self.target_kl is not None or epoch == self.n_epochs - 1
        return self.has_dist_params and (coefficients.kl_coef != 0 or may_be_last)


@dataclass(frozen=True)
class UpdateCoefficients:
    """
    Coefficients of one update.

    :param clip_range: epsilon of the ratio clip; None: not clipped.
    :param clip_range_vf: Largest change of a value prediction that is let through, return units; None: not clipped.
    :param ent_coef: Weight of the entropy.
    :param vf_coef: Weight of the value loss.
    :param kl_coef: beta, weight of the KL penalty; 0: none.
    """

    clip_range: float | None
    clip_range_vf: float | None
    ent_coef: float
    vf_coef: float
    kl_coef: float


@dataclass(frozen=True)
class UpdateStatistics:
    """
    What an update did. Tensors stay on the device where they were computed; reading them is the caller's choice.

    Unless said otherwise, each is the mean over all minibatches that were looked at, the one that ``target_kl`` stopped
    at included, as in SB3, and without those that were skipped.

    :param means: Scalars by SB3's log key without "train/".
    :param last_loss: Loss of the last minibatch.
    :param approx_kl: Estimator k3, mean over the last epoch, nats.
    :param kl: Exact KL(pi_old || pi), mean over the last epoch before each step, nats; None where it is not known.
    :param kl_after: Exact KL(pi_old || pi) over the whole rollout after the last step, nats; None if not asked for.
    :param ratio_max: Largest ratio of the update.
    :param n_epochs: Epochs begun.
    :param stopped_at_kl: The k3 estimate, in nats, at which ``target_kl`` ended the update; None if it did not.
    :param n_skipped: Minibatches that were skipped.
    :param skipped: The first of them, or None.
    """

    means: dict[str, th.Tensor]
    last_loss: th.Tensor
    approx_kl: th.Tensor
    kl: th.Tensor | None
    kl_after: th.Tensor | None
    ratio_max: th.Tensor
    n_epochs: int
    stopped_at_kl: float | None
    n_skipped: int = 0
    skipped: BadMinibatchError | None = None

    def read(self) -> dict[str, float]:
        """
        Bring the statistics to the host: the one device read of an update.

        :return: Numbers by log key without "train/".
        """
        scalars = {**self.means, "approx_kl": self.approx_kl, "ratio_max": self.ratio_max, "loss": self.last_loss}
        if self.kl is not None:
            scalars["kl"] = self.kl
        if self.kl_after is not None:
            scalars["kl_after_update"] = self.kl_after
        numbers = th.stack([scalar.double() for scalar in scalars.values()]).tolist()
        return dict(zip(scalars, numbers, strict=True))


class Acted(NamedTuple):
    """
    What a rollout stores of one step of all environments, on the host.

    :param actions: As the policy gives them, shape ``(n_envs, ...)``.
    :param values: Shape ``(n_envs, 1)``, return units.
    :param log_prob: Shape ``(n_envs,)``, nats.
    :param dist_params: The distribution's parameters, shape ``(n_envs, k)``; None where they were not wanted, or the
        distribution is of an unknown type.
    :param is_finite: Whether observations, values and log-probabilities are; None where the engine has not looked.
    """

    actions: np.ndarray
    values: np.ndarray
    log_prob: np.ndarray
    dist_params: np.ndarray | None
    is_finite: bool | None = None

    def as_tensors(self) -> tuple[np.ndarray, th.Tensor, th.Tensor, th.Tensor | None]:
        """:return: Actions; values, log-probabilities and parameters as tensors that share memory with the arrays."""
        dist_params = None if self.dist_params is None else th.from_numpy(self.dist_params)
        return self.actions, th.from_numpy(self.values), th.from_numpy(self.log_prob), dist_params


class Engine(Protocol):
    """What runs a policy in rollouts and updates it; engines differ in speed, never in meaning."""

    name: str
    acts_on_arrays: bool
    """Whether :meth:`act` takes arrays, of the host; else tensors, on the policy's device."""
    policy: ActorCriticPolicy
    settings: UpdateSettings
    compile_seconds: float
    """Seconds that compiling or loading kernels took since this was last set to 0."""

    def fits(self, buffer: Any) -> bool:
        """
        Tell whether this engine still runs its policy, which someone may have changed.

        :param buffer: The rollout buffer.
        :return: False where another engine must be chosen.
        """

    def set_training_mode(self, mode: bool) -> None:
        """
        Say to the policy whether it is being trained.

        :param mode: Whether it is.
        """

    def begin_rollout(self, buffer: Any) -> None:
        """
        Make ready for the steps of a rollout.

        :param buffer: Will be filled.
        """

    def act(self, observations: Any, *, with_dist_params: bool) -> Acted:
        """
        Sample one action for each environment.

        :param observations: Arrays where :attr:`acts_on_arrays`, else tensors on the policy's device, shape
            ``(n_envs, *obs_shape)``, or a dict of such.
        :param with_dist_params: Whether the distribution's parameters are wanted.
        :return: What the rollout stores.
        """

    def predict_values(self, observations: Any) -> th.Tensor:
        """
        Predict the values of observations.

        :param observations: Tensors on the policy's device, shape ``(n, *obs_shape)``, or a dict of such.
        :return: Shape ``(n, 1)``, return units.
        """

    def update(self, buffer: Any, coefficients: UpdateCoefficients) -> UpdateStatistics:
        """
        Run the epochs of one update.

        :param buffer: A complete rollout.
        :param coefficients: Of this update.
        :return: Statistics.
        :raises BadMinibatchError: If a minibatch is not finite, unless it may be skipped; or if each one was skipped.
        """


def named_terms(
    coefficients: UpdateCoefficients,
    *,
    policy_loss: float,
    value_loss: float,
    entropy_loss: float,
    kl: float,
    loss: float,
    grad_norm: float,
) -> dict[str, float]:
    """
    Name the terms of a minibatch's loss, for :class:`BadMinibatchError`.

    :param coefficients: Of this update.
    :param policy_loss: Without weight, as the other terms.
    :param value_loss: Squared return units.
    :param entropy_loss: nats.
    :param kl: Exact KL, nats; counts where it is a term of the loss.
    :param loss: The weighted sum that the engine has looked at.
    :param grad_norm: Before it is bounded.
    :return: In the order in which they are looked at.
    """
    terms = {"policy_loss": policy_loss, "value_loss": value_loss, "entropy_loss": entropy_loss}
    if coefficients.kl_coef:
        terms["kl"] = kl
    return {**terms, "loss": loss, "grad_norm": grad_norm}
