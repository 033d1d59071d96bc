"""
One update: all epochs of minibatches, on one thread or divided among several, with the same numbers.

A minibatch is divided into groups of rows. A task is the gradient of one network over one group, and a thread has
one or more tasks. Gradients and statistics of the groups are added in a fixed order. Inside a group, blocks of rows run
one after the other, since a smaller workspace stays in the processor's caches.

Actor and critic share no parameters. On two threads, each has a network: only the joint gradient norm and ``target_kl``
make them wait for each other. More threads also wait before gradients of groups are added, and after a step.

An interrupted update computes no further blocks, and all threads end before the same step.
"""

import numpy as np

from sb3_clipvf.common.jit import fast
from sb3_clipvf.engines.kernels import gsde
from sb3_clipvf.engines.kernels.action_distributions import (
    distributions_of,
    kl_from_old,
    normalize_logits,
    shared_log_std,
)
from sb3_clipvf.engines.kernels.adam import adam_step, add_groups, clip_factor
from sb3_clipvf.engines.kernels.barrier import end_if_interrupted, ends, is_interrupted, wait_for_all
from sb3_clipvf.engines.kernels.inputs import (
    FLOAT32,
    FLOAT64,
    INT8,
    STATE_DEPENDENT,
    Division,
    Hyperparameters,
    Mlp,
    Policy,
    RolloutArrays,
    Shared,
    unpack,
)
from sb3_clipvf.engines.kernels.memory import GRAD
from sb3_clipvf.engines.kernels.minibatch import (
    SKIP,
    STEP,
    STOP,
    add_to_totals,
    add_up,
    advantage_scale,
    outcome_of,
    policy_gradient,
    value_gradient,
)
from sb3_clipvf.engines.kernels.mlp import backward, forward, layer, output_gradient
from sb3_clipvf.engines.kernels.totals import STAT, TOTAL

F = np.float32
_N_STATS = len(STAT)


@fast
def run_update(
    rank: int, n_threads: int, policies: np.ndarray, rollout: RolloutArrays, hyper: Hyperparameters,
    permutations: np.ndarray, division: Division, shared: Shared, workspace: np.ndarray,
) -> None:  # fmt: skip
    """
    Run this thread's part of an update, in place on the policy.

    ``policies`` has a row for each group: the policy, packed by :func:`.inputs.pack`, with the addresses of the group's
    gradients. ``permutations``, shape ``(n_epochs, n)``, are in SB3's numbering. The last minibatch of an epoch may be
    shorter. ``workspace`` is this thread's own, for a block of rows and the larger network. Rank 0 fills ``totals``.
    """
    n, batch_size = rollout.returns.shape[0], division.batch_size
    totals, counters = shared.totals, shared.counters
    first, last = _own_pieces(rank, n_threads, division.n_actor_pieces, shared.pieces.shape[0])
    shares_networks = n_threads > 2
    rows, stats = np.empty(batch_size, np.int64), np.empty(_N_STATS)
    n_minibatches, n_steps, n_waits = 0, 0, 0
    for epoch in range(permutations.shape[0]):
        if rank == 0:
            totals[TOTAL.n_epochs] += 1
            totals[TOTAL.n_in_epoch], totals[TOTAL.approx_kl], totals[TOTAL.kl] = 0, 0, 0
        measure_kl = epoch >= hyper.kl_from_epoch
        for start in range(0, n, batch_size):
            size = min(batch_size, n - start)
            _rows_of(permutations[epoch, start : start + size], rollout, rows)
            n_groups = (size + division.group_rows - 1) // division.group_rows
            task_stats = shared.stats[n_minibatches % 2, : 2 * n_groups]
            squares = shared.squares[n_minibatches % 2]
            n_minibatches += 1
            _run_tasks(
                rank, n_threads, policies, rollout, hyper, rows[:size], measure_kl, division, counters, workspace,
                task_stats,
            )  # fmt: skip
            end_if_interrupted(counters, n_minibatches)
            if shares_networks:
                n_waits += 1
                if not wait_for_all(counters, n_threads, n_waits):
                    return
            add_groups(shared.pieces, first, last, shared.partials[: n_groups - 1], squares)
            n_waits += 1
            if not wait_for_all(counters, n_threads, n_waits) or ends(counters, n_minibatches):
                return
            add_up(task_stats, stats)
            for k in range(squares.shape[0]):
                stats[STAT.squares] += squares[k]
            norm, factor = clip_factor(stats[STAT.squares], hyper.max_grad_norm)
            outcome = outcome_of(stats, hyper, norm)
            if rank == 0:
                if outcome == SKIP and totals[TOTAL.n_skipped] == 0:
                    totals[TOTAL.first_skipped] = n_minibatches - 1
                    for k in range(_N_STATS):
                        shared.skipped[k] = stats[k]
                add_to_totals(stats, outcome, norm, totals)
            if outcome == STEP:
                n_steps += 1
                adam_step(shared.pieces[first:last], factor, int(hyper.step) + n_steps, hyper)
            elif outcome == STOP or hyper.skips == 0.0:
                return
            if shares_networks:
                n_waits += 1
                if not wait_for_all(counters, n_threads, n_waits):
                    return


@fast
def _own_pieces(rank: int, n_threads: int, n_actor: int, n: int) -> tuple[int, int]:
    """Return the range of pieces, without its end, whose gradients this thread adds and whose parameters it steps."""
    if n_threads == 2:  # a network each
        return (0, n_actor) if rank == 0 else (n_actor, n)
    return rank * n // n_threads, (rank + 1) * n // n_threads


@fast
def _run_tasks(
    rank: int, n_threads: int, policies: np.ndarray, rollout: RolloutArrays, hyper: Hyperparameters, rows: np.ndarray,
    measure_kl: bool, division: Division, counters: np.ndarray, workspace: np.ndarray, stats: np.ndarray,
) -> None:  # fmt: skip
    """
    Compute gradients and ``stats`` of this thread's tasks: first the actor's groups, then the critic's.

    Return at once if the update is interrupted.
    """
    n, n_tasks = rows.shape[0], stats.shape[0]
    n_groups = n_tasks // 2
    begin, end = rank * n_tasks // n_threads, (rank + 1) * n_tasks // n_threads
    shift, scale = F(0), F(1)
    if begin < min(end, n_groups):
        advantages = np.empty(n, np.float32)
        for i in range(n):
            advantages[i] = rollout.advantages[rows[i]]
        shift, scale = advantage_scale(advantages, hyper)
    for task in range(begin, end):
        group = task % n_groups
        policy = unpack(policies[group])
        own_stats = stats[task]
        for k in range(_N_STATS):
            own_stats[k] = 0.0
        group_end = min(n, (group + 1) * division.group_rows)
        for start in range(group * division.group_rows, group_end, division.block_rows):
            if is_interrupted(counters):
                return
            block = rows[start : min(group_end, start + division.block_rows)]
            adds = start > group * division.group_rows
            if task < n_groups:
                _actor_gradients(policy, rollout, hyper, block, n, shift, scale, measure_kl, adds, workspace, own_stats)
            else:
                _critic_gradients(policy.critic, rollout, hyper, block, n, adds, workspace, own_stats)


@fast
def _rows_of(drawn: np.ndarray, rollout: RolloutArrays, rows: np.ndarray) -> None:
    """Translate SB3's numbering, environment by environment, into rows of the rollout, step by step."""
    for i in range(drawn.shape[0]):
        rows[i] = (drawn[i] % rollout.n_steps) * rollout.n_envs + drawn[i] // rollout.n_steps


@fast
def _actor_gradients(
    policy: Policy, rollout: RolloutArrays, hyper: Hyperparameters, rows: np.ndarray, n: int, shift: float,
    scale: float, measure_kl: bool, adds: bool, workspace: np.ndarray, stats: np.ndarray,
) -> None:  # fmt: skip
    """Run the actor forward and backward over a block of a minibatch of ``n`` rows; add to ``stats``."""
    n_rows, actor = rows.shape[0], policy.actor
    advantages, old_log_prob = np.empty(n_rows, np.float32), np.empty(n_rows, np.float32)
    actions = np.empty((n_rows, rollout.actions.shape[1]), np.float32)
    _gather_observations(rollout, rows, layer(actor, workspace, n_rows, 0))
    _gather(rollout.actions, rows, actions)
    for i in range(n_rows):
        advantages[i] = (rollout.advantages[rows[i]] - shift) / scale
        old_log_prob[i] = rollout.old_log_prob[rows[i]]
    dist = distributions_of(policy, workspace, n_rows)
    state_dependent = policy.kind == STATE_DEPENDENT
    log_std_gradient = np.empty_like(dist.log_std) if state_dependent else shared_log_std(policy, GRAD)
    if state_dependent or not adds:
        log_std_gradient[:] = F(0)
    policy_gradient(
        dist, actions, old_log_prob, advantages, rollout.old_dist, rows, hyper, measure_kl, n, log_std_gradient, stats
    )
    if state_dependent:
        gsde.log_std_gradients(policy, workspace, n_rows, dist.log_std, log_std_gradient, adds)
    backward(actor, workspace, n_rows, adds)


@fast
def _critic_gradients(
    critic: Mlp, rollout: RolloutArrays, hyper: Hyperparameters, rows: np.ndarray, n: int, adds: bool,
    workspace: np.ndarray, stats: np.ndarray,
) -> None:  # fmt: skip
    """Run the critic forward and backward over a block of a minibatch of ``n`` rows; add to ``stats``."""
    n_rows = rows.shape[0]
    old_values, returns = np.empty(n_rows, np.float32), np.empty(n_rows, np.float32)
    _gather_observations(rollout, rows, layer(critic, workspace, n_rows, 0))
    for i in range(n_rows):
        old_values[i], returns[i] = rollout.old_values[rows[i]], rollout.returns[rows[i]]
    values = forward(critic, workspace, n_rows).reshape(n_rows)
    gradient = output_gradient(critic, workspace, n_rows).reshape(n_rows)
    value_gradient(values, old_values, returns, hyper, n, gradient, stats)
    backward(critic, workspace, n_rows, adds)


@fast
def _gather_observations(rollout: RolloutArrays, rows: np.ndarray, target: np.ndarray) -> None:
    """Copy rows of observations to ``target``, float32, as ``astype`` converts them."""
    stored = rollout.observations
    if rollout.obs_type == FLOAT32:
        _gather(stored.view(np.float32), rows, target)
    elif rollout.obs_type == FLOAT64:
        _gather(stored.view(np.float64), rows, target)
    elif rollout.obs_type == INT8:
        _gather(stored.view(np.int8), rows, target)
    else:
        _gather(stored, rows, target)


@fast
def _gather(source: np.ndarray, rows: np.ndarray, target: np.ndarray) -> None:
    for i in range(rows.shape[0]):
        row = source[rows[i]]
        for j in range(row.shape[0]):
            target[i, j] = row[j]


@fast
def kl_of_rollout(
    rank: int,
    n_threads: int,
    policy: Policy,
    rollout: RolloutArrays,
    chunk: int,
    workspace: np.ndarray,
    sums: np.ndarray,
) -> None:
    """
    Fill this thread's part of ``sums``: the exact KL(pi_old || pi), nats, summed over each chunk of a rollout.

    The policy runs forward on ``chunk`` rows at a time.
    """
    n, n_chunks = rollout.returns.shape[0], sums.shape[0]
    for k in range(rank * n_chunks // n_threads, (rank + 1) * n_chunks // n_threads):
        rows = np.arange(k * chunk, min(n, (k + 1) * chunk))
        size = rows.shape[0]
        _gather_observations(rollout, rows, layer(policy.actor, workspace, size, 0))
        dist = distributions_of(policy, workspace, size)
        normalize_logits(dist)
        sums[k] = kl_from_old(dist, rollout.old_dist, rows)
