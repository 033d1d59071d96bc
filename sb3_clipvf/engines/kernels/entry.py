"""
The entry points: the kernels that Python calls, compiled once and then loaded from numba's cache on disk.

numba's cache notices changes in the file of an entry point, but not in the files of the functions that it calls.
Therefore, each entry point captures a digest of all these files, which numba adds to the cache's key. Return values
depend on the digest, since numba ignores unused variables. The functions called document the arguments.
"""

import hashlib
from collections.abc import Callable
from importlib.resources import files
from typing import Any

import numpy as np

from sb3_clipvf.common.jit import cached
from sb3_clipvf.engines.kernels import acting, gae, minibatch, update
from sb3_clipvf.engines.kernels.action_distributions import ActionDist
from sb3_clipvf.engines.kernels.adam import adam_step, clip_factor, squared_norm
from sb3_clipvf.engines.kernels.inputs import unpack, unpack_hyperparameters
from sb3_clipvf.engines.kernels.totals import STAT


def _digest() -> int:
    folder = files("sb3_clipvf.engines.kernels")
    sources = sorted(entry.name for entry in folder.iterdir() if entry.name.endswith(".py"))
    content = b"".join(folder.joinpath(name).read_bytes() for name in sources)
    content += files("sb3_clipvf").joinpath("common", "jit.py").read_bytes()
    return 1 + int.from_bytes(hashlib.sha256(content).digest()[:4], "big")


def _native(digest: int) -> tuple[Callable[..., Any], ...]:
    """Return the kernels of the native engine, which take a policy packed by :func:`.inputs.pack`."""

    @cached()
    def run_update(
        rank: int, n_threads: int, policies: np.ndarray, rollout: Any, hyper: np.ndarray, permutations: np.ndarray,
        division: Any, shared: Any, workspace: np.ndarray,
    ) -> int:  # fmt: skip
        update.run_update(
            rank, n_threads, policies, rollout, unpack_hyperparameters(hyper), permutations, division, shared, workspace
        )
        return digest

    @cached()
    def act_into(
        packed: np.ndarray, target: np.ndarray, step: int, observations: np.ndarray, noise: np.ndarray,
        workspace: np.ndarray, actions: np.ndarray,
    ) -> bool:  # fmt: skip
        finite = acting.act_into(unpack(packed), target, step, observations, noise, workspace, actions)
        return finite and digest > 0

    @cached()
    def predict_values(packed: np.ndarray, observations: np.ndarray, workspace: np.ndarray, values: np.ndarray) -> int:
        acting.predict_values(unpack(packed), observations, workspace, values)
        return digest

    @cached()
    def advantages_and_returns(
        rewards: np.ndarray, values: np.ndarray, episode_starts: np.ndarray, last_values: np.ndarray,
        dones: np.ndarray, gamma: float, gae_lambda: float, advantages: np.ndarray, returns: np.ndarray,
    ) -> int:  # fmt: skip
        gae.advantages_and_returns(
            rewards, values, episode_starts, last_values, dones, gamma, gae_lambda, advantages, returns
        )
        return digest

    @cached()
    def kl_of_rollout(
        rank: int, n_threads: int, packed: np.ndarray, rollout: Any, chunk: int, workspace: np.ndarray, sums: np.ndarray
    ) -> int:
        update.kl_of_rollout(rank, n_threads, unpack(packed), rollout, chunk, workspace, sums)
        return digest

    return run_update, act_into, predict_values, advantages_and_returns, kl_of_rollout


def _fused(digest: int) -> tuple[Callable[..., Any], ...]:
    """Return the kernels of the fused engine, around networks that torch runs."""

    @cached()
    def loss_gradients(
        kind: int, widths: np.ndarray, outputs: np.ndarray, log_std: np.ndarray, values: np.ndarray,
        actions: np.ndarray, old_log_prob: np.ndarray, advantages: np.ndarray, old_values: np.ndarray,
        returns: np.ndarray, old_dist: np.ndarray, hyper: np.ndarray, measure_kl: bool, output_gradient: np.ndarray,
        log_std_gradient: np.ndarray, value_gradient: np.ndarray, stats: np.ndarray,
    ) -> int:  # fmt: skip
        dist, settings = ActionDist(kind, outputs, log_std, widths, output_gradient), unpack_hyperparameters(hyper)
        n = values.shape[0]
        shift, scale = minibatch.advantage_scale(advantages, settings)
        for i in range(n):
            advantages[i] = (advantages[i] - shift) / scale
        stats[:] = 0.0
        log_std_gradient[:] = np.float32(0)
        minibatch.policy_gradient(
            dist, actions, old_log_prob, advantages, old_dist, np.arange(n), settings, measure_kl, n,
            log_std_gradient, stats,
        )  # fmt: skip
        minibatch.value_gradient(values, old_values, returns, settings, n, value_gradient, stats)
        stats[STAT.loss] = minibatch.total_loss(stats, settings)
        return digest

    @cached()
    def draw(
        kind: int, widths: np.ndarray, outputs: np.ndarray, log_std: np.ndarray, noise: np.ndarray,
        actions: np.ndarray, log_prob: np.ndarray, dist_params: np.ndarray,
    ) -> int:  # fmt: skip
        dist = ActionDist(kind, outputs, log_std, widths, np.empty_like(outputs))
        acting.draw(dist, noise, actions, log_prob, dist_params)
        return digest

    @cached()
    def gradient_norm(table: np.ndarray, max_grad_norm: float) -> tuple[float, float, int]:
        norm, factor = clip_factor(squared_norm(table), max_grad_norm)
        return norm, factor, digest

    @cached()
    def optimizer_step(table: np.ndarray, factor: float, step: int, hyper: np.ndarray) -> int:
        adam_step(table, factor, step, unpack_hyperparameters(hyper))
        return digest

    return loss_gradients, draw, gradient_norm, optimizer_step


*NATIVE, kl_of_rollout = _native(_digest())
run_update, act_into, predict_values, advantages_and_returns = NATIVE
FUSED = _fused(_digest())
loss_gradients, draw, gradient_norm, optimizer_step = FUSED
