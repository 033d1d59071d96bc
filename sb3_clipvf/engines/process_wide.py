"""Switches of the whole process, which several trainings in threads of it may need at once."""

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager
from threading import Lock


class ProcessWide:
    """
    A context that is the process's own: the first of several threads enters it, and the last one leaves it.

    :param make: Makes the context manager that is entered for all of them.
    """

    def __init__(self, make: Callable[[], AbstractContextManager[object]]) -> None:
        self._make = make
        self._lock = Lock()
        self._n_inside = 0
        self._context = ExitStack()

    @contextmanager
    def inside(self) -> Iterator[None]:
        """
        Be in the context, whether this thread entered it or another one.

        :return: Context manager.
        """
        with self._lock:
            if self._n_inside == 0:
                self._context.enter_context(self._make())
            self._n_inside += 1
        try:
            yield
        finally:
            with self._lock:
                self._n_inside -= 1
                if self._n_inside == 0:
                    self._context.close()
