"""Time of a minibatch and of a policy's step, by engine: ``python -m tests.bench minibatch --device cuda``."""

from __future__ import annotations

import argparse
import sys
import time
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from statistics import median
from typing import Any

import numpy as np
import torch as th
from gymnasium import spaces
from stable_baselines3 import PPO
from torch import nn

from tests.bench.speed_free import FreeVecEnv

SECONDS = 1.0
"""Length of a measurement; it has at least three updates."""


@dataclass(frozen=True)
class Work:
    """Spaces, environments and arguments of a policy's updates."""

    observations: spaces.Box
    actions: spaces.Space[Any]
    n_envs: int
    n_steps: int
    batch_size: int
    policy: str = "MlpPolicy"
    net_arch: tuple[int, ...] | None = None
    activation: type[nn.Module] | None = None

    @property
    def policy_kwargs(self) -> dict[str, Any]:
        """Arguments of the policy that are not SB3's defaults."""
        if self.net_arch is None:
            return {}
        return {"net_arch": list(self.net_arch), "activation_fn": self.activation}


def _box(*shape: int) -> spaces.Box:
    return spaces.Box(-np.inf, np.inf, shape)


WORKS = {
    "mlp-64": Work(_box(17), spaces.Box(-1.0, 1.0, (6,)), 8, 256, 64),
    "mlp-256": Work(_box(4), spaces.Discrete(2), 8, 256, 256),
    "wide-256": Work(_box(17), spaces.Box(-1.0, 1.0, (6,)), 8, 256, 256, net_arch=(256, 256), activation=nn.Tanh),
    "cnn-256": Work(spaces.Box(0, 255, (4, 84, 84), np.uint8), spaces.Discrete(4), 8, 128, 256, "CnnPolicy"),
    "large-24576": Work(
        _box(48), spaces.Box(-1.0, 1.0, (12,)), 4096, 24, 24_576, net_arch=(512, 256, 128), activation=nn.ELU
    ),
}


class FreeSpaces(FreeVecEnv):
    """A free environment with a work's spaces."""

    def __init__(self, work: Work) -> None:
        super().__init__(work.n_envs, 1, 1, seed=0)
        self.observation_space, self.action_space = work.observations, work.actions
        generator = np.random.default_rng(0)
        shape = (len(self._observations), work.n_envs, *work.observations.shape)
        if work.observations.dtype == np.uint8:
            self._observations = generator.integers(0, 256, shape, np.uint8)
        else:
            self._observations = generator.standard_normal(shape, np.float32)


def engines_on(device: str) -> list[str]:
    """Return what is measured: SB3, and this package's engines on a device."""
    on_gpu = ["static", "cuda_graph", "cuda_graph_bf16"]
    return ["sb3", "autograd", *(on_gpu if device.startswith("cuda") else ["auto"])]


def make_model(work: Work, engine: str, device: str) -> Any:
    """Build a model that has trained once. "static" is cuda_graph without graphs."""
    from sb3_clipvf import SB3_EQUIVALENT, ClipPPO

    arguments: dict[str, Any] = {"n_steps": work.n_steps, "batch_size": work.batch_size, "n_epochs": 4}
    arguments |= {"learning_rate": 1e-5, "seed": 0, "device": device, "policy_kwargs": work.policy_kwargs}
    if engine == "sb3":
        model: Any = PPO(work.policy, FreeSpaces(work), **arguments)
    else:
        name = "cuda_graph" if engine == "static" else engine
        model = ClipPPO(work.policy, FreeSpaces(work), **(SB3_EQUIVALENT | {"engine": name} | arguments))
    if engine == "static":
        model._current_engine()._try = lambda *_: None
    model.learn(1)
    return model


def seconds_of(function: Callable[[], object], device: str) -> float:
    """Return the median time of a call, which ends when the device has finished."""
    times: list[float] = []
    function()
    while len(times) < 3 or sum(times) < SECONDS:
        started = time.perf_counter()
        function()
        if device.startswith("cuda"):
            th.cuda.synchronize()
        times.append(time.perf_counter() - started)
    return median(times)


def act_fn(model: Any, engine: str) -> Callable[[], object]:
    """Return a function that makes the policy's step of a rollout, from arrays to arrays."""
    observations = model.env.reset()

    def act() -> object:
        tensor = th.as_tensor(observations, device=model.device)
        if engine != "sb3":
            used = model._engine
            return used.act(observations if used.acts_on_arrays else tensor, with_dist_params=False)
        with th.no_grad():
            return [part.cpu().numpy() for part in model.policy(tensor)]

    return act


def kernels_of(function: Callable[[], object], device: str) -> str:
    """Return a table of the operations that take longest in a call."""
    with th.profiler.profile() as profile:
        function()
        if device.startswith("cuda"):
            th.cuda.synchronize()
    by = "self_device_time_total" if device.startswith("cuda") else "self_cpu_time_total"
    return str(profile.key_averages().table(sort_by=by, row_limit=30, max_name_column_width=90))


def main(argv: Sequence[str] | None = None) -> int:
    """Measure, and print a table in Markdown."""
    parser = argparse.ArgumentParser(prog="python -m tests.bench minibatch", description=__doc__)
    parser.add_argument("--device", default="cpu", help="PyTorch device")
    parser.add_argument("--only", nargs="+", choices=WORKS, default=list(WORKS), help="works to measure")
    parser.add_argument("--engines", nargs="+", help="what to measure; default: all on the device")
    parser.add_argument("--profile", action="store_true", help="also list the operations of an update")
    args = parser.parse_args(argv)
    warnings.filterwarnings("ignore", message="You are trying to run")
    device = th.cuda.get_device_name() if args.device.startswith("cuda") else f"CPU, {th.get_num_threads()} threads"
    sys.stdout.write(f"{device}, torch {th.__version__}\n\n")
    sys.stdout.write("| work | engine | minibatch, us | step of the policy, us |\n|---|---|---:|---:|\n")
    for name in args.only:
        work = WORKS[name]
        n_minibatches = 4 * -(-work.n_envs * work.n_steps // work.batch_size)
        for engine in args.engines or engines_on(args.device):
            model = make_model(work, engine, args.device)
            update = seconds_of(model.train, args.device) / n_minibatches
            act = seconds_of(act_fn(model, engine), args.device)
            used = engine if engine in ("sb3", "static") else model._engine.name
            sys.stdout.write(f"| {name} | {used} | {1e6 * update:.0f} | {1e6 * act:.0f} |\n")
            if args.profile:
                sys.stdout.write(kernels_of(model.train, args.device))
            sys.stdout.flush()
            del model
    return 0
