"""
The group of processes that train one model, and what they exchange.

A group of one process exchanges nothing. ``docs/distributed.md`` describes a training on several processes.
"""

import atexit
import contextlib
import importlib
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

Value = TypeVar("Value")

TIMEOUT_VARIABLE = "SB3_CLIPVF_TIMEOUT"
"""Environment variable: seconds that a process waits for another. The default is 1800."""

_DEFAULT_TIMEOUT = timedelta(minutes=30)
_LAUNCH, _FAILURE, _WAITING = "sb3_clipvf/launch", "sb3_clipvf/failure", "sb3_clipvf/waiting"
# A process that fails writes its note before it closes its connections; those that wait write theirs after that.
_NOTE_SECONDS = 2


class LostProcessError(RuntimeError):
    """Another process of the training has failed, has ended or does not respond."""


@dataclass(frozen=True)
class Group:
    """
    The processes that train one model. Each method is called by all of them, in the same order.

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
        with _raising_lost_process():
            dist.all_gather_object(values, value)
        return values

    def gather_in_first(self, value: Value) -> list[Value]:
        """Return the values of all processes, as :meth:`gather` does, in the first one; return no value in others."""
        if self.size == 1:
            return [value]
        values: list[Any] = [None] * self.size if self.rank == 0 else []
        with _raising_lost_process():
            dist.gather_object(value, values or None)
        return values

    def broadcast(self, value: Value) -> Value:
        """Return the value of the first process, which is pickled, unless there is one process."""
        if self.size == 1:
            return value
        values = [value if self.rank == 0 else None]
        with _raising_lost_process():
            dist.broadcast_object_list(values)
        return value if self.rank == 0 else cast(Value, values[0])

    def broadcast_tensor(self, tensor: th.Tensor) -> None:
        """Overwrite a tensor by that of the first process, of the same shape and type."""
        if self.size > 1:
            with _raising_lost_process():
                dist.broadcast(tensor, 0)

    def add_up(self, tensor: th.Tensor) -> None:
        """Overwrite a tensor by the sum of those of all processes, of the same shape and type."""
        if self.size > 1:
            with _raising_lost_process():
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
        try:
            yield
        except LostProcessError:
            _leave(failed=True)
            raise
        except BaseException as error:
            if self.size > 1:
                with contextlib.suppress(RuntimeError):
                    _store().set(_FAILURE, f"process {self.rank} failed with {type(error).__name__}: {error}")
                _leave(failed=True)
            raise


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
    Return the group of this process, and join it if ``torchrun`` has started it and it has not joined yet.

    :raises LostProcessError: If an error has ended the group.
    """
    if not dist.is_available():
        return ALONE
    if not dist.is_initialized():
        if not dist.is_torchelastic_launched() or int(os.environ.get("WORLD_SIZE", 1)) == 1:
            return ALONE
        if multiprocessing.parent_process() is not None:  # a worker of an environment, which inherits the variables
            return ALONE
        _join()
    size = dist.get_world_size()
    return ALONE if size == 1 else Group(dist.get_rank(), size)


# Whether this module, and not the user's own code, has connected this process to others
_has_joined = False
# Whether an error has ended that connection
_has_failed = False


def _join() -> None:
    """Join the processes that torchrun has started. On a machine with GPUs, each process gets one."""
    global _has_joined
    if _has_failed:
        raise LostProcessError("An error has disconnected this process from the others. Start all of them again.")
    can_use_nccl, n_gpus = False, th.cuda.device_count()
    if n_gpus:
        th.cuda.set_device(int(os.environ["LOCAL_RANK"]) % n_gpus)
        # Processes of nccl cannot share a GPU.
        can_use_nccl = dist.is_nccl_available() and int(os.environ["LOCAL_WORLD_SIZE"]) <= n_gpus
    # If torch imports this module later, default arguments of its functions keep the group alive. The threads of gloo
    # then run on while the interpreter ends, and abort the process if they release one of Python's tensors.
    importlib.import_module("torch.distributed.nn.functional")
    timeout = _timeout()
    with _raising_lost_process():
        store, rank, size = next(dist.rendezvous("env://", timeout=timeout))  # type: ignore[attr-defined]
        name = _name_of_this_launch(store, rank, size, timeout)
        store = dist.PrefixStore(name, store)  # type: ignore[attr-defined]
        backend = _common_backend(store, rank, size, can_use_nccl)
        dist.init_process_group(backend, store=store, rank=rank, world_size=size, timeout=timeout)
    _has_joined = True
    atexit.register(_leave)


def _name_of_this_launch(store: Any, rank: int, size: int, timeout: timedelta) -> str:
    """
    Return a name that only the processes of this launch know.

    After a restart, torchrun's store still has the entries of earlier launches, by which processes would connect to
    ended ones (https://github.com/pytorch/pytorch/issues/135712). So the first process chooses a name, and each other
    process waits until the first one has seen it under this name.
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


def _common_backend(store: Any, rank: int, size: int, can_use_nccl: bool) -> str:
    """Return the backend of all processes: nccl for GPUs if each of them can use it, otherwise gloo alone."""
    store.set(f"nccl/{rank}", str(can_use_nccl))
    answers = {store.get(f"nccl/{other}").decode() for other in range(size)}
    return "cpu:gloo,cuda:nccl" if answers == {"True"} else "gloo"


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
            with contextlib.suppress(RuntimeError):
                dist.distributed_c10d._abort_process_group()
        if dist.is_initialized():
            with contextlib.suppress(RuntimeError):
                dist.destroy_process_group()


def _store() -> Any:
    """Return the store in which processes leave notes."""
    return dist.distributed_c10d._get_default_store()


@contextlib.contextmanager
def _raising_lost_process() -> Iterator[None]:
    """Raise LostProcessError if processes cannot communicate."""
    try:
        yield
    except RuntimeError as error:
        raise LostProcessError(f"The training has ended on all processes, since {_cause_of(error)}") from None


def _cause_of(error: RuntimeError) -> str:
    """Return the error of the process that has failed, or which processes may have ended or do not respond."""
    lost = "a process"
    with contextlib.suppress(RuntimeError, ValueError):  # there may be no store, or no longer
        store, rank, size = _store(), dist.get_rank(), dist.get_world_size()
        store.set(f"{_WAITING}/{rank}", "")
        # Disconnect, so that processes that wait for this one write their notes, too. Local variables of PyTorch's
        # functions, which the error keeps, would keep the connections.
        traceback.clear_frames(error.__traceback__)
        _leave(failed=True)
        until = time.monotonic() + _NOTE_SECONDS
        while time.monotonic() < until:  # PyTorch writes a warning if a wait of its own takes too long
            if store.check([_FAILURE]):
                return str(store.get(_FAILURE).decode())
            time.sleep(0.05)
        silent = [other for other in range(size) if not store.check([f"{_WAITING}/{other}"])]
        if len(silent) == 1:
            lost = f"process {silent[0]}"
        elif silent:  # some of them may be busy with other work
            lost = f"at least one of the processes {', '.join(map(str, silent))}"
    return f"{lost} has ended or does not respond: {error}"
