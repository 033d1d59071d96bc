"""``python -m tests.bench speed``: what it measures, keeps, skips and tabulates."""

import json
import os
import shutil
import signal
import sys
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import psutil
import pytest
import torch as th
from matplotlib.axes import Axes
from stable_baselines3 import PPO
from stable_baselines3.common.envs import FakeImageEnv
from stable_baselines3.common.monitor import Monitor
from stable_baselines3.common.vec_env import DummyVecEnv, VecNormalize
from torch import nn

from sb3_clipvf import ClipPPO
from sb3_clipvf.common import resources
from sb3_clipvf.engines import threads
from sb3_clipvf.engines.selection import ENGINE_NAMES
from sb3_clipvf.envs import FastDummyVecEnv, FastVecNormalize
from tests.bench import speed, speed_child, speed_products, speed_rows
from tests.bench.results import Results
from tests.bench.speed import main
from tests.bench.speed_figure import write_figure
from tests.bench.speed_models import make_env, make_model
from tests.bench.speed_profile import area_of, render_profile, sum_areas
from tests.bench.speed_rows import BOUNDS, ROWS, SpeedRow
from tests.bench.speed_table import (
    CACHES,
    COLD_TRIAL,
    KEY,
    TRIALS,
    Spread,
    best_threads,
    entries_of,
    ratio,
    render_tables,
)

# Of a policy that the native engine does not run, so that ClipPPO's number of threads is tried.
FAST = SpeedRow("fast", "a fast one", 2, "CartPole-v1", 4, 8, {"n_steps": 16}, policy="CnnPolicy")
SLOW = SpeedRow("slow", "a slow one", 2, "CartPole-v1", 4, 8, {"n_steps": 16}, policy="CnnPolicy", env="vector")

# A quick stand-in for the measured process: it records its task, and is faster for ClipPPO and on one thread.
CHILD = """
import json, os, sys
task = json.loads(sys.argv[-1])
threads = os.environ.get("OMP_NUM_THREADS")
with open("tasks.jsonl", "a") as file:
    caches = [name for name in ("NUMBA_CACHE_DIR", "TORCHINDUCTOR_CACHE_DIR") if name in os.environ]
    file.write(json.dumps(task | {"threads": threads, "caches": caches}) + "\\n")
steps = 1000.0 * (2 if task["peer"] == "clipppo" else 1) * (1.2 if threads == "1" else 1) + task["seed"]
split = {name + "_seconds": 0.25 for name in ("environment", "policy", "update", "other", "startup")}
times = {"steps": 1000, "wall_seconds": 1.0, "steps_per_second": steps, "peak_megabytes": 100.0}
print("not the result")
print(json.dumps(split | times | {"engine": "none", "device": "cuda", "torch_threads": 1}))
"""


@pytest.fixture
def in_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty working folder, two rows, the quick process, SBX not installed, and no cache set outside."""
    monkeypatch.chdir(tmp_path)
    for name in CACHES.values():
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(speed, "ROWS", (FAST, SLOW))
    monkeypatch.setattr(psutil, "cpu_percent", lambda interval: 5.0)
    installed(monkeypatch, lambda name: name != "sbx")
    child_is(monkeypatch, CHILD)
    monkeypatch.setattr(speed, "COMPILE_COMMAND", (sys.executable, "-c", "open('compiled', 'w')"))
    return tmp_path


def installed(monkeypatch: pytest.MonkeyPatch, is_there: Callable[[str], bool]) -> None:
    monkeypatch.setattr(speed_rows, "find_spec", lambda name: object() if is_there(name) else None)
    monkeypatch.setattr(shutil, "which", lambda name: name if is_there(name) else None)


def child_is(monkeypatch: pytest.MonkeyPatch, program: str) -> None:
    monkeypatch.setattr(speed, "CHILD_COMMAND", (sys.executable, "-c", program))


def runs_in(path: Path = Path("docs/results/speed.json")) -> list[dict[str, Any]]:
    runs = json.loads(path.read_text())["runs"]
    assert isinstance(runs, list)
    return runs


def tasks() -> list[dict[str, Any]]:
    """Return the tasks that measured processes got since the last call."""
    path = Path("tasks.jsonl")
    lines = path.read_text().splitlines() if path.exists() else []
    path.unlink(missing_ok=True)
    return [json.loads(line) for line in lines]


def order() -> list[str]:
    return [f"{task['row']['name']} {task['peer']} {task['seed']}" for task in tasks()]


# --- rows


def test_rows_have_the_goals_to_reach() -> None:
    goals = {row.name: (row.env_id, row.n_envs, row.settings.get("batch_size", 64), row.goal) for row in ROWS}
    assert goals == {
        "update-64": ("CartPole-v1", 1, 64, 15),
        "update-256": ("CartPole-v1", 8, 256, 8),
        "cartpole": ("CartPole-v1", 8, 256, 8),
        "halfcheetah-1": ("HalfCheetah-v5", 1, 64, 5),
        "halfcheetah-1-sb3": ("HalfCheetah-v5", 1, 64, 5),
        "halfcheetah-8": ("HalfCheetah-v5", 8, 64, 5),
        "halfcheetah-8-envpool": ("HalfCheetah-v5", 8, 64, 10),
        "lunarlander-envpool": ("LunarLander-v3", 16, 64, 10),
        "cartpole-64-vector": ("CartPole-v1", 64, 256, 12),
        "breakout-8-ale": ("BreakoutNoFrameskip-v4", 8, 256, 2),
        "breakout-64-ale": ("BreakoutNoFrameskip-v4", 64, 256, 2),
        "tensor-pendulum": ("Pendulum-v1", 4096, 32_768, 3),
        "custom-extractor": ("CartPole-v1", 1, 64, 1.7),
        "wide-256": ("17 -> 6", 8, 256, 3),
        "wide-256-1t": ("17 -> 6", 8, 256, 3),
        "large-4096": ("48 -> 12", 4096, 24_576, 1.3),
        "large-4096-1t": ("48 -> 12", 4096, 24_576, 1.3),
    }
    assert {row.name for row in ROWS if row.normalize} == {name for name in goals if name.startswith("halfcheetah")}
    updates = {"update-64", "update-256", "wide-256", "wide-256-1t", "large-4096", "large-4096-1t"}
    assert {row.name for row in ROWS if row.phase == "update"} == updates
    assert {row.name: row.threads for row in ROWS if row.threads} == {"wide-256-1t": 1, "large-4096-1t": 1}
    for name in ("wide-256", "large-4096"):
        row, one_thread = (next(row for row in ROWS if row.name == name + end) for end in ("", "-1t"))
        assert replace(one_thread, name=row.name, title=row.title, threads=None, peers=row.peers) == row


def test_row_measures_the_peers_that_can_run_and_the_environments_of_both(monkeypatch: pytest.MonkeyPatch) -> None:
    installed(monkeypatch, lambda name: True)
    every = replace(FAST, peers=("clipppo", "sb3", "sb3_compiled", "sbx"))
    assert every.measured() == ("clipppo", "sb3", "sb3_compiled", "sbx", "bound_clipppo")
    assert FAST.measured() == ("clipppo", "sb3", "sbx", "bound_clipppo")
    assert SLOW.measured() == ("clipppo", "sb3", "sbx", "bound_clipppo", "bound_sb3")
    assert replace(FAST, phase="update").measured() == ("clipppo", "sb3", "sbx")
    assert replace(FAST, env="free", peer_env="free").measured() == ("clipppo", "sb3", "sbx")
    installed(monkeypatch, lambda name: name != "sbx")
    assert FAST.measured() == ("clipppo", "sb3", "bound_clipppo")
    installed(monkeypatch, lambda name: name != "g++")
    assert every.measured() == ("clipppo", "sb3", "sbx", "bound_clipppo")
    monkeypatch.setenv("CXX", "clang++")
    assert every.measured() == ("clipppo", "sb3", "sb3_compiled", "sbx", "bound_clipppo")


@pytest.mark.parametrize(
    "row, missing, needs",
    [
        ("halfcheetah-1", "mujoco", "needs mujoco: pip install 'sb3_clipvf[mujoco]'"),
        ("halfcheetah-8-envpool", "envpool", "needs envpool: pip install 'sb3_clipvf[envpool]'"),
        ("lunarlander-envpool", "Box2D", "needs Box2D: pip install 'sb3_clipvf[box2d]'"),
        ("breakout-8-ale", "ale_py", "needs ale_py: pip install 'sb3_clipvf[atari]'"),
        ("breakout-8-ale", "cv2", "needs cv2: pip install 'sb3_clipvf[atari]'"),
        ("cartpole", "mujoco", None),
        ("halfcheetah-8", "envpool", None),
    ],
)
def test_row_names_what_it_needs(monkeypatch: pytest.MonkeyPatch, row: str, missing: str, needs: str | None) -> None:
    installed(monkeypatch, lambda name: name != missing)
    assert next(r for r in ROWS if r.name == row).missing() == needs


@pytest.mark.parametrize("row", ROWS, ids=lambda row: row.name)
def test_quick_row_is_the_same_but_short(row: SpeedRow) -> None:
    quick = row.quick()
    n_transitions = quick.n_steps * quick.n_envs
    assert 64 <= n_transitions <= 128
    assert (quick.warmup, quick.iterations, quick.settings["n_epochs"], quick.settings["batch_size"]) == (1, 2, 2, 64)
    changed = {"settings": row.settings, "warmup": row.warmup, "iterations": row.iterations, "n_envs": row.n_envs}
    assert replace(quick, **changed, cold_start=row.cold_start) == row


@pytest.mark.parametrize("normalize", [False, True])
def test_each_peer_has_the_environments_of_its_own_library(normalize: bool) -> None:
    row = replace(FAST, normalize=normalize)
    for peer, vec_env, wrapper in (
        ("clipppo", FastDummyVecEnv, FastVecNormalize),
        ("sb3", DummyVecEnv, VecNormalize),
        ("sbx", DummyVecEnv, VecNormalize),
    ):
        env = make_env(row, peer, 3)
        assert type(env) is (wrapper if normalize else vec_env)
        assert type(env.unwrapped) is vec_env
        assert (env.num_envs, env.env_is_wrapped(Monitor)) == (4, [True] * 4)
        env.close()


def test_tensor_environments_are_stepped_as_tensors_by_clipppo_alone() -> None:
    row = next(row for row in ROWS if row.name == "tensor-pendulum").quick()
    assert row.measured() == ("clipppo", "sb3")
    for peer, method in (("clipppo", "step_tensors"), ("sb3", "step")):
        model = make_model(row, peer, 3)
        assert model.env.num_envs == 64 and model.env.unwrapped.device.type == "cpu"
        watch = speed_child.Stopwatch(model, 0, lambda: None)
        assert method in vars(model.env)
        model.learn(64 * row.n_steps)
        assert [iteration.n_env_steps for iteration in watch.iterations] == [row.n_steps]


def test_peers_get_the_same_arguments() -> None:
    row = next(row for row in ROWS if row.name == "cartpole")
    ours, sb3 = (make_model(row, peer, 3) for peer in ("clipppo", "sb3"))
    for name in ("n_steps", "batch_size", "n_epochs", "gamma", "gae_lambda", "ent_coef", "vf_coef", "max_grad_norm"):
        assert getattr(ours, name) == getattr(sb3, name)
    assert (ours.n_envs, ours.seed, ours.verbose, ours.engine) == (sb3.n_envs, sb3.seed, sb3.verbose, "auto")
    assert ours.clip_range(0.5) == sb3.clip_range(0.5) == 0.1
    assert ours.lr_schedule(0.5) == sb3.lr_schedule(0.5) == 0.0005
    assert (ours.clip_range_vf, ours.vf_clip_units) == (None, "absolute")
    shapes = [[tuple(tensor.shape) for tensor in model.policy.parameters()] for model in (ours, sb3)]
    assert shapes[0] == shapes[1]


@pytest.mark.parametrize("peer", ["clipppo", "sb3"])
def test_networks_of_a_row_and_environments_that_cost_nothing(peer: str) -> None:
    row = next(row for row in ROWS if row.name == "large-4096")
    model = make_model(row.quick(), peer, 3)
    layers = [
        (layer.in_features, layer.out_features) if isinstance(layer, nn.Linear) else type(layer)
        for layer in model.policy.mlp_extractor.policy_net
    ]
    assert layers == [(48, 512), nn.ELU, (512, 256), nn.ELU, (256, 128), nn.ELU]
    assert (model.n_envs, model.env.action_space.shape) == (64, (12,))
    first = model.env.reset()
    steps = [model.env.step(np.zeros((64, 12))) for _ in range(20)]
    assert len({step[0].tobytes() for step in steps}) == 16 and steps[15][0] is not steps[14][0]
    assert all(step[0].shape == first.shape == (64, 48) and step[1].std() > 0.5 for step in steps)
    assert not any(step[2].any() for step in steps)


def test_compiled_sb3_compiles_what_rollouts_and_updates_call(
    monkeypatch: pytest.MonkeyPatch, validation_as_before: None
) -> None:
    graphs: list[str] = []

    def keep(graph: Any, inputs: Any) -> Any:  # the default backend takes ten seconds
        graphs.append(graph.code)
        return graph.forward

    monkeypatch.setattr(th, "compile", partial(th.compile, backend=keep, fullgraph=True))
    row = next(row for row in ROWS if row.name == "cartpole").quick()
    result = speed_child.measure_peer(row, "sb3_compiled", 1)
    assert result["engine"] == "torch.compile"
    rollout, update = graphs  # once each
    assert "multinomial" in rollout and "multinomial" not in update


def test_sbx_gets_activation_functions_of_jax(monkeypatch: pytest.MonkeyPatch) -> None:
    made: dict[str, Any] = {}
    monkeypatch.setitem(sys.modules, "sbx", SimpleNamespace(PPO=lambda *args, **kwargs: made.update(kwargs)))
    monkeypatch.setitem(sys.modules, "jax", SimpleNamespace())
    monkeypatch.setitem(sys.modules, "jax.nn", SimpleNamespace(elu="jax's elu"))
    make_model(next(row for row in ROWS if row.name == "large-4096").quick(), "sbx", 3)
    assert made["policy_kwargs"] == {"net_arch": [512, 256, 128], "activation_fn": "jax's elu"}


# --- the measured process


class Clock:
    """A clock that only the scripted model advances."""

    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now


class ScriptedModel:
    """A rollout takes 5 s, 3 of them in two environment steps; an update takes 4 s, and the rest 1 s."""

    def __init__(self, clock: Clock, compile_seconds: float, n_calls: int = 2) -> None:
        self.clock, self.compile_seconds, self.n_calls = clock, compile_seconds, n_calls
        self.env = SimpleNamespace(step=self._step)

    def _step(self, actions: int) -> int:
        self.clock.now += 1.5
        return actions + 1

    def collect_rollouts(self, *args: Any, n_rollout_steps: int) -> bool:
        for step in range(self.n_calls):
            assert self.env.step(step) == step + 1
        self.clock.now += 2.0
        return True

    def train(self) -> None:
        self.clock.now += 4.0 + self.compile_seconds
        self.compile_seconds = 0.0

    def learn(self, total_timesteps: int) -> None:
        self.total_timesteps = total_timesteps
        for _ in range(total_timesteps // 8):
            assert self.collect_rollouts(self.env, n_rollout_steps=2)
            self.train()
            self.clock.now += 1.0


@pytest.fixture
def scripted(monkeypatch: pytest.MonkeyPatch) -> Callable[..., dict[str, Any]]:
    """Measures the scripted model, which takes 7 s to build and 20 s to compile in its first update."""

    def measure(phase: str = "all", n_calls: int = 2) -> dict[str, Any]:
        clock = Clock()

        def build(row: SpeedRow, peer: str, seed: int) -> ScriptedModel:
            assert (peer, seed) == ("sb3", 9)
            clock.now += 7.0
            return ScriptedModel(clock, 20.0, n_calls)

        monkeypatch.setattr(speed_child, "make_model", build)
        monkeypatch.setattr(speed_child.time, "perf_counter", clock)
        row = replace(FAST, settings={"n_steps": 2}, warmup=2, iterations=3, phase=phase)
        return speed_child.measure_peer(row, "sb3", 9)

    return measure


def test_seconds_are_divided_without_compilation(scripted: Callable[..., dict[str, Any]]) -> None:
    # 3 measured iterations of 4 environments and 2 steps; the warm-up takes 2 iterations and 20 s more.
    result = scripted()
    assert result.pop("peak_megabytes") > 50
    assert result == {
        "steps": 24,
        "wall_seconds": 30.0,
        "environment_seconds": 9.0,
        "policy_seconds": 6.0,
        "update_seconds": 12.0,
        "other_seconds": 3.0,
        "steps_per_second": 0.8,
        "warmup_seconds": 40.0,
        "setup_seconds": 7.0,
        "startup_seconds": 27.0,
        "engine": "torch",
        "device": "cpu",
    }


def test_update_rows_count_the_seconds_of_updates(scripted: Callable[..., dict[str, Any]]) -> None:
    assert scripted("update")["steps_per_second"] == 24 / 12


def test_environments_stepped_by_another_way_are_an_error(scripted: Callable[..., dict[str, Any]]) -> None:
    with pytest.raises(RuntimeError, match=r"must call `env\.step` 2 times, got \[1, 1, 1, 1, 1\]"):
        scripted(n_calls=1)


@pytest.mark.parametrize("peer, engines", [("clipppo", ENGINE_NAMES), ("sb3", ("torch",)), ("bound_clipppo", ())])
def test_real_measurement(peer: str, engines: tuple[str, ...], capsys: pytest.CaptureFixture[str]) -> None:
    row = next(row for row in ROWS if row.name == "custom-extractor").quick()
    task = {"row": asdict(row), "peer": peer, "seed": 1, "cores": None, "profile": False, "bound_seconds": 0.02}
    assert speed_child.main([json.dumps(task)]) == 0
    result = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert result["engine"] in set(engines) - {"auto"} if engines else "engine" not in result
    assert result["steps_per_second"] == pytest.approx(result["steps"] / result["wall_seconds"])
    if engines:
        assert result["steps"] == 128
        parts = [result[f"{name}_seconds"] for name in ("environment", "policy", "update", "other")]
        assert min(parts) > 0
        assert sum(parts) == pytest.approx(result["wall_seconds"])
    assert (result.get("products_seconds", 0.0) > 0) == (peer == "clipppo")


@pytest.mark.parametrize(
    "policy, n_layers, without_gradient_of_inputs", [("MlpPolicy", 6, {4}), ("CnnPolicy", 6, {(4, 36, 36)})]
)
def test_products_are_those_of_each_layer(
    policy: str, n_layers: int, without_gradient_of_inputs: set[Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    if policy == "MlpPolicy":
        env: Any = "CartPole-v1"
    else:
        env = FakeImageEnv(screen_height=36, screen_width=36, n_channels=4, discrete=True, channel_first=True)
    model = ClipPPO(policy, env, n_steps=32, batch_size=16, n_epochs=3, engine="autograd", device="cpu")
    model.learn(32)
    needed: list[tuple[Any, bool]] = []

    def noting(make: Callable[..., Any]) -> Callable[..., Any]:
        def note(layer: Any, rows: Any) -> Any:
            needed.append((rows.shape[1] if rows.dim() == 2 else tuple(rows.shape[1:]), rows.requires_grad))
            return make(layer, rows)

        return note

    for name in ("_linear", "_convolution"):
        monkeypatch.setattr(speed_products, name, noting(getattr(speed_products, name)))
    monkeypatch.setattr(speed_products, "_seconds", lambda products, threads: [f() for f in products] and 1.0 / threads)
    weights = [parameter.detach().clone() for parameter in model.policy.parameters()]
    # The fastest number of threads, and 2 minibatches in 3 epochs.
    assert speed_products.products_seconds(model) == pytest.approx(6.0 / resources.usable_cores())
    needed.clear()
    assert speed_products.products_seconds(model, threads=1) == 6.0
    assert len(needed) == n_layers
    assert {shape for shape, has_gradient in needed if not has_gradient} == without_gradient_of_inputs
    assert all(p.equal(before) for p, before in zip(model.policy.parameters(), weights, strict=True))


@pytest.mark.slow
@pytest.mark.parametrize("row", ROWS, ids=lambda row: row.name)
@pytest.mark.parametrize("peer", ["clipppo", "sb3"])
def test_every_row_runs(row: SpeedRow, peer: str) -> None:
    if (reason := row.missing()) is not None:
        pytest.skip(reason)
    quick = row.quick()
    result = speed_child.measure_peer(quick, peer, 1)
    assert result["steps"] == 2 * quick.n_steps * quick.n_envs
    if "bound_clipppo" in row.measured():
        assert speed_child.measure_bound(row, peer, 1, 0.01)["steps"] > 0


def test_bound_of_a_vector_environment_leaves_out_steps_that_only_reset(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = Clock()

    class Vector:
        """Two environments: each step takes 1 s, and ends the episode of the first one."""

        single_action_space = SimpleNamespace(seed=lambda seed: None, sample=lambda: np.int64(1))

        action_space = None

        def reset(self) -> None:
            clock.now += 100.0

        def step(self, actions: np.ndarray) -> Any:
            assert actions.shape == (2,)
            clock.now += 1.0
            return None, None, np.array([True, False]), np.array([True, False]), {}

    monkeypatch.setattr(speed_child, "raw_vector", lambda row, seed: Vector())
    monkeypatch.setattr(speed_child.time, "perf_counter", clock)
    result = speed_child.measure_bound(replace(SLOW, n_envs=2), "clipppo", 1, 10.0)
    assert (result["steps"], result["steps_per_second"]) == (10, 1.0)
    ale = speed_child.measure_bound(replace(SLOW, n_envs=2, env="ale"), "clipppo", 1, 10.0)
    assert ale["steps"] == 20  # it resets in the same step


def test_peak_memory_is_at_least_what_is_held_now() -> None:
    # Linux counts pages in batches for each thread, so that the two numbers may differ by some of them.
    assert speed_child.peak_megabytes() > 0.98 * psutil.Process().memory_info().rss / 1e6


# --- profile


def test_areas_get_the_time_of_what_they_call() -> None:
    train, act, step = ("x/ppo/ppo.py", 1, "train"), ("x/policies.py", 2, "act"), ("x/gymnasium/e.py", 3, "step")
    policy = ("stable_baselines3/common/policies.py", 4, "forward")
    linear, inner, orphan = ("~", 0, "linear"), ("~", 0, "inner"), ("~", 0, "orphan")
    edge = (1, 1, 0.0)
    stats = {
        train: (1, 1, 1.0, 5.0, {}),
        policy: (1, 1, 2.0, 3.0, {}),
        step: (1, 1, 4.0, 4.0, {act: (*edge, 4.0)}),
        act: (1, 1, 0.5, 4.5, {}),  # in no area, and no caller is known
        # 3 of its 4 s belong to the update; the recursive call changes nothing.
        linear: (2, 2, 1.0, 4.0, {train: (*edge, 3.0), policy: (*edge, 1.0), inner: (*edge, 0.0)}),
        inner: (1, 1, 3.0, 3.0, {linear: (*edge, 3.0)}),
        orphan: (1, 1, 0.25, 0.25, {}),
    }
    assert sum_areas(stats) == pytest.approx(
        {"update": 1 + 3, "policy in the rollout": 2 + 1, "environments": 4, "other": 0.75}
    )
    assert next(iter(sum_areas(stats))) in ("update", "environments")


@pytest.mark.parametrize(
    "path, function, area",
    [
        ("/s/stable_baselines3/ppo/ppo.py", "train", "update"),
        ("/s/torch/nn/modules/module.py", "train", None),
        ("/s/sb3_clipvf/clip_ppo.py", "collect_rollouts", "loop of the rollout"),
        ("/s/sb3_clipvf/engines/native.py", "act", "policy in the rollout"),
        ("/s/sb3_clipvf/engines/native.py", "update", None),
        ("/s/stable_baselines3/common/policies.py", "evaluate_actions", None),
        ("/s/stable_baselines3/common/monitor.py", "step", "adapters and wrappers"),
        ("/s/gymnasium/envs/classic_control/cartpole.py", "step", "environments"),
        ("~", "<built-in method torch._C._nn.linear>", None),
    ],
)
def test_area_of_a_function(path: str, function: str, area: str | None) -> None:
    assert area_of(path, function) == area


def test_profile_of_a_real_run() -> None:
    row = next(row for row in ROWS if row.name == "custom-extractor").quick()
    result = speed_child.measure_peer(row, "sb3", 1, profile=True)
    areas = result["profile"]["areas"]
    assert {"update", "policy in the rollout", "environments", "rollout buffer"} <= set(areas)
    assert areas["other"] < 0.2 * sum(areas.values())
    # The profiler stops a moment after the clock.
    assert sum(areas.values()) <= result["wall_seconds"] + 1e-3
    lines = render_profile("A title", result).splitlines()
    assert lines[0].startswith("A title: 128 steps in ")
    assert lines[0].endswith(" s, engine torch.")
    assert len(lines) == 6 + len(areas) + 3 + 25
    assert [line[:9] for line in lines[-25:]] == sorted((line[:9] for line in lines[-25:]), reverse=True)


# --- table


def result(row: SpeedRow, peer: str, part: str, speed_: float, **other: Any) -> dict[str, Any]:
    where = {"cpu": "C", "cores": 2, "versions": {"python": "3"}, "other_load": 1.0}
    split = {"environment_seconds": 0.1, "policy_seconds": 0.2, "update_seconds": 1000 / speed_, "other_seconds": 0.0}
    times = {"steps": 1000, "steps_per_second": speed_, "peak_megabytes": 100.0, "startup_seconds": 4.0}
    return entries_of(row, peer, part) | where | split | times | {"engine": "e", "torch_threads": 1} | other


def results_of(path: Path, *runs: dict[str, Any]) -> Results:
    results = Results(path / "r.json", KEY)
    for run in runs:
        results.add(run)
    return results


def test_ratio_pairs_runs_of_the_same_round(tmp_path: Path) -> None:
    results = results_of(
        tmp_path,
        *(result(FAST, "clipppo", str(n), speed_) for n, speed_ in ((1, 30.0), (2, 80.0), (3, 120.0), (4, 999.0))),
        *(result(FAST, "sb3", str(n), speed_) for n, speed_ in ((1, 10.0), (2, 20.0), (3, 20.0))),
    )
    assert ratio(results, FAST, "sb3", 4) == Spread(4.0, 3.0, 6.0, 3)
    assert ratio(results, FAST, "sb3", 2) == Spread(3.5, 3.0, 4.0, 2)
    assert ratio(results, FAST, "sb3", 4, "update") == Spread(4.0, 3.0, 6.0, 3)
    assert ratio(results, FAST, "sbx", 4) is None
    assert ratio(results, replace(FAST, iterations=9), "sb3", 4) is None
    assert ratio(results, replace(FAST, goal=9, title="other"), "sb3", 4) is not None


def test_a_new_field_of_rows_leaves_results_valid(tmp_path: Path) -> None:
    @dataclass(frozen=True)
    class LaterRow(SpeedRow):
        later: int = 3

    results = results_of(tmp_path, result(FAST, "sb3", "1", 1.0))
    row = LaterRow(**asdict(FAST))
    assert results.find(entries_of(row, "sb3", "1")) is not None
    assert results.find(entries_of(replace(row, later=4), "sb3", "1")) is None


@pytest.mark.parametrize("other", [{"cpu": "D"}, {"cores": 4}, {"versions": {"python": "4"}}])
def test_ratio_pairs_only_runs_of_the_same_machine(tmp_path: Path, other: dict[str, Any]) -> None:
    results = results_of(tmp_path, result(FAST, "clipppo", "1", 3.0), result(FAST, "sb3", "1", 1.0, **other))
    assert ratio(results, FAST, "sb3", 3) is None


def test_threads_are_those_of_the_fastest_trial(tmp_path: Path) -> None:
    one, default, one_again, default_again = TRIALS
    results = results_of(tmp_path, result(FAST, "sb3", one, 3.0))
    assert best_threads(results, FAST, "sb3") == 1
    results.add(result(FAST, "sb3", default, 3.7))
    assert best_threads(results, FAST, "sb3") is None
    results.add(result(FAST, "sb3", one_again, 5.0))
    assert best_threads(results, FAST, "sb3") == 1
    results.add(result(FAST, "sb3", default_again, 4.5))
    assert best_threads(results, FAST, "sb3") == 1
    # After a clear difference, second trials count for nothing, such as those of an earlier machine.
    results.add(result(FAST, "sb3", default, 3.8))
    assert best_threads(results, FAST, "sb3") is None
    with pytest.raises(LookupError, match="no trial of fast, sbx"):
        best_threads(results, FAST, "sbx")


def test_tables(tmp_path: Path) -> None:
    peers = ("clipppo", "sb3", "sb3_compiled", "sbx")
    cold = replace(FAST, name="cold", cold_start=True, peers=peers)
    results = results_of(
        tmp_path,
        *(result(FAST, "clipppo", str(n), 4000.0 * n, peak_megabytes=150.0, products_seconds=0.05) for n in (1, 2, 3)),
        *(result(FAST, "sb3", str(n), 2000.0) for n in (1, 2, 3)),
        *(result(FAST, "sbx", str(n), 8000.0, other_load=7.6) for n in (1, 2, 3)),
        result(FAST, "bound_clipppo", "1", 50_000.0),
        result(FAST, "bound_sb3", "1", 9_000.0),
        result(cold, "clipppo", "1", 1000.0),
        result(cold, "clipppo", next(iter(TRIALS)), 1000.0, startup_seconds=12.0),
        result(cold, "sb3", "1", 800.0),
        result(cold, "sb3_compiled", "1", 900.0),
        result(cold, "sb3_compiled", COLD_TRIAL, 900.0, startup_seconds=25.0),
    )
    text = render_tables(results, (FAST, cold, SLOW, replace(SLOW, name="gone")), 3, {"gone": "needs x"})
    lines = [line for line in text.splitlines() if line.startswith("|")]
    assert lines == [
        "| configuration | ClipPPO / SB3 | update | ClipPPO / SB3 compiled | ClipPPO / SBX "
        "| ClipPPO steps/s | SB3 steps/s | SB3 compiled steps/s | SBX steps/s | environment-only steps/s | goal |",
        "| --- | ---: | ---: | ---: | ---: | ---: | ---: | ---: | ---: | ---: | --- |",
        "| a fast one (`fast`) | 4.00<br>(2.00 to 6.00) | 4.00<br>(2.00 to 6.00) |  | 1.00<br>(0.50 to 1.50) "
        "| 8,000 | 2,000 |  | 8,000 | 50,000 / 9,000 | 2: yes |",
        "| a fast one (`cold`) | 1.25 | 1.25 | 1.11 |  | 1,000 | 800 | 900 |  |  | 2: no so far (1 of 3 rounds) |",
        "| a slow one (`slow`) |  |  |  |  |  |  |  |  |  | 2: not run |",
        "| a slow one (`gone`) |  |  |  |  |  |  |  |  |  | 2: needs x |",
        "| configuration | library | environment s | policy s | update s | other s | matrix products | memory MB "
        "| start s | engine | threads |",
        "| --- | --- | ---: | ---: | ---: | ---: | ---: | ---: | ---: | --- | ---: |",
        "| fast | ClipPPO | 10.00 | 20.00 | 12.50 | 0.00 | 40% | 150 (+50) | 4.0 | e | 1 |",
        "| fast | SB3 | 10.00 | 20.00 | 50.00 | 0.00 |  | 100 | 4.0 | e | 1 |",
        "| fast | SBX | 10.00 | 20.00 | 12.50 | 0.00 |  | 100 (+0) | 4.0 | e | 1 |",
        "| cold | ClipPPO | 10.00 | 20.00 | 100.00 | 0.00 |  | 100 (+0) | 4.0 (12.0) | e | 1 |",
        "| cold | SB3 | 10.00 | 20.00 | 125.00 | 0.00 |  | 100 | 4.0 | e | 1 |",
        "| cold | SB3 compiled | 10.00 | 20.00 | 111.11 | 0.00 |  | 100 (+0) | 4.0 (25.0) | e | 1 |",
    ]
    assert "Other programs used at most 8 % of the processor" in text
    assert text.endswith("- C, 2 cores, one run at a time; python 3\n")
    ratios, _, seconds = text.partition("\n\n<!-- details -->\n\n")
    assert "| fast | SB3 |" not in ratios
    assert seconds.startswith("| configuration | library |")


def test_figure_has_a_bar_for_each_ratio(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    drawn: list[str] = []
    text = Axes.text
    monkeypatch.setattr(
        Axes, "text", lambda self, *args, **kwargs: (drawn.append(args[2]), text(self, *args, **kwargs))
    )
    results = results_of(
        tmp_path,
        *(result(FAST, "clipppo", str(n), 4000.0 * n) for n in (1, 2, 3)),
        *(result(FAST, "sb3", str(n), 2000.0) for n in (1, 2, 3)),
        result(SLOW, "sb3", "1", 10.0),
        result(SLOW, "sbx", "1", 5.0),
    )
    write_figure(results, (FAST, SLOW), 3, tmp_path / "new" / "figure.png")
    assert [number.strip() for number in drawn] == ["4.0", "0.5"]
    assert (tmp_path / "new" / "figure.png").read_bytes().startswith(b"\x89PNG")


# --- the command


def test_results_and_table_of_all_rows(in_folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([]) == 0
    runs = runs_in()
    assert len(runs) == 2 * 2 * 4 + 3 * (3 + 4)  # trials of two peers, two on each number of threads; rounds
    run = next(run for run in runs if (run["name"], run["peer"], run["part"]) == ("fast", "clipppo", "2"))
    # Both peers are faster on one thread in the fake process.
    assert (run["steps_per_second"], run["other_load"]) == (2402.0, 5.0)
    assert run["cpu"] and run["versions"]["torch"] and run["versions"]["sb3_clipvf"]
    assert run["process_seconds"] > 0 and "wall_seconds" not in run
    table = Path("docs/results/speed.md").read_text()
    (line,) = (
        line for line in table.splitlines() if line.startswith("| a fast one (`fast`) | 2.00<br>(2.00 to 2.00) |")
    )
    assert line.endswith("| 2: no |")  # 1.999: rounded only in the table
    printed = capsys.readouterr().out
    assert "\n6 rounds to measure, 0 are done already" in printed
    assert "fast, ClipPPO, 2: 2,402 steps/s" in printed
    assert table in printed
    assert not (in_folder / "logs/bench/speed-quick.json").exists()


def test_peers_run_in_turn_and_each_row_before_the_next_round(in_folder: Path) -> None:
    assert main(["--rounds", "2"]) == 0
    trials = ["clipppo 0"] * 4 + ["sb3 0"] * 4
    first_fast = ["clipppo 1", "sb3 1", "bound_clipppo 1"]
    first_slow = [*first_fast, "bound_sb3 1"]
    assert order() == [
        *(f"fast {text}" for text in trials + first_fast),
        *(f"slow {text}" for text in trials + first_slow),
        *(f"fast {text}" for text in ("bound_clipppo 2", "sb3 2", "clipppo 2")),
        *(f"slow {text}" for text in ("bound_sb3 2", "bound_clipppo 2", "sb3 2", "clipppo 2")),
    ]


def test_processes_get_their_threads_and_sizes(in_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    installed(monkeypatch, lambda name: True)
    monkeypatch.setenv("OMP_NUM_THREADS", "7")
    monkeypatch.setattr(speed, "ROWS", (replace(FAST, cold_start=True), SLOW))
    assert main(["--rows", "fast", "--rounds", "1"]) == 0
    made = tasks()
    assert [(task["peer"], task["threads"]) for task in made] == [
        *((peer, threads) for peer in FAST.peers for threads in ("1", None, "1", None)),
        *((peer, "1") for peer in FAST.peers),
        ("bound_clipppo", None),
    ]
    assert [task["row"]["iterations"] for task in made] == [2] * 12 + [8] * 4
    assert [task["cores"] for task in made] == [None] * 8 + [1, None] * 2 + [None] * 2 + [1, None]
    # Only ClipPPO's first trial starts without compiled code.
    assert [task["caches"] for task in made] == [["NUMBA_CACHE_DIR"]] + [[]] * 15
    assert not any(task["profile"] for task in made)


@pytest.mark.parametrize("cold_start", [False, True])
def test_compiled_sb3_has_the_threads_of_sb3(
    in_folder: Path, monkeypatch: pytest.MonkeyPatch, cold_start: bool
) -> None:
    row = replace(FAST, policy="MlpPolicy", peers=("clipppo", "sb3", "sb3_compiled"), cold_start=cold_start)
    monkeypatch.setattr(speed, "ROWS", (row,))
    assert main(["--rounds", "1"]) == 0
    made = [(task["threads"], task["seed"], task["caches"]) for task in tasks() if task["peer"] == "sb3_compiled"]
    cold = [(None, 0, ["TORCHINDUCTOR_CACHE_DIR"])] if cold_start else []
    assert made == [*cold, ("1", 1, [])]
    assert main(["--rounds", "1", "--rerun"]) == 0  # cold starts are measured again
    again = [(task["threads"], task["seed"], task["caches"]) for task in tasks() if task["peer"] == "sb3_compiled"]
    assert again == made


def test_peers_that_cannot_run_are_named(
    in_folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(speed, "ROWS", (FAST, replace(SLOW, peers=("clipppo", "sb3", "sb3_compiled", "sbx"))))
    installed(monkeypatch, lambda name: name not in ("sbx", "g++"))
    assert main(["--rounds", "1"]) == 0
    printed = capsys.readouterr().out
    assert "SBX: skipped, needs sbx: pip install 'sb3_clipvf[sbx]'" in printed
    assert "SB3 compiled: skipped, needs a C++ compiler: g++, or the one that CXX names" in printed
    assert {task["peer"] for task in tasks()} == {"clipppo", "sb3", *BOUNDS}
    assert main(["--rounds", "1", "--rows", "fast"]) == 0
    assert "compiled: skipped" not in capsys.readouterr().out


def test_row_that_fixes_the_threads_needs_no_trials(in_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    installed(monkeypatch, lambda name: True)
    monkeypatch.setattr(speed, "ROWS", (replace(FAST, threads=1), replace(SLOW, policy="MlpPolicy", threads=1)))
    assert main(["--rounds", "1"]) == 0
    made = [(task["peer"], task["threads"], task["cores"], task["seed"]) for task in tasks()]
    first = [("clipppo", "1", None, 1), ("sb3", "1", None, 1), ("sbx", "1", 1, 1), ("bound_clipppo", None, None, 1)]
    assert made == [*first, *first, ("bound_sb3", None, None, 1)]


@pytest.mark.parametrize("cold_start", [False, True])
def test_the_native_engine_chooses_its_threads_itself(
    in_folder: Path, monkeypatch: pytest.MonkeyPatch, cold_start: bool
) -> None:
    monkeypatch.setattr(speed, "ROWS", (replace(FAST, policy="MlpPolicy", cold_start=cold_start), SLOW))
    assert main(["--rows", "fast", "--rounds", "1"]) == 0
    made = [(task["peer"], task["threads"], task["seed"], task["caches"]) for task in tasks()]
    # Its only trial measures the time that compiling takes.
    assert made == [
        *([("clipppo", None, 0, ["NUMBA_CACHE_DIR"])] if cold_start else []),
        *(("sb3", threads, 0, []) for threads in ("1", None, "1", None)),
        ("clipppo", None, 1, []),
        ("sb3", "1", 1, []),
        ("bound_clipppo", None, 1, []),
    ]


def test_finished_rounds_are_skipped_until_asked_or_changed(
    in_folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["--rows", "fast"]) == 0
    tasks()
    Path("compiled").unlink()  # kernels, before anything is measured
    assert main(["--rows", "fast"]) == 0
    assert order() == [] and not Path("compiled").exists()
    assert "0 rounds to measure, 3 are done already" in capsys.readouterr().out
    assert main(["--rows", "fast", "--rounds", "4"]) == 0
    assert order() == ["fast bound_clipppo 4", "fast sb3 4", "fast clipppo 4"]
    assert main(["--rows", "fast", "--rounds", "1", "--rerun"]) == 0
    assert order() == ["fast clipppo 1", "fast sb3 1", "fast bound_clipppo 1"]  # the choices of threads stay
    monkeypatch.setattr(speed, "ROWS", (replace(FAST, iterations=9), SLOW))
    assert main(["--rows", "fast", "--rounds", "1"]) == 0
    assert len(order()) == 8 + 3


def test_second_trials_follow_only_close_first_ones(in_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    child_is(monkeypatch, CHILD.replace('1.2 if threads == "1"', '1.3 if threads == "1"'))
    assert main(["--rows", "fast", "--rounds", "1"]) == 0
    made = [(task["peer"], task["threads"]) for task in tasks() if task["seed"] == 0]
    assert made == [("clipppo", "1"), ("clipppo", None), ("sb3", "1"), ("sb3", None)]


def test_expected_minutes_are_those_of_earlier_measurements(
    in_folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["--rows", "fast", "--rounds", "1"]) == 0
    assert "0 of their 11 measurements take about 0 min; the others were never made." in capsys.readouterr().out
    results = Results(Path("docs/results/speed.json"), KEY)
    for run in results.runs:
        results.add(run | {"process_seconds": 600.0})
    assert main(["--rows", "fast", "--rounds", "2"]) == 0
    assert "\nThey take about 30 min.\n" in capsys.readouterr().out
    assert main(["--rows", "fast", "--rounds", "2"]) == 0
    assert "They take" not in capsys.readouterr().out


def test_round_that_lacks_a_peer_is_measured_as_a_whole(in_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert main(["--rows", "fast", "--rounds", "2"]) == 0
    path = Path("docs/results/speed.json")
    runs = [run for run in runs_in() if (run["peer"], run["part"]) != ("sb3", "2")]
    path.write_text(json.dumps({"format": 1, "runs": runs}))
    tasks()
    assert main(["--rows", "fast", "--rounds", "2"]) == 0
    assert order() == ["fast bound_clipppo 2", "fast sb3 2", "fast clipppo 2"]
    installed(monkeypatch, lambda name: True)
    assert main(["--rows", "fast", "--rounds", "1"]) == 0
    whole = ("clipppo 1", "sb3 1", "sbx 1", "bound_clipppo 1")
    assert order() == [f"fast {text}" for text in (*["sbx 0"] * 4, *whole)]


@pytest.mark.parametrize(
    "key, value, stale",
    [
        ("cpu", "another", True),
        ("cores", 99, True),
        ("versions", {"torch": "0"}, True),
        ("versions", {"removed": "1"}, True),
        ("versions", {}, False),  # packages installed later change nothing
    ],
)
def test_results_of_another_machine_or_version_are_measured_again(
    in_folder: Path, key: str, value: Any, stale: bool
) -> None:
    assert main(["--rows", "fast", "--rounds", "1"]) == 0
    runs = [run | {key: value} for run in runs_in()]
    Path("docs/results/speed.json").write_text(json.dumps({"format": 1, "runs": runs}))
    tasks()
    assert main(["--rows", "fast", "--rounds", "1"]) == 0
    assert len(order()) == (8 + 3 if stale else 0)


def test_failed_process_is_reported_not_kept_and_does_not_stop_the_others(
    in_folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    program = CHILD + "if task['row']['name'] == 'fast' and task['seed'] == 2: raise SystemExit('it broke')"
    child_is(monkeypatch, program)
    assert main(["--rounds", "2"]) == 1
    printed = capsys.readouterr().out
    log = "logs/bench/speed/fast/clipppo-2.log"
    assert f"fast, ClipPPO, 2: FAILED, the process ended with code 1 (it broke), see {log}" in printed
    assert "Failed:\n  fast: the process ended with code 1 (it broke)" in printed
    assert "The same command tries again." in printed
    kept = {(run["name"], run["part"]) for run in runs_in() if run["peer"] == "clipppo"}
    assert kept == {(name, part) for name in ("fast", "slow") for part in (*TRIALS, "1", "2")} - {("fast", "2")}
    child_is(monkeypatch, CHILD)
    tasks()
    assert main(["--rounds", "2"]) == 0
    assert len(order()) == 3


def test_row_whose_trials_fail_is_left_out(
    in_folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    child_is(monkeypatch, CHILD + "if task['row']['env'] == 'gym' and task['peer'] == 'sb3': sys.exit(3)")
    assert main(["--rounds", "2"]) == 1
    assert "fast, 1: left out, since the trials failed" in capsys.readouterr().out
    assert {task.split()[2] for task in order() if task.startswith("fast")} == {"0"}
    assert "| 2: failed |" in Path("docs/results/speed.md").read_text()
    assert {run["part"] for run in runs_in() if run["name"] == "slow"} == {*TRIALS, "1", "2"}


def test_sbx_that_fails_leaves_the_row_to_the_others(in_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    installed(monkeypatch, lambda name: True)
    child_is(monkeypatch, CHILD + "if task['peer'] == 'sbx': sys.exit(3)")
    assert main(["--rows", "fast", "--rounds", "1"]) == 1
    assert {run["peer"] for run in runs_in()} == {"clipppo", "sb3", "bound_clipppo"}


@pytest.mark.parametrize(
    "program, reason",
    [
        ("import sys; sys.exit(2)", "code 2, see"),
        ("raise KeyError('gone\\n  and more')", r"code 1 (KeyError: 'gone\n  and more'), see"),
        ("raise OSError('line 1\\nline 2')", "code 1 (OSError: line 1), see"),
        ("raise KeyboardInterrupt", "code -2 (KeyboardInterrupt), see"),
    ],
)
def test_reason_of_a_failed_process_is_its_last_error(
    in_folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], program: str, reason: str
) -> None:
    child_is(monkeypatch, program)
    assert main(["--profile", "fast"]) == 1
    assert f"fast: FAILED, the process ended with {reason} logs/bench/speed/fast/clipppo-profile.log" in (
        capsys.readouterr().out
    )


@pytest.mark.parametrize("program", ["", "print('no json')", "print(3)"])
def test_process_without_a_result_failed(
    in_folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], program: str
) -> None:
    child_is(monkeypatch, program)
    assert main(["--rows", "fast", "--rounds", "1"]) == 1
    assert "FAILED, the process gave no result (" in capsys.readouterr().out
    assert not Path("docs/results/speed.json").exists()


@pytest.mark.parametrize("name", ["SIGINT", "SIGTERM"])
def test_interrupt_ends_the_process_and_keeps_what_is_measured(
    in_folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], name: str
) -> None:
    before = signal.getsignal(signal.SIGTERM)
    # SB3's process of the second round interrupts the benchmark, and would otherwise last for a minute.
    program = f"""
import os, pathlib, signal, time
if task["peer"] == "sb3" and task["seed"] == 2:
    pathlib.Path("pid").write_text(str(os.getpid()))
    for _ in range(12):
        os.kill(os.getppid(), signal.{name})
        time.sleep(5)
"""
    child_is(monkeypatch, CHILD + program)
    assert main(["--rows", "fast", "--rounds", "2"]) == 130
    assert "Interrupted. The same command resumes with what is missing." in capsys.readouterr().out
    assert signal.getsignal(signal.SIGTERM) is before
    assert not psutil.pid_exists(int(Path("pid").read_text()))
    parts = {(run["peer"], run["part"]) for run in runs_in()}
    assert ("sb3", "1") in parts and ("bound_clipppo", "2") in parts and ("sb3", "2") not in parts
    assert "| 2: no so far (1 of 3 rounds) |" in Path("docs/results/speed.md").read_text()
    child_is(monkeypatch, CHILD)
    tasks()
    assert main(["--rows", "fast", "--rounds", "2"]) == 0
    assert order() == ["fast bound_clipppo 2", "fast sb3 2", "fast clipppo 2"]


def test_row_that_needs_a_package_is_skipped_with_its_name(
    in_folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(speed, "ROWS", (FAST, replace(SLOW, env="envpool")))
    installed(monkeypatch, lambda name: name != "envpool" and name != "sbx")
    assert main(["--rounds", "1"]) == 0
    assert "slow: skipped, needs envpool: pip install 'sb3_clipvf[envpool]'" in capsys.readouterr().out
    assert all(task.startswith("fast") for task in order())
    assert "| 2: needs envpool: pip install 'sb3_clipvf[envpool]' |" in Path("docs/results/speed.md").read_text()


def test_quick_writes_beside_the_results(in_folder: Path) -> None:
    assert main(["--quick", "--rows", "fast", "--rounds", "1"]) == 0
    assert not Path("docs").exists()
    assert {run["row"]["iterations"] for run in runs_in(Path("logs/bench/speed-quick.json"))} == {2}
    assert {task["bound_seconds"] for task in tasks()} == {0.05}
    assert "Made by `python -m tests.bench speed --quick --rounds 1`." in Path("logs/bench/speed-quick.md").read_text()
    # Quick results never replace real ones.
    Path("docs/results").mkdir(parents=True)
    Path("docs/results/speed.json").write_bytes(Path("logs/bench/speed-quick.json").read_bytes())
    assert main(["--rows", "fast", "--rounds", "1"]) == 0
    assert len(order()) == 8 + 3


@pytest.mark.parametrize(
    "device, devices",
    [
        ("auto", {"clipppo": "auto", "clipppo_on_cpu": "cpu", "clipppo_on_gpu": "cuda", "sb3": "auto"}),
        ("cuda", {"clipppo": "cuda", "clipppo_autograd": "cuda", "sb3": "cuda"}),
    ],
)
def test_devices(in_folder: Path, monkeypatch: pytest.MonkeyPatch, device: str, devices: dict[str, str]) -> None:
    update = replace(FAST, phase="update", policy="MlpPolicy")
    monkeypatch.setattr(speed, "ROWS", (update,))
    monkeypatch.setattr(speed.SpeedBenchmark, "gpu_rows", ("fast",))
    monkeypatch.setattr(speed, "_gpu_name", lambda: "a GPU")
    assert main(["--device", device, "--rounds", "1", "--iterations", "3"]) == 0
    made = tasks()  # no trials: threads matter little beside a GPU, and the native engine tries them itself
    assert [task["peer"] for task in made] == list(devices)
    for task in made:
        row = SpeedRow(**task["row"])
        assert (row.device, row.iterations, task["threads"]) == (device, 3, None)
        assert row.device_of(task["peer"]) == devices[task["peer"]]
        assert row.is_native(task["peer"]) == (devices[task["peer"]] != "cuda" and task["peer"] != "sb3")
    assert {run["gpu"] for run in runs_in(Path(f"docs/results/speed-{device}.json"))} == {"a GPU"}
    table = Path(f"docs/results/speed-{device}.md").read_text()
    command = f"python -m tests.bench speed --rounds 1 --iterations 3 --device {device}"
    assert f"Made by `{command}`." in table
    assert "| none on cuda |" in table
    assert ("| ClipPPO / ClipPPO on the GPU |" in table) == (device == "auto")
    assert "2 cores, a GPU, one run at a time" in table.replace(f"{os.cpu_count()} cores", "2 cores")
    monkeypatch.setattr(speed, "_gpu_name", lambda: "another GPU")
    assert main(["--device", device, "--rounds", "1", "--iterations", "3"]) == 0
    assert len(tasks()) == len(devices)  # results of another GPU do not count


def test_a_gpu_gets_its_own_rows(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(speed, "_gpu_name", lambda: "a GPU")
    assert main(["--device", "cuda", "--list"]) == 0
    assert {line.split()[0] for line in capsys.readouterr().out.splitlines()} == set(speed.GPU_ROWS)
    assert {row.name for row in ROWS} >= set(speed.GPU_ROWS)
    rows = [row.on("cuda") for row in ROWS if row.name in speed.GPU_ROWS]
    for row in rows:
        is_large = row.name.startswith(("breakout", "large"))
        bf16 = ("clipppo_bf16",) if is_large else ()
        assert row.measured() == ("clipppo", "clipppo_autograd", *bf16, "sb3")
    assert sum(len(row.measured()) for row in rows) == 18


def test_a_captured_rollout_steps_its_environments_without_calls(monkeypatch: pytest.MonkeyPatch) -> None:
    (row,) = (row.quick() for row in ROWS if row.name == "tensor-pendulum")
    model = make_model(row, "clipppo_autograd", 0)
    assert model.engine == "autograd"
    step, calls = model.env.step_tensors, []

    def some(actions: Any) -> Any:
        calls.append(None)
        return step(actions)

    def made(*_: Any) -> Any:
        model.env.step_tensors = some
        watch = speed_child.Stopwatch
        monkeypatch.setattr(watch, "_timed_step", lambda self, actions: some(actions))  # counts no calls
        model._current_engine()._rollout_step = "captured"
        return model

    monkeypatch.setattr(speed_child, "make_model", made)
    result = speed_child.measure_peer(row, "clipppo_autograd", 0)
    assert calls and result["engine"] == "autograd" and result["environment_seconds"] == 0.0
    model._current_engine()._rollout_step = None
    monkeypatch.setattr(speed_child, "make_model", lambda *_: model)
    with pytest.raises(RuntimeError, match="A rollout must call `env.step`"):
        speed_child.measure_peer(row, "clipppo_autograd", 0)


def test_trials_choose_threads_of_a_peer_on_the_cpu_beside_a_gpu(
    in_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(speed, "_gpu_name", lambda: "a GPU")
    assert main(["--device", "auto", "--rounds", "1", "--rows", "fast"]) == 0
    assert {task["peer"] for task in tasks() if task["seed"] == 0} == {"clipppo_on_cpu"}


def test_models_are_on_the_device_of_their_peer(monkeypatch: pytest.MonkeyPatch) -> None:
    row = replace(FAST, policy="MlpPolicy", device="auto", settings={"n_steps": 16, "batch_size": 16})
    devices = []
    for algorithm in (ClipPPO, PPO):
        init = algorithm.__init__

        def record(*args: Any, init: Any = init, device: str, **kwargs: Any) -> None:
            devices.append(device)
            init(*args, device="cpu", **kwargs)

        monkeypatch.setattr(algorithm, "__init__", record)
    engines = {"clipppo_autograd": "autograd", "clipppo_bf16": "cuda_graph_bf16"}
    for peer in ("clipppo", "clipppo_on_cpu", "clipppo_on_gpu", "sb3", *engines):
        model = make_model(row, peer, 0)
        assert getattr(model, "engine", None) == (None if peer == "sb3" else engines.get(peer, "auto"))
        assert isinstance(model, PPO if peer == "sb3" else ClipPPO)
        assert isinstance(model.env, FastDummyVecEnv) == (peer != "sb3")
    assert devices == ["auto", "cpu", "cuda", "auto", "auto", "auto"]


def test_list_shows_what_is_done_and_runs_nothing(in_folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--rows", "fast", "--rounds", "2"]) == 0
    tasks()
    capsys.readouterr()
    assert main(["--list"]) == 0
    assert capsys.readouterr().out.splitlines() == [
        "fast  goal   2  done: 1 2  a fast one",
        "slow  goal   2  done: none  a slow one",
    ]
    assert order() == []


def test_profile_names_where_the_time_goes(
    in_folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    profile = {"areas": {"update": 3.0, "other": 1.0}, "top": [[2.5, 1200, "ppo/ppo.py:1(train)"]]}
    child_is(monkeypatch, CHILD + f"print(json.dumps(split | times | {{'engine': 'e', 'profile': {profile!r}}}))")
    assert main(["--profile", "fast", "--peer", "sb3"]) == 0
    assert capsys.readouterr().out.splitlines() == [
        "a fast one, SB3, one thread: 1,000 steps in 1.00 s, engine e.",
        "cProfile slows Python code down and compiled code not: compare areas, do not read speeds here.",
        "",
        "By the clock: environment 0.25 s, policy 0.25 s, update 0.25 s, other 0.25 s",
        "",
        "area                      seconds   share",
        "update                       3.00   75.0%",
        "other                        1.00   25.0%",
        "",
        "The 1 functions with the most time in themselves:",
        "  seconds     calls  function",
        "    2.500     1,200  ppo/ppo.py:1(train)",
        "",
    ]
    (task,) = tasks()
    assert (task["profile"], task["peer"], task["threads"]) == (True, "sb3", "1")
    assert not Path("docs").exists() and not Path("compiled").exists()
    child_is(monkeypatch, "raise SystemExit('it broke')")
    assert main(["--profile", "fast"]) == 1
    assert "fast: FAILED, the process ended with code 1 (it broke)" in capsys.readouterr().out


@pytest.mark.parametrize(
    "options, match",
    [
        ("--rounds 0", "--rounds: must be a whole number of at least 1, got 0"),
        ("--rows fast huge", "--only/--rows: invalid choice: 'huge' (choose from"),
        ("--profile huge", "--profile: invalid choice: 'huge' (choose from"),
        (
            "--profile fast --peer sbx",
            "`--peer` must be one of the peers of fast (clipppo, sb3, sbx), got sbx, which needs sbx: pip install",
        ),
        ("--profile fast --peer sb3_compiled", "one of the peers of fast (clipppo, sb3, sbx), got sb3_compiled\n"),
        ("--profile slow", "`--profile` must name a row whose packages are installed, got slow: it needs envpool"),
        ("--device auto", "`--device` must be cpu on a machine without a GPU, got auto. Leave it out."),
        ("--device tpu", "--device: invalid choice: 'tpu' (choose from"),
        ("--out learning.json", "`--out` must be a results file of this benchmark"),
    ],
)
def test_bad_options_are_refused(
    in_folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], options: str, match: str
) -> None:
    Path("learning.json").write_text('{"format": 1, "runs": [{"name": "CartPole-v1", "seed": 1}]}')
    monkeypatch.setattr(speed, "ROWS", (FAST, replace(SLOW, env="envpool")))
    installed(monkeypatch, lambda name: name not in ("envpool", "sbx"))
    monkeypatch.setattr(speed, "_gpu_name", lambda: None)
    with pytest.raises(SystemExit, match="2"):
        main(options.split())
    assert match in capsys.readouterr().err


@pytest.mark.slow
def test_real_processes_of_both_peers(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    installed(monkeypatch, lambda name: name != "sbx")
    for name in [*TRIALS][:0:-1]:  # on busy cores these take minutes; put back in the reverse order, so the last first
        monkeypatch.delitem(TRIALS, name)
    assert main(["--quick", "--rows", "custom-extractor", "--rounds", "1"]) == 0
    runs = {(run["peer"], run["part"]): run for run in runs_in(Path("logs/bench/speed-quick.json"))}
    assert runs["sb3", "1"]["engine"] == "torch"
    assert runs["clipppo", "1"]["engine"] in set(ENGINE_NAMES) - {"auto", "native"}
    assert runs["clipppo", next(iter(TRIALS))]["torch_threads"] == 1
    assert all(run["steps_per_second"] > 0 for run in runs.values())
    assert runs["sb3", "1"]["peak_megabytes"] > 10
    assert "(`custom-extractor`)" in capsys.readouterr().out


def test_the_native_engine_tries_its_threads_before_it_is_measured(monkeypatch: pytest.MonkeyPatch) -> None:
    rows = {row.name: row for row in ROWS}
    for cores, n_numbers in ((1, 1), (2, 2), (3, 3), (16, 5)):
        for module in (resources, threads):
            monkeypatch.setattr(module, "usable_cores", partial(int, cores))
        monkeypatch.setattr(th, "get_num_threads", partial(int, cores))
        assert len(threads.ThreadChoice(16)._numbers) == n_numbers
        assert rows["cartpole"].warmup_of("clipppo") == 1 + n_numbers * threads.TRIALS
    assert rows["cartpole"].warmup_of("sb3") == rows["cartpole"].warmup
    for name in ("custom-extractor", "breakout-8-ale"):
        assert rows[name].warmup_of("clipppo") == rows[name].warmup
