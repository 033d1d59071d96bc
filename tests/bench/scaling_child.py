"""One process of ``python -m tests.bench scaling``: it trains or sends messages, and the first one prints numbers."""

from __future__ import annotations

import json
import os
import pickle
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch as th
from stable_baselines3.common.callbacks import BaseCallback
from stable_baselines3.common.env_util import make_vec_env
from stable_baselines3.common.vec_env import VecEnv, VecNormalize

from sb3_clipvf import ClipPPO
from sb3_clipvf.distributed import Group, current_group
from tests.bench.experiments.episodes import grid

REPEATS = 21
"""Messages of each size, of which the median counts."""


class Meter:
    """Counts messages between processes, their bytes and their seconds; waiting for other processes is included."""

    def __init__(self) -> None:
        self.n, self.n_bytes, self.seconds = 0, 0, 0.0
        for name in ("add_up", "broadcast_tensor", "gather", "broadcast"):
            setattr(Group, name, self._metered(getattr(Group, name)))

    def _metered(self, send: Callable[[Group, Any], Any]) -> Callable[[Group, Any], Any]:
        def metered(group: Group, value: Any) -> Any:
            if group.size == 1:
                return send(group, value)
            self.n_bytes += value.nbytes if isinstance(value, th.Tensor) else len(pickle.dumps(value))
            self.n += 1
            started = time.perf_counter()
            result = send(group, value)
            self.seconds += time.perf_counter() - started
            return result

        return metered


class Clock(BaseCallback):
    """Stores the time and the meter's numbers at the start and the end of each rollout of the first process."""

    def __init__(self, meter: Meter) -> None:
        super().__init__()
        self.meter = meter
        self.starts: list[np.ndarray] = []
        self.ends: list[np.ndarray] = []

    def _on_step(self) -> bool:
        return True

    def _on_rollout_start(self) -> None:
        self.starts.append(self._now())

    def _on_rollout_end(self) -> None:
        self.ends.append(self._now())

    def _now(self) -> np.ndarray:
        return np.array([time.perf_counter(), self.meter.seconds, self.meter.n, self.meter.n_bytes])


def train(spec: dict[str, Any]) -> dict[str, Any]:
    """Train, and return means over all iterations but the first one."""
    clock = Clock(Meter())
    env = make_vec_env(spec["env_id"], n_envs=spec["n_envs"])
    model = ClipPPO(
        "MlpPolicy",
        env,
        n_steps=spec["n_steps"],
        batch_size=spec["batch_size"],
        n_epochs=spec["n_epochs"],
        policy_kwargs={"net_arch": spec["net_arch"]},
        engine="native",
        device="cpu",
        seed=1,
    )
    size = current_group().size
    model.learn((spec["iterations"] + 2) * spec["n_steps"] * spec["n_envs"] * size, callback=clock)
    if not clock.starts:
        return {}  # callbacks run in the first process only
    starts, ends = np.array(clock.starts), np.array(clock.ends)
    whole = (starts[-1] - starts[1]) / spec["iterations"]
    rollout = (ends[1:-1] - starts[1:-1]).mean(axis=0)
    return {
        "rollout_seconds": rollout[0] - rollout[1],
        "update_seconds": whole[0] - whole[1] - (rollout[0] - rollout[1]),
        "message_seconds": whole[1],
        "messages": whole[2],
        "message_bytes": whole[3],
        "steps_per_second": spec["n_steps"] * spec["n_envs"] * size / whole[0],
        "parameters": sum(parameter.numel() for parameter in model.policy.parameters()),
    }


class Curve(BaseCallback):
    """Keeps the mean return of the last 100 episodes of all processes, by environment steps."""

    def __init__(self) -> None:
        super().__init__()
        self.steps: list[int] = []
        self.returns: list[float] = []

    def _on_step(self) -> bool:
        return True

    def _on_rollout_start(self) -> None:
        episodes = self.model.ep_info_buffer
        if episodes:
            self.steps.append(self.model.num_timesteps)
            self.returns.append(float(np.mean([episode["r"] for episode in episodes])))

    def _on_training_end(self) -> None:
        self._on_rollout_start()


def learn(spec: dict[str, Any]) -> dict[str, Any]:
    """Train, and return the curve on an even grid of steps; None where no episode had ended."""
    env: VecEnv = make_vec_env(spec["env_id"], n_envs=spec["n_envs"])
    if spec["normalize"]:
        env = VecNormalize(env, gamma=spec["arguments"].get("gamma", 0.99))
    curve = Curve()
    ClipPPO("MlpPolicy", env, device="cpu", **spec["arguments"]).learn(spec["n_timesteps"], callback=curve)
    if not curve.steps:
        return {}
    values = np.interp(grid(spec["n_timesteps"]), curve.steps, curve.returns, left=np.nan)
    return {"curve": [float(f"{value:.5g}") if np.isfinite(value) else None for value in values]}


def send(sizes: Sequence[int]) -> dict[str, Any]:
    """Return the seconds of an all-reduce by its bytes."""
    group, medians = current_group(), {}
    for n_bytes in sizes:
        tensor, seconds = th.zeros(n_bytes // 4), []
        for _ in range(REPEATS):
            started = time.perf_counter()
            group.add_up(tensor)
            seconds.append(time.perf_counter() - started)
        medians[str(n_bytes)] = statistics.median(seconds)
    return {"seconds_by_bytes": medians}


if __name__ == "__main__":
    th.set_num_threads(1)
    given = json.loads(sys.argv[1])
    if "sizes" in given:
        numbers = send(given["sizes"])
    else:
        numbers = learn(given) if "arguments" in given else train(given)
    if int(os.environ.get("RANK", "0")) == 0:
        sys.stdout.write(json.dumps(numbers) + "\n")
