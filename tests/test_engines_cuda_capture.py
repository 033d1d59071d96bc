"""Captures on a GPU. Without one, a stand-in for ``torch.cuda`` has a generator that a failed capture breaks."""

from contextlib import contextmanager
from types import SimpleNamespace
from typing import Any

import pytest
import torch as th

from sb3_clipvf.engines.cuda import capture
from sb3_clipvf.engines.cuda.capture import GraphCapturer


class FakeGenerator:
    """Draws 1, 2, 3, ...; while a capture has not ended, it refuses."""

    def __init__(self) -> None:
        self.state, self.is_capturing = 0, False

    def draw(self) -> int:
        if self.is_capturing:
            raise RuntimeError("Offset increment outside graph capture encountered unexpectedly.")
        self.state += 1
        return self.state

    def get_state(self) -> int:
        return self.state

    def set_state(self, state: int) -> None:
        self.state = state


class FakeGraph:
    """A graph that draws from the generators when it is replayed."""

    def __init__(self, cuda: "FakeCuda") -> None:
        self.generators = [cuda.generator]

    def register_generator_state(self, generator: FakeGenerator) -> None:
        self.generators.append(generator)

    def replay(self) -> list[int]:
        return [generator.draw() for generator in self.generators]


class FakeCuda:
    """What a capturer uses of ``torch.cuda``, as torch 2.13 behaves."""

    def __init__(self) -> None:
        self.generator = FakeGenerator()
        self.streams = ["default"]
        self.current = 0
        self.may_capture = True

    def Stream(self, device: Any) -> Any:  # noqa: N802 (a class of torch.cuda)
        return SimpleNamespace(wait_stream=lambda other: None)

    def CUDAGraph(self) -> FakeGraph:  # noqa: N802
        return FakeGraph(self)

    def current_stream(self, device: Any) -> Any:
        return SimpleNamespace(wait_stream=lambda other: None, name=self.streams[-1])

    def set_stream(self, stream: Any) -> None:
        self.streams, self.current = [stream.name], DEVICE.index

    @contextmanager
    def device(self, device: th.device) -> Any:
        before, self.current = self.current, device.index
        try:
            yield
        finally:
            self.current = before

    def get_rng_state(self, device: Any) -> int:
        return self.generator.get_state()

    def set_rng_state(self, state: int, device: Any) -> None:
        self.generator.set_state(state)

    @contextmanager
    def stream(self, stream: Any) -> Any:
        yield

    @contextmanager
    def graph(self, graph: FakeGraph, **_: Any) -> Any:
        assert self.current == DEVICE.index  # the one that torch synchronises
        self.streams.append("capture")
        if not self.may_capture:
            raise RuntimeError("capture is impossible")
        for generator in graph.generators:
            generator.is_capturing = True
        yield  # an error leaves the generators as they are
        for generator in graph.generators:
            generator.is_capturing = False
        self.streams.pop()

    @property
    def default_generators(self) -> list[Any]:
        def replace(generator: FakeGenerator) -> None:
            self.generator = generator

        return [None, SimpleNamespace(graphsafe_set_state=replace)]


@pytest.fixture
def cuda(monkeypatch: pytest.MonkeyPatch) -> FakeCuda:
    fake = FakeCuda()

    def zeros(*_: Any, **__: Any) -> Any:
        return SimpleNamespace(zero_=lambda: None, uniform_=fake.generator.draw)

    replaced = SimpleNamespace(cuda=fake, zeros=zeros, Generator=lambda device: FakeGenerator())
    monkeypatch.setattr(capture, "th", replaced)
    return fake


DEVICE = th.device("cuda", 1)


def test_random_states_stay(cuda: FakeCuda) -> None:
    own = FakeGenerator()
    cuda.generator.state, own.state = 7, 3

    def warm_up() -> None:
        cuda.generator.draw(), own.draw()

    graph: Any = GraphCapturer(DEVICE).capture(lambda: None, warm_up, [own])  # type: ignore[list-item]
    assert (cuda.generator.state, own.state) == (7, 3)
    assert graph.replay() == [8, 4]


@pytest.mark.parametrize("error", [RuntimeError, ValueError, KeyboardInterrupt])
@pytest.mark.parametrize("when", ["warm-up", "capture"])
def test_an_error_leaves_everything_as_it_was(when: str, error: type[BaseException], cuda: FakeCuda) -> None:
    own, cuda.generator.state = FakeGenerator(), 7
    first: Any = GraphCapturer(DEVICE).capture(lambda: None, lambda: None, [own])  # type: ignore[list-item]
    generator = cuda.generator

    def fail() -> None:
        raise error

    def warm_up() -> None:
        own.draw() and cuda.generator.draw()
        if when == "warm-up":
            fail()

    with pytest.raises(error):
        GraphCapturer(DEVICE).capture(fail, warm_up, [own])  # type: ignore[list-item]
    assert cuda.generator is generator and (generator.state, own.state) == (7, 0)
    assert cuda.streams[0] == "default" and cuda.current == 0
    assert first.replay() == [8, 1]  # the graph that was captured before draws from the same generators


def test_a_device_that_captures_nothing_more_gets_another_generator(cuda: FakeCuda) -> None:
    cuda.generator.state = 7

    def fail() -> None:
        cuda.may_capture = False
        raise RuntimeError("first")

    with pytest.raises(RuntimeError, match="first"):
        GraphCapturer(DEVICE).capture(fail, lambda: None)
    assert cuda.generator.state == 7 and cuda.generator.draw() == 8


@pytest.mark.cuda
@pytest.mark.skipif(not th.cuda.is_available(), reason="there is no CUDA device")
@pytest.mark.parametrize("own", [False, True], ids=["the device's generator", "own generator"])
def test_a_failed_capture_leaves_other_graphs_usable(own: bool) -> None:
    device = th.device("cuda", th.cuda.current_device())
    generator = th.Generator(device) if own else None
    generators = [] if generator is None else [generator]
    drawn = th.zeros(3, device=device)

    def draw() -> None:
        drawn.copy_(th.rand(3, device=device, generator=generator))

    def read() -> None:
        draw()
        drawn.sum().item()

    def seed() -> None:
        th.manual_seed(5) if generator is None else generator.manual_seed(5)

    graph = GraphCapturer(device).capture(draw, draw, generators)
    numbers = []
    for _ in range(2):
        seed()
        graph.replay()
        numbers.append(drawn.clone())
        with pytest.raises(RuntimeError):
            GraphCapturer(device).capture(read, draw, generators)
        numbers.append(th.rand(3, device=device, generator=generator))
    assert th.equal(numbers[0], numbers[2]) and th.equal(numbers[1], numbers[3])
    assert not th.equal(numbers[0], numbers[1])
