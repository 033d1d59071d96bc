"""
The measured process: ``python -m tests.bench.speed_child <task>`` measures one peer once.

The task is a JSON object: ``row`` (a SpeedRow's fields), ``peer`` (a key of PEERS or BOUNDS), ``seed``, ``cores`` (the
number of cores to stay on; null: all) and ``profile``. Its last line of output is the result, a JSON object as well.
"""

from __future__ import annotations

import cProfile
import itertools
import json
import os
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from sb3_clipvf import collection
from tests.bench.speed_models import make_model, raw_vector
from tests.bench.speed_rows import BOUNDS, SpeedRow, is_clipppo

_ENGINES = {"sb3": "torch", "sb3_compiled": "torch.compile", "sbx": "jax"}


@dataclass
class Iteration:
    """One rollout and the update that follows, in seconds."""

    started: float  # on the clock of ``time.perf_counter``
    rollout: float = 0.0
    environment: float = 0.0  # the part of the rollout in the environments, with all VecEnv wrappers
    update: float = 0.0
    n_env_steps: int = 0


class Stopwatch:
    """Times a model's iterations by wrapping rollout, update and step, and calls ``on_measured`` after the warm-up."""

    def __init__(self, model: Any, warmup: int, on_measured: Callable[[], None]) -> None:
        self.iterations: list[Iteration] = []
        self._warmup, self._on_measured = warmup, on_measured
        self._collect, self._train = model.collect_rollouts, model.train
        model.collect_rollouts, model.train = self._timed_collect, self._timed_train
        if _trains_on_tensors(model):
            self._step, model.env.step_tensors = model.env.step_tensors, self._timed_step
        elif type(model).__module__.startswith("sb3_clipvf."):
            # A method replaced in the environments would make ClipPPO leave the step to their own code.
            chooser: Any = collection
            self._choose_step, chooser.faster_step = chooser.faster_step, self._timed_choice
        else:
            self._step, model.env.step = model.env.step, self._timed_step

    def _timed_collect(self, *args: Any, **kwargs: Any) -> Any:
        if len(self.iterations) == self._warmup:
            self._on_measured()
        started = time.perf_counter()
        self.iterations.append(Iteration(started))
        result = self._collect(*args, **kwargs)
        self.iterations[-1].rollout = time.perf_counter() - started
        return result

    def _timed_train(self) -> None:
        started = time.perf_counter()
        self._train()
        self.iterations[-1].update = time.perf_counter() - started

    def _timed_choice(self, env: Any) -> Callable[[Any], Any]:
        self._step = self._choose_step(env)
        return self._timed_step

    def _timed_step(self, actions: Any) -> Any:
        started = time.perf_counter()
        result = self._step(actions)
        iteration = self.iterations[-1]
        iteration.environment += time.perf_counter() - started
        iteration.n_env_steps += 1
        return result


def _trains_on_tensors(model: Any) -> bool:
    if not type(model).__module__.startswith("sb3_clipvf."):
        return False
    from sb3_clipvf.tensor_collection import trains_on_tensors

    return trains_on_tensors(model.env, model.rollout_buffer)


def peak_megabytes() -> float:
    """Return the peak of this process's resident memory in MB (10^6 bytes)."""
    # Linux's ``ru_maxrss`` includes the process that started this one.
    status = Path("/proc/self/status").read_text(encoding="ascii")
    return int(status.partition("VmHWM:")[2].split()[0]) * 1024 / 1e6


def measure_peer(row: SpeedRow, peer: str, seed: int, *, profile: bool = False) -> dict[str, Any]:
    """
    Train a peer for the row's iterations, and return the entries of its result.

    :raises RuntimeError: if a peer steps its environments by another way than ``env.step``
    """
    started = time.perf_counter()
    model = make_model(row, peer, seed)
    profiler = cProfile.Profile()
    warmup = row.warmup_of(peer)
    watch = Stopwatch(model, warmup, profiler.enable if profile else lambda: None)
    setup_seconds = time.perf_counter() - started
    n_steps = row.n_steps * row.n_envs
    model.learn(n_steps * (warmup + row.iterations))
    ended = time.perf_counter()
    profiler.disable()
    # A captured step of a rollout has the environments' operations, and calls no method.
    is_captured = getattr(getattr(model, "_engine", None), "_rollout_step", None) is not None
    if not is_captured and any(iteration.n_env_steps != row.n_steps for iteration in watch.iterations):
        raise RuntimeError(
            f"A rollout must call `env.step` {row.n_steps} times, got "
            f"{[iteration.n_env_steps for iteration in watch.iterations]}. The seconds cannot be divided."
        )
    result = _summary(row, watch.iterations, warmup, ended) | {"setup_seconds": setup_seconds}
    result["engine"] = _ENGINES.get(peer) or model._current_engine().name
    # The warm-up's time beyond that of as many measured iterations is compilation and loading.
    usual = warmup * result["wall_seconds"] / row.iterations
    result["startup_seconds"] = setup_seconds + max(0.0, result["warmup_seconds"] - usual)
    result["device"] = str(getattr(model, "device", "cpu"))  # SBX has none
    result["peak_megabytes"] = peak_megabytes()
    if is_clipppo(peer) and model.device.type == "cpu":
        from tests.bench.speed_products import products_seconds

        result["products_seconds"] = products_seconds(model, row.threads) * row.iterations
    if profile:
        from tests.bench.speed_profile import summarise

        result["profile"] = summarise(profiler)
    return result


def _summary(row: SpeedRow, iterations: Sequence[Iteration], warmup: int, ended: float) -> dict[str, Any]:
    measured = iterations[warmup:]
    wall = ended - measured[0].started
    rollout, environment, update = (
        sum(getattr(iteration, name) for iteration in measured) for name in ("rollout", "environment", "update")
    )
    steps = row.n_steps * row.n_envs * len(measured)
    return {
        "steps": steps,
        "wall_seconds": wall,
        "environment_seconds": environment,
        "policy_seconds": rollout - environment,
        "update_seconds": update,
        "other_seconds": wall - rollout - update,
        "steps_per_second": steps / (update if row.phase == "update" else wall),
        "warmup_seconds": measured[0].started - iterations[0].started,
    }


def measure_bound(row: SpeedRow, peer: str, seed: int, seconds: float) -> dict[str, Any]:
    """
    Step a peer's environments alone, without adapters and statistics, under random actions drawn beforehand.

    Steps that only reset an environment do not count.
    """
    step = _single_stepper(row, seed) if row.kind(peer) in ("gym", "sb3", "atari") else _vector_stepper(row, seed)
    for _ in range(20):
        step()
    steps, started = 0, time.perf_counter()
    while time.perf_counter() - started < seconds:
        steps += step()
    wall = time.perf_counter() - started
    return {"steps": steps, "wall_seconds": wall, "steps_per_second": steps / wall}


def _single_stepper(row: SpeedRow, seed: int) -> Callable[[], int]:
    import gymnasium as gym

    if row.peer_env == "atari":
        import ale_py
        from stable_baselines3.common.atari_wrappers import AtariWrapper

        gym.register_envs(ale_py)
        envs: list[Any] = [AtariWrapper(gym.make(row.env_id)) for _ in range(row.n_envs)]
    else:
        envs = [gym.make(row.env_id) for _ in range(row.n_envs)]
    envs[0].action_space.seed(seed)
    actions = itertools.cycle([envs[0].action_space.sample() for _ in range(4096)])
    for index, env in enumerate(envs):
        env.reset(seed=seed + index)

    def step() -> int:
        for env in envs:
            _, _, terminated, truncated, _ = env.step(next(actions))
            if terminated or truncated:
                env.reset()
        return len(envs)

    return step


def _vector_stepper(row: SpeedRow, seed: int) -> Callable[[], int]:
    envs = raw_vector(row, seed)
    space = getattr(envs, "single_action_space", envs.action_space)  # EnvPool's is the single one
    space.seed(seed)
    actions = itertools.cycle([np.stack([space.sample() for _ in range(row.n_envs)]) for _ in range(256)])
    envs.reset()
    resets_cost_a_step = row.env != "ale"

    def step() -> int:
        _, _, terminated, truncated, _ = envs.step(next(actions))
        return row.n_envs - int(resets_cost_a_step and np.count_nonzero(terminated | truncated))

    return step


def main(argv: Sequence[str] | None = None) -> int:
    """Measure the task, and print the result."""
    (text,) = sys.argv[1:] if argv is None else argv
    task = json.loads(text)
    if task["cores"] is not None:
        os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[: task["cores"]])
    row, peer = SpeedRow(**task["row"]), task["peer"]
    if peer in BOUNDS:
        result = measure_bound(row, BOUNDS[peer], task["seed"], task["bound_seconds"])
    else:
        result = measure_peer(row, peer, task["seed"], profile=task["profile"])
        import torch as th

        result["torch_threads"] = th.get_num_threads()
    sys.stdout.write("\n" + json.dumps(result) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
