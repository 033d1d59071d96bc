"""
One update: all epochs of minibatches, on one thread or with actor and critic side by side on two.

Actor and critic share no parameters. So only the joint gradient norm and ``target_kl`` make them wait for each other,
and the numbers are the same on one thread and on two.
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
from sb3_clipvf.engines.kernels.adam import adam_step, clip_factor, squared_norm
from sb3_clipvf.engines.kernels.barrier import wait_for_all
from sb3_clipvf.engines.kernels.inputs import (
    FLOAT32,
    FLOAT64,
    INT8,
    STATE_DEPENDENT,
    Hyperparameters,
    Mlp,
    Policy,
    Rollout,
)
from sb3_clipvf.engines.kernels.memory import GRAD
from sb3_clipvf.engines.kernels.minibatch import (
    SKIP,
    STEP,
    STOP,
    add_to_totals,
    outcome_of,
    policy_gradient,
    value_gradient,
)
from sb3_clipvf.engines.kernels.mlp import backward, forward, layer, output_gradient
from sb3_clipvf.engines.kernels.totals import SKIPPED_ROW, STAT, TOTAL


@fast
def run_update(
    rank: int, n_threads: int, policy: Policy, rollout: Rollout, hyper: Hyperparameters, permutations: np.ndarray,
    batch_size: int, workspace: np.ndarray, shared_stats: np.ndarray, counters: np.ndarray, totals: np.ndarray,
) -> None:  # fmt: skip
    """
    Run this thread's part of an update, in place on the policy: rank 0 has the actor, the last rank the critic.

    ``permutations``, shape ``(n_epochs, n)``, are in SB3's numbering; a last minibatch may be shorter than
    ``batch_size``. Each thread has its own ``workspace``, for a minibatch and the larger network. Threads share
    ``shared_stats``, ``(N_STAT_ROWS, len(STAT))``, and the barrier's ``counters``; the actor's fills ``totals``.
    """
    has_actor, has_critic = rank == 0, rank == n_threads - 1
    n = rollout.returns.shape[0]
    rows = np.empty(batch_size, np.int64)
    n_minibatches, n_steps = 0, 0
    for epoch in range(permutations.shape[0]):
        if has_actor:
            totals[TOTAL.n_epochs] += 1
            totals[TOTAL.n_in_epoch], totals[TOTAL.approx_kl], totals[TOTAL.kl] = 0, 0, 0
        measure_kl = epoch >= hyper.kl_from_epoch
        for start in range(0, n, batch_size):
            size = min(batch_size, n - start)
            _rows_of(permutations[epoch, start : start + size], rollout, rows)
            stats = shared_stats[n_minibatches % 2]
            n_minibatches += 1
            if has_actor:
                _actor_gradients(policy, rollout, hyper, rows[:size], measure_kl, workspace, stats)
            if has_critic:
                _critic_gradients(policy.critic, rollout, hyper, rows[:size], workspace, stats)
            if not wait_for_all(counters, n_threads, n_minibatches):
                return
            norm, factor = clip_factor(stats[STAT.actor_squares] + stats[STAT.critic_squares], hyper.max_grad_norm)
            outcome = outcome_of(stats, hyper, norm)
            if has_actor:
                if outcome == SKIP and totals[TOTAL.n_skipped] == 0:
                    totals[TOTAL.first_skipped] = n_minibatches - 1
                    for k in range(stats.shape[0]):
                        shared_stats[SKIPPED_ROW, k] = stats[k]
                add_to_totals(stats, outcome, norm, totals)
            if outcome == STEP:
                n_steps += 1
                if has_actor:
                    adam_step(policy.actor.table, factor, int(hyper.step) + n_steps, hyper)
                if has_critic:
                    adam_step(policy.critic.table, factor, int(hyper.step) + n_steps, hyper)
            elif outcome == STOP or hyper.skips == 0.0:
                return


@fast
def _rows_of(drawn: np.ndarray, rollout: Rollout, rows: np.ndarray) -> None:
    """Translate SB3's numbering, environment by environment, into rows of the rollout, step by step."""
    for i in range(drawn.shape[0]):
        rows[i] = (drawn[i] % rollout.n_steps) * rollout.n_envs + drawn[i] // rollout.n_steps


@fast
def _actor_gradients(
    policy: Policy, rollout: Rollout, hyper: Hyperparameters, rows: np.ndarray, measure_kl: bool,
    workspace: np.ndarray, stats: np.ndarray,
) -> None:  # fmt: skip
    """Run the actor forward and backward over a minibatch, and sum the squares of its gradients."""
    n, actor = rows.shape[0], policy.actor
    advantages, old_log_prob = np.empty(n, np.float32), np.empty(n, np.float32)
    actions = np.empty((n, rollout.actions.shape[1]), np.float32)
    _gather_observations(rollout, rows, layer(actor, workspace, n, 0))
    _gather(rollout.actions, rows, actions)
    for i in range(n):
        advantages[i], old_log_prob[i] = rollout.advantages[rows[i]], rollout.old_log_prob[rows[i]]
    dist = distributions_of(policy, workspace, n)
    state_dependent = policy.kind == STATE_DEPENDENT
    log_std_gradient = np.empty_like(dist.log_std) if state_dependent else shared_log_std(policy, GRAD)
    policy_gradient(
        dist, actions, old_log_prob, advantages, rollout.old_dist, rows, hyper, measure_kl, log_std_gradient, stats
    )
    if state_dependent:
        gsde.log_std_gradients(policy, workspace, n, dist.log_std, log_std_gradient)
    backward(actor, workspace, n)
    stats[STAT.actor_squares] = squared_norm(actor.table)


@fast
def _critic_gradients(
    critic: Mlp, rollout: Rollout, hyper: Hyperparameters, rows: np.ndarray, workspace: np.ndarray, stats: np.ndarray
) -> None:
    """Run the critic forward and backward over a minibatch, and sum the squares of its gradients."""
    n = rows.shape[0]
    old_values, returns = np.empty(n, np.float32), np.empty(n, np.float32)
    _gather_observations(rollout, rows, layer(critic, workspace, n, 0))
    for i in range(n):
        old_values[i], returns[i] = rollout.old_values[rows[i]], rollout.returns[rows[i]]
    values = forward(critic, workspace, n)
    value_gradient(
        values.reshape(n), old_values, returns, hyper, output_gradient(critic, workspace, n).reshape(n), stats
    )
    backward(critic, workspace, n)
    stats[STAT.critic_squares] = squared_norm(critic.table)


@fast
def _gather_observations(rollout: Rollout, rows: np.ndarray, target: np.ndarray) -> None:
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
def kl_of_rollout(policy: Policy, rollout: Rollout, chunk: int, workspace: np.ndarray) -> float:
    """Return the mean exact KL(pi_old || pi) over a rollout, nats, by forward passes of ``chunk`` rows each."""
    n = rollout.returns.shape[0]
    total = 0.0
    for start in range(0, n, chunk):
        size = min(chunk, n - start)
        rows = np.arange(start, start + size)
        _gather_observations(rollout, rows, layer(policy.actor, workspace, size, 0))
        dist = distributions_of(policy, workspace, size)
        normalize_logits(dist)
        total += kl_from_old(dist, rollout.old_dist, rows)
    return total / n
