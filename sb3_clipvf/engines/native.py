"""The native engine: compiled kernels for plain MLP policies on the CPU, in place on the policy's own memory."""

import math
import threading
import time
from typing import Any, cast

import numpy as np
import torch as th
from gymnasium import spaces
from stable_baselines3.common.distributions import (
    BernoulliDistribution,
    CategoricalDistribution,
    MultiCategoricalDistribution,
)
from stable_baselines3.common.policies import ActorCriticPolicy
from torch import nn

from sb3_clipvf.engines import why_not_native
from sb3_clipvf.engines.binding import Binding, bind, n_steps_made, write_steps
from sb3_clipvf.engines.kernels import entry, memory
from sb3_clipvf.engines.kernels import update as kernels
from sb3_clipvf.engines.kernels.losses import CLIPPED_MAX, CLIPPED_PREDICTION, NOT_CLIPPED
from sb3_clipvf.engines.kernels.network import workspace_size
from sb3_clipvf.engines.settings import Acted, UpdateCoefficients, UpdateSettings, UpdateStatistics
from sb3_clipvf.engines.threads import ThreadChoice, one_blas_thread
from sb3_clipvf.messages import log
from sb3_clipvf.objectives import ADVANTAGE_EPS

EVALUATION_ROWS = 1024
"""Rows in a forward pass over a whole rollout."""

NOISE_NUMBERS = 2**16
"""Random numbers that are drawn at once for the actions of a rollout."""

COMPILE_NOTE_SECONDS = 3.0
"""Waiting time after which the user is told that kernels are being compiled."""

_KINDS: dict[type[Any], int] = {
    CategoricalDistribution: memory.CATEGORICAL,
    MultiCategoricalDistribution: memory.CATEGORICAL,
    BernoulliDistribution: memory.BERNOULLI,
}
_ACTIVATIONS = {
    nn.Tanh: memory.TANH,
    nn.ReLU: memory.RELU,
    nn.ELU: memory.ELU,
    nn.LeakyReLU: memory.LEAKY_RELU,
    nn.SiLU: memory.SILU,
}


class NativeEngine:
    """
    Updates a plain MLP policy, and acts for it, by compiled kernels.

    Same permutations, same coefficients and the numbers of the autograd engine to float32 rounding. Actions are drawn
    from torch's generator, but in other portions than torch's own distributions draw them.

    :param policy: Its parameters, their gradients and its optimizer's moments are changed in place.
    :param settings: What stays the same over all updates.
    :raises NotPlainError: If the policy is more than kernels know.
    """

    name = "native"

    def __init__(self, policy: ActorCriticPolicy, settings: UpdateSettings) -> None:
        self.policy = policy
        self.settings = settings
        self._threads = ThreadChoice()
        self._noise = _Noise()
        self._work: dict[int, np.ndarray] = {}
        self._bind()
        _compile(self._network, self._packed)

    def _bind(self) -> None:
        self._binding = bind(self.policy)
        self._network = _network(self._binding)
        self._packed = kernels.pack(self._network)
        self._addresses = self._binding.table[:, memory.PARAM].tolist()
        self._parameters = [row[0] for row in self._binding.tensors]
        self._action_dim = int(self._network.codes[memory.ACTION_DIM])
        self._dist_dim = int(self._network.codes[memory.DIST_DIM])

    def _bind_again(self) -> None:
        if not self._binding.holds(self.policy):
            self._bind()

    # ------------------------------------------------------------------ rollout

    def fits(self, buffer: Any) -> bool:
        """
        Tell whether this engine still runs its policy, which someone may have changed.

        :param buffer: The rollout buffer.
        :return: False where another engine must be chosen.
        """
        return self._binding.holds(self.policy) or why_not_native(self.policy, buffer) is None

    def begin_rollout(self, buffer: Any) -> None:
        """
        Look at the policy anew, and forget random numbers that are left from another rollout.

        :param buffer: Will be filled; its advantages will be computed by a kernel.
        :raises NotPlainError: If the policy has become more than kernels know.
        """
        self._bind_again()
        buffer.gae_fn = _gae
        is_gaussian = self._network.codes[memory.DIST] == memory.GAUSSIAN
        self._noise.begin(buffer.buffer_size, (buffer.n_envs, self._action_dim), normal=bool(is_gaussian))

    def act(self, observations: th.Tensor, *, with_dist_params: bool) -> Acted:
        """
        Sample one action for each environment.

        :param observations: Shape ``(n_envs, *obs_shape)``.
        :param with_dist_params: Whether the distribution's parameters are wanted.
        :return: What the rollout stores.
        """
        self._follow_parameters()
        n_envs = len(observations)
        rows = _float_rows(observations.numpy(), n_envs)
        actions = np.empty((n_envs, self._action_dim), np.float32)
        values, log_prob = np.empty((n_envs, 1), np.float32), np.empty(n_envs, np.float32)
        dist_params = np.empty((n_envs, self._dist_dim if with_dist_params else 0), np.float32)
        entry.act(
            self._packed, rows, self._noise.next(), self._workspace(n_envs), actions, values.reshape(n_envs), log_prob,
            dist_params,
        )  # fmt: skip
        return Acted(
            actions=self._as_policy_gives(actions),
            values=th.from_numpy(values),
            log_prob=th.from_numpy(log_prob),
            dist_params=th.from_numpy(dist_params) if with_dist_params else None,
        )

    def predict_values(self, observations: th.Tensor) -> th.Tensor:
        """
        Predict the values of observations.

        :param observations: Shape ``(n, *obs_shape)``.
        :return: Shape ``(n, 1)``, return units.
        """
        self._follow_parameters()
        n = len(observations)
        values = np.empty(n, np.float32)
        rows = _float_rows(observations.numpy(), n)
        entry.predict_values(self._packed, rows, self._workspace(n), values)
        return th.from_numpy(values.reshape(-1, 1))

    def _follow_parameters(self) -> None:
        # A callback may have put other tensors into the parameters' place; their values need no attention.
        for parameter, address in zip(self._parameters, self._addresses, strict=True):
            if parameter.data_ptr() != address:
                self._bind()
                return

    def _as_policy_gives(self, actions: np.ndarray) -> np.ndarray:
        space = self.policy.action_space
        if isinstance(space, spaces.Discrete):
            return actions.reshape(-1).astype(np.int64)
        if isinstance(space, spaces.MultiDiscrete):
            return actions.astype(np.int64)
        return np.asarray(actions.reshape(-1, *cast(tuple[int, ...], space.shape)))

    # ------------------------------------------------------------------ update

    def update(self, buffer: Any, coefficients: UpdateCoefficients) -> UpdateStatistics:
        """
        Run the epochs of one update.

        :param buffer: A complete rollout in a ``TensorRolloutBuffer``.
        :param coefficients: Of this update.
        :return: Statistics.
        :raises NotPlainError: If the policy has become more than kernels know.
        """
        self._bind_again()
        settings = self.settings
        rollout = _rollout(buffer, settings.has_dist_params)
        numbers = self._numbers(buffer, coefficients)
        n_transitions = rollout.returns.shape[0]
        state = None if settings.target_kl is None else np.random.get_state()
        permutations = np.stack([np.random.permutation(n_transitions) for _ in range(settings.n_epochs)])
        totals = self._run(rollout, numbers, permutations)
        if state is not None and totals[kernels.N_EPOCHS] < settings.n_epochs:
            # An update that was left early must not have drawn the permutations of the epochs that it left out.
            np.random.set_state(state)
            for _ in range(int(totals[kernels.N_EPOCHS])):
                np.random.permutation(n_transitions)
        write_steps(self.policy, int(numbers.step + totals[kernels.N_STEPS]))
        kl_after = None
        if settings.measure_kl_after:
            rows = min(EVALUATION_ROWS, n_transitions)
            kl_after, _ = entry.kl_of_rollout(self._packed, rollout, rows, self._workspace(rows))
        return _statistics(totals, coefficients, settings, kl_after)

    def _run(self, rollout: kernels.Rollout, numbers: kernels.Numbers, permutations: np.ndarray) -> np.ndarray:
        n_threads = self._threads.next()
        batch_size = min(self.settings.batch_size, permutations.shape[1])
        counter, shared = np.zeros(1, np.int64), np.zeros((2, kernels.N_SHARED))
        totals = np.zeros((n_threads, kernels.N_TOTALS))
        works = [self._workspace(batch_size, rank) for rank in range(n_threads)]

        def run(rank: int) -> None:
            entry.run_update(
                rank, n_threads, self._packed, rollout, numbers, permutations, batch_size, works[rank], shared,
                counter, totals[rank],
            )  # fmt: skip

        with one_blas_thread():
            started = time.perf_counter()
            others = [threading.Thread(target=run, args=(rank,), daemon=True) for rank in range(1, n_threads)]
            for thread in others:
                thread.start()
            run(0)
            for thread in others:
                thread.join()
            self._threads.took(time.perf_counter() - started)
        return np.asarray(totals.sum(axis=0))

    def _numbers(self, buffer: Any, coefficients: UpdateCoefficients) -> kernels.Numbers:
        settings = self.settings
        group = self.policy.optimizer.param_groups[0]
        in_rollout = settings.normalize_advantage and settings.advantage_scope == "rollout"
        shift, scale = 0.0, 1.0
        if in_rollout and buffer.advantages.size > 1:
            shift = float(buffer.advantages.mean(dtype=np.float64))
            scale = float(buffer.advantages.std(dtype=np.float64, ddof=1)) + ADVANTAGE_EPS
        form = NOT_CLIPPED
        if coefficients.clip_range_vf is not None:
            form = CLIPPED_MAX if settings.vf_clip == "max" else CLIPPED_PREDICTION
        kl_from_epoch = 0.0 if settings.target_kl is not None else settings.n_epochs - 1.0
        return kernels.Numbers(
            clip_range=_or_infinite(coefficients.clip_range),
            value_form=float(form),
            clip_range_vf=_or_infinite(coefficients.clip_range_vf),
            ent_coef=float(coefficients.ent_coef),
            vf_coef=float(coefficients.vf_coef),
            kl_coef=float(coefficients.kl_coef),
            normalize=float(settings.normalize_advantage and not in_rollout),
            shift=shift,
            scale=scale,
            advantage_eps=ADVANTAGE_EPS,
            max_grad_norm=float(settings.max_grad_norm),
            target_kl=_or_infinite(settings.target_kl),
            kl_from_epoch=kl_from_epoch if settings.has_dist_params else np.inf,
            step=float(n_steps_made(self._binding, self.policy)),
            learning_rate=float(group["lr"]),
            beta1=float(group["betas"][0]),
            beta2=float(group["betas"][1]),
            eps=float(group["eps"]),
            weight_decay=float(group["weight_decay"]),
            decoupled=float(isinstance(self.policy.optimizer, th.optim.AdamW)),
        )

    def _workspace(self, n: int, rank: int = 0) -> np.ndarray:
        network = self._network
        size = max(workspace_size(sizes, n) for sizes in (network.actor_sizes, network.critic_sizes))
        if rank not in self._work or self._work[rank].size < size:
            self._work[rank] = np.empty(size, np.float32)
        return self._work[rank]


class _Noise:
    """Random numbers for the actions of a rollout, drawn from torch's generator many at once."""

    def begin(self, n_steps: int, shape: tuple[int, int], *, normal: bool) -> None:
        at_once = max(1, NOISE_NUMBERS // (shape[0] * shape[1]))
        self._shape = (min(n_steps, at_once), *shape)
        self._draw = th.randn if normal else th.rand
        self._drawn = np.empty((0, *shape), np.float32)
        self._next = 0

    def next(self) -> np.ndarray:
        if self._next == len(self._drawn):
            self._drawn, self._next = self._draw(self._shape).numpy(), 0
        row: np.ndarray = self._drawn[self._next]
        self._next += 1
        return row


def _network(binding: Binding) -> kernels.Network:
    plain = binding.plain
    dist = plain.dist
    if isinstance(dist, CategoricalDistribution):
        widths = [dist.action_dim]
    else:
        widths = list(dist.action_dims) if isinstance(dist, MultiCategoricalDistribution) else []
    n_outputs = plain.actor[-1].out_features
    is_gaussian = plain.log_std is not None
    codes = [
        _KINDS.get(type(dist), memory.GAUSSIAN),
        _ACTIVATIONS[plain.activation],
        len(widths) or n_outputs,
        2 * n_outputs if is_gaussian else n_outputs,
    ]
    n_actor = len(plain.actor_parameters)
    return kernels.Network(
        codes=np.array(codes, np.int64),
        actor_sizes=_sizes(plain.actor),
        critic_sizes=_sizes(plain.critic),
        widths=np.array(widths, np.int64),
        table=binding.table,
        first_critic=n_actor,
        log_std_row=n_actor - 1 if is_gaussian else -1,
    )


def _sizes(layers: list[nn.Linear]) -> np.ndarray:
    return np.array([layers[0].in_features, *(layer.out_features for layer in layers)], np.int64)


def _rollout(buffer: Any, has_dist_params: bool) -> kernels.Rollout:
    n = buffer.buffer_size * buffer.n_envs
    return kernels.Rollout(
        observations=_float_rows(buffer.observations, n),
        actions=_float_rows(buffer.actions, n),
        old_values=buffer.values.reshape(n),
        old_log_prob=buffer.log_probs.reshape(n),
        advantages=buffer.advantages.reshape(n),
        returns=buffer.returns.reshape(n),
        old_dist=buffer.dist_params.reshape(n, -1) if has_dist_params else np.empty((0, 0), np.float32),
        n_steps=buffer.buffer_size,
        n_envs=buffer.n_envs,
    )


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
    return np.ascontiguousarray(array.reshape(n, -1), np.float32)


def _or_infinite(number: float | None) -> float:
    return math.inf if number is None else float(number)


def _statistics(
    totals: np.ndarray, coefficients: UpdateCoefficients, settings: UpdateSettings, kl_after: float | None
) -> UpdateStatistics:
    looked_at, in_epoch = totals[kernels.N_LOOKED_AT], totals[kernels.N_IN_EPOCH]
    names = {
        "policy_gradient_loss": kernels.POLICY_LOSS,
        "value_loss": kernels.VALUE_LOSS,
        "entropy_loss": kernels.ENTROPY_LOSS,
    }
    if coefficients.clip_range is not None:
        names["clip_fraction"] = kernels.CLIP_FRACTION
    if coefficients.clip_range_vf is not None:
        names["vf_clip_fraction"] = kernels.VF_CLIP_FRACTION
    means = {name: _scalar(totals[place] / looked_at) for name, place in names.items()}
    if totals[kernels.N_STEPS]:
        means["grad_norm"] = _scalar(totals[kernels.GRAD_NORM] / totals[kernels.N_STEPS])
    n_epochs = int(totals[kernels.N_EPOCHS])
    knows_kl = settings.has_dist_params and (
        coefficients.kl_coef != 0 or settings.target_kl is not None or n_epochs == settings.n_epochs
    )
    stopped_at = float(totals[kernels.STOPPED_AT])
    return UpdateStatistics(
        means=means,
        last_loss=_scalar(totals[kernels.LAST_LOSS]),
        approx_kl=_scalar(totals[kernels.APPROX_KL] / in_epoch),
        kl=_scalar(totals[kernels.KL] / in_epoch) if knows_kl else None,
        kl_after=None if kl_after is None else _scalar(kl_after),
        ratio_max=_scalar(totals[kernels.RATIO_MAX]),
        n_epochs=n_epochs,
        stopped_at_kl=stopped_at or None,
    )


def _scalar(number: float) -> th.Tensor:
    return th.tensor(number, dtype=th.float64)


def _compile(network: kernels.Network, packed: np.ndarray) -> None:
    """Compile all kernels, or read them from numba's cache; where that takes long, say so."""
    if entry.run_update.signatures:  # type: ignore[attr-defined]
        return
    note = threading.Timer(
        COMPILE_NOTE_SECONDS,
        lambda: log.warning("Compiling the native engine's kernels; they are kept on disk for later runs"),
    )
    note.daemon = True
    started = time.perf_counter()
    note.start()
    try:
        _call_all(network, packed)
    finally:
        note.cancel()
    seconds = time.perf_counter() - started
    kernels_: Any = entry.ALL
    n_compiled = sum(sum(kernel.stats.cache_misses.values()) for kernel in kernels_)
    if n_compiled:
        log.info("Compiled the native engine's kernels in %.1f s", seconds)


def _call_all(network: kernels.Network, packed: np.ndarray) -> None:
    rows, row = np.zeros((1, network.actor_sizes[0]), np.float32), np.zeros(1, np.float32)
    actions = np.zeros((1, network.codes[memory.ACTION_DIM]), np.float32)
    none, nothing = np.zeros((0, 0), np.float32), np.zeros(0, np.float32)
    sizes = (network.actor_sizes, network.critic_sizes)
    work = np.zeros(max(workspace_size(widths, 1) for widths in sizes), np.float32)
    entry.act(packed, rows, actions.copy(), work, actions, row.copy(), row.copy(), np.zeros((1, 0), np.float32))
    entry.predict_values(packed, rows, work, row.copy())
    entry.advantages_and_returns(none, none, none, nothing, nothing, 0.0, 0.0, none.copy(), none.copy())
    rollout = kernels.Rollout(none, none, nothing, nothing, nothing, nothing, none, 0, 0)
    numbers = kernels.Numbers(*[0.0] * len(kernels.Numbers._fields))
    entry.kl_of_rollout(packed, rollout, 1, work)
    shared, counter, totals = np.zeros((2, kernels.N_SHARED)), np.zeros(1, np.int64), np.zeros(kernels.N_TOTALS)
    permutations = np.zeros((0, 0), np.int64)
    entry.run_update(0, 1, packed, rollout, numbers, permutations, 1, work, shared, counter, totals)
