"""Captured tensor environments: what they refuse. tests/test_engines_device_buffer.py steps one on a GPU."""

import random
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import pytest
import torch as th
from gymnasium import spaces
from tape import TapeCapturer
from tensor_cases import InPlaceWalk, ReadingWalk, TensorWalk, tensor_pendulum

from sb3_clipvf import ClipPPO
from sb3_clipvf.envs import GraphedTensorEnv, TensorVecEnv
from sb3_clipvf.envs.graphed import restorer_of


def test_on_the_cpu_the_operations_run_one_by_one() -> None:
    env, captured = (tensor_pendulum().TensorPendulum(8, time_limit=5) for _ in range(2))
    graphed = GraphedTensorEnv(captured)
    assert isinstance(graphed, TensorVecEnv) and graphed.generators == [captured.generator]
    assert th.equal(env.reset_tensors(seed=5), graphed.reset_tensors(seed=5))
    actions = th.linspace(-3, 3, 8)[:, None]
    for number in range(12):
        step, again = (each.step_tensors(actions * number / 10) for each in (env, graphed))
        assert th.equal(step.observations, again.observations) and th.equal(step.rewards, again.rewards)
    model = ClipPPO("MlpPolicy", graphed, n_steps=8, batch_size=16, device="cpu").learn(64 * 2)
    assert {episode["l"] for episode in model.ep_info_buffer} == {5}


def test_an_environment_that_keeps_new_tensors_is_refused() -> None:
    """A graph reads and writes the memory of its capture, so that each step would start from the same state."""
    with pytest.raises(ValueError, match="`env` must write what it keeps in-place, got a new `x` after `step_tens"):
        GraphedTensorEnv(TensorWalk())


class Drawing(InPlaceWalk):
    """Draws a random number on the host."""

    def __init__(self, draw: Callable[[Any], float]) -> None:
        super().__init__(2)
        self.draw = draw
        self.rng = np.random.default_rng(0)
        self.old = [np.random.RandomState(0)]
        self.python = random.Random(0)

    def reset_tensors(self, seed: int | None = None) -> Any:
        self.draw(self)  # which no graph has
        return super().reset_tensors(seed)

    def step_tensors(self, actions: th.Tensor) -> Any:
        return super().step_tensors(actions + self.draw(self))


@pytest.mark.parametrize(
    ("draw", "name"),
    [
        (lambda _: random.random(), "Python's random"),
        (lambda _: np.random.rand(), "NumPy's random"),
        (lambda env: env.rng.random(), "`rng`"),
        (lambda env: env.old[0].rand(), "`old.0`"),
        (lambda env: env.python.random(), "`python`"),
    ],
)
def test_random_numbers_of_the_host_are_refused(draw: Callable[[Any], float], name: str) -> None:
    with pytest.raises(ValueError, match=f"must draw random numbers on its device, got one from {name} in"):
        GraphedTensorEnv(Drawing(draw))


@dataclass(slots=True)
class Slots:
    """Has no ``__dict__``."""

    x: th.Tensor


class Compiled:
    """A function that keeps a cache, as Numba's and Triton's do."""

    def __init__(self) -> None:
        self.__name__, self.n_calls = "compiled", 0

    def __call__(self) -> None:
        self.n_calls += 1


compiled = Compiled()


class Keeps(InPlaceWalk):
    """Keeps something else after a step, or after a reset."""

    def __init__(self, after: str, name: str) -> None:
        super().__init__()
        self.after, self.name = after, name
        self.number, self.text, self.table, self.none = 0, "a", np.zeros(3), None
        self.scalar = np.int64(0)
        self.parts = [{"a": th.zeros(2)}, (1, 2)]
        self.inner = InPlaceWalk()
        self.space = spaces.Discrete(2)
        self.itself = self
        self.module = th.nn.Sequential(th.nn.Linear(2, 1))
        self.module[0].register_buffer("state", th.zeros(1))
        self.delayed = deque([th.zeros(1), th.zeros(1)])
        self.slots = Slots(th.zeros(1))
        self.method, self.call = InPlaceWalk().close, partial(InPlaceWalk.close, InPlaceWalk())
        self.functions = [np.exp, th.relu, InPlaceWalk, compiled, lambda: 0]

    def change(self) -> None:
        self.space.sample()  # the state of a space is no state of the environment
        compiled()
        if self.name == "number":
            self.number += 1
        elif self.name == "scalar":
            self.scalar += 1
        elif self.name == "table":
            self.table[1] = 1.0
        elif self.name == "parts.0.a":
            self.parts[0]["a"] = self.parts[0]["a"] + 1
        elif self.name == "parts.1.1":
            self.parts[1] = (1, self.parts[1][1] + 1)
        elif self.name == "inner.x":
            self.inner.x = self.inner.x.clone()
        elif self.name == "module._modules.0._buffers.state":
            self.module[0].state = self.module[0].state + 1
        elif self.name == "module.counter":
            self.module.counter = getattr(self.module, "counter", 0) + 1
        elif self.name == "delayed.0":
            self.delayed.rotate()
        elif self.name == "slots.x":
            self.slots.x = self.slots.x + 1
        elif self.name == "method.__self__.x":
            self.method.__self__.x = self.x.clone()
        elif self.name == "call.args.0.x":
            self.call.args[0].x = self.x.clone()
        elif self.name == "none":
            self.none = th.zeros(1)
        elif self.name == "x":
            self.x = self.x.view(3, 2).flatten()[None].flatten().clone()

    def reset_tensors(self, seed: int | None = None) -> Any:
        self.change() if self.after == "reset_tensors" else None
        return super().reset_tensors(seed)

    def step_tensors(self, actions: th.Tensor) -> Any:
        self.change() if self.after == "step_tensors" else None
        return super().step_tensors(actions)


@pytest.mark.parametrize("after", ["step_tensors", "reset_tensors"])
@pytest.mark.parametrize(
    "name",
    [
        *("number", "scalar", "table", "parts.0.a", "parts.1.1", "inner.x", "none", "x", "delayed.0", "slots.x"),
        *("module._modules.0._buffers.state", "module.counter", "method.__self__.x", "call.args.0.x"),
    ],
)
def test_all_that_an_environment_keeps_is_compared(name: str, after: str) -> None:
    if (name, after) == ("table", "reset_tensors"):
        pytest.skip("the first reset leaves the table as it is")
    with pytest.raises(ValueError, match=f"got a new `{name}` after `{after}`"):
        GraphedTensorEnv(Keeps(after, name))
    GraphedTensorEnv(Keeps(after, ""))


class IsModule(th.nn.Module):
    """An environment that is itself a module, and has one that torch compiles at the first step."""

    def __init__(self, *, keeps_new: bool) -> None:
        super().__init__()
        self.walk, self.keeps_new = InPlaceWalk(), keeps_new
        self.num_envs, self.device = self.walk.num_envs, self.walk.device
        self.observation_space, self.action_space = self.walk.observation_space, self.walk.action_space
        self.network: Any = th.compile(th.nn.Linear(2, 2), backend="eager")
        self.register_buffer("state", th.zeros(6, 2))

    def reset_tensors(self, seed: int | None = None) -> Any:
        return self.walk.reset_tensors(seed)

    @th.no_grad()
    def step_tensors(self, actions: th.Tensor) -> Any:
        state = self.network(actions)
        self.state = state if self.keeps_new else self.state.copy_(state)
        return self.walk.step_tensors(actions)

    def close(self) -> None:
        self.walk.close()


def test_modules_are_compared_too() -> None:
    GraphedTensorEnv(IsModule(keeps_new=False))
    with pytest.raises(ValueError, match="got a new `_buffers.state` after `step_tensors`"):
        GraphedTensorEnv(IsModule(keeps_new=True))


def test_a_change_from_outside_is_captured_again(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sb3_clipvf.envs.graphed.GraphCapturer", TapeCapturer)
    ours, theirs = (tensor_pendulum().TensorPendulum(4, time_limit=5) for _ in range(2))
    graphed = GraphedTensorEnv(ours)
    graphed._captures = True  # as on a GPU
    ours.reset_tensors(seed=1), theirs.reset_tensors(seed=1)
    graphs = []
    for number in range(12):
        if number % 3 == 0:
            for env in (ours, theirs):
                env.time_limit += number // 3
                env.generator = th.Generator().manual_seed(number)
        step, other = (env.step_tensors(th.full((4, 1), 0.5)) for env in (graphed, theirs))
        assert th.equal(step.observations, other.observations) and th.equal(step.rewards, other.rewards)
        assert graphed.generators == [ours.generator]
        graphs.append(graphed._graph)
    assert [graphs.index(graph) for graph in graphs] == [number - number % 3 for number in range(12)]


def test_an_environment_that_cannot_be_captured_steps_by_single_operations(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr("sb3_clipvf.envs.graphed.GraphCapturer", TapeCapturer)
    theirs, graphed = InPlaceWalk(), GraphedTensorEnv(ReadingWalk())
    graphed._captures = True  # as on a GPU
    theirs.reset_tensors()
    for number in range(12):
        step, other = (env.step_tensors(th.full((6, 2), number / 10)) for env in (graphed, theirs))
        assert th.equal(step.observations, other.observations) and th.equal(step.rewards, other.rewards)
    assert caplog.text.count("The CUDA graph of the environments' step could not be captured (operation not perm") == 1


def test_a_step_in_the_context_leaves_no_trace() -> None:
    env = GraphedTensorEnv(tensor_pendulum().TensorPendulum(4))
    first = env.reset_tensors(seed=3).clone()
    actions = th.ones(4, 1)
    step = env.step_tensors(actions).observations.clone()
    env.reset_tensors(seed=3)
    with env.unchanged():
        env.step_tensors(actions)
        env.reset_tensors()
    assert th.equal(env.env._observations(), first) and th.equal(env.step_tensors(actions).observations, step)


def test_tensors_of_all_kinds_are_restored() -> None:
    walk: Any = InPlaceWalk()
    walk.expanded, walk.network, walk.none = th.zeros(1, 2).expand(6, 2), th.nn.Linear(2, 1), th.zeros(0, 3)
    with th.inference_mode():
        walk.inferred = th.zeros(3)
    tensors = [walk.expanded, walk.inferred, *walk.network.parameters()]
    before = [tensor.clone() for tensor in tensors]
    with GraphedTensorEnv(walk).unchanged(), th.inference_mode():
        walk.expanded[:1] += 1
        for tensor in tensors[1:]:
            tensor += 1
        assert not any(map(th.equal, tensors, before))
    assert all(map(th.equal, tensors, before)) and walk.network.weight.requires_grad


def test_saved_tensors_and_generators_are_restored_in_place() -> None:
    tensor, generator = th.zeros(2), th.Generator()
    address = tensor.data_ptr()
    restore = restorer_of([tensor, generator])
    drawn = th.rand(3, generator=generator)
    tensor += 1
    restore()
    assert tensor.tolist() == [0.0, 0.0] and tensor.data_ptr() == address
    assert th.equal(th.rand(3, generator=generator), drawn)


def test_a_generator_without_the_index_of_its_device_belongs_to_it() -> None:
    """That of ``th.Generator("cuda")`` has none, while the environments' device is cuda:0."""
    env = GraphedTensorEnv(tensor_pendulum().TensorPendulum(4))
    env.device = th.device("cpu", 0)
    assert env.generators == [env.env.generator]


def test_a_graph_gets_the_generators_of_its_device() -> None:
    """torch ends the process if a CUDA graph gets one of the CPU."""
    env = tensor_pendulum().TensorPendulum(4)
    graphed = GraphedTensorEnv(env)
    assert graphed.generators == [env.generator]
    graphed.device = th.device("cuda", 0)
    assert graphed.generators == []
    state = env.generator.get_state()
    with graphed.unchanged():
        env.generator.manual_seed(1)
    assert th.equal(env.generator.get_state(), state)


@pytest.mark.parametrize(
    ("space", "dtype"),
    [
        (spaces.Box(1.0, 2.0, (2,), np.float64), th.float32),
        (spaces.MultiBinary(2), th.float32),
        (spaces.Discrete(3, start=4), th.int64),
        (spaces.MultiDiscrete([2, 3]), th.int64),
    ],
)
def test_actions_are_those_of_the_protocol(space: Any, dtype: th.dtype) -> None:
    env = InPlaceWalk(action_space=space)
    GraphedTensorEnv(env)
    assert env.last.dtype == dtype and env.last.shape == (6, *space.shape)
    assert all(space.contains(row.numpy().astype(space.dtype)) for row in env.last)
