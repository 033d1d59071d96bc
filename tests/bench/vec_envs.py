"""``python -m tests.bench.vec_envs``: environments alone, in one process and in several, in turn."""

from __future__ import annotations

import statistics
import sys
import time
from functools import partial
from typing import Any

import numpy as np
from stable_baselines3.common.env_util import make_vec_env
from stable_baselines3.common.vec_env import SubprocVecEnv

from sb3_clipvf.envs import FastDummyVecEnv, FastSubprocVecEnv

ROWS = (("LunarLander-v3", 16), ("HalfCheetah-v5", 8))
CLASSES: dict[str, Any] = {
    "FastDummyVecEnv": FastDummyVecEnv,
    "FastSubprocVecEnv": partial(FastSubprocVecEnv, start_method="fork"),
    "SubprocVecEnv": partial(SubprocVecEnv, start_method="fork"),
}
N_ROUNDS = 3
N_CHUNKS = 7
CHUNK = 256  # steps of all environments


def steps_per_second(env_id: str, n_envs: int) -> dict[str, list[float]]:
    """Return environment steps per second of each class under the same random actions: the median of each round."""
    found: dict[str, list[float]] = {name: [] for name in CLASSES}
    for _ in range(N_ROUNDS):
        venvs = {name: make_vec_env(env_id, n_envs, seed=0, vec_env_cls=cls) for name, cls in CLASSES.items()}
        seconds: dict[str, list[float]] = {name: [] for name in CLASSES}
        space = next(iter(venvs.values())).action_space
        space.seed(0)
        actions = [np.stack([space.sample() for _ in range(n_envs)]) for _ in range((1 + N_CHUNKS) * CHUNK)]
        for venv in venvs.values():
            venv.reset()
        for chunk in range(1 + N_CHUNKS):
            for name, venv in venvs.items():
                start = time.perf_counter()
                for action in actions[chunk * CHUNK : (chunk + 1) * CHUNK]:
                    venv.step(action)
                seconds[name].append(time.perf_counter() - start)
        for name, venv in venvs.items():
            venv.close()
            found[name].append(n_envs * CHUNK / statistics.median(seconds[name][1:]))  # the first chunk warms up
    return found


def main() -> int:
    """Print a line for each environment."""
    for env_id, n_envs in ROWS:
        found = steps_per_second(env_id, n_envs)
        medians = {name: statistics.median(values) for name, values in found.items()}
        ours = medians["FastSubprocVecEnv"]
        texts = [
            f"{name} {medians[name]:,.0f} ({min(values):,.0f} to {max(values):,.0f}), {ours / medians[name]:.2f} times"
            for name, values in found.items()
        ]
        sys.stdout.write(f"{env_id} x {n_envs}, steps/s: " + "; ".join(texts) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
