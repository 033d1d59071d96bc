"""
Environments in several processes: the training process steps the first ones, and workers step the others.

Observations, rewards and dones lie in shared memory. Actions and infos are sent (see ``channel`` and ``info_rows``).
"""

import contextlib
import multiprocessing
import pickle
import signal
import time
import traceback
import warnings
from collections import OrderedDict
from collections.abc import Callable, Sequence
from itertools import chain, pairwise, starmap
from multiprocessing.connection import Connection
from multiprocessing.process import BaseProcess
from multiprocessing.reduction import ForkingPickler
from typing import Any

import gymnasium as gym
import numpy as np
from stable_baselines3.common.vec_env import SubprocVecEnv, VecEnv
from stable_baselines3.common.vec_env.base_vec_env import CloudpickleWrapper, VecEnvIndices, VecEnvObs, VecEnvStepReturn
from stable_baselines3.common.vec_env.util import dict_to_obs

from sb3_clipvf.common.resources import usable_cores
from sb3_clipvf.common.validation import check_int
from sb3_clipvf.envs.channel import Channel, channel_ends
from sb3_clipvf.envs.dummy import FastDummyVecEnv, copied_infos, step_envs
from sb3_clipvf.envs.info_rows import InfoRows, Infos

GRACE = 2.0
"""Seconds that a worker process has to end by itself, or to finish an interrupted step, before it is killed."""

SPIN = 1e-3
"""Seconds for which a process polls for a message before it sleeps."""

_CLOSE = bytes(ForkingPickler.dumps(("close", None)))  # as SB3's class sends it


class FastSubprocVecEnv(SubprocVecEnv):
    """
    Step environments in several processes, each of which has several environments.

    The process that creates this object steps the first environments itself, while workers step the others. Values and
    types of results are those of ``DummyVecEnv``, and nothing overwrites them later. Environments of one process share
    what is global there, such as NumPy's global random numbers.

    An error in an environment is raised here as ``DummyVecEnv`` raises it. Its cause holds the worker's traceback. If a
    worker dies, ``EOFError`` names its environments and its exit code. Within ``ClipPPO.learn``, it is a
    :class:`~sb3_clipvf.guards.workers.WorkerDiedError`. Between :meth:`step_async` and :meth:`step_wait`, only
    :meth:`reset` and :meth:`close` may be called, which drop the step.

    :param env_fns: Functions that create one environment each, all with the same spaces.
    :param n_workers: Number of processes, including this one; at most one per environment is used. None is the number
        of cores that this process may use.
    :param start_method: How workers start: "fork", "forkserver" or "spawn". None is "forkserver" if the system has
        it, else "spawn", as in ``SubprocVecEnv``. A script needs ``if __name__ == "__main__":`` with these two.
    :raises ValueError: If the observation spaces differ, or their values cannot lie in shared memory.
    """

    def __init__(
        self,
        env_fns: list[Callable[[], gym.Env[Any, Any]]],
        n_workers: int | None = None,
        start_method: str | None = None,
    ) -> None:
        n_envs = self.num_envs = len(env_fns)
        n_workers = usable_cores() if n_workers is None else n_workers
        n_workers = max(1, min(check_int("n_workers", n_workers, 1, "Leave it out to use all cores."), n_envs))
        limits = [n_envs * number // n_workers for number in range(n_workers + 1)]
        self._all_rows = list(starmap(range, pairwise(limits)))
        self.worker_rows = self._all_rows[1:]
        self.waiting = self.closed = False
        self._awaits_replies = True  # until the last worker has replied
        self.processes, self.remotes = [], []
        self._channels: list[Channel] = []
        self._called: list[Channel] = []  # of the workers whose reply has not been read
        self._info_rows = [InfoRows() for _ in self.worker_rows]
        spin = SPIN if n_workers <= usable_cores() else 0.0

        if start_method is None:
            start_method = "forkserver" if "forkserver" in multiprocessing.get_all_start_methods() else "spawn"
        context: Any = multiprocessing.get_context(start_method)
        self._own = _LocalEnvs([env_fns[row] for row in self._all_rows[0]])
        memory = _shared_memory(context, self._own, n_envs)
        self._arrays = self._own.use(memory, self._all_rows[0])
        try:
            for rows in self.worker_rows:
                channel, work_channel = channel_ends(context, spin)
                wrapped = CloudpickleWrapper([env_fns[row] for row in rows])
                arguments = (work_channel, channel.remote, wrapped, memory, rows)
                process = context.Process(target=_work, args=arguments, daemon=True)
                process.start()
                # `multiprocessing` keeps this object while the process runs. If the environments are dropped during a
                # step, the worker may still write to the memory, which must not be allocated again.
                process.memory = memory, work_channel
                # Before the next worker is forked: a copy there would keep the pipe open when this worker dies.
                work_channel.remote.close()
                self.processes.append(process)
                self.remotes.append(channel.remote)
                self._channels.append(channel)
            self._called = list(self._channels)
            self._receive()
            VecEnv.__init__(self, n_envs, self._own.observation_space, self._own.action_space)
        except BaseException:
            self.close()
            raise

    def step_async(self, actions: np.ndarray) -> None:
        """Start a step, with actions ``(n_envs, ...)``. Environments of this process wait for :meth:`step_wait`."""
        if len(actions) != self.num_envs:
            raise ValueError(f"`actions` must be one per environment, {self.num_envs}, got {len(actions)}.")
        self._own.actions, *others = [actions[rows.start : rows.stop] for rows in self._all_rows]
        parts = zip(others, self._info_rows, strict=True)
        self._send([pickle.dumps(("step_rows", (_encoded(part), rows.version))) for part, rows in parts])
        self.waiting = True

    def step_wait(self) -> VecEnvStepReturn:
        """
        Step the environments of this process, wait for the others, and reset those whose episode ended.

        :return: Observations, rewards (float32), dones and infos, as ``DummyVecEnv`` returns them.
        """
        if not self.waiting:
            raise RuntimeError("`step_wait` was called without `step_async`. Call `step_async` first, or use `step`.")
        self.waiting = False
        step_envs(self._own, self._own._first)
        infos = copied_infos(self._own)
        self.reset_infos[: len(infos)] = self._own.reset_infos
        for rows, (sent, resets) in zip(self._info_rows, self._receive(), strict=True):
            infos += rows.unpack(sent)
            for row, info in resets.items():
                self.reset_infos[row] = info
        return self._obs(), self._arrays["rewards"].copy(), self._arrays["dones"].copy(), infos

    def reset(self) -> VecEnvObs:
        """Begin an episode in every environment, with the seeds and options of ``seed`` and ``set_options``."""
        self.waiting = False
        parts = [slice(rows.start, rows.stop) for rows in self._all_rows]
        infos = self._call("begin", [(self._seeds[part], self._options[part]) for part in parts])
        self.reset_infos = list(chain(*infos))
        self._reset_seeds()
        self._reset_options()
        return self._obs()

    def _obs(self) -> VecEnvObs:
        if self._own.keys == [None]:
            return self._arrays["obs", None].copy()
        copies = OrderedDict((key, self._arrays["obs", key].copy()) for key in self._own.keys)
        return dict_to_obs(self.observation_space, copies)

    def close(self) -> None:
        """Close all environments and end the workers."""
        if self.closed:
            return
        self.closed, self.waiting = True, False
        deadline = time.monotonic() + GRACE
        for remote in self.remotes:
            with contextlib.suppress(OSError):  # the worker has died
                remote.send_bytes(_CLOSE)
            remote.close()
        for process in self.processes:
            if self._awaits_replies:
                process.join(max(0.0, deadline - time.monotonic()))
                process.kill()
            process.join()
        self._own.close()

    def get_images(self) -> Sequence[np.ndarray | None]:
        """Return an image of each environment, or None unless ``render_mode`` is rgb_array."""
        if self.render_mode == "rgb_array":
            return self.env_method("render")
        warnings.warn(f"The render mode must be rgb_array for images, got {self.render_mode}.", stacklevel=2)
        return [None] * self.num_envs

    def has_attr(self, attr_name: str) -> bool:
        """Return whether all environments have an attribute."""
        self._check_idle("has_attr")
        return all(self._call("has_attr", [(attr_name,)] * len(self._all_rows)))

    def get_attr(self, attr_name: str, indices: VecEnvIndices = None) -> list[Any]:
        """Return an attribute of all environments, or of those at ``indices``; workers send copies."""
        return self._call_envs("get_attr", indices, attr_name)

    def set_attr(self, attr_name: str, value: Any, indices: VecEnvIndices = None) -> None:
        """Set an attribute of all environments, or of those at ``indices``."""
        self._call_envs("set_attr", indices, attr_name, value)

    def env_method(
        self, method_name: str, *method_args: Any, indices: VecEnvIndices = None, **method_kwargs: Any
    ) -> list[Any]:
        """Call a method of all environments, or of those at ``indices``, and return the results."""
        return self._call_envs("env_method", indices, method_name, *method_args, **method_kwargs)

    def env_is_wrapped(
        self, wrapper_class: type[gym.Wrapper[Any, Any, Any, Any]], indices: VecEnvIndices = None
    ) -> list[bool]:
        """Return whether all environments, or those at ``indices``, have a wrapper of this class."""
        return self._call_envs("env_is_wrapped", indices, wrapper_class)

    def _call_envs(self, name: str, indices: VecEnvIndices, /, *args: Any, **kwargs: Any) -> list[Any]:
        """Call a method of ``DummyVecEnv`` for the environments at ``indices``, in the processes that have them."""
        self._check_idle(name)
        wanted = [range(self.num_envs)[index] for index in self._get_indices(indices)]
        results: list[Any] = [None] * len(wanted)
        parts = [[place for place, row in enumerate(wanted) if row in rows] for rows in self._all_rows]
        calls = [(name, [wanted[place] for place in part], args, kwargs) if part else None for part in parts]
        for place, result in zip(chain(*parts), chain(*self._call("call_rows", calls)), strict=True):
            results[place] = result
        return results

    def _check_idle(self, name: str) -> None:
        if self.waiting:
            raise RuntimeError(
                f"`{name}` cannot be called between `step_async` and `step_wait`. Call `step_wait` first."
            )

    def _call(self, name: str, calls: list[Any]) -> list[Any]:
        """Call a method in each process that has arguments, and return the results of these processes."""
        self._send([None if args is None else pickle.dumps((name, args)) for args in calls[1:]])
        results = [] if calls[0] is None else [getattr(self._own, name)(*calls[0])]
        return results + self._receive()

    def _send(self, messages: Sequence[bytes | None]) -> None:
        """Send each worker its message, unless it is None."""
        try:
            if self._awaits_replies:  # an exception has interrupted the last call
                for channel in self._channels:
                    channel.reset()
            self._awaits_replies = True
            self._called = []
            for channel, message in zip(self._channels, messages, strict=True):
                if message is not None:
                    channel.send(message)
                    self._called.append(channel)
        except (EOFError, OSError) as broken:
            self._raise_if_dead(broken)
            raise

    def _receive(self) -> list[Any]:
        """Return the results of the workers that have been called; raise the first error once all have replied."""
        try:
            messages = [channel.receive() for channel in self._called]
        except (EOFError, OSError) as broken:
            self._raise_if_dead(broken)
            raise
        replies = list(map(pickle.loads, messages))
        self._awaits_replies = False
        for failure, _ in replies:
            if failure is not None:
                error, trace = failure
                raise error from _WorkerError(trace)
        return [result for _, result in replies]

    def _raise_if_dead(self, cause: Exception) -> None:
        """Raise EOFError if a worker has died."""
        ended = ended_workers(self.processes, self.worker_rows, GRACE)
        if ended:
            raise EOFError(
                f"`env_fns` must make environments that keep their process running, but {described(ended)}. See the "
                "error output (stderr) above."
            ) from cause


def ended_workers(
    processes: Sequence[BaseProcess], worker_rows: Sequence[range], grace: float
) -> list[tuple[range, int]]:
    """Return environments and exit code of each process that has ended, or ends within ``grace`` seconds."""
    # A process ends some moments after its pipes are closed.
    deadline = time.monotonic() + grace
    while all(process.is_alive() for process in processes) and time.monotonic() < deadline:
        time.sleep(0.01)
    ends = [(rows, process.exitcode) for rows, process in zip(worker_rows, processes, strict=True)]
    return [(rows, code) for rows, code in ends if code is not None]


def described(ended: list[tuple[range, int]]) -> str:
    """Return how the processes of these environments ended, as a part of a sentence."""
    return ", ".join(f"that of {_named(rows)} {_end(code)}" for rows, code in ended)


def _named(rows: range) -> str:
    return f"environment {rows[0]}" if len(rows) == 1 else f"environments {rows[0]} to {rows[-1]}"


def _end(code: int) -> str:
    if code >= 0:
        return f"ended with exit code {code}"
    known = {int(number): number.name for number in signal.Signals}
    return f"was killed by {known.get(-code, f'signal {-code}')}"


class _WorkerError(Exception):
    """The traceback of an error in a worker, as text."""


# Name of an array -> memory, shape, dtype.
_Memory = dict[Any, tuple[Any, tuple[int, ...], np.dtype[Any]]]


def _shared_memory(context: Any, envs: FastDummyVecEnv, n_envs: int) -> _Memory:
    """Return memory for observations by key, rewards and dones of all environments."""
    layout: dict[Any, Any] = {("obs", key): (rows.shape[1:], rows.dtype) for key, rows in envs.buf_obs.items()}
    layout |= {"rewards": ((), np.dtype(np.float32)), "dones": ((), np.dtype(bool))}
    memory = {}
    for name, (shape, dtype) in layout.items():
        if dtype.hasobject:
            raise ValueError(
                "`env_fns` must create environments whose observations are arrays of numbers, got the space "
                f"{envs.observation_space}. Use stable_baselines3's SubprocVecEnv."
            )
        n_bytes = n_envs * int(np.prod(shape)) * dtype.itemsize
        memory[name] = (context.RawArray("b", max(1, n_bytes)), (n_envs, *shape), dtype)
    return memory


class _LocalEnvs(FastDummyVecEnv):
    """The environments of one process."""

    def __init__(self, env_fns: list[Callable[[], gym.Env[Any, Any]]]) -> None:
        super().__init__(env_fns)
        self._info_rows = InfoRows()

    def use(self, memory: _Memory, rows: range) -> dict[Any, np.ndarray]:
        """Put the buffers into these rows of the shared memory, and return its arrays."""
        arrays = {name: np.ndarray(shape, dtype, buffer=block) for name, (block, shape, dtype) in memory.items()}
        own = {name: array[rows.start : rows.stop] for name, array in arrays.items()}
        obs = OrderedDict((name[1], array) for name, array in own.items() if name[0] == "obs")
        kinds = [[(key, array.shape, array.dtype) for key, array in found.items()] for found in (obs, self.buf_obs)]
        if kinds[0] != kinds[1]:
            raise ValueError(
                f"`env_fns` must create environments of one observation space, got {self.observation_space} for "
                f"environment {rows.start}, and a different one for environment 0."
            )
        self._first, self.buf_obs, self.buf_rews, self.buf_dones = rows.start, obs, own["rewards"], own["dones"]
        return arrays

    def begin(self, seeds: list[int | None], options: list[dict[str, Any]]) -> list[dict[str, Any]]:
        """Reset all environments, and return the infos of the resets."""
        self._seeds, self._options = seeds, options
        self.reset()
        return self.reset_infos

    def step_rows(self, actions: tuple[Any, ...], version: int) -> tuple[bytes | Infos, dict[int, Any]]:
        """Step all environments, and return their infos, and those of resets by row."""
        self.actions = _decoded(actions)
        step_envs(self, self._first)
        dones = enumerate(self.buf_dones.tolist())
        resets = {self._first + index: self.reset_infos[index] for index, done in dones if done}
        return self._info_rows.pack(self.buf_infos, version), resets

    def call_rows(self, name: str, rows: list[int], args: tuple[Any, ...], kwargs: dict[str, Any]) -> list[Any]:
        """Call a method for the environments of these rows."""
        results = getattr(self, name)(*args, indices=[row - self._first for row in rows], **kwargs)
        return [None] * len(rows) if results is None else results


def _encoded(actions: Any) -> tuple[Any, ...]:
    """Return dtype, shape and bytes, which pickle faster than an array; or a tuple of the actions, if they are none."""
    if type(actions) is not np.ndarray or actions.dtype.isbuiltin != 1 or actions.dtype.hasobject:
        return (actions,)
    return actions.dtype.str, actions.shape, actions.tobytes()


def _decoded(encoded: tuple[Any, ...]) -> Any:
    """Return the actions that :func:`_encoded` received; an array is writable."""
    if len(encoded) == 1:
        return encoded[0]
    dtype, shape, data = encoded
    return np.frombuffer(bytearray(data), dtype).reshape(shape)


def _work(
    channel: Channel, parent_remote: Connection, env_fns: CloudpickleWrapper, memory: _Memory, rows: range
) -> None:
    """Run a worker until the parent closes it or ends."""
    parent_remote.close()
    # Ctrl-C reaches all processes of a terminal, and the parent may continue. SIG_IGN would be inherited by programs
    # that environments start.
    signal.signal(signal.SIGINT, lambda *_: None)
    envs: _LocalEnvs | None = None

    def start() -> None:
        nonlocal envs
        envs = _LocalEnvs(env_fns.var)
        envs.use(memory, rows)

    def answer() -> Any:
        name, args = pickle.loads(message)
        return getattr(envs, name)(*args)

    with contextlib.suppress(EOFError, OSError):  # the parent has ended
        channel.send(_reply(start))
        while (message := channel.receive()) != _CLOSE:
            channel.send(_reply(answer))
    if envs is not None:
        envs.close()


def _reply(call: Callable[[], Any]) -> bytes:
    """Return a pickled pair: an error with its traceback or None, and the result of the call."""
    try:
        return pickle.dumps((None, call()))
    except Exception as error:
        trace = traceback.format_exc()
        try:
            reply = pickle.dumps(((error, trace), None))
            pickle.loads(reply)
        except Exception:  # the error's class cannot be pickled
            reply = pickle.dumps(((RuntimeError(f"{type(error).__name__}: {error}"), trace), None))
        return reply
