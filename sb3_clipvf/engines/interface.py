"""The interface of engines: settings, coefficients, statistics and methods."""

from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol

import numpy as np
import torch as th
from stable_baselines3.common.policies import ActorCriticPolicy

from sb3_clipvf.common.nonfinite import BadMinibatchError
from sb3_clipvf.common.tensors import double_device, to_double
from sb3_clipvf.distributed import ALONE, Group


@dataclass(frozen=True)
class UpdateSettings:
    """Settings that all updates of a run share, unlike the coefficients."""

    batch_size: int  #: Transitions in each minibatch.
    n_epochs: int  #: Passes over the rollout.
    normalize_advantage: bool  #: Whether advantages are normalised.
    advantage_scope: str  #: "minibatch" or "rollout", over which they are normalised.
    vf_clip: str  #: "max" or "prediction": the form of the clipped value loss.
    max_grad_norm: float  #: Bound on the joint gradient norm.
    #: nats. The update ends before the step of the first minibatch whose estimate k3 exceeds 1.5 times this.
    target_kl: float | None
    measure_kl_after: bool  #: Whether to measure the exact KL over the whole rollout after the last step.
    has_dist_params: bool  #: Whether minibatches hold the old distribution's parameters.
    discrete_actions: bool  #: Whether actions are class indices, which policies expect as integers of shape ``(n,)``.
    #: Whether an argument of ClipPPO needs the exact KL; else it is measured only if that costs no forward pass.
    needs_kl: bool = False
    #: How to handle a minibatch with a non-finite loss or gradient norm: "raise" ends the update, "skip" continues with
    #: the next minibatch. No step is taken for this one in either case.
    on_nonfinite: str = "raise"
    group: Group = ALONE  #: Processes that update the policy together, each from its own rollout.

    @property
    def normalizes_rollout(self) -> bool:
        """Whether advantages are normalised over the rollout, not in minibatches."""
        return self.normalize_advantage and self.advantage_scope == "rollout"

    def measures_kl(self, epoch: int, coefficients: "UpdateCoefficients") -> bool:
        """Return whether an epoch measures the exact KL: the loss needs it, or the epoch may be the last one."""
        may_be_last = self.target_kl is not None or epoch == self.n_epochs - 1
        return self.has_dist_params and (coefficients.kl_coef != 0 or may_be_last)


@dataclass(frozen=True)
class UpdateCoefficients:
    """Coefficients of one update."""

    clip_range: float | None  #: epsilon of the ratio clip; None: not clipped.
    clip_range_vf: float | None  #: Largest change of a value prediction, return units; None: not clipped.
    ent_coef: float  #: Weight of the entropy.
    vf_coef: float  #: Weight of the value loss.
    kl_coef: float  #: beta, weight of the KL penalty; 0: none.


@dataclass(frozen=True)
class UpdateStatistics:
    """
    Statistics of an update. Tensors stay on the device until the caller reads them.

    Means are over all minibatches that were not skipped, and include the one at which ``target_kl`` stopped, as in SB3.
    """

    means: dict[str, th.Tensor]  #: Scalars by SB3's log key without "train/".
    last_loss: th.Tensor  #: Loss of the last minibatch.
    approx_kl: th.Tensor  #: Estimator k3, mean over the last epoch, nats.
    kl: th.Tensor | None  #: Exact KL(pi_old || pi) before each step, mean of the last epoch, nats; None: unknown.
    #: Exact KL(pi_old || pi) over the rollout after the last step, nats; None: not measured.
    kl_after: th.Tensor | None
    ratio_max: th.Tensor  #: Largest ratio of the update.
    n_epochs: int  #: Epochs begun.
    stopped_at_kl: float | None  #: Estimate k3, nats, at which ``target_kl`` ended the update; None: it did not.
    n_skipped: int = 0  #: Number of skipped minibatches.
    skipped: BadMinibatchError | None = None  #: The first of them.

    def read(self) -> dict[str, float]:
        """Return the numbers by log key without "train/", in one read of the device (or two, with ``kl_after``)."""
        scalars = {**self.means, "approx_kl": self.approx_kl, "ratio_max": self.ratio_max, "loss": self.last_loss}
        if self.kl is not None:
            scalars["kl"] = self.kl
        if self.kl_after is not None:
            scalars["kl_after_update"] = self.kl_after
        # The KL after the update may be on the device although the engine has read the others.
        device = double_device(self.last_loss.device)
        numbers = th.stack([to_double(scalar).to(device) for scalar in scalars.values()]).tolist()
        return dict(zip(scalars, numbers, strict=True))


class Acted(NamedTuple):
    """One step of all environments for the rollout buffer, as arrays on the host."""

    actions: np.ndarray  #: Actions as the policy returns them, shape ``(n_envs, ...)``.
    values: np.ndarray  #: Shape ``(n_envs, 1)``, return units.
    log_prob: np.ndarray  #: Shape ``(n_envs,)``, nats.
    #: Parameters of the action distribution, ``(n_envs, k)``; None: not requested, or of an unknown type.
    dist_params: np.ndarray | None
    is_finite: bool | None = None  #: Whether observations, values and ``log_prob`` are finite; None: not checked.

    def as_tensors(self) -> tuple[np.ndarray, th.Tensor, th.Tensor, th.Tensor | None]:
        """Return actions unchanged, and the other arrays as tensors that share their memory."""
        dist_params = None if self.dist_params is None else th.from_numpy(self.dist_params)
        return self.actions, th.from_numpy(self.values), th.from_numpy(self.log_prob), dist_params


class ActedTensors(NamedTuple):
    """One step of all environments, as tensors on the policy's device, in the shapes of :class:`Acted`."""

    actions: th.Tensor
    values: th.Tensor
    log_prob: th.Tensor
    dist_params: th.Tensor | None

    def on_host(self) -> Acted:
        """Return the step as arrays."""
        return Acted(*(None if tensor is None else tensor.cpu().numpy() for tensor in self))  # type: ignore[arg-type]


class Engine(Protocol):
    """Acts with a policy in rollouts, and updates it. Engines differ only in speed and rounding."""

    name: str
    acts_on_arrays: bool  #: Whether :meth:`act` takes NumPy arrays; else it takes tensors on the policy's device.
    policy: ActorCriticPolicy
    settings: UpdateSettings
    compile_seconds: float  #: Seconds of compiling or loading kernels since this was last set to 0.

    def fits(self, buffer: Any) -> bool:
        """Return whether this engine can still run its policy, which a callback may have changed."""

    def set_training_mode(self, mode: bool) -> None:
        """Set the policy's training mode."""

    def begin_rollout(self, buffer: Any) -> None:
        """Prepare for the steps of a rollout into this buffer."""

    def act(self, observations: Any, *, with_dist_params: bool) -> Acted:
        """Sample one action for each environment; observations are ``(n_envs, *obs_shape)``, or a dict of these."""

    def act_tensors(self, observations: Any, *, with_dist_params: bool) -> ActedTensors:
        """
        Act as :meth:`act` does, without a copy to the host. Observations are tensors on the policy's device.

        The next call may overwrite the result.
        """

    def predict_values(self, observations: Any) -> th.Tensor:
        """Return values, shape ``(n, 1)``, return units; observations are tensors ``(n, *obs_shape)``, or a dict."""

    def update(self, buffer: Any, coefficients: UpdateCoefficients) -> UpdateStatistics:
        """
        Run the epochs of one update on a complete rollout.

        :raises BadMinibatchError: If a minibatch is not finite and may not be skipped, or if all were skipped.
        """
