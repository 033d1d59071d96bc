"""The capture of a GPU's operations as CUDA graphs, each of which one call replays."""

from collections.abc import Callable, Iterable
from contextlib import suppress
from typing import Any, Protocol

import torch as th

from sb3_clipvf.common.messages import log
from sb3_clipvf.engines.autograd import unvalidated_distributions

_WARM_UPS = 3
"""Runs before a capture, in which libraries allocate memory and choose algorithms."""


class Graph(Protocol):
    """Captured operations."""

    def replay(self) -> None:
        """Run the operations on the current stream."""

    def pool(self) -> Any:
        """Return the name of the memory that the operations allocated."""


class GraphCapturer:
    """Captures operations on a CUDA device, on a stream of its own."""

    def __init__(self, device: th.device) -> None:
        self._device = device
        self._stream: Any = None

    @unvalidated_distributions
    def capture(
        self,
        run: Callable[[], None],
        warm_up: Callable[[], None],
        generators: Iterable[th.Generator] = (),
        beside: Graph | None = None,
    ) -> Graph:
        """
        Return the operations of ``run``, which is called once, after some calls of ``warm_up``.

        Random states stay as they are, after an error, too. ``generators`` are those that the operations draw from
        besides that of the device. If a graph is given as ``beside``, both use the same memory: what one of them
        allocates is lost when the other one runs.

        :raises RuntimeError: If an operation cannot be captured.
        """
        with th.cuda.device(self._device):  # torch synchronises the current device, and changes it with the stream
            return self._capture(run, warm_up, list(generators), None if beside is None else beside.pool())

    def _capture(
        self, run: Callable[[], None], warm_up: Callable[[], None], generators: list[th.Generator], pool: Any
    ) -> Graph:
        device = self._device
        if self._stream is None:
            self._stream = th.cuda.Stream(device)  # type: ignore[no-untyped-call]
        stream, current = self._stream, th.cuda.current_stream(device)
        states = [generator.get_state() for generator in generators]
        random_state = th.cuda.get_rng_state(device)

        def restore() -> None:
            th.cuda.set_rng_state(random_state, device)
            for generator, state in zip(generators, states, strict=True):
                generator.set_state(state)

        try:
            stream.wait_stream(current)
            with th.cuda.stream(stream):
                for _ in range(_WARM_UPS):
                    warm_up()
            current.wait_stream(stream)
            restore()
            return _captured(run, stream, generators, pool)
        except BaseException:  # also Ctrl-C
            with suppress(RuntimeError):  # of a device that has failed: the first error is raised
                th.cuda.set_stream(current)
                _end_capture(device, generators)
                restore()
                current.wait_stream(stream)  # its warm-ups may still run, and the caller restores what they wrote
            raise


def warn_about_failure(what: str, error: RuntimeError) -> None:
    """Warn that operations could not be captured."""
    # The end of a capture raises a second error.
    reason = error.__context__ if isinstance(error.__context__, RuntimeError) else error
    log.warning(
        "The CUDA graph of %s could not be captured (%s). Training continues without it, which is slower.",
        what,
        str(reason).partition("\n")[0],
    )


def _captured(run: Callable[[], None], stream: Any, generators: list[th.Generator], pool: Any = None) -> Graph:
    graph = th.cuda.CUDAGraph()
    for generator in generators:
        graph.register_generator_state(generator)
    # Threads of environments may use the device meanwhile.
    with th.cuda.graph(graph, pool=pool, stream=stream, capture_error_mode="thread_local"):
        run()
    return graph


def _end_capture(device: th.device, generators: list[th.Generator]) -> None:
    """
    Make generators usable after a failed capture, in which torch 2.11 to 2.13 leave them.

    The end of a capture that succeeds ends it for them. They stay the generators that other graphs draw from.
    """
    try:
        number = th.zeros(1, device=device)

        def run() -> None:
            number.zero_()  # torch warns of empty graphs

        _captured(run, th.cuda.Stream(device), generators)  # type: ignore[no-untyped-call]
        number.uniform_()
    except RuntimeError:
        index = th.cuda.current_device() if device.index is None else device.index
        th.cuda.default_generators[index].graphsafe_set_state(th.Generator(device))
