"""The native engine: compiled kernels for plain MLP policies on the CPU, in place on the policy's own memory."""

import itertools
import math
import threading
import time
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from typing import Any

import numpy as np
import torch as th
from stable_baselines3.common.policies import ActorCriticPolicy
from torch import nn

from sb3_clipvf.common.nonfinite import BadMinibatchError
from sb3_clipvf.distributions import (
    category_counts,
    dist_param_dim,
    lazy_distribution,
    n_action_numbers,
    to_action_space,
)
from sb3_clipvf.engines.autograd import AutogradEngine
from sb3_clipvf.engines.binding import Binding, bind, check_gradients, write_steps
from sb3_clipvf.engines.bridge import (
    KINDS,
    Noise,
    as_floats,
    check_stored,
    exploration_matrices,
    hyperparameters_of,
    record_of,
    rollout_of,
    statistics_of,
)
from sb3_clipvf.engines.division import DividedPolicy, rows_to_share
from sb3_clipvf.engines.interface import Acted, ActedTensors, UpdateCoefficients, UpdateSettings, UpdateStatistics
from sb3_clipvf.engines.kernels import entry, inputs, memory
from sb3_clipvf.engines.kernels.barrier import CANCELLED, INTERRUPTED
from sb3_clipvf.engines.kernels.mlp import workspace_size
from sb3_clipvf.engines.kernels.totals import STAT, TOTAL
from sb3_clipvf.engines.kernels.warmup import warm_up
from sb3_clipvf.engines.native_minibatches import NativeUpdate
from sb3_clipvf.engines.recognition import UnsupportedError, why_unknown_buffer
from sb3_clipvf.engines.reduction import run_shared_epochs
from sb3_clipvf.engines.rollout_writer import Target
from sb3_clipvf.engines.support import share_memory, steps_made, why_not_native
from sb3_clipvf.engines.threads import ThreadChoice, one_blas_thread, run_on_threads
from sb3_clipvf.rollout import gae

EVALUATION_ROWS = 1024
"""Rows in each forward pass in which the KL over a rollout is measured."""

UNSHARED_WORK = 2**18
"""Multiplications of a product that OpenBLAS, by its default, never splits among threads."""

_ACTIVATIONS = {
    nn.Tanh: inputs.TANH,
    nn.ReLU: inputs.RELU,
    nn.ELU: inputs.ELU,
    nn.LeakyReLU: inputs.LEAKY_RELU,
    nn.SiLU: inputs.SILU,
}


class NativeEngine:
    """
    Engine for plain MLP policies on the CPU. Equals the autograd engine up to float32 rounding.

    Actions are drawn from torch's generator as torch draws them, and with gSDE from the policy's exploration matrices.
    The constructor raises :class:`.recognition.UnsupportedError` if this engine cannot run the policy.
    """

    name = "native"
    acts_on_arrays = True
    compile_seconds = 0.0

    def __init__(self, policy: ActorCriticPolicy, settings: UpdateSettings) -> None:
        self.policy = policy
        self.settings = settings
        self._noise: Noise | None = None
        self._scratch: Target | None = None
        self._divided: DividedPolicy | None = None
        self._workspaces: dict[int, np.ndarray] = {}
        self._has_checked = False
        self._bind()
        self._threads = ThreadChoice(n_tasks=2 * len(self._divided_for(int(settings.batch_size)).policies))
        self.compile_seconds += warm_up("native")

    def fits(self, buffer: Any) -> bool:
        """Return whether this engine can still run its policy, which a callback may have changed."""
        # The rollout or update that follows need not check again.
        self._has_checked = self._binding.is_current(self.policy)
        if self._has_checked and why_unknown_buffer(buffer) is None:
            return True
        return why_not_native(self.policy, buffer) is None

    def set_training_mode(self, mode: bool) -> None:
        """Set the training mode of all modules, in a fraction of the time that the policy's own method takes."""
        for module in self._modules:
            module.__dict__["training"] = mode

    # ------------------------------------------------------------------ rollout

    def begin_rollout(self, buffer: Any) -> None:
        """Bind the policy again if it has changed, and set a kernel to compute the buffer's advantages."""
        self._bind_if_changed()
        self._follow_parameters()
        if buffer.gae_fn is gae:  # a class may have its own
            buffer.gae_fn = _gae
        self._noise = Noise(self._binding.plain.dist)

    def act(self, observations: np.ndarray | th.Tensor, *, with_dist_params: bool) -> Acted:
        """
        Sample one action for each environment; observations are ``(n_envs, *obs_shape)``.

        If a callback has replaced tensors with ones that kernels cannot read, torch acts, and the next update checks
        whether this engine can still run the policy.
        """
        if not self._follow_parameters():
            rows = th.from_numpy(self._rows(observations))
            return AutogradEngine(self.policy, self.settings).act(rows, with_dist_params=with_dist_params)
        scratch = self._scratch_for(len(observations))
        actions, is_finite = self._fill(scratch, 0, observations)
        dist_params = None
        if with_dist_params:
            dist, dist_params = self._binding.plain.dist, scratch.dist_params[0].copy()
            dist.distribution = lazy_distribution(dist, dist_params)  # callbacks may read it
        return Acted(
            actions=to_action_space(actions, self.policy.action_space),
            values=scratch.values.reshape(-1, 1).copy(),
            log_prob=scratch.log_prob[0].copy(),
            dist_params=dist_params,
            is_finite=is_finite,
        )

    def act_tensors(self, observations: th.Tensor, *, with_dist_params: bool) -> ActedTensors:
        """Act as :meth:`act` does; the tensors share the memory of its arrays."""
        acted = self.act(observations, with_dist_params=with_dist_params)
        return ActedTensors(th.from_numpy(acted.actions), *acted.as_tensors()[1:])

    def act_into(self, target: Target, step: int, observations: np.ndarray) -> tuple[np.ndarray, bool]:
        """
        Act as :meth:`act` does, and fill a step of the target, as described in :class:`.rollout_writer.WritingEngine`.

        If an environment replaces a parameter's tensor during a rollout, it takes effect in the next one at the latest.
        """
        target.check(step, len(observations), self._dist_dim)
        return self._fill(target, step, observations)

    def _fill(self, target: Target, step: int, observations: np.ndarray | th.Tensor) -> tuple[np.ndarray, bool]:
        rows = self._rows(observations)
        n_envs = len(rows)
        actions = np.empty((n_envs, self._action_dim), np.float32)
        noise = self._noise_for(n_envs)
        if n_envs < 2 * self._group_rows:
            with _blas_for(n_envs * self._largest_layer):
                workspace = self._workspace(n_envs)
                return actions, entry.act_into(self._packed, target.packed, step, rows, noise, workspace, actions)
        finite = []

        def run(group: slice, workspace: np.ndarray) -> None:
            own_target, own_noise = target.of_rows(step, group.start), self._noise_of(group, noise, n_envs)
            own_actions = actions[group]
            finite.append(entry.act_into(self._packed, own_target, 0, rows[group], own_noise, workspace, own_actions))

        self._run_groups(run, n_envs)
        return actions, all(finite)

    def predict_values(self, observations: th.Tensor) -> th.Tensor:
        """Return the values of observations, shape ``(n, 1)``, return units; torch computes them if it acts."""
        rows = self._rows(observations)
        if not self._follow_parameters():
            return AutogradEngine(self.policy, self.settings).predict_values(th.from_numpy(rows))
        n = len(rows)
        values = np.empty(n, np.float32)
        self._run_groups(
            lambda group, workspace: entry.predict_values(self._packed, rows[group], workspace, values[group]), n
        )
        return th.from_numpy(values.reshape(-1, 1))

    def _run_groups(self, run: Callable[[slice, np.ndarray], object], n: int) -> None:
        """Call ``run`` with groups of ``n`` rows, the same ones on any number of threads, and with a workspace."""
        n_groups = max(1, n // self._group_rows)
        n_threads = min(n_groups, self._threads.next())
        workspaces = [self._workspace(-(-n // n_groups), rank) for rank in range(n_threads)]

        def run_part(rank: int) -> None:
            for group in range(rank * n_groups // n_threads, (rank + 1) * n_groups // n_threads):
                run(slice(group * n // n_groups, (group + 1) * n // n_groups), workspaces[rank])

        with _blas_for(-(-n // n_groups) * self._largest_layer):
            run_on_threads(run_part, n_threads)

    def _rows(self, observations: np.ndarray | th.Tensor) -> np.ndarray:
        rows = as_floats(observations if isinstance(observations, np.ndarray) else observations.numpy())
        if rows.ndim != 2:
            rows = rows.reshape(len(rows), -1)
        self._check_width(rows.shape[1])
        return rows

    def _check_width(self, width: int) -> None:
        if width != self._obs_dim:  # a kernel would read beyond narrower rows
            raise ValueError(
                f"`observations` must have {self._obs_dim} numbers per row, as the policy needs, got {width}. Correct "
                "the environment or its space."
            )

    def _noise_for(self, n_envs: int) -> np.ndarray:
        if self._inputs.kind == inputs.STATE_DEPENDENT:
            # A callback may call `reset_noise` at any step, which creates new tensors.
            return exploration_matrices(self._binding.plain.dist, n_envs, self._latent_dim)
        if self._noise is None:
            raise RuntimeError("Call `begin_rollout(buffer)` before `act`.")
        return self._noise.next(n_envs)

    def _noise_of(self, group: slice, noise: np.ndarray, n_envs: int) -> np.ndarray:
        if self._inputs.kind == inputs.STATE_DEPENDENT and len(noise) == self._latent_dim:
            return noise  # all environments share a matrix
        n_rows = len(noise) // n_envs
        return noise[group.start * n_rows : group.stop * n_rows]

    # ------------------------------------------------------------------ the policy's tensors

    def _bind(self) -> None:
        self._binding = bind(self.policy)
        plain, self._inputs = self._binding.plain, _kernel_policy(self._binding)
        # These hold addresses of arrays, so a deep copy of this engine, whose policy is another one, needs its own.
        self._packed, self._divided, self._scratch = inputs.pack(self._inputs), None, None
        mlps = (self._inputs.actor, self._inputs.critic)
        self._row_size = max(workspace_size(mlp.sizes) for mlp in mlps)
        self._group_rows = rows_to_share(max(int(mlp.table[:, memory.SIZE].sum()) for mlp in mlps))
        self._largest_layer = max(layer.weight.numel() for layer in (*plain.actor, *plain.critic))
        self._addresses = self._binding.table[:, memory.PARAM].tolist()
        self._parameters = [row[0] for row in self._binding.tensors]
        self._memory = [parameter.data for parameter in self._parameters]  # keeps it alive if tensors are replaced
        self._modules = tuple(self.policy.modules())
        self._obs_dim, self._latent_dim = plain.actor[0].in_features, plain.actor[-1].in_features
        self._action_dim, self._dist_dim = n_action_numbers(plain.dist), dist_param_dim(plain.dist) or 0

    def _bind_if_changed(self) -> None:
        if not self._has_checked and not self._binding.is_current(self.policy):
            self._bind()
        self._has_checked = False

    def _follow_parameters(self) -> bool:
        """
        Update addresses of parameters if a callback has replaced their tensors (``parameter.data = ...``).

        Return whether kernels can read them.
        """
        addresses = list(map(th.Tensor.data_ptr, self._parameters))
        if addresses == self._addresses and all(map(th.Tensor.is_contiguous, self._parameters)):
            return True
        if any(
            parameter.shape != gradient.shape or parameter.dtype != th.float32 or not parameter.is_contiguous()
            for parameter, gradient, *_ in self._binding.tensors
        ) or share_memory(itertools.chain.from_iterable(self._binding.tensors)):
            try:
                self._bind()  # networks of a different width, or raises
            except UnsupportedError:
                return False
            return True
        # The next update checks whether this engine can still run the policy.
        self._binding.table[:, memory.PARAM] = self._addresses = addresses
        self._memory = [parameter.data for parameter in self._parameters]
        self._packed, self._divided = inputs.pack(self._inputs), None
        return True

    def _divided_for(self, batch_size: int) -> DividedPolicy:
        if self._divided is None or self._divided.division.batch_size != batch_size:
            self._divided = DividedPolicy(self._inputs, batch_size)
        return self._divided

    def _scratch_for(self, n: int) -> Target:
        if self._scratch is None or self._scratch.shape != (1, n, self._dist_dim):
            values, log_prob = np.empty((2, 1, n), np.float32)
            self._scratch = Target(values, log_prob, np.empty((1, n, self._dist_dim), np.float32))
        return self._scratch

    def _workspace(self, n: int, rank: int = 0) -> np.ndarray:
        size = n * self._row_size
        if rank not in self._workspaces or self._workspaces[rank].size < size:
            self._workspaces[rank] = np.empty(size, np.float32)
        return self._workspaces[rank]

    # ------------------------------------------------------------------ update

    def update(self, buffer: Any, coefficients: UpdateCoefficients) -> UpdateStatistics:
        """
        Run the epochs of one update; the buffer is a ``TensorRolloutBuffer``.

        :raises UnsupportedError: If this engine can no longer run the policy.
        :raises RuntimeError: If gradients are disabled, with which PyTorch's backward pass raises it.
        """
        check_gradients()
        self._bind_if_changed()
        settings, optimizer = self.settings, self.policy.optimizer
        rollout = rollout_of(buffer, settings.has_dist_params)
        check_stored(self._binding.plain.dist, rollout.actions, rollout.old_dist)
        self._check_width(buffer.observations.size // len(rollout.returns))
        n_made = steps_made(optimizer, self._parameters[:1])[0]  # the same for all
        hyper = hyperparameters_of(settings, coefficients, optimizer, n_made, buffer)
        if settings.group.size > 1:
            return self._update_shared(buffer, rollout, hyper, coefficients)
        random_state = np.random.get_state()
        permutations = _permutations(settings.n_epochs, len(rollout.returns))
        divided = self._divided_for(min(int(settings.batch_size), permutations.shape[1]))
        shared = divided.shared()
        totals = shared.totals
        try:
            self._run(divided, shared, rollout, hyper, permutations)
        finally:  # also after Ctrl-C, the optimizer's state must count the steps taken
            write_steps(optimizer, self._parameters, n_made + int(totals[TOTAL.n_steps]))
        n_epochs = int(totals[TOTAL.n_epochs])
        if n_epochs < settings.n_epochs:
            # After an early stop, the generator must not have drawn permutations for the omitted epochs.
            np.random.set_state(random_state)
            _permutations(n_epochs, len(rollout.returns))
        skipped = None
        if totals[TOTAL.n_skipped]:
            terms = statistics_of(shared.skipped, coefficients, measure_kl=True).terms(coefficients)
            terms["grad_norm"] = math.sqrt(shared.skipped[STAT.squares])
            skipped = self._skipped(buffer, permutations, int(totals[TOTAL.first_skipped]), terms)
            if settings.on_nonfinite == "raise" or not totals[TOTAL.n_minibatches]:
                raise skipped
        record = record_of(totals, coefficients, settings, skipped)
        return record.statistics(self._kl_after(rollout) if settings.measure_kl_after else None)

    def _update_shared(
        self, buffer: Any, rollout: inputs.RolloutArrays, hyper: np.ndarray, coefficients: UpdateCoefficients
    ) -> UpdateStatistics:
        """Run the epochs together with other processes, with calls of kernels for each minibatch."""

        def run(hyper: np.ndarray, permutations: np.ndarray) -> inputs.Shared:
            divided = self._divided_for(permutations.shape[1])
            shared = divided.shared()
            self._run(divided, shared, rollout, hyper, permutations)
            return shared

        settings, parameters = self.settings, self._parameters
        update = NativeUpdate(run, self._binding.table, hyper, coefficients, buffer)
        self.compile_seconds += update.compile_seconds
        try:
            record = run_shared_epochs(update, parameters, settings, coefficients, buffer, draw=update.draw)
        finally:
            write_steps(self.policy.optimizer, parameters, update.n_steps)
        return record.statistics(self._kl_after(rollout) if settings.measure_kl_after else None)

    def _run(
        self,
        divided: DividedPolicy,
        shared: inputs.Shared,
        rollout: inputs.RolloutArrays,
        hyper: np.ndarray,
        permutations: np.ndarray,
    ) -> None:
        """Run the epochs in kernels, which fill the totals, and the statistics of the first skipped minibatch."""
        n_threads = self._threads.next()
        division, totals = divided.division, shared.totals
        workspaces = [self._workspace(division.block_rows, rank) for rank in range(n_threads)]

        def run(rank: int) -> None:
            entry.run_update(
                rank, n_threads, divided.policies, rollout, hyper, permutations, division, shared, workspaces[rank]
            )

        cancel, interrupt = (partial(shared.counters.__setitem__, index, 1) for index in (CANCELLED, INTERRUPTED))
        with one_blas_thread:
            started = time.perf_counter()
            run_on_threads(run, n_threads, cancel, interrupt if divided.is_long(permutations.size) else None)
            seconds = time.perf_counter() - started
        self._threads.record(seconds, int(totals[TOTAL.n_minibatches] + totals[TOTAL.n_skipped]))

    def _skipped(
        self, buffer: Any, permutations: np.ndarray, number: int, terms: dict[str, float]
    ) -> BadMinibatchError:
        batch_size = self.settings.batch_size
        epoch, minibatch = divmod(number, -(-permutations.shape[1] // batch_size))
        indices = permutations[epoch, minibatch * batch_size : (minibatch + 1) * batch_size].astype(np.int64)
        return BadMinibatchError(terms, epoch, minibatch, buffer._get_samples(indices), indices)

    def _kl_after(self, rollout: inputs.RolloutArrays) -> th.Tensor:
        self.compile_seconds += warm_up("kl_of_rollout")
        n = len(rollout.returns)
        n_rows, n_threads = min(EVALUATION_ROWS, n), self._threads.next()
        sums = np.empty(-(-n // n_rows))
        workspaces = [self._workspace(n_rows, rank) for rank in range(n_threads)]

        ended = threading.Event()

        def run(rank: int) -> None:
            for k in range(rank * len(sums) // n_threads, (rank + 1) * len(sums) // n_threads):
                if not ended.is_set():  # Python handles signals between two calls
                    entry.kl_of_rollout(k, len(sums), self._packed, rollout, n_rows, workspaces[rank], sums)

        with one_blas_thread:
            run_on_threads(run, n_threads, ended.set)
        return self.settings.group.mean(th.tensor(sums.sum() / n, dtype=th.float64), n)


def _permutations(n_epochs: int, n: int) -> np.ndarray:
    """Draw the permutations of the epochs, as the buffer does, in half of the memory."""
    permutations = np.empty((n_epochs, n), np.int32 if n <= 2**31 else np.int64)
    for permutation in permutations:
        permutation[:] = np.random.permutation(n)
    return permutations


def _blas_for(n_multiplications: int) -> AbstractContextManager[None]:
    # For a small product, the limit takes about as long as the product.
    return nullcontext() if n_multiplications <= UNSHARED_WORK else one_blas_thread


def _kernel_policy(binding: Binding) -> inputs.Policy:
    plain = binding.plain
    table, n_actor, activation = binding.table, len(plain.actor_parameters), _ACTIVATIONS[plain.activation]
    return inputs.Policy(
        actor=inputs.Mlp(_sizes(plain.actor), table[:n_actor], activation),
        critic=inputs.Mlp(_sizes(plain.critic), table[n_actor:], activation),
        kind=KINDS[type(plain.dist)],
        widths=category_counts(plain.dist),
        use_expln=int(getattr(plain.dist, "use_expln", False)),
    )


def _sizes(layers: list[nn.Linear]) -> np.ndarray:
    return np.array([layers[0].in_features, *(layer.out_features for layer in layers)], np.int64)


def _gae(
    rewards: np.ndarray,
    values: np.ndarray,
    episode_starts: np.ndarray,
    last_values: np.ndarray,
    dones: np.ndarray,
    gamma: float,
    gae_lambda: float,
) -> tuple[np.ndarray, np.ndarray]:
    """Compute :func:`sb3_clipvf.rollout.gae` by a kernel, in float32."""
    arrays = [as_floats(array) for array in (rewards, values, episode_starts, last_values, dones)]
    advantages, returns = np.empty(values.shape, np.float32), np.empty(values.shape, np.float32)
    entry.advantages_and_returns(*arrays, float(gamma), float(gae_lambda), advantages, returns)
    return advantages, returns
