"""The rollout's part: actions and values for all environments at once, and advantages."""

import numpy as np

from sb3_clipvf.common.jit import fast, strict
from sb3_clipvf.engines.kernels import gsde, heads
from sb3_clipvf.engines.kernels.data import Network
from sb3_clipvf.engines.kernels.memory import ACTIVATION, DIST, STATE_DEPENDENT
from sb3_clipvf.engines.kernels.minibatch import is_finite
from sb3_clipvf.engines.kernels.network import forward, layer, output_gradient

F = np.float32


@fast
def predict_values(network: Network, observations: np.ndarray, work: np.ndarray, values: np.ndarray) -> None:
    """
    Values of observations.

    :param network: The policy.
    :param observations: Shape ``(n, obs_dim)``.
    :param work: Workspace for ``n`` rows.
    :param values: Filled, shape ``(n,)``.
    """
    n = observations.shape[0]
    layer(work, network.critic_sizes, n, 0)[:] = observations
    activation = network.codes[ACTIVATION]
    outputs = forward(work, network.critic_sizes, n, network.table, network.first_critic, activation)
    values[:] = outputs.reshape(n)


@fast
def act(
    network: Network,
    observations: np.ndarray,
    noise: np.ndarray,
    work: np.ndarray,
    actions: np.ndarray,
    values: np.ndarray,
    log_prob: np.ndarray,
    dist_params: np.ndarray,
) -> bool:
    """
    Draw one action for each environment.

    :param network: The policy.
    :param observations: Shape ``(n, obs_dim)``.
    :param noise: As :func:`heads.sample` takes it, shape ``(n, action_dim)``; gSDE's matrices as :func:`gsde.noise_of`
        takes them.
    :param work: Workspace for ``n`` rows.
    :param actions: Filled, shape ``(n, action_dim)``.
    :param values: Filled, shape ``(n,)``.
    :param log_prob: Filled, shape ``(n,)``, nats.
    :param dist_params: Filled with the distribution's parameters, shape ``(n, k)``; of no column: not wanted.
    :return: Whether observations, values and log-probabilities are finite; activations may hide an observation's NaN.
    """
    predict_values(network, observations, work, values)
    n = observations.shape[0]
    sizes, kind = network.actor_sizes, network.codes[DIST]
    layer(work, sizes, n, 0)[:] = observations
    outputs = forward(work, sizes, n, network.table, 0, network.codes[ACTIVATION])
    probs = output_gradient(work, sizes, n)
    log_std = gsde.log_stds(network, work, n)
    if kind == STATE_DEPENDENT:
        noise = gsde.noise_of(network, work, n, noise)
    draw(kind, outputs, log_std, network.widths, probs, noise, actions, log_prob, dist_params)
    n_bad = 0
    for i in range(n):
        row = observations[i]
        for j in range(row.shape[0]):
            n_bad += 0 if is_finite(row[j]) else 1
        n_bad += 0 if is_finite(values[i]) and is_finite(log_prob[i]) else 1
    return n_bad == 0


@fast
def draw(
    kind: int,
    outputs: np.ndarray,
    log_std: np.ndarray,
    widths: np.ndarray,
    probs: np.ndarray,
    noise: np.ndarray,
    actions: np.ndarray,
    log_prob: np.ndarray,
    dist_params: np.ndarray,
) -> None:
    """
    Draw one action a row from what the actor's last layer gives.

    :param kind: Of the distribution.
    :param outputs: Shape ``(n, k)``; logits of categorical distributions are normalised in place.
    :param log_std: Of a Gaussian, shape ``(1, k)`` or ``(n, k)``; else empty.
    :param widths: Of the categorical distributions.
    :param probs: Room for probabilities, shape ``(n, k)``.
    :param noise: As :func:`heads.sample` takes it.
    :param actions: Filled, shape ``(n, action_dim)``.
    :param log_prob: Filled, shape ``(n,)``, nats.
    :param dist_params: As in :func:`act`.
    """
    n, k = outputs.shape
    heads.normalize_all(kind, outputs, widths, probs)
    heads.sample(kind, outputs, log_std, widths, probs, noise, actions)
    if dist_params.shape[1] > 0:
        for i in range(n):
            for j in range(k):
                dist_params[i, j] = outputs[i, j]
                if log_std.shape[0] > 0:
                    dist_params[i, k + j] = log_std[i if log_std.shape[0] > 1 else 0, j]
    entropy = np.empty(n, np.float32)
    heads.evaluate(kind, outputs, log_std, widths, actions, probs, log_prob, entropy)


@strict
def advantages_and_returns(
    rewards: np.ndarray,
    values: np.ndarray,
    episode_starts: np.ndarray,
    last_values: np.ndarray,
    dones: np.ndarray,
    gamma: float,
    gae_lambda: float,
    advantages: np.ndarray,
    returns: np.ndarray,
) -> None:
    """
    :func:`sb3_clipvf.rollout.gae`, with the same roundings.

    :param rewards: Shape ``(n_steps, n_envs)``.
    :param values: Shape ``(n_steps, n_envs)``.
    :param episode_starts: Shape ``(n_steps, n_envs)``.
    :param last_values: Shape ``(n_envs,)``.
    :param dones: Of the last step, float32, shape ``(n_envs,)``.
    :param gamma: Discount factor.
    :param gae_lambda: lambda.
    :param advantages: Filled, shape ``(n_steps, n_envs)``.
    :param returns: Filled, shape ``(n_steps, n_envs)``.
    """
    n_steps, n_envs = rewards.shape
    discount, decay = F(gamma), F(gamma * gae_lambda)
    for env in range(n_envs):
        next_value, running, advantage = last_values[env], F(1) - dones[env], F(0)
        for step in range(n_steps - 1, -1, -1):
            delta = rewards[step, env] + discount * next_value * running - values[step, env]
            advantage = delta + decay * running * advantage
            advantages[step, env] = advantage
            returns[step, env] = advantage + values[step, env]
            next_value, running = values[step, env], F(1) - episode_starts[step, env]
