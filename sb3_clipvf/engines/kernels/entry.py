"""
The entry points: the kernels that Python calls, compiled once and then loaded from numba's cache on disk.

numba notices a change of the file of the function that it cached, not of those that it calls. So each entry point
holds a digest of all their files, which numba makes part of the cache's key.
"""

import hashlib
from collections.abc import Callable
from importlib.resources import files
from typing import Any

import numpy as np

from sb3_clipvf.common.jit import cached
from sb3_clipvf.engines.kernels import minibatch, rollout, update
from sb3_clipvf.engines.kernels.adam import squared_norm
from sb3_clipvf.engines.kernels.data import ACTOR_NORM, N_STEPS, unpack, unpack_numbers


def _digest() -> int:
    folder = files("sb3_clipvf.engines.kernels")
    sources = sorted(entry.name for entry in folder.iterdir() if entry.name.endswith(".py"))
    content = b"".join(folder.joinpath(name).read_bytes() for name in sources)
    content += files("sb3_clipvf").joinpath("common", "jit.py").read_bytes()
    return 1 + int.from_bytes(hashlib.sha256(content).digest()[:4], "big")


def _for_networks(digest: int) -> tuple[Callable[..., Any], ...]:
    @cached()
    def run_update(
        rank: int, n_threads: int, packed: np.ndarray, data: Any, numbers: np.ndarray, permutations: np.ndarray,
        batch_size: int, work: np.ndarray, shared: np.ndarray, counter: np.ndarray, totals: np.ndarray,
    ) -> int:  # fmt: skip
        update.run_update(
            rank, n_threads, unpack(packed), data, unpack_numbers(numbers), permutations, batch_size, work, shared,
            counter, totals,
        )  # fmt: skip
        return digest

    @cached()
    def kl_of_rollout(packed: np.ndarray, data: Any, chunk: int, work: np.ndarray) -> tuple[float, int]:
        return update.kl_of_rollout(unpack(packed), data, chunk, work), digest

    @cached()
    def act(
        packed: np.ndarray, observations: np.ndarray, noise: np.ndarray, work: np.ndarray, actions: np.ndarray,
        values: np.ndarray, log_prob: np.ndarray, dist_params: np.ndarray,
    ) -> bool:  # fmt: skip
        finite = rollout.act(unpack(packed), observations, noise, work, actions, values, log_prob, dist_params)
        return finite and digest > 0

    @cached()
    def predict_values(packed: np.ndarray, observations: np.ndarray, work: np.ndarray, values: np.ndarray) -> int:
        rollout.predict_values(unpack(packed), observations, work, values)
        return digest

    @cached()
    def advantages_and_returns(
        rewards: np.ndarray, values: np.ndarray, episode_starts: np.ndarray, last_values: np.ndarray,
        dones: np.ndarray, gamma: float, gae_lambda: float, advantages: np.ndarray, returns: np.ndarray,
    ) -> int:  # fmt: skip
        rollout.advantages_and_returns(
            rewards, values, episode_starts, last_values, dones, gamma, gae_lambda, advantages, returns
        )
        return digest

    return run_update, act, predict_values, advantages_and_returns, kl_of_rollout


def _around_networks(digest: int) -> tuple[Callable[..., Any], ...]:
    @cached()
    def loss_gradients(
        kind: int, widths: np.ndarray, outputs: np.ndarray, log_std: np.ndarray, values: np.ndarray,
        actions: np.ndarray, old_log_prob: np.ndarray, advantages: np.ndarray, old_values: np.ndarray,
        returns: np.ndarray, old_dist: np.ndarray, packed: np.ndarray, measure_kl: bool, output_gradient: np.ndarray,
        log_std_gradient: np.ndarray, value_gradient: np.ndarray, told: np.ndarray, totals: np.ndarray,
    ) -> tuple[int, int]:  # fmt: skip
        numbers = unpack_numbers(packed)
        minibatch.policy_gradient(
            kind, widths, outputs, log_std, actions, old_log_prob, advantages, old_dist, np.arange(values.shape[0]),
            numbers, measure_kl, output_gradient, log_std_gradient, told,
        )  # fmt: skip
        minibatch.value_gradient(values, old_values, returns, numbers, value_gradient, told)
        what = minibatch.verdict(told, numbers, 0.0)
        if what != minibatch.STEPS:
            minibatch.count(told, what, 0.0, totals)
        return what, digest

    @cached()
    def draw(
        kind: int, widths: np.ndarray, outputs: np.ndarray, log_std: np.ndarray, noise: np.ndarray,
        actions: np.ndarray, log_prob: np.ndarray, dist_params: np.ndarray,
    ) -> int:  # fmt: skip
        probs = np.empty_like(outputs)
        rollout.draw(kind, outputs, log_std, widths, probs, noise, actions, log_prob, dist_params)
        return digest

    @cached()
    def optimizer_step(table: np.ndarray, packed: np.ndarray, told: np.ndarray, totals: np.ndarray) -> tuple[int, int]:
        numbers = unpack_numbers(packed)
        told[ACTOR_NORM] = squared_norm(table, 0, table.shape[0])
        norm, factor = minibatch.clip_factor(told[ACTOR_NORM], numbers.max_grad_norm)
        what = minibatch.STEPS if minibatch.is_finite(norm) else minibatch.SKIPS
        minibatch.count(told, what, norm, totals)
        if what == minibatch.STEPS:
            minibatch.step(table, 0, table.shape[0], factor, int(totals[N_STEPS]), numbers)
        return what, digest

    return loss_gradients, draw, optimizer_step


*FOR_NETWORKS, kl_of_rollout = _for_networks(_digest())
run_update, act, predict_values, advantages_and_returns = FOR_NETWORKS
AROUND_NETWORKS = _around_networks(_digest())
loss_gradients, draw, optimizer_step = AROUND_NETWORKS
