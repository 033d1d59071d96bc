"""Generalised advantage estimation, compiled."""

import numpy as np

from sb3_clipvf.common.jit import strict

F = np.float32


@strict
def advantages_and_returns(
    rewards: np.ndarray, values: np.ndarray, episode_starts: np.ndarray, last_values: np.ndarray, dones: np.ndarray,
    gamma: float, gae_lambda: float, advantages: np.ndarray, returns: np.ndarray,
) -> None:  # fmt: skip
    """
    Fill advantages and returns as :func:`sb3_clipvf.rollout.gae` computes them, to the same bits.

    ``last_values`` and ``dones`` (of the last step) are ``(n_envs,)``, the other arrays ``(n_steps, n_envs)``, float32.
    Parity test: ``tests/test_native.py::test_advantages_have_the_same_bits``.
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
