"""
The fused engine: PyTorch runs and differentiates the networks, kernels do the rest.

One kernel computes the losses and their gradients with respect to the networks' outputs, others clip the gradients and
take Adam's step. In torch these are about a hundred small operations, which take most of the time of a small minibatch.
"""

from typing import Any, TypeAlias, cast

import numpy as np
import torch as th
from stable_baselines3.common.distributions import DiagGaussianDistribution, StateDependentNoiseDistribution
from stable_baselines3.common.policies import ActorCriticPolicy

from sb3_clipvf.distributions import category_counts, lazy_distribution, n_action_numbers, n_outputs, to_action_space
from sb3_clipvf.engines.autograd import AutogradEngine, old_dist_params
from sb3_clipvf.engines.binding import check_gradients, moments_of, table_row, write_steps
from sb3_clipvf.engines.bridge import (
    KINDS,
    Noise,
    as_floats,
    check_stored,
    hyperparameters_of,
    set_advantage_moments,
    statistics_of,
)
from sb3_clipvf.engines.epochs import MinibatchStatistics, UpdateRecord
from sb3_clipvf.engines.images import FeatureExtraction
from sb3_clipvf.engines.interface import Acted, UpdateCoefficients, UpdateSettings
from sb3_clipvf.engines.kernels import entry, memory
from sb3_clipvf.engines.kernels.totals import STAT
from sb3_clipvf.engines.kernels.warmup import warm_up
from sb3_clipvf.engines.reduction import run_shared_epochs
from sb3_clipvf.engines.support import steps_made, why_not_fused
from sb3_clipvf.rollout import MiniBatch

Outputs: TypeAlias = tuple[th.Tensor, th.Tensor, th.Tensor | None]
"""
What the last layers of actor and critic return, ``(n, k)`` and ``(n, 1)``, and a Gaussian's log standard deviations:
its parameter, or with gSDE those of each state.
"""


class FusedEngine(AutogradEngine):
    """Engine for policies with any networks on the CPU. Equals the autograd engine up to float32 rounding."""

    name = "fused"

    def __init__(self, policy: ActorCriticPolicy, settings: UpdateSettings) -> None:
        super().__init__(policy, settings)
        self._drawn_for: Any = None
        self._features = FeatureExtraction(policy)
        self.compile_seconds += warm_up("fused")

    def fits(self, buffer: Any) -> bool:
        """Return whether this engine can still run its policy, which a callback may have changed."""
        return why_not_fused(self.policy) is None

    def begin_rollout(self, buffer: Any) -> None:
        """Prepare the random numbers of the actions."""
        dist: Any = self.policy.action_dist
        has_own_forward = type(self.policy).forward is not ActorCriticPolicy.forward
        # torch adds gSDE's noise, which its own tensors hold.
        draws = not has_own_forward and not isinstance(dist, StateDependentNoiseDistribution)
        self._drawn_for = dist if draws else None
        self._noise = Noise(dist)

    @th.no_grad()
    def act(self, observations: Any, *, with_dist_params: bool) -> Acted:
        """Sample one action for each environment: torch runs the networks, and a kernel draws."""
        dist: Any = self.policy.action_dist
        if dist is not self._drawn_for:  # a callback may have replaced it since the rollout began
            return super().act(observations, with_dist_params=with_dist_params)
        outputs, values, log_std = self.forward(observations, values_first=True)
        n, k = outputs.shape
        log_stds = np.empty((0, 0), np.float32) if log_std is None else _as_floats(log_std).reshape(1, k)
        actions, log_prob = np.empty((n, n_action_numbers(dist)), np.float32), np.empty(n, np.float32)
        logits = _as_floats(outputs).copy()  # normalised in place, while hooks and heads may hold the outputs
        width = k if log_std is None else 2 * k
        dist_params = np.empty((n, width if with_dist_params else 0), np.float32)
        entry.draw(
            KINDS[type(dist)], category_counts(dist), logits, log_stds,
            self._noise.next(n), actions, log_prob, dist_params,
        )  # fmt: skip
        if with_dist_params:  # callbacks may read it
            dist.distribution = lazy_distribution(dist, dist_params)
        return Acted(
            actions=to_action_space(actions, self.policy.action_space),
            values=values.numpy(),
            log_prob=log_prob,
            dist_params=dist_params if with_dist_params else None,
        )

    def forward(self, observations: Any, *, values_first: bool) -> Outputs:
        """
        Run the networks in the order of SB3's ``forward``, which computes values first, or ``evaluate_actions``.

        The order matters, since layers may draw random numbers.
        """
        policy = self.policy
        features = self._features(observations)
        if policy.share_features_extractor:
            latent_pi, latent_vf = policy.mlp_extractor(features)
        else:
            pi_features, vf_features = cast(tuple[th.Tensor, th.Tensor], features)
            latent_pi = policy.mlp_extractor.forward_actor(pi_features)
            latent_vf = policy.mlp_extractor.forward_critic(vf_features)
        if values_first:
            values = policy.value_net(latent_vf)
            outputs = policy.action_net(latent_pi)
        else:
            outputs = policy.action_net(latent_pi)
            values = policy.value_net(latent_vf)
        dist = policy.action_dist
        if outputs.shape != (len(values), n_outputs(dist)):  # kernels would write beyond the actions
            raise ValueError(
                f"`policy.action_net` must return {n_outputs(dist)} numbers for each of {len(values)} observations, "
                f"as {type(dist).__name__} needs, got the shape {tuple(outputs.shape)}. Correct the last layer."
            )
        if isinstance(dist, StateDependentNoiseDistribution):
            gaussian = dist.proba_distribution(outputs, policy.log_std, latent_pi).distribution
            return outputs, values, gaussian.scale.log()
        return outputs, values, policy.log_std if isinstance(dist, DiagGaussianDistribution) else None

    def _run_epochs(self, buffer: Any, coefficients: UpdateCoefficients) -> UpdateRecord:
        check_gradients()
        update = FusedUpdate(self, coefficients, buffer)
        try:
            return run_shared_epochs(update, self.policy.parameters(), self.settings, coefficients, buffer)
        finally:  # also after Ctrl-C, the optimizer's state must count the steps taken
            update.write_steps()


class FusedUpdate:
    """Loss, gradients and step of one update's minibatches. Parameters without a gradient take no step."""

    def __init__(self, engine: FusedEngine, coefficients: UpdateCoefficients, buffer: Any) -> None:
        self._engine, self._coefficients = engine, coefficients
        self._max_grad_norm = float(engine.settings.max_grad_norm)
        self._optimizer = engine.policy.optimizer
        self._parameters = list(engine.policy.parameters())
        self._n_steps = 0  # known when a minibatch has reached parameters
        self._hyper = hyperparameters_of(engine.settings, coefficients, self._optimizer, 0, buffer)
        self._reached: list[th.nn.Parameter] = []
        self._shapes: list[th.Size] = []
        self._table = np.zeros((0, memory.N_COLUMNS), np.int64)
        self._by_torch = False
        self._zero_grad()

    def loss(self, batch: MiniBatch, measure_kl: bool) -> MinibatchStatistics:
        """Compute the loss of a minibatch, and its gradients with respect to the networks' outputs."""
        dist: Any = self._engine.policy.action_dist
        outputs, values, log_std = self._engine.forward(batch.observations, values_first=False)
        n = len(values)
        old_log_prob, advantages, old_values, returns = _vectors(batch, n)
        log_stds = th.empty(0, 0) if log_std is None else log_std.reshape(-1, outputs.shape[1])
        # Float32 and contiguous, even if outputs and values are not
        output_gradient, value_gradient = th.empty(outputs.shape), th.empty(values.shape)
        log_std_gradient = th.empty(log_stds.shape)
        logits = _as_floats(outputs).copy()  # normalised in place
        actions = _as_floats(batch.actions).reshape(n, -1)
        old_dist = _as_floats(old_dist_params(batch)) if measure_kl else np.zeros((0, 0), np.float32)
        check_stored(dist, actions, old_dist)
        stats = np.zeros(len(STAT))
        entry.loss_gradients(
            KINDS[type(dist)], category_counts(dist), logits, _as_floats(log_stds), _as_floats(values).reshape(n),
            actions, old_log_prob, advantages.copy(), old_values, returns, old_dist, self._hyper, measure_kl,
            output_gradient.numpy(), log_std_gradient.numpy(), value_gradient.numpy().reshape(n), stats,
        )  # fmt: skip
        self._roots, self._root_gradients = [outputs, values], [output_gradient, value_gradient]
        if log_std is not None:
            self._roots.append(log_std)
            self._root_gradients.append(log_std_gradient.view_as(log_std))
        return statistics_of(stats, self._coefficients, measure_kl)

    def set_advantage_moments(self, mean: float, divisor: float) -> None:
        """Normalise advantages as ``(advantages - mean) / divisor`` from the next minibatch on."""
        set_advantage_moments(self._hyper, mean, divisor)

    def backward(self) -> None:
        """Compute the gradients of the last loss."""
        self._zero_grad()
        roots, gradients = self._roots, self._root_gradients
        # A head may be detached. If all are, torch raises its error.
        if any(root.requires_grad for root in roots):
            pairs = [pair for pair in zip(roots, gradients, strict=True) if pair[0].requires_grad]
            roots, gradients = [list(column) for column in zip(*pairs, strict=True)]
        th.autograd.backward(roots, gradients)

    def prepare_step(self) -> float:
        """Find the factor by which ``step`` clips the gradients, and return their joint norm before that."""
        reached = [parameter for parameter in self._parameters if parameter.grad is not None]
        if not self._by_torch and not self._bind(reached):
            self.write_steps()
            self._by_torch = True
        if self._by_torch:
            return float(th.nn.utils.clip_grad_norm_(self._parameters, self._max_grad_norm))
        self._table[:, memory.PARAM] = list(map(th.Tensor.data_ptr, reached))
        self._table[:, memory.GRAD] = [_contiguous_gradient(parameter).data_ptr() for parameter in reached]
        norm, self._clip_factor, _ = entry.gradient_norm(self._table, self._max_grad_norm)
        return cast(float, norm)

    def step(self) -> None:
        """Clip the gradients, and take an optimizer step."""
        if self._by_torch:
            self._optimizer.step()
            return
        self._n_steps += 1
        entry.optimizer_step(self._table, self._clip_factor, self._n_steps, self._hyper)

    def write_steps(self) -> None:
        """Write the number of the kernels' steps to the optimizer."""
        if not self._by_torch:
            write_steps(self._optimizer, self._reached, self._n_steps)

    def _bind(self, reached: list[th.nn.Parameter]) -> bool:
        """Return whether kernels can step the parameters that a minibatch has reached."""
        if not self._reached:
            steps = set(steps_made(self._optimizer, reached))
            if len(steps) > 1:  # kernels have one number for all
                return False
            self._n_steps, self._reached = max(steps, default=0), reached
            moments = [moments_of(self._optimizer, parameter) for parameter in reached]
            self._shapes = [moment.shape for moment, _ in moments]
            # The first two addresses may change with each minibatch.
            rows = [table_row(*[parameter] * 2, *pair) for parameter, pair in zip(reached, moments, strict=True)]
            self._table = np.array(rows, np.int64).reshape(-1, memory.N_COLUMNS)
        # Minibatches may reach different parameters. A layer's own code may replace tensors (``weight.data = ...``).
        return (
            list(map(id, reached)) == list(map(id, self._reached))
            and list(map(th.Tensor.size, reached)) == self._shapes
            and all(map(th.Tensor.is_contiguous, reached))
        )

    def _zero_grad(self) -> None:
        for parameter in self._parameters:
            parameter.grad = None


def _as_floats(tensor: th.Tensor) -> np.ndarray:
    return as_floats(tensor.detach().numpy())


def _vectors(batch: Any, n: int) -> list[np.ndarray]:
    """Return the numbers of a minibatch's transitions, from buffers of any class."""
    arrays = {
        name: _as_floats(getattr(batch, name)) for name in ("old_log_prob", "advantages", "old_values", "returns")
    }
    for name, array in arrays.items():
        if array.shape != (n,):  # kernels would read beyond them
            raise ValueError(
                f"`rollout_buffer_class` must return `{name}` of shape ({n},) for {n} transitions, got {array.shape}. "
                "Correct its get()."
            )
    return list(arrays.values())


def _contiguous_gradient(parameter: th.nn.Parameter) -> th.Tensor:
    gradient = cast(th.Tensor, parameter.grad)
    if not gradient.is_contiguous():
        gradient = parameter.grad = gradient.contiguous()
    return gradient
