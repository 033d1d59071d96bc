"""A stand-in for CUDA graphs on the CPU: it replays captured operations on the memory of the capture."""

from collections.abc import Callable, Iterable
from typing import Any

import torch as th
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from sb3_clipvf.engines.autograd import unvalidated_distributions

READS = ("_local_scalar_dense", "nonzero", "_is_all_true", "masked_select", "equal.default")
"""Operations that read from the device, which a graph cannot have."""


class Tape(TorchDispatchMode):
    """
    Captures operations, and replays them without Python, as a CUDA graph does.

    A replayed operation reads and writes the tensors of the capture, whatever the code has bound to names since.
    """

    def __init__(self) -> None:
        super().__init__()
        self.operations: list[tuple[Any, Any, Any, Any]] = []

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if any(name in str(function) for name in READS):
            raise RuntimeError(f"operation not permitted when stream is capturing: {function}")
        result = function(*args, **(kwargs or {}))
        self.operations.append((function, args, kwargs or {}, result))
        return result

    @th.no_grad()
    def replay(self) -> None:
        """Run the operations again."""
        for function, args, kwargs, result in self.operations:
            again = function(*args, **kwargs)
            for before, now in zip(tree_leaves(result), tree_leaves(again), strict=True):
                if isinstance(before, th.Tensor) and before.data_ptr() != now.data_ptr():
                    before.copy_(now)

    def spoil(self) -> None:
        """Overwrite the memory that the operations allocated, floats by NaN."""
        for storage in self._allocated().values():
            storage.fill_(255)

    def _allocated(self) -> dict[int, Any]:
        given: set[int] = set()
        allocated: dict[int, Any] = {}
        for _, args, kwargs, result in self.operations:
            given |= _storages((args, kwargs)).keys() - allocated.keys()
            allocated |= {key: storage for key, storage in _storages(result).items() if key not in given}
        return allocated

    def names(self) -> list[str]:
        """Return the names of the operations that a GPU would run as kernels, which views are not."""
        return [str(function) for function, args, _, result in self.operations if not _is_view(args, result)]


def _storages(tree: Any) -> dict[int, Any]:
    storages = [part.untyped_storage() for part in tree_leaves(tree) if isinstance(part, th.Tensor)]
    return {storage.data_ptr(): storage for storage in storages}


def _is_view(args: Any, result: Any) -> bool:
    storages = _storages(args)
    tensors = [part for part in tree_leaves(result) if isinstance(part, th.Tensor)]
    in_place = any(part is other for part in tensors for other in tree_leaves(args))
    return bool(tensors) and not in_place and all(part.untyped_storage().data_ptr() in storages for part in tensors)


class TapeCapturer:
    """A stand-in for the capturer, on devices without graphs."""

    def __init__(self, device: th.device) -> None:
        self.tapes: list[Tape] = []

    @unvalidated_distributions
    def capture(
        self,
        run: Callable[[], None],
        warm_up: Callable[[], None],
        generators: Iterable[th.Generator] = (),
        beside: Tape | None = None,
    ) -> Tape:
        """Capture as ``GraphCapturer.capture`` does: the operations run once, and their effects must not last."""
        states = [(generator, generator.get_state()) for generator in (th.default_generator, *generators)]
        tape = Tape()
        try:
            warm_up()
            for generator, state in states:
                generator.set_state(state)
            with tape:
                run()
        finally:
            for generator, state in states:
                generator.set_state(state)
        self.tapes.append(tape)
        return tape


class SharedTapeCapturer(TapeCapturer):
    """Captures tapes in one memory: each overwrites what all have allocated."""

    def capture(self, *args: Any, **kwargs: Any) -> Tape:
        """Capture as ``TapeCapturer`` does."""
        tape = super().capture(*args, **kwargs)
        replay = tape.replay

        def spoil_and_replay() -> None:
            for other in self.tapes:
                other.spoil()
            replay()

        tape.replay = spoil_and_replay  # type: ignore[method-assign]
        return tape
