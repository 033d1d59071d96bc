"""A rollout's step: values of observations, and actions drawn for all environments at once."""

import numpy as np

from sb3_clipvf.common.jit import fast
from sb3_clipvf.engines.kernels import gsde
from sb3_clipvf.engines.kernels.action_distributions import (
    ActionDist,
    distributions_of,
    evaluate,
    normalize_logits,
    sample,
)
from sb3_clipvf.engines.kernels.elementwise import copy_rows
from sb3_clipvf.engines.kernels.inputs import STATE_DEPENDENT, Policy
from sb3_clipvf.engines.kernels.memory import matrix, vector
from sb3_clipvf.engines.kernels.minibatch import is_finite
from sb3_clipvf.engines.kernels.mlp import forward, layer

# Entries of a target: addresses of float32 arrays `(n_steps, n_envs, ...)` for a rollout's steps, the number of
# parameters of a distribution, and addresses of the actions' bounds, `(action_dim,)`. If the address of the actions is
# 0, they are neither stored nor clipped.
VALUES, LOG_PROB, DIST_PARAMS, DIST_WIDTH, ACTIONS, LOW, HIGH = range(7)


@fast
def predict_values(policy: Policy, observations: np.ndarray, workspace: np.ndarray, values: np.ndarray) -> None:
    """Fill ``values``, shape ``(n,)``, of observations, ``(n, obs_dim)``."""
    n = observations.shape[0]
    copy_rows(observations, layer(policy.critic, workspace, n, 0))
    outputs = forward(policy.critic, workspace, n)
    for i in range(n):
        values[i] = outputs[i, 0]


@fast
def act(
    policy: Policy, observations: np.ndarray, noise: np.ndarray, workspace: np.ndarray, actions: np.ndarray,
    values: np.ndarray, log_prob: np.ndarray, dist_params: np.ndarray,
) -> bool:  # fmt: skip
    """
    Draw an action for each of ``n`` observations, as :func:`draw` does, and fill ``values``, shape ``(n,)``.

    For gSDE ``noise`` holds the matrices of :func:`.gsde.noise_of`. Return whether observations, values and
    log-probabilities are finite; an activation such as tanh may hide an infinite observation.
    """
    predict_values(policy, observations, workspace, values)
    n = observations.shape[0]
    copy_rows(observations, layer(policy.actor, workspace, n, 0))
    dist = distributions_of(policy, workspace, n)
    if policy.kind == STATE_DEPENDENT:
        noise = gsde.noise_of(policy, workspace, n, noise)
    draw(dist, noise, actions, log_prob, dist_params)
    n_bad = 0
    for i in range(n):
        row = observations[i]
        for j in range(row.shape[0]):
            n_bad += 0 if is_finite(row[j]) else 1
        n_bad += 0 if is_finite(values[i]) and is_finite(log_prob[i]) else 1
    return n_bad == 0


@fast
def act_into(
    policy: Policy, target: np.ndarray, step: int, observations: np.ndarray, noise: np.ndarray,
    workspace: np.ndarray, actions: np.ndarray,
) -> bool:  # fmt: skip
    """
    Act as :func:`act` does, and write the results to row ``step`` of the arrays whose addresses ``target`` holds.

    ``actions``, ``(n, action_dim)``, is filled with the actions for the environments, clipped if there are bounds.
    """
    n, k = actions.shape
    cells, width = 4 * n * step, target[DIST_WIDTH]
    values, log_prob = vector(target[VALUES] + cells, n), vector(target[LOG_PROB] + cells, n)
    dist_params = matrix(target[DIST_PARAMS] + cells * width, n, width)
    finite = act(policy, observations, noise, workspace, actions, values, log_prob, dist_params)
    if target[ACTIONS] != 0:
        stored = matrix(target[ACTIONS] + cells * k, n, k)
        low, high = vector(target[LOW], k), vector(target[HIGH], k)
        for i in range(n):
            for j in range(k):
                action = actions[i, j]
                stored[i, j] = action
                if action < low[j]:
                    action = low[j]
                if action > high[j]:
                    action = high[j]
                actions[i, j] = action
    return finite


@fast
def draw(
    dist: ActionDist, noise: np.ndarray, actions: np.ndarray, log_prob: np.ndarray, dist_params: np.ndarray
) -> None:
    """
    Fill ``actions``, ``(n, action_dim)``, and ``log_prob``, ``(n,)`` in nats; ``noise`` is that of :func:`.sample`.

    ``dist_params`` is filled with the distributions' parameters, ``(n, k)``, or has no column if none are wanted.
    """
    outputs, log_std = dist.outputs, dist.log_std
    n, k = outputs.shape
    normalize_logits(dist)
    sample(dist, noise, actions)
    if dist_params.shape[1] > 0:
        for i in range(n):
            for j in range(k):
                dist_params[i, j] = outputs[i, j]
                if log_std.shape[0] > 0:
                    dist_params[i, k + j] = log_std[i if log_std.shape[0] > 1 else 0, j]
    evaluate(dist, actions, log_prob, np.empty(n, np.float32))
