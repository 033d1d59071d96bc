"""
One update: all epochs of minibatches, on one thread or with actor and critic side by side on two.

Actor and critic share no parameters, so that only the joint gradient norm and ``target_kl`` make them wait for each
other; the numbers are the same on one thread and on two.
"""

import numpy as np

from sb3_clipvf.common.jit import fast
from sb3_clipvf.engines.kernels import gsde, heads
from sb3_clipvf.engines.kernels.adam import squared_norm
from sb3_clipvf.engines.kernels.data import (
    ACTOR_NORM,
    APPROX_KL,
    CRITIC_NORM,
    FIRST_SKIPPED,
    KL,
    N_EPOCHS,
    N_IN_EPOCH,
    N_SKIPPED,
    SKIPPED_ROW,
    Network,
    Numbers,
    Rollout,
    log_std_of,
)
from sb3_clipvf.engines.kernels.memory import ACTIVATION, DIST, GRAD, STATE_DEPENDENT
from sb3_clipvf.engines.kernels.minibatch import (
    SKIPS,
    STEPS,
    STOPS,
    clip_factor,
    count,
    policy_gradient,
    step,
    value_gradient,
    verdict,
)
from sb3_clipvf.engines.kernels.network import backward, forward, layer, output_gradient
from sb3_clipvf.engines.kernels.sync import wait_for_all


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
    :param shared: Shape ``(N_SHARED_ROWS, N_TOLD)``.
    :param counter: Of the barrier.
    :param totals: Filled by the actor's thread, shape ``(N_TOTALS,)``.
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
        measure_kl = epoch >= numbers.kl_from_epoch
        for start in range(0, n, batch_size):
            size = min(batch_size, n - start)
            _rows_of(permutations[epoch, start : start + size], rollout, rows)
            told = shared[n_minibatches % 2]
            n_minibatches += 1
            if has_actor:
                _actor(network, rollout, numbers, rows[:size], measure_kl, work, told)
            if has_critic:
                _critic(network, rollout, numbers, rows[:size], work, told)
            if not wait_for_all(counter, n_threads, n_minibatches):
                return
            norm, factor = clip_factor(told[ACTOR_NORM] + told[CRITIC_NORM], numbers.max_grad_norm)
            what = verdict(told, numbers, norm)
            if has_actor:
                if what == SKIPS and totals[N_SKIPPED] == 0:
                    shared[SKIPPED_ROW], totals[FIRST_SKIPPED] = told, n_minibatches - 1
                count(told, what, norm, totals)
            if what == STEPS:
                n_steps += 1
                step(network.table, first, end, factor, n_steps, numbers)
            elif what == STOPS or numbers.skips == 0.0:
                return


@fast
def _rows_of(drawn: np.ndarray, rollout: Rollout, rows: np.ndarray) -> None:
    """Translate SB3's numbering, environment by environment, into rows of the rollout, step by step."""
    for i in range(drawn.shape[0]):
        rows[i] = (drawn[i] % rollout.n_steps) * rollout.n_envs + drawn[i] // rollout.n_steps


@fast
def _actor(
    network: Network, rollout: Rollout, numbers: Numbers, rows: np.ndarray, measure_kl: bool, work: np.ndarray,
    told: np.ndarray,
) -> None:  # fmt: skip
    """Forward and backward pass of the actor, and the squares of its gradients."""
    n = rows.shape[0]
    sizes = network.actor_sizes
    advantages, old_log_prob = np.empty(n, np.float32), np.empty(n, np.float32)
    actions = np.empty((n, rollout.actions.shape[1]), np.float32)
    _gather(rollout.observations, rows, layer(work, sizes, n, 0))
    _gather(rollout.actions, rows, actions)
    for i in range(n):
        advantages[i], old_log_prob[i] = rollout.advantages[rows[i]], rollout.old_log_prob[rows[i]]
    outputs = forward(work, sizes, n, network.table, 0, network.codes[ACTIVATION])
    state_dependent = network.codes[DIST] == STATE_DEPENDENT
    log_std = gsde.log_stds(network, work, n)
    log_std_gradient = np.empty_like(log_std) if state_dependent else log_std_of(network, GRAD)
    policy_gradient(
        network.codes[DIST], network.widths, outputs, log_std, actions, old_log_prob, advantages, rollout.old_dist,
        rows, numbers, measure_kl, output_gradient(work, sizes, n), log_std_gradient, told,
    )  # fmt: skip
    if state_dependent:
        gsde.log_std_gradients(network, work, n, log_std, log_std_gradient)
    backward(work, sizes, n, network.table, 0, network.codes[ACTIVATION])
    told[ACTOR_NORM] = squared_norm(network.table, 0, network.first_critic)


@fast
def _critic(
    network: Network, rollout: Rollout, numbers: Numbers, rows: np.ndarray, work: np.ndarray, told: np.ndarray,
) -> None:  # fmt: skip
    """Forward and backward pass of the critic, and the squares of its gradients."""
    n = rows.shape[0]
    sizes = network.critic_sizes
    old_values, returns = np.empty(n, np.float32), np.empty(n, np.float32)
    _gather(rollout.observations, rows, layer(work, sizes, n, 0))
    for i in range(n):
        old_values[i], returns[i] = rollout.old_values[rows[i]], rollout.returns[rows[i]]
    values = forward(work, sizes, n, network.table, network.first_critic, network.codes[ACTIVATION])
    value_gradient(values.reshape(n), old_values, returns, numbers, output_gradient(work, sizes, n).reshape(n), told)
    backward(work, sizes, n, network.table, network.first_critic, network.codes[ACTIVATION])
    told[CRITIC_NORM] = squared_norm(network.table, network.first_critic, network.table.shape[0])


@fast
def _gather(source: np.ndarray, rows: np.ndarray, target: np.ndarray) -> None:
    for i in range(rows.shape[0]):
        row = source[rows[i]]
        for j in range(row.shape[0]):
            target[i, j] = row[j]


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
        heads.normalize_all(kind, outputs, network.widths, probs)
        log_std = gsde.log_stds(network, work, size)
        total += heads.kl_from_old(kind, outputs, log_std, probs, rollout.old_dist, rows)
    return total / n
