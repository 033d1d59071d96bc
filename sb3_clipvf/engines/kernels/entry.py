"""
The entry points: the kernels that Python calls, compiled once and then loaded from numba's cache on disk.

numba notices a change of the file of the function that it cached, not of those that it calls. So each entry point
holds a digest of this whole package, which numba makes part of the cache's key.
"""

import hashlib
from collections.abc import Callable
from importlib.resources import files
from typing import Any

import numpy as np
from numba import njit

from sb3_clipvf.engines.kernels import rollout, update


def _digest() -> int:
    folder = files("sb3_clipvf.engines.kernels")
    sources = sorted(entry.name for entry in folder.iterdir() if entry.name.endswith(".py"))
    content = b"".join(folder.joinpath(name).read_bytes() for name in sources)
    return int.from_bytes(hashlib.sha256(content).digest()[:4], "big")


def _entry_points(digest: int) -> tuple[Callable[..., Any], ...]:
    compiled = njit(cache=True, nogil=True, error_model="numpy")

    @compiled
    def run_update(
        rank: int, n_threads: int, packed: np.ndarray, data: Any, numbers: Any, permutations: np.ndarray,
        batch_size: int, work: np.ndarray, shared: np.ndarray, counter: np.ndarray, totals: np.ndarray,
    ) -> int:  # fmt: skip
        update.run_update(
            rank,
            n_threads,
            update.unpack(packed),
            data,
            numbers,
            permutations,
            batch_size,
            work,
            shared,
            counter,
            totals,
        )
        return digest

    @compiled
    def kl_of_rollout(packed: np.ndarray, data: Any, chunk: int, work: np.ndarray) -> tuple[float, int]:
        return update.kl_of_rollout(update.unpack(packed), data, chunk, work), digest

    @compiled
    def act(
        packed: np.ndarray, observations: np.ndarray, noise: np.ndarray, work: np.ndarray, actions: np.ndarray,
        values: np.ndarray, log_prob: np.ndarray, dist_params: np.ndarray,
    ) -> int:  # fmt: skip
        rollout.act(update.unpack(packed), observations, noise, work, actions, values, log_prob, dist_params)
        return digest

    @compiled
    def predict_values(packed: np.ndarray, observations: np.ndarray, work: np.ndarray, values: np.ndarray) -> int:
        rollout.predict_values(update.unpack(packed), observations, work, values)
        return digest

    @compiled
    def advantages_and_returns(
        rewards: np.ndarray, values: np.ndarray, episode_starts: np.ndarray, last_values: np.ndarray,
        dones: np.ndarray, gamma: float, gae_lambda: float, advantages: np.ndarray, returns: np.ndarray,
    ) -> int:  # fmt: skip
        rollout.advantages_and_returns(
            rewards, values, episode_starts, last_values, dones, gamma, gae_lambda, advantages, returns
        )
        return digest

    return run_update, kl_of_rollout, act, predict_values, advantages_and_returns


run_update, kl_of_rollout, act, predict_values, advantages_and_returns = _entry_points(_digest())

ALL = (run_update, kl_of_rollout, act, predict_values, advantages_and_returns)
