"""
The group of processes that train one model, and what they exchange.

A group of one process exchanges nothing. ``docs/distributed.md`` describes training on several processes.
"""

import atexit
import contextlib
import functools
import importlib
import json
import math
import multiprocessing
import os
import time
import traceback
import uuid
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, TypeVar, cast

import numpy as np
import torch as th
import torch.distributed as dist

from sb3_clipvf.common.messages import log
from sb3_clipvf.common.nonfinite import NonFiniteError

Value = TypeVar("Value")

TIMEOUT_VARIABLE = "SB3_CLIPVF_TIMEOUT"
"""Environment variable: seconds that a process waits for another. The default is 1800."""

_DEFAULT_TIMEOUT = timedelta(minutes=30)
_LAUNCH = "sb3_clipvf/launch"
# The process that torchrun has started sets this variable to the launch and its own id. Its children inherit both.
_OWNER = "SB3_CLIPVF_OWNER"
_OF_LAUNCH = ("TORCHELASTIC_RUN_ID", "TORCHELASTIC_RESTART_COUNT", "MASTER_ADDR", "MASTER_PORT", "RANK")
# A process that fails writes its note before it closes its connections; those that wait write theirs after that.
_NOTE_SECONDS = 2


class LostProcessError(RuntimeError):
    """Another process of the run has failed, has ended or does not respond."""


@dataclass(frozen=True)
class Group:
    """
    The processes that train one model. Each method is called by all of them, in the same order.

    Processes that ``torchrun`` has started connect in the first call.

    :param rank: Number of this process, from 0.
    :param size: Number of processes.
    """

    rank: int = 0
    size: int = 1

    def gather(self, value: Value) -> list[Value]:
        """Return the values of all processes, by rank. They are pickled, unless there is one process."""
        if self.size == 1:
            return [value]
        values: list[Any] = [None] * self.size
        with _exchanging():
            dist.all_gather_object(values, value)
        return values

    def gather_in_first(self, value: Value) -> list[Value]:
        """Return the values of all processes, as :meth:`gather` does, in the first one; return no value in others."""
        if self.size == 1:
            return [value]
        values: list[Any] = [None] * self.size if self.rank == 0 else []
        with _exchanging():
            dist.gather_object(value, values or None)
        return values

    def broadcast(self, value: Value) -> Value:
        """Return the value of the first process, which is pickled, unless there is one process."""
        if self.size == 1:
            return value
        values = [value if self.rank == 0 else None]
        with _exchanging():
            dist.broadcast_object_list(values)
        return value if self.rank == 0 else cast(Value, values[0])

    def broadcast_tensor(self, tensor: th.Tensor) -> None:
        """Overwrite a tensor with that of the first process, of the same shape and type."""
        if self.size > 1:
            with _exchanging():
                dist.broadcast(tensor, 0)

    def add_up(self, tensor: th.Tensor) -> None:
        """Overwrite a tensor with the sum of those of all processes, of the same shape and type."""
        if self.size > 1:
            with _exchanging():
                dist.all_reduce(tensor)

    def mean(self, value: th.Tensor, n: int) -> th.Tensor:
        """Return the mean over all processes of ``value``, which is the mean of ``n`` numbers in this one."""
        if self.size == 1:
            return value
        parts = np.array(self.gather((float(value), n)))
        return th.tensor(np.average(parts[:, 0], weights=parts[:, 1]), dtype=th.float64)

    def moments(self, values: Any) -> "Moments":
        """Return the moments of an array's or a tensor's numbers in all processes."""
        return merged_moments(self.gather(Moments.of(values)))

    @contextlib.contextmanager
    def failing_together(self) -> Iterator[None]:
        """Report an error that ends this context to the other processes, and disconnect from them."""
        global _notes
        if self.size == 1:
            yield
            return
        try:
            _join()
            _notes = _Notes(self.rank, self.size)
            yield
        except LostProcessError:
            _leave(failed=True)
            raise
        except BaseException as error:
            if _notes is not None:
                _notes.write_failure(error)
            _leave(failed=True)
            raise
        finally:
            _notes = None


ALONE = Group()


@dataclass(frozen=True)
class Moments:
    """Number, mean and sum of squared deviations of numbers, float64."""

    n: int
    mean: float
    squared_deviations: float

    @classmethod
    def of(cls, values: Any) -> "Moments":
        """Return the moments of an array or a tensor."""
        numbers = th.as_tensor(values).detach().double()
        if not numbers.numel():
            return cls(0, 0.0, 0.0)
        mean = numbers.mean()
        squared_deviations = (numbers - mean).square().sum()
        return cls(numbers.numel(), *th.stack([mean, squared_deviations]).tolist())

    @property
    def variance(self) -> float:
        """The population's variance."""
        return self.squared_deviations / self.n

    @property
    def sample_std(self) -> float:
        """Root of the unbiased variance; there must be more than one number."""
        return float(np.sqrt(self.squared_deviations / (self.n - 1)))


def merged_moments(parts: list[Moments]) -> Moments:
    """
    Return the moments of the union of several sets of numbers.

    Source: Chan, Golub and LeVeque 1979, Stanford STAN-CS-79-773, equation 2.1.
    """
    n = sum(part.n for part in parts)
    mean = sum(part.n * part.mean for part in parts) / n
    squared_deviations = sum(part.squared_deviations + part.n * (part.mean - mean) ** 2 for part in parts)
    return Moments(n, mean, squared_deviations)


def current_group() -> Group:
    """
    Return the group of this process: one that the user's own code has joined, or else all that ``torchrun`` started.

    No message is sent. A process that such a process starts is not in the group. With several processes, the first call
    also selects this process's GPU, as :func:`_select_gpu` describes.
    """
    if not dist.is_available():
        return ALONE
    if dist.is_initialized() and not _has_joined:
        rank, size = dist.get_rank(), dist.get_world_size()
    elif _claim_launch() == os.getpid():
        rank, size = int(os.environ["RANK"]), int(os.environ.get("WORLD_SIZE", 1))
        if size > 1:
            _select_gpu()
    else:
        return ALONE
    return ALONE if size == 1 else Group(rank, size)


def warn_about_child() -> None:
    """Warn that this process trains alone, if torchrun has started a parent of it."""
    if _claim_launch() not in (None, os.getpid()) and int(os.environ.get("WORLD_SIZE", 1)) > 1:
        log.warning("This process trains a model of its own: torchrun did not start it, but a parent process did.")


def check_backend(device: th.device) -> None:
    """
    Check that processes can exchange tensors of a device.

    :raises ValueError: If the user's own group cannot.
    """
    if dist.is_initialized():
        backends = str(dist.get_backend_config())
        if device.type not in (part.partition(":")[0] for part in backends.split(",")):
            raise ValueError(
                f"`device` must be of a type for which the process group has a backend, got {device.type} and the "
                f"backends {backends}. Call init_process_group with "
                '`backend="cpu:gloo,cuda:nccl"`, or choose another device.'
            )


def is_ended_by_nonfinite() -> bool:
    """Return whether a NonFiniteError in one of the processes has ended the current run."""
    return _notes is not None and _notes.failure()[1]


# Whether this module, and not the user's own code, has connected this process to others
_has_joined = False
# Whether an error has ended that connection
_has_failed = False


def _claim_launch() -> int | None:
    """
    Mark this process in the environment as the one that torchrun has started, unless a parent of it is marked.

    Return the id of the marked process, or in workers of multiprocessing that of the parent; None without torchrun.
    """
    if not dist.is_available() or not dist.is_torchelastic_launched():
        return None
    if (parent := multiprocessing.parent_process()) is not None:
        return parent.pid
    launch = " ".join(os.environ.get(name, "") for name in _OF_LAUNCH)
    known, _, pid = os.environ.get(_OWNER, "").rpartition(" ")
    if known == launch:
        return int(pid)
    os.environ[_OWNER] = f"{launch} {os.getpid()}"
    return os.getpid()


_claim_launch()  # before children that start after ClipPPO was imported


@functools.cache
def _select_gpu() -> None:
    """Select a GPU for this process by its local rank, if its machine has one."""
    if n_gpus := th.cuda.device_count():
        th.cuda.set_device(int(os.environ["LOCAL_RANK"]) % n_gpus)


def _join() -> None:
    """Join the processes that torchrun has started, unless this process has joined them or the user's own group."""
    global _has_joined
    if _has_failed:
        raise LostProcessError("An error has disconnected this process from the others. Start all of them again.")
    if dist.is_initialized():
        return
    # If torch imports this module later, default arguments of its functions keep the group alive. The threads of gloo
    # then run on while the interpreter ends, and abort the process if they release one of Python's tensors.
    importlib.import_module("torch.distributed.nn.functional")
    timeout, gpu = _timeout(), _gpu_for_nccl()
    with _raising_lost_process():
        store, rank, size = next(dist.rendezvous("env://", timeout=timeout))  # type: ignore[attr-defined]
        name = _name_of_this_launch(store, rank, size, timeout)
        store = dist.PrefixStore(name, store)  # type: ignore[attr-defined]
        backend = _common_backend(store, rank, size, gpu)
        dist.init_process_group(backend, store=store, rank=rank, world_size=size, timeout=timeout)
    _has_joined = True
    atexit.register(_leave)
    if rank == 0:
        log.info("%d processes train one model, and communicate by %s", size, backend)


def _name_of_this_launch(store: Any, rank: int, size: int, timeout: timedelta) -> str:
    """
    Return a name that only the processes of this launch know.

    After a restart, torchrun's store still has the entries of earlier launches, by which processes would connect to
    ended ones (https://github.com/pytorch/pytorch/issues/135712). Therefore, the first process chooses a name, and each
    other process waits until the first one has seen it under this name.
    """
    own = uuid.uuid4().hex
    if rank == 0:
        store.set(_LAUNCH, own)
        for other in range(1, size):
            store.set(f"{own}/{other}/seen", store.get(f"{own}/{other}"))
        return own
    until = time.monotonic() + timeout.total_seconds()
    while time.monotonic() < until:
        name = str(store.get(_LAUNCH).decode())  # perhaps that of an earlier launch
        store.set(f"{name}/{rank}", own)
        seen = f"{name}/{rank}/seen"
        if store.check([seen]) and store.get(seen).decode() == own:
            return name
        time.sleep(0.1)
    raise RuntimeError("process 0 has not joined")


def _gpu_for_nccl() -> str:
    """Return a name of this process's GPU which no other GPU has; "" if it cannot use nccl."""
    if not th.cuda.device_count() or not dist.is_nccl_available():
        return ""
    return str(th.cuda.get_device_properties(th.cuda.current_device()).uuid)


def _common_backend(store: Any, rank: int, size: int, gpu: str) -> str:
    """Return the backend of all processes: nccl for GPUs if each of them has one of its own, otherwise gloo alone."""
    store.set(f"gpu/{rank}", gpu)
    gpus = {store.get(f"gpu/{other}").decode() for other in range(size)}
    return "cpu:gloo,cuda:nccl" if len(gpus) == size and "" not in gpus else "gloo"


def _timeout() -> timedelta:
    """Return how long a process waits for another."""
    value = os.environ.get(TIMEOUT_VARIABLE)
    if value is None:
        return _DEFAULT_TIMEOUT
    try:
        seconds = float(value)
    except ValueError:
        seconds = math.nan
    if not 0 < seconds < math.inf:
        raise ValueError(
            f"`{TIMEOUT_VARIABLE}` must be a positive number of seconds, got {value!r}. Unset it for the default."
        )
    return timedelta(seconds=seconds)


def _leave(*, failed: bool = False) -> None:
    """Disconnect from the other processes, unless the user's own code has connected them."""
    global _has_failed
    if _has_joined and dist.is_initialized():
        _has_failed = failed
        if failed:  # with nccl, the other function waits for all processes, of which some may wait for this one
            with contextlib.suppress(Exception):  # a signal may have interrupted an earlier call
                dist.distributed_c10d._abort_process_group()
        if dist.is_initialized():
            with contextlib.suppress(Exception):
                dist.destroy_process_group()


class _Notes:
    """What processes write into their store if an error ends a run. Each run has notes of its own."""

    n_runs = 0  # in which this process has taken part

    def __init__(self, rank: int, size: int) -> None:
        _Notes.n_runs += 1
        store = dist.distributed_c10d._get_default_store()
        self._store = dist.PrefixStore(f"sb3_clipvf/{_Notes.n_runs}", store)  # type: ignore[attr-defined]
        self._rank, self._size = rank, size
        self._is_waiting = False
        self._failure: tuple[str | None, bool] = None, False

    def write_failure(self, error: BaseException) -> None:
        """Report this process's error, unless it was waiting for another one."""
        if not self._is_waiting:
            text = f"process {self._rank} failed with {type(error).__name__}: {error}"
            with contextlib.suppress(RuntimeError):
                self._store.set("failure", json.dumps([text, isinstance(error, NonFiniteError)]))

    def failure(self) -> tuple[str | None, bool]:
        """Return the error of a process, None without one, and whether it is a NonFiniteError."""
        with contextlib.suppress(RuntimeError):
            if self._failure[0] is None and self._store.check(["failure"]):
                text, is_nonfinite = json.loads(self._store.get("failure"))
                self._failure = text, is_nonfinite
        return self._failure

    def write_waiting(self) -> None:
        """Report that this process has lost the connection to another one."""
        self._is_waiting = True
        with contextlib.suppress(RuntimeError):
            self._store.set(f"waiting/{self._rank}", "")

    def silent(self) -> list[int]:
        """Return the processes that have not reported that they have lost a connection."""
        with contextlib.suppress(RuntimeError):
            return [rank for rank in range(self._size) if not self._store.check([f"waiting/{rank}"])]
        return []


# Notes of the current run
_notes: _Notes | None = None


@contextlib.contextmanager
def _exchanging() -> Iterator[None]:
    """Join the group, and raise LostProcessError if processes cannot communicate in this context."""
    _join()
    with _raising_lost_process():
        yield


@contextlib.contextmanager
def _raising_lost_process() -> Iterator[None]:
    """Raise LostProcessError if processes cannot communicate."""
    try:
        yield
    except RuntimeError as error:
        raise LostProcessError(f"The training has ended on all processes, since {_cause_of(error)}") from None


def _cause_of(error: RuntimeError) -> str:
    """Return the error of the process that has failed, or which processes may have ended or do not respond."""
    if _notes is not None:
        _notes.write_waiting()
    # Disconnect, so that processes that wait for this one write their notes, too. Local variables of PyTorch's
    # functions, which the error keeps, would keep the connections.
    traceback.clear_frames(error.__traceback__)
    _leave(failed=True)
    lost = "a process"
    if _notes is not None:
        until = time.monotonic() + _NOTE_SECONDS
        while time.monotonic() < until:  # PyTorch writes a warning if a wait of its own takes too long
            text, _ = _notes.failure()
            if text is not None:
                return text
            time.sleep(0.05)
        silent = _notes.silent()
        if len(silent) == 1:
            lost = f"process {silent[0]}"
        elif silent:  # some of them may be busy with other work
            lost = f"at least one of the processes {', '.join(map(str, silent))}"
    return f"{lost} has ended or does not respond: {error}"
