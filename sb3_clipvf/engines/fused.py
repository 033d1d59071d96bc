"""
The fused engine: torch runs and differentiates the networks, kernels do the rest.

The losses' gradients with respect to what the networks give are one kernel call, and so is clipping with Adam's step;
in torch these are about a hundred small operations, which take most of the time of a small minibatch.
"""

from typing import Any, cast

import numpy as np
import torch as th
from stable_baselines3.common.distributions import DiagGaussianDistribution, StateDependentNoiseDistribution
from stable_baselines3.common.policies import ActorCriticPolicy
from stable_baselines3.common.preprocessing import get_action_dim, is_image_space
from stable_baselines3.common.torch_layers import CombinedExtractor, NatureCNN
from torch import nn

from sb3_clipvf.common.nonfinite import BadMinibatchError, drawn_indices
from sb3_clipvf.distributions import LazyDistribution
from sb3_clipvf.engines.autograd import AutogradEngine, old_dist_params, unvalidated_distributions
from sb3_clipvf.engines.binding import (
    moments_of,
    n_outputs_of,
    table_row,
    why_not_fused,
)
from sb3_clipvf.engines.bridge import (
    Noise,
    as_policy_gives,
    check_stored,
    kind_of,
    statistics_of,
    terms_of,
    update_numbers,
    widths_of,
)
from sb3_clipvf.engines.interface import Acted, UpdateCoefficients, UpdateSettings, UpdateStatistics
from sb3_clipvf.engines.kernels import entry, memory
from sb3_clipvf.engines.kernels.minibatch import SKIP, STEP, STOP, add_to_totals, is_finite
from sb3_clipvf.engines.kernels.totals import STAT, TOTAL
from sb3_clipvf.engines.kernels.warmup import warm_up
from sb3_clipvf.engines.recognition import altered_torch, has_hooks, replaced_method
from sb3_clipvf.rollout import MiniBatch

# What SB3's extractors of pictures consist of.
_SB3S_MODULES = (
    NatureCNN, CombinedExtractor, nn.Conv2d, nn.ReLU, nn.Flatten, nn.Linear, nn.Sequential, nn.ModuleDict
)  # fmt: skip


class FusedEngine(AutogradEngine):
    """
    Updates, and acts, with the autograd engine's numbers to float32 rounding.

    :param policy: Its parameters and its optimizer are changed in place.
    :param settings: What stays the same over all updates.
    """

    name = "fused"

    def __init__(self, policy: ActorCriticPolicy, settings: UpdateSettings) -> None:
        super().__init__(policy, settings)
        self._draws, self._drawn_for = False, cast(Any, None)
        self._pictures: th.Tensor | None = None
        self.compile_seconds += warm_up("fused")

    def fits(self, buffer: Any) -> bool:
        """
        Tell whether this engine still runs its policy, which someone may have changed.

        :param buffer: The rollout buffer.
        :return: False where another engine must be chosen.
        """
        return why_not_fused(self.policy) is None

    def begin_rollout(self, buffer: Any) -> None:
        """
        Make ready for the steps of a rollout.

        :param buffer: Will be filled.
        """
        policy = self.policy
        has_own_forward = type(policy).forward is not ActorCriticPolicy.forward
        # Where the spread depends on the state, torch holds the noise.
        self._draws = not has_own_forward and not isinstance(policy.action_dist, StateDependentNoiseDistribution)
        self._drawn_for = policy.action_dist
        if self._draws:
            self._action_dim = get_action_dim(policy.action_space)
            self._noise = Noise(kind_of(policy.action_dist), self._action_dim, self._widths.tolist())

    @th.no_grad()
    def act(self, observations: Any, *, with_dist_params: bool) -> Acted:
        """
        Sample one action for each environment: torch runs the networks, and a kernel draws.

        :param observations: Tensors on the policy's device, ``n_envs`` rows.
        :param with_dist_params: Whether the distribution's parameters are wanted.
        :return: What the rollout stores.
        """
        # A callback may have put another distribution there since the rollout began.
        if not self._draws or self.policy.action_dist is not self._drawn_for:
            return super().act(observations, with_dist_params=with_dist_params)
        outputs, values, log_std = self._forward(observations, values_first=True)
        n, k = outputs.shape
        log_stds = np.empty((0, 0), np.float32) if log_std is None else log_std.detach().numpy().reshape(1, k)
        actions, log_prob = np.empty((n, self._action_dim), np.float32), np.empty(n, np.float32)
        width = k if log_std is None else 2 * k
        dist_params = np.empty((n, width if with_dist_params else 0), np.float32)
        entry.draw(
            kind_of(self.policy.action_dist), self._widths, np.ascontiguousarray(outputs.numpy()), log_stds,
            self._noise.next(n), actions, log_prob, dist_params,
        )  # fmt: skip
        if with_dist_params:  # callbacks may look at it
            dist: Any = self.policy.action_dist
            dist.distribution = LazyDistribution(dist, dist_params)
        return Acted(
            actions=as_policy_gives(actions, self.policy.action_space),
            values=values.numpy(),
            log_prob=log_prob,
            dist_params=dist_params if with_dist_params else None,
        )

    @unvalidated_distributions()
    def update(self, buffer: Any, coefficients: UpdateCoefficients) -> UpdateStatistics:
        """
        Run the epochs of one update.

        :param buffer: A complete rollout: ours, or any with the interface of SB3's ``RolloutBuffer``.
        :param coefficients: Of this update.
        :return: Statistics.
        :raises BadMinibatchError: If a minibatch is not finite, unless it may be skipped; or if each one was skipped.
        """
        settings = self.settings
        optimizer = self.policy.optimizer
        n_made = _steps_made(self.policy)
        numbers = update_numbers(settings, coefficients, optimizer, n_made, buffer.advantages)
        totals = np.zeros(len(TOTAL))
        steps = _Steps(self.policy, numbers, totals, n_made)
        try:
            skipped = self._run_epochs(buffer, coefficients, steps)
        finally:  # after Ctrl-C, too, the optimizer's state is that of the steps made
            steps.write()
        if skipped is not None and (settings.on_nonfinite == "raise" or not totals[TOTAL.n_minibatches]):
            raise skipped
        kl_after = float(self._kl_after(buffer)) if settings.measure_kl_after else None
        return statistics_of(totals, coefficients, settings, kl_after, skipped)

    def _run_epochs(self, buffer: Any, coefficients: UpdateCoefficients, steps: "_Steps") -> BadMinibatchError | None:
        """:return: The first minibatch that was skipped, or that has ended the update."""
        settings, totals = self.settings, steps.totals
        skipped, state = None, np.random.get_state()
        for epoch in range(settings.n_epochs):
            totals[TOTAL.n_epochs] += 1
            totals[[TOTAL.n_in_epoch, TOTAL.approx_kl, TOTAL.kl]] = 0
            measure_kl = settings.measures_kl(epoch, coefficients)
            for number, batch in enumerate(buffer.get(settings.batch_size)):
                told = np.zeros(len(STAT))
                what = self._minibatch(batch, measure_kl, steps, told)
                if what == SKIP and skipped is None:
                    indices = drawn_indices(state, buffer, epoch, number * settings.batch_size, batch)
                    skipped = BadMinibatchError(terms_of(told, coefficients), epoch, number, batch, indices)
                if what == STOP or (what == SKIP and settings.on_nonfinite == "raise"):
                    return skipped
        return skipped

    def _minibatch(self, batch: MiniBatch, measure_kl: bool, steps: "_Steps", told: np.ndarray) -> int:
        """The gradients of one minibatch, and the step, unless kernels judge otherwise. :return: What came of it."""
        policy = self.policy
        outputs, values, log_std = self._forward(batch.observations, values_first=False)
        n = len(values)
        old_log_prob, advantages, old_values, returns = _vectors(batch, n)
        logits = outputs.detach().numpy().copy()
        output_gradient = outputs.new_empty(outputs.shape)  # kernels take no other layout than C's
        value_gradient = th.empty_like(values)
        rows = th.empty(0, 0) if log_std is None else log_std.detach().reshape(-1, outputs.shape[1])
        log_std_gradient = th.empty_like(rows)
        actions = batch.actions.numpy().reshape(n, -1).astype(np.float32, copy=False)
        old_dist = old_dist_params(batch).numpy() if measure_kl else np.zeros((0, 0), np.float32)
        check_stored(policy.action_dist, actions, old_dist)
        what, _ = entry.loss_gradients(
            kind_of(policy.action_dist),
            self._widths,
            logits,
            rows.numpy(),
            values.detach().numpy().reshape(n),
            actions,
            old_log_prob,
            advantages.copy(),
            old_values,
            returns,
            old_dist,
            steps.numbers,
            measure_kl,
            output_gradient.numpy(),
            log_std_gradient.numpy(),
            value_gradient.numpy().reshape(n),
            told,
            steps.totals,
        )
        if what != STEP:
            return int(what)
        steps.forget_gradients()
        roots, gradients = [outputs, values], [output_gradient, value_gradient]
        if log_std is not None:
            roots.append(log_std)
            gradients.append(log_std_gradient.view_as(log_std))
        # A head may be held by detach(); where all are, torch says so.
        if any(root.requires_grad for root in roots):
            pairs = [pair for pair in zip(roots, gradients, strict=True) if pair[0].requires_grad]
            roots, gradients = [list(column) for column in zip(*pairs, strict=True)]
        th.autograd.backward(roots, gradients)
        return steps.make(told, self.settings.max_grad_norm)

    @property
    def _widths(self) -> np.ndarray:
        return widths_of(self.policy.action_dist)

    def _forward(self, observations: Any, *, values_first: bool) -> tuple[th.Tensor, th.Tensor, th.Tensor | None]:
        """
        Run the networks in SB3's order: its ``forward`` computes values first, its ``evaluate_actions`` does not.

        Layers may draw random numbers, so that the order counts. What the actor's and the critic's last layers give.
        With them a Gaussian's log standard deviations: its parameter, or with gSDE those of each state.
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
        if outputs.shape != (len(values), n_outputs_of(dist)):  # kernels would write beyond the actions
            raise ValueError(
                f"`policy.action_net` must give {n_outputs_of(dist)} numbers for each of {len(values)} observations, "
                f"as {type(dist).__name__} takes them, got the shape {tuple(outputs.shape)}. Correct the last layer."
            )
        if isinstance(dist, StateDependentNoiseDistribution):
            gaussian = dist.proba_distribution(outputs, policy.log_std, latent_pi).distribution
            return outputs, values, gaussian.scale.log()
        return outputs, values, policy.log_std if isinstance(dist, DiagGaussianDistribution) else None

    def _features(self, observations: Any) -> Any:
        """What ``extract_features`` of SB3 gives, of pictures by a faster way with the same numbers."""
        policy = self.policy
        if not _has_pictures(observations) or not all(map(_is_sb3s, self._extractors)):
            return policy.extract_features(observations)
        if not self._scales(observations):
            return policy.extract_features(_channels_last(observations))
        pictures = self._scaled(observations)
        if policy.share_features_extractor:
            return policy.features_extractor(pictures)
        return policy.pi_features_extractor(pictures), policy.vf_features_extractor(pictures)

    def _scales(self, observations: Any) -> bool:
        policy = self.policy
        if not (policy.normalize_images and isinstance(observations, th.Tensor) and observations.dtype == th.uint8):
            return False
        is_cnn = all(type(extractor) is NatureCNN for extractor in self._extractors)
        return is_cnn and is_image_space(policy.observation_space)

    @property
    def _extractors(self) -> set[th.nn.Module]:
        policy = self.policy
        return {policy.features_extractor, policy.pi_features_extractor, policy.vf_features_extractor}

    def _scaled(self, observations: th.Tensor) -> th.Tensor:
        """
        Scale pictures to [0, 1], in memory that is kept for the next ones, as large as the most of them so far.

        New memory for each minibatch takes longer than the arithmetic: a batch of 256 Atari pictures 10 ms so and 65 ms
        otherwise (fastest of 8, one thread).
        """
        n = len(observations)
        if self._pictures is None or len(self._pictures) < n or self._pictures.shape[1:] != observations.shape[1:]:
            self._pictures = None  # before there are more
            with th.inference_mode(False):  # which would forbid to write there in an update
                self._pictures = th.empty(
                    observations.shape, dtype=th.float32, device=observations.device, memory_format=th.channels_last
                )
        return self._pictures[:n].copy_(observations).div_(255.0)


def _has_pictures(observations: Any) -> bool:
    parts = observations.values() if isinstance(observations, dict) else [observations]
    return any(part.dim() == 4 for part in parts)


def _is_sb3s(extractor: th.nn.Module) -> bool:
    """Return whether an extractor is SB3's in all parts, which take any layout and neither keep nor change pictures."""
    if type(extractor) not in (NatureCNN, CombinedExtractor) or altered_torch() is not None:
        return False
    modules = list(extractor.modules())
    if any(type(module) not in _SB3S_MODULES or has_hooks(module) or replaced_method(module) for module in modules):
        return False
    return all((module.start_dim, module.end_dim) == (1, -1) for module in modules if type(module) is nn.Flatten)


def _channels_last(observations: Any) -> Any:
    """
    Lay pictures out as oneDNN's convolutions are fastest with.

    The update of a batch of 256 Atari pictures takes 235 ms so and 305 ms otherwise (fastest of 7, one thread).
    """
    if isinstance(observations, dict):
        return {key: _channels_last(tensor) for key, tensor in observations.items()}
    return observations.contiguous(memory_format=th.channels_last) if observations.dim() == 4 else observations


def _vectors(batch: Any, n: int) -> list[np.ndarray]:
    """The numbers of a minibatch's transitions, from buffers of any class, in the form that kernels take."""
    arrays = {name: getattr(batch, name).numpy() for name in ("old_log_prob", "advantages", "old_values", "returns")}
    for name, array in arrays.items():
        if array.shape != (n,):  # kernels would read beyond them
            raise ValueError(
                f"`rollout_buffer_class` must give `{name}` of shape ({n},) for {n} transitions, got {array.shape}. "
                "Correct its get()."
            )
    return [np.ascontiguousarray(array, np.float32) for array in arrays.values()]


def _steps_made(policy: ActorCriticPolicy) -> int:
    states = [policy.optimizer.state.get(parameter) for parameter in policy.parameters()]
    return max((int(state["step"]) for state in states if state), default=0)


class _Steps:
    """
    The optimizer's steps of one update, on those parameters that a backward pass has reached.

    :param policy: With its optimizer.
    :param numbers: Of this update.
    :param totals: Statistics, to which each step is added.
    :param n_made: Steps before this update.
    """

    def __init__(self, policy: ActorCriticPolicy, numbers: np.ndarray, totals: np.ndarray, n_made: int) -> None:
        self.numbers = numbers
        self.totals = totals
        self._n_made = n_made
        self._parameters = list(policy.parameters())
        self._optimizer = policy.optimizer
        self._table = np.zeros((0, memory.N_COLUMNS), np.int64)
        self._reached: list[th.nn.Parameter] = []
        self._is_torchs = False
        self.forget_gradients()

    def forget_gradients(self) -> None:
        """Leave no gradients, as ``zero_grad`` of torch: parameters that a backward pass does not reach get no step."""
        for parameter in self._parameters:
            parameter.grad = None

    def make(self, told: np.ndarray, max_grad_norm: float) -> int:
        """
        Clip the gradients and step, where they are finite.

        :param told: What the kernels told of this minibatch.
        :param max_grad_norm: The bound of their norm.
        :return: STEP or SKIP.
        """
        reached = [parameter for parameter in self._parameters if parameter.grad is not None]
        gradients = [_contiguous_gradient(parameter) for parameter in reached]
        if not self._reached:
            self._reached = reached
            rows = [
                table_row(parameter, gradient, *moments_of(self._optimizer, parameter))
                for parameter, gradient in zip(reached, gradients, strict=True)
            ]
            self._table = np.array(rows, np.int64).reshape(-1, memory.N_COLUMNS)
        if self._is_torchs or list(map(id, reached)) != list(map(id, self._reached)):
            return self._make_by_torch(told, max_grad_norm)
        self._table[:, memory.GRAD] = [gradient.data_ptr() for gradient in gradients]
        return int(entry.optimizer_step(self._table, self.numbers, told, self.totals)[0])

    def _make_by_torch(self, told: np.ndarray, max_grad_norm: float) -> int:
        # Where parts of a network take turns, parameters come to different numbers of steps, of which kernels know one.
        self.write()
        self._is_torchs = True
        norm = float(th.nn.utils.clip_grad_norm_(self._parameters, max_grad_norm))
        told[STAT.actor_squares] = norm**2
        what = STEP if is_finite(norm) else SKIP
        add_to_totals(told, what, norm, self.totals)
        if what == STEP:
            self._optimizer.step()
        return what

    def write(self) -> None:
        """Tell the optimizer how many steps were made."""
        if not self._is_torchs:
            for parameter in self._reached:
                self._optimizer.state[parameter]["step"].fill_(self._n_made + int(self.totals[TOTAL.n_steps]))


def _contiguous_gradient(parameter: th.nn.Parameter) -> th.Tensor:
    gradient = cast(th.Tensor, parameter.grad)
    if not gradient.is_contiguous():
        gradient = parameter.grad = gradient.contiguous()
    return gradient
