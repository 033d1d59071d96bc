"""The native engine: compiled kernels for plain MLP policies on the CPU, in place on the policy's own memory."""

import time
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import numpy as np
import torch as th
from stable_baselines3.common.distributions import StateDependentNoiseDistribution
from stable_baselines3.common.policies import ActorCriticPolicy
from torch import nn

from sb3_clipvf.common.nonfinite import BadMinibatchError
from sb3_clipvf.distributions import LazyDistribution
from sb3_clipvf.engines.binding import Binding, bind, n_steps_made, why_not_native, write_steps
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
from sb3_clipvf.engines.kernels import entry, inputs, memory
from sb3_clipvf.engines.kernels.barrier import CANCELLED, N_COUNTERS
from sb3_clipvf.engines.kernels.mlp import workspace_size
from sb3_clipvf.engines.kernels.totals import N_STAT_ROWS, SKIPPED_ROW, STAT, TOTAL
from sb3_clipvf.engines.kernels.warmup import warm_up
from sb3_clipvf.engines.recognition import why_unknown_buffer
from sb3_clipvf.engines.threads import ThreadChoice, one_blas_thread, second_thread
from sb3_clipvf.rollout import gae

EVALUATION_ROWS = 1024
"""Rows in a forward pass over a whole rollout."""

UNSHARED_ROWS = 32
"""Rows of a forward pass that BLAS does not share among threads, whatever the width of usual layers."""

_ACTIVATIONS = {
    nn.Tanh: inputs.TANH,
    nn.ReLU: inputs.RELU,
    nn.ELU: inputs.ELU,
    nn.LeakyReLU: inputs.LEAKY_RELU,
    nn.SiLU: inputs.SILU,
}


class NativeEngine:
    """
    Updates a plain MLP policy, and acts for it, by compiled kernels.

    Same permutations, same coefficients and the numbers of the autograd engine to float32 rounding; actions are drawn
    from torch's generator as torch draws them, and with gSDE from the policy's own exploration matrices.

    :param policy: Its parameters, their gradients and its optimizer's moments are changed in place.
    :param settings: What stays the same over all updates.
    :raises NotPlainError: If the policy is more than kernels know.
    """

    name = "native"
    acts_on_arrays = True
    compile_seconds = 0.0

    def __init__(self, policy: ActorCriticPolicy, settings: UpdateSettings) -> None:
        self.policy = policy
        self.settings = settings
        self._threads = ThreadChoice()
        self._noise: Noise | None = None
        self._work: dict[int, np.ndarray] = {}
        self._has_looked = False
        self._bind()
        self.compile_seconds += warm_up("native")

    def _bind(self) -> None:
        self._binding = bind(self.policy)
        self._network = _network(self._binding)
        self._packed = inputs.pack(self._network)
        both = (self._network.actor, self._network.critic)
        self._workspace_of_a_row = max(workspace_size(mlp.sizes) for mlp in both)
        self._addresses = self._binding.table[:, memory.PARAM].tolist()
        self._parameters = [row[0] for row in self._binding.tensors]
        self._modules = tuple(self.policy.modules())
        self._obs_dim = int(self._network.actor.sizes[0])
        n_outputs = int(self._network.actor.sizes[-1])
        self._action_dim = len(self._network.widths) or n_outputs
        self._dist_dim = n_outputs if self._binding.plain.log_std is None else 2 * n_outputs

    def _bind_again(self) -> None:
        if not self._has_looked and not self._binding.holds(self.policy):
            self._bind()
        self._has_looked = False

    # ------------------------------------------------------------------ rollout

    def fits(self, buffer: Any) -> bool:
        """
        Tell whether this engine still runs its policy, which someone may have changed.

        :param buffer: The rollout buffer.
        :return: False where another engine must be chosen.
        """
        # The rollout or the update that follows need not look again.
        self._has_looked = self._binding.holds(self.policy)
        if self._has_looked and why_unknown_buffer(buffer) is None:
            return True
        return why_not_native(self.policy, buffer) is None

    def set_training_mode(self, mode: bool) -> None:
        """
        Say to the policy whether it is being trained, as its ``set_training_mode`` does in many times the time.

        :param mode: Whether it is.
        """
        for module in self._modules:
            module.__dict__["training"] = mode

    def begin_rollout(self, buffer: Any) -> None:
        """
        Look at the policy anew.

        :param buffer: Will be filled; its advantages will be computed by a kernel.
        :raises NotPlainError: If the policy has become more than kernels know.
        """
        self._bind_again()
        if buffer.gae_fn is gae:  # a class may have one of its own
            buffer.gae_fn = _gae
        kind, widths = self._network.kind, self._network.widths.tolist()
        self._noise = Noise(kind, self._action_dim, widths)

    def act(self, observations: np.ndarray | th.Tensor, *, with_dist_params: bool) -> Acted:
        """
        Sample one action for each environment.

        :param observations: Shape ``(n_envs, *obs_shape)``.
        :param with_dist_params: Whether the distribution's parameters are wanted.
        :return: What the rollout stores.
        :raises ValueError: If the observations are not as wide as the policy's.
        :raises NotPlainError: If a parameter's tensor was replaced by one that kernels cannot read.
        """
        self._follow_parameters()
        rows = self._rows(observations)
        n_envs = len(rows)
        actions = np.empty((n_envs, self._action_dim), np.float32)
        values, log_prob = np.empty((n_envs, 1), np.float32), np.empty(n_envs, np.float32)
        dist_params = np.empty((n_envs, self._dist_dim if with_dist_params else 0), np.float32)
        noise, work = self._noise_for(n_envs), self._workspace(n_envs)
        with _blas_for(n_envs):
            is_finite = entry.act(
                self._packed, rows, noise, work, actions, values.reshape(n_envs), log_prob, dist_params
            )
        if with_dist_params:  # callbacks may look at it
            self._binding.plain.dist.distribution = LazyDistribution(self._binding.plain.dist, dist_params)
        return Acted(
            actions=as_policy_gives(actions, self.policy.action_space),
            values=values,
            log_prob=log_prob,
            dist_params=dist_params if with_dist_params else None,
            is_finite=is_finite,
        )

    def predict_values(self, observations: th.Tensor) -> th.Tensor:
        """
        Predict the values of observations.

        :param observations: Shape ``(n, *obs_shape)``.
        :return: Shape ``(n, 1)``, return units.
        :raises ValueError: If the observations are not as wide as the policy's.
        :raises NotPlainError: If a parameter's tensor was replaced by one that kernels cannot read.
        """
        self._follow_parameters()
        rows = self._rows(observations)
        n = len(rows)
        values = np.empty(n, np.float32)
        with _blas_for(n):
            entry.predict_values(self._packed, rows, self._workspace(n), values)
        return th.from_numpy(values.reshape(-1, 1))

    def _rows(self, observations: np.ndarray | th.Tensor) -> np.ndarray:
        array = observations if isinstance(observations, np.ndarray) else observations.numpy()
        rows = _float_rows(array, len(array))
        self._check_width(rows)
        return rows

    def _check_width(self, rows: np.ndarray) -> None:
        if rows.shape[1] != self._obs_dim:  # a kernel would read on beyond them
            raise ValueError(
                f"`observations` must have {self._obs_dim} numbers a row, as many as the policy takes, got "
                f"{rows.shape[1]}. Correct the environment or its space."
            )

    def _noise_for(self, n_envs: int) -> np.ndarray:
        dist = self._binding.plain.dist
        if isinstance(dist, StateDependentNoiseDistribution):
            # A callback may call `reset_noise` at any step, which makes new tensors.
            return _exploration_matrices(dist, n_envs, self._binding.plain.actor[-1].in_features)
        if self._noise is None:
            raise RuntimeError("`begin_rollout` must be called before `act`, got no call. Call it with the buffer.")
        return self._noise.next(n_envs)

    def _follow_parameters(self) -> None:
        # A callback may have put other tensors into the parameters' place; their values need no attention.
        addresses = list(map(th.Tensor.data_ptr, self._parameters))
        if addresses == self._addresses:
            return
        if any(
            parameter.shape != gradient.shape or parameter.dtype != th.float32 or not parameter.is_contiguous()
            for parameter, gradient, *_ in self._binding.tensors
        ):
            self._bind()  # which says what is wrong, or finds networks of another width
            return
        # Whether the policy may stay on this engine is asked before the next update.
        self._binding.table[:, memory.PARAM] = self._addresses = addresses
        self._packed = inputs.pack(self._network)

    # ------------------------------------------------------------------ update

    def update(self, buffer: Any, coefficients: UpdateCoefficients) -> UpdateStatistics:
        """
        Run the epochs of one update.

        :param buffer: A complete rollout in a ``TensorRolloutBuffer``.
        :param coefficients: Of this update.
        :return: Statistics.
        :raises NotPlainError: If the policy has become more than kernels know.
        :raises BadMinibatchError: If a minibatch is not finite, unless it may be skipped; or if each one was skipped.
        """
        self._bind_again()
        settings = self.settings
        rollout = _rollout(buffer, settings.has_dist_params)
        check_stored(self._binding.plain.dist, rollout.actions, rollout.old_dist)
        self._check_width(rollout.observations)
        n_made = n_steps_made(self._binding, self.policy)
        numbers = update_numbers(settings, coefficients, self.policy.optimizer, n_made, buffer.advantages)
        n_transitions = rollout.returns.shape[0]
        state = np.random.get_state()
        permutations = np.empty((settings.n_epochs, n_transitions), np.int64)
        for permutation in permutations:
            permutation[:] = np.random.permutation(n_transitions)
        totals, told = self._run(rollout, numbers, permutations)
        if totals[TOTAL.n_epochs] < settings.n_epochs:
            # An update that was left early must not have drawn the permutations of the epochs that it left out.
            np.random.set_state(state)
            for _ in range(int(totals[TOTAL.n_epochs])):
                np.random.permutation(n_transitions)
        write_steps(self.policy, n_made + int(totals[TOTAL.n_steps]))
        skipped = None
        if totals[TOTAL.n_skipped]:
            skipped = self._skipped(
                buffer, permutations, int(totals[TOTAL.first_skipped]), terms_of(told, coefficients)
            )
            if settings.on_nonfinite == "raise" or not totals[TOTAL.n_minibatches]:
                raise skipped
        kl_after = None
        if settings.measure_kl_after:
            self.compile_seconds += warm_up("kl_of_rollout")
            rows = min(EVALUATION_ROWS, n_transitions)
            with one_blas_thread():
                kl_after, _ = entry.kl_of_rollout(self._packed, rollout, rows, self._workspace(rows))
        return statistics_of(totals, coefficients, settings, kl_after, skipped)

    def _skipped(
        self, buffer: Any, permutations: np.ndarray, number: int, terms: dict[str, float]
    ) -> BadMinibatchError:
        batch_size = self.settings.batch_size
        epoch, minibatch = divmod(number, -(-permutations.shape[1] // batch_size))
        indices = permutations[epoch, minibatch * batch_size : (minibatch + 1) * batch_size]
        return BadMinibatchError(terms, epoch, minibatch, buffer._get_samples(indices), indices)

    def _run(
        self, rollout: inputs.Rollout, numbers: np.ndarray, permutations: np.ndarray
    ) -> tuple[np.ndarray, np.ndarray]:
        """:return: Totals, and what was told of the first minibatch that was skipped."""
        n_threads = self._threads.next()
        batch_size = min(self.settings.batch_size, permutations.shape[1])
        counter, shared = np.zeros(N_COUNTERS, np.int64), np.zeros((N_STAT_ROWS, len(STAT)))
        totals = np.zeros(len(TOTAL))
        works = [self._workspace(batch_size, rank) for rank in range(n_threads)]

        def run(rank: int) -> None:
            entry.run_update(
                rank, n_threads, self._packed, rollout, numbers, permutations, batch_size, works[rank], shared,
                counter, totals,
            )  # fmt: skip

        with one_blas_thread():
            started = time.perf_counter()
            others = []
            try:
                for rank in range(1, n_threads):
                    others.append(second_thread().submit(run, rank))
                run(0)
            except BaseException:  # as Ctrl-C before this thread's part has begun
                counter[CANCELLED] = 1
                raise
            finally:
                for other in others:
                    other.result()
            seconds = time.perf_counter() - started
        self._threads.took(seconds, int(totals[TOTAL.n_minibatches] + totals[TOTAL.n_skipped]))
        return totals, shared[SKIPPED_ROW]

    def _workspace(self, n: int, rank: int = 0) -> np.ndarray:
        size = n * self._workspace_of_a_row
        if rank not in self._work or self._work[rank].size < size:
            self._work[rank] = np.empty(size, np.float32)
        return self._work[rank]


def _blas_for(n: int) -> AbstractContextManager[None]:
    # BLAS shares no product of so few rows, and telling it not to takes longer than the product.
    return nullcontext() if n <= UNSHARED_ROWS else one_blas_thread()


def _exploration_matrices(dist: StateDependentNoiseDistribution, n_envs: int, latent_dim: int) -> np.ndarray:
    """The matrices that SB3's ``get_noise`` would take, below each other: one for each row, or one for all."""
    own = n_envs > 1 and n_envs == len(dist.exploration_matrices)
    matrices = (dist.exploration_matrices if own else dist.exploration_mat).detach().numpy()
    rows = matrices.reshape((n_envs if own else 1) * latent_dim, dist.action_dim)
    return np.ascontiguousarray(rows, np.float32)


def _network(binding: Binding) -> inputs.Policy:
    plain = binding.plain
    table, n_actor, activation = binding.table, len(plain.actor_parameters), _ACTIVATIONS[plain.activation]
    return inputs.Policy(
        actor=inputs.Mlp(_sizes(plain.actor), table[:n_actor], activation),
        critic=inputs.Mlp(_sizes(plain.critic), table[n_actor:], activation),
        kind=kind_of(plain.dist),
        widths=widths_of(plain.dist),
        use_expln=int(getattr(plain.dist, "use_expln", False)),
    )


def _sizes(layers: list[nn.Linear]) -> np.ndarray:
    return np.array([layers[0].in_features, *(layer.out_features for layer in layers)], np.int64)


def _rollout(buffer: Any, has_dist_params: bool) -> inputs.Rollout:
    n = buffer.buffer_size * buffer.n_envs
    return inputs.Rollout(
        observations=_float_rows(buffer.observations, n),
        actions=_float_rows(buffer.actions, n),
        old_values=_vector(buffer.values, n),
        old_log_prob=_vector(buffer.log_probs, n),
        advantages=_vector(buffer.advantages, n),
        returns=_vector(buffer.returns, n),
        old_dist=_float_rows(buffer.dist_params, n) if has_dist_params else np.empty((0, 0), np.float32),
        n_steps=buffer.buffer_size,
        n_envs=buffer.n_envs,
    )


def _vector(array: np.ndarray, n: int) -> np.ndarray:
    return np.ascontiguousarray(array.reshape(n), np.float32)


def _gae(
    rewards: np.ndarray,
    values: np.ndarray,
    episode_starts: np.ndarray,
    last_values: np.ndarray,
    dones: np.ndarray,
    gamma: float,
    gae_lambda: float,
) -> tuple[np.ndarray, np.ndarray]:
    """:func:`sb3_clipvf.rollout.gae`, compiled."""
    advantages, returns = np.empty_like(values), np.empty_like(values)
    ended = dones.astype(np.float32)
    entry.advantages_and_returns(
        rewards, values, episode_starts, last_values, ended, gamma, gae_lambda, advantages, returns
    )
    return advantages, returns


def _float_rows(array: np.ndarray, n: int) -> np.ndarray:
    if array.ndim == 2 and len(array) == n and array.dtype == np.float32 and array.flags.c_contiguous:
        return array  # what the rest gives, in less time
    # What float32 cannot hold becomes infinite, which is told by name rather than by NumPy's warning.
    with nullcontext() if array.dtype == np.float32 else np.errstate(over="ignore"):
        return np.ascontiguousarray(array.reshape(n, -1), np.float32)
