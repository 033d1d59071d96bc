"""
One update: all epochs of minibatches, on one thread or with actor and critic side by side on two.

Actor and critic share no parameters, so that only the joint gradient norm and ``target_kl`` make them wait for each
other; the numbers are the same on one thread and on two.
"""

import math
from typing import NamedTuple

import numpy as np

from sb3_clipvf.engines.kernels import heads
from sb3_clipvf.engines.kernels.adam import adam_step, squared_norm
from sb3_clipvf.engines.kernels.compiled import fast
from sb3_clipvf.engines.kernels.losses import NOT_CLIPPED, shift_and_scale, surrogate, value_loss
from sb3_clipvf.engines.kernels.memory import ACTIVATION, CATEGORICAL, DIST, GAUSSIAN, GRAD, N_COLUMNS, PARAM, vector
from sb3_clipvf.engines.kernels.network import backward, forward, layer, output_gradient
from sb3_clipvf.engines.kernels.sync import wait_for_all

F = np.float32
_CLIP_EPS = 1e-6

# Totals over the minibatches that were looked at; those of the last epoch are started anew with each epoch.
(
    N_LOOKED_AT,
    N_STEPS,
    N_EPOCHS,
    POLICY_LOSS,
    ENTROPY_LOSS,
    CLIP_FRACTION,
    RATIO_MAX,
    VALUE_LOSS,
    VF_CLIP_FRACTION,
    GRAD_NORM,
    LAST_LOSS,
    N_IN_EPOCH,
    APPROX_KL,
    KL,
    STOPPED_AT,
) = range(15)
N_TOTALS = 15

# What the threads tell each other, twice, since one may be a minibatch ahead of the other's reading.
_ACTOR_NORM, _CRITIC_NORM, _APPROX_KL, _VALUE_LOSS, _ACTOR_LOSS = range(5)
N_SHARED = 5


class Network(NamedTuple):
    """
    The policy as kernels see it.

    :param codes: Kind of distribution, activation, widths of an action and of the distribution's parameters.
    :param actor_sizes: Width of the actor's input and of each layer.
    :param critic_sizes: The same of the critic.
    :param widths: Actions of each categorical distribution.
    :param table: One row a parameter, actor first; columns as in :mod:`.memory`.
    :param first_critic: Row of the critic's first weight.
    :param log_std_row: Row of the Gaussian's log standard deviations, the last of the actor's; -1: there is none.
    """

    codes: np.ndarray
    actor_sizes: np.ndarray
    critic_sizes: np.ndarray
    widths: np.ndarray
    table: np.ndarray
    first_critic: int
    log_std_row: int


def pack(network: Network) -> np.ndarray:
    """
    Write a policy into one array, which Python hands over to a kernel faster than a tuple of arrays.

    :param network: The policy.
    :return: int64, for :func:`unpack`.
    """
    parts = [network.codes, network.actor_sizes, network.critic_sizes, network.widths, network.table.reshape(-1)]
    head = [*(len(part) for part in parts), network.first_critic, network.log_std_row]
    return np.concatenate([np.array(head, np.int64), *parts])


@fast
def unpack(packed: np.ndarray) -> Network:
    """
    Read what :func:`pack` wrote.

    :param packed: int64.
    :return: Views of it.
    """
    n_head = 7
    ends = np.cumsum(packed[:5]) + n_head
    return Network(
        packed[n_head : ends[0]],
        packed[ends[0] : ends[1]],
        packed[ends[1] : ends[2]],
        packed[ends[2] : ends[3]],
        packed[ends[3] : ends[4]].reshape(-1, N_COLUMNS),
        packed[5],
        packed[6],
    )


class Rollout(NamedTuple):
    """
    One rollout, a row a transition, float32.

    :param observations: Shape ``(n, obs_dim)``.
    :param actions: Shape ``(n, action_dim)``.
    :param old_values: Shape ``(n,)``.
    :param old_log_prob: Shape ``(n,)``.
    :param advantages: Shape ``(n,)``.
    :param returns: Shape ``(n,)``.
    :param old_dist: Shape ``(n, k)``, or ``(0, 0)``.
    :param n_steps: Steps of each environment.
    :param n_envs: Environments; rows run step by step.
    """

    observations: np.ndarray
    actions: np.ndarray
    old_values: np.ndarray
    old_log_prob: np.ndarray
    advantages: np.ndarray
    returns: np.ndarray
    old_dist: np.ndarray
    n_steps: int
    n_envs: int


class Numbers(NamedTuple):
    """
    Coefficients and settings of one update; all float64.

    :param clip_range: epsilon; infinity: not clipped.
    :param value_form: As in :mod:`.losses`.
    :param clip_range_vf: Return units.
    :param ent_coef: Weight of the entropy.
    :param vf_coef: Weight of the value loss.
    :param kl_coef: beta.
    :param normalize: 1 where advantages are normalised in each minibatch.
    :param shift: Taken from all advantages otherwise.
    :param scale: They are divided by it otherwise.
    :param advantage_eps: Added to their standard deviation.
    :param max_grad_norm: Bound on the joint norm.
    :param target_kl: nats; infinity: no early stop.
    :param kl_from_epoch: First epoch whose exact KL is measured.
    :param step: Steps that the optimizer has made.
    :param learning_rate: At least 0.
    :param beta1: Adam's.
    :param beta2: Adam's.
    :param eps: Adam's.
    :param weight_decay: Adam's or AdamW's.
    :param decoupled: 1 for AdamW.
    """

    clip_range: float
    value_form: float
    clip_range_vf: float
    ent_coef: float
    vf_coef: float
    kl_coef: float
    normalize: float
    shift: float
    scale: float
    advantage_eps: float
    max_grad_norm: float
    target_kl: float
    kl_from_epoch: float
    step: float
    learning_rate: float
    beta1: float
    beta2: float
    eps: float
    weight_decay: float
    decoupled: float


@fast
def run_update(
    rank: int,
    n_threads: int,
    network: Network,
    rollout: Rollout,
    numbers: Numbers,
    permutations: np.ndarray,
    batch_size: int,
    work: np.ndarray,
    shared: np.ndarray,
    counter: np.ndarray,
    totals: np.ndarray,
) -> None:
    """
    Run this thread's part of an update.

    :param rank: 0 is the actor's thread; the last one is the critic's.
    :param n_threads: 1 or 2.
    :param network: The policy, changed in place.
    :param rollout: What it collected.
    :param numbers: Coefficients and settings.
    :param permutations: Shape ``(n_epochs, n)``, in SB3's numbering, environment by environment.
    :param batch_size: Transitions in a minibatch; the last one may be shorter.
    :param work: This thread's workspace, large enough for the larger network.
    :param shared: Shape ``(2, N_SHARED)``.
    :param counter: Of the barrier.
    :param totals: Filled, shape ``(N_TOTALS,)``; each thread writes its own.
    """
    has_actor, has_critic = rank == 0, rank == n_threads - 1
    n = rollout.returns.shape[0]
    first = 0 if has_actor else network.first_critic
    end = network.table.shape[0] if has_critic else network.first_critic
    rows = np.empty(batch_size, np.int64)
    n_minibatches, n_steps = 0, 0
    for epoch in range(permutations.shape[0]):
        if has_actor:
            totals[N_EPOCHS] += 1
            totals[N_IN_EPOCH], totals[APPROX_KL], totals[KL] = 0, 0, 0
        measure_kl = numbers.kl_coef != 0.0 or epoch >= numbers.kl_from_epoch
        for start in range(0, n, batch_size):
            size = min(batch_size, n - start)
            for i in range(size):
                index = permutations[epoch, start + i]
                rows[i] = (index % rollout.n_steps) * rollout.n_envs + index // rollout.n_steps
            told = shared[n_minibatches % 2]
            n_minibatches += 1
            if has_actor:
                _actor(network, rollout, numbers, rows[:size], measure_kl, work, told, totals)
                told[_ACTOR_NORM] = squared_norm(network.table, 0, network.first_critic)
            if has_critic:
                _critic(network, rollout, numbers, rows[:size], work, told, totals)
                told[_CRITIC_NORM] = squared_norm(network.table, network.first_critic, network.table.shape[0])
            wait_for_all(counter, n_threads, n_minibatches)
            if has_actor:
                totals[LAST_LOSS] = told[_ACTOR_LOSS] + numbers.vf_coef * told[_VALUE_LOSS]
            if F(told[_APPROX_KL]) > 1.5 * numbers.target_kl:
                if has_actor:
                    totals[STOPPED_AT] = told[_APPROX_KL]
                return
            norm = math.sqrt(told[_ACTOR_NORM] + told[_CRITIC_NORM])
            n_steps += 1
            if has_actor:
                totals[GRAD_NORM] += norm
                totals[N_STEPS] += 1
            # As torch's clip_grad_norm_; NaN stays NaN.
            ratio = numbers.max_grad_norm / (norm + _CLIP_EPS)
            adam_step(
                network.table, first, end, 1.0 if ratio > 1.0 else ratio, int(numbers.step) + n_steps,
                numbers.learning_rate, numbers.beta1, numbers.beta2, numbers.eps, numbers.weight_decay,
                numbers.decoupled != 0.0,
            )  # fmt: skip


@fast
def _actor(
    network: Network, rollout: Rollout, numbers: Numbers, rows: np.ndarray, measure_kl: bool, work: np.ndarray,
    told: np.ndarray, totals: np.ndarray,
) -> None:  # fmt: skip
    """Forward and backward pass of the actor."""
    n = rows.shape[0]
    sizes, kind = network.actor_sizes, network.codes[DIST]
    advantages, old_log_prob = np.empty(n, np.float32), np.empty(n, np.float32)
    log_prob, entropy, weights = np.empty(n, np.float32), np.empty(n, np.float32), np.empty(n, np.float32)
    actions = np.empty((n, rollout.actions.shape[1]), np.float32)
    _gather(rollout.observations, rows, layer(work, sizes, n, 0))
    _gather(rollout.actions, rows, actions)
    for i in range(n):
        advantages[i], old_log_prob[i] = rollout.advantages[rows[i]], rollout.old_log_prob[rows[i]]
    shift, scale = F(numbers.shift), F(numbers.scale)
    if numbers.normalize != 0.0:
        shift, scale = shift_and_scale(advantages, numbers.advantage_eps)
    for i in range(n):
        advantages[i] = (advantages[i] - shift) / scale

    outputs = forward(work, sizes, n, network.table, 0, network.codes[ACTIVATION])
    gradient = output_gradient(work, sizes, n)
    log_std, log_std_gradient = log_std_of(network, PARAM), log_std_of(network, GRAD)
    heads.evaluate(kind, outputs, log_std, network.widths, actions, gradient, log_prob, entropy)
    loss, clipped, k3, largest = surrogate(log_prob, old_log_prob, advantages, numbers.clip_range, weights)
    kl = 0.0
    if measure_kl:
        kl = heads.kl_from_old(kind, outputs, log_std, gradient, rollout.old_dist, rows) / n
    heads.gradients(
        kind, outputs, log_std, network.widths, actions, gradient, weights, numbers.ent_coef, numbers.kl_coef,
        rollout.old_dist, rows, log_std_gradient,
    )  # fmt: skip
    backward(work, sizes, n, network.table, 0, network.codes[ACTIVATION])

    entropy_loss = 0.0
    for i in range(n):
        entropy_loss -= entropy[i] / n
    told[_APPROX_KL] = k3
    told[_ACTOR_LOSS] = loss + numbers.ent_coef * entropy_loss + numbers.kl_coef * kl
    totals[N_LOOKED_AT] += 1
    totals[N_IN_EPOCH] += 1
    totals[POLICY_LOSS] += loss
    totals[ENTROPY_LOSS] += entropy_loss
    totals[CLIP_FRACTION] += clipped
    totals[APPROX_KL] += k3
    totals[KL] += kl
    if largest > totals[RATIO_MAX] or largest != largest:
        totals[RATIO_MAX] = largest


@fast
def _critic(
    network: Network, rollout: Rollout, numbers: Numbers, rows: np.ndarray, work: np.ndarray, told: np.ndarray,
    totals: np.ndarray,
) -> None:  # fmt: skip
    """Forward and backward pass of the critic."""
    n = rows.shape[0]
    sizes = network.critic_sizes
    old_values, returns = np.empty(n, np.float32), np.empty(n, np.float32)
    _gather(rollout.observations, rows, layer(work, sizes, n, 0))
    for i in range(n):
        old_values[i], returns[i] = rollout.old_values[rows[i]], rollout.returns[rows[i]]
    values = forward(work, sizes, n, network.table, network.first_critic, network.codes[ACTIVATION])
    loss, clipped = value_loss(
        values.reshape(n), old_values, returns, int(numbers.value_form), numbers.clip_range_vf, numbers.vf_coef,
        output_gradient(work, sizes, n).reshape(n),
    )  # fmt: skip
    backward(work, sizes, n, network.table, network.first_critic, network.codes[ACTIVATION])
    told[_VALUE_LOSS] = loss
    totals[VALUE_LOSS] += loss
    totals[VF_CLIP_FRACTION] += clipped if int(numbers.value_form) != NOT_CLIPPED else 0.0


@fast
def _gather(source: np.ndarray, rows: np.ndarray, target: np.ndarray) -> None:
    for i in range(rows.shape[0]):
        row = source[rows[i]]
        for j in range(row.shape[0]):
            target[i, j] = row[j]


@fast
def log_std_of(network: Network, column: int) -> np.ndarray:
    """
    The Gaussian's log standard deviations, or their gradients.

    :param network: The policy.
    :param column: PARAM or GRAD.
    :return: Shape ``(action_dim,)``, no copy; empty where the distribution is another.
    """
    if network.codes[DIST] != GAUSSIAN:
        return np.empty(0, np.float32)
    return vector(network.table[network.log_std_row, column], network.actor_sizes[-1])


@fast
def kl_of_rollout(network: Network, rollout: Rollout, chunk: int, work: np.ndarray) -> float:
    """
    Mean exact KL(pi_old || pi) over a rollout, under the parameters as they are now.

    :param network: The policy.
    :param rollout: What pi_old collected.
    :param chunk: Rows of each forward pass.
    :param work: Workspace for as many.
    :return: nats.
    """
    n = rollout.returns.shape[0]
    sizes, kind = network.actor_sizes, network.codes[DIST]
    total = 0.0
    for start in range(0, n, chunk):
        size = min(chunk, n - start)
        rows = np.arange(start, start + size)
        _gather(rollout.observations, rows, layer(work, sizes, size, 0))
        outputs = forward(work, sizes, size, network.table, 0, network.codes[ACTIVATION])
        probs = output_gradient(work, sizes, size)
        if kind == CATEGORICAL:
            heads.normalize_all(kind, outputs, network.widths, probs)
        total += heads.kl_from_old(kind, outputs, log_std_of(network, PARAM), probs, rollout.old_dist, rows)
    return total / n
