"""
Environments in several processes: the training's own process steps the first ones, and each worker steps others.

Observations, rewards, dones and actions lie in shared memory. Infos are sent only where there are some.
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
from multiprocessing.connection import Connection
from multiprocessing.reduction import ForkingPickler
from typing import Any

import gymnasium as gym
import numpy as np
from gymnasium import spaces
from stable_baselines3.common.vec_env import SubprocVecEnv, VecEnv
from stable_baselines3.common.vec_env.base_vec_env import CloudpickleWrapper, VecEnvIndices, VecEnvObs, VecEnvStepReturn
from stable_baselines3.common.vec_env.util import dict_to_obs

from sb3_clipvf.common.validation import check_int
from sb3_clipvf.engines.threads import usable_cores
from sb3_clipvf.envs.dummy import FastDummyVecEnv

GRACE = 2.0
"""Seconds that ``close`` waits for a step that an error has interrupted, before it terminates the workers."""

_STEP = pickle.dumps(("step_shared", ()))
_CLOSE = bytes(ForkingPickler.dumps(("close", None)))  # as SB3's class sends it

# Pickling one of NumPy's scalars takes about 1 us, one of Python's hardly any time.
_SCALARS = (np.float64, np.float32, np.int64, np.bool_)
_CODES = {kind: code for code, kind in enumerate(_SCALARS)}
_ARRAYS = (spaces.Box, spaces.Discrete, spaces.MultiBinary, spaces.MultiDiscrete)
_FLAT = frozenset({type(None), bool, int, float, str, *_SCALARS})


class FastSubprocVecEnv(SubprocVecEnv):
    """
    Step environments in several processes, each of which has several environments.

    The process that makes this object steps the first environments itself, while workers step the others. Values and
    types of results are those of ``DummyVecEnv``, and nothing overwrites them later. Environments of one process share
    what is global there, such as NumPy's global random numbers.

    An error in an environment is raised here as ``DummyVecEnv`` raises it. Its cause holds the worker's traceback. If a
    worker dies, ``EOFError`` or ``OSError`` is raised, and within ``ClipPPO.learn``
    :class:`~sb3_clipvf.guards.workers.WorkerDiedError`.

    :param env_fns: Functions that make one environment each, all with the same spaces.
    :param n_workers: Number of processes, including this one; at most one per environment is used. None is the number
        of cores that this process may use.
    :param start_method: How workers start: "fork", "forkserver" or "spawn". None is "forkserver" where the system has
        it, else "spawn", as in ``SubprocVecEnv``. A script needs ``if __name__ == "__main__":`` with these two.
    :raises ValueError: If the observation spaces differ, or their values cannot lie in shared memory.
    """

    def __init__(
        self,
        env_fns: list[Callable[[], gym.Env[Any, Any]]],
        n_workers: int | None = None,
        start_method: str | None = None,
    ) -> None:
        n_workers = usable_cores() if n_workers is None else n_workers
        check_int("n_workers", n_workers, 1, "Leave it out to use all cores.")
        n_envs = self.num_envs = len(env_fns)
        n_workers = max(1, min(n_workers, n_envs))
        limits = [n_envs * number // n_workers for number in range(n_workers + 1)]
        self._all_rows = [range(*limits[number : number + 2]) for number in range(n_workers)]
        self.worker_rows = self._all_rows[1:]
        self.waiting = self.closed = False
        self.processes, self.remotes = [], []
        self._pending: list[Connection] = []  # of the workers whose reply has not been read

        if start_method is None:
            start_method = "forkserver" if "forkserver" in multiprocessing.get_all_start_methods() else "spawn"
        context: Any = multiprocessing.get_context(start_method)
        self._own = _Share([env_fns[row] for row in self._all_rows[0]])
        memory = _SharedMemory(context, self._own, n_envs)
        self._arrays = memory.arrays()
        self._own.use(memory, self._all_rows[0])
        try:
            for rows in self.worker_rows:
                self._start_worker(context, [env_fns[row] for row in rows], memory, rows)
            self._receive()
            VecEnv.__init__(self, n_envs, self._own.observation_space, self._own.action_space)
        except BaseException:
            self._end_workers()
            raise

    def _start_worker(self, context: Any, env_fns: list[Any], memory: "_SharedMemory", rows: range) -> None:
        remote, work_remote = context.Pipe()
        arguments = (work_remote, remote, CloudpickleWrapper(env_fns), memory, rows)
        process = context.Process(target=_work, args=arguments, daemon=True)
        process.start()
        # Before the next worker is forked: a copy there would keep the pipe open when this worker dies.
        work_remote.close()
        self.processes.append(process)
        self.remotes.append(remote)
        self._pending.append(remote)

    def step_async(self, actions: np.ndarray) -> None:
        """Start a step, with actions ``(n_envs, ...)``. Environments of this process wait for :meth:`step_wait`."""
        if len(actions) != self.num_envs:
            raise ValueError(f"`actions` must be one per environment, {self.num_envs}, got {len(actions)}.")
        shared = self._arrays["actions"]
        if isinstance(actions, np.ndarray) and (actions.shape, actions.dtype) == (shared.shape, shared.dtype):
            shared[:] = actions
            self._send([_STEP] * len(self.remotes))
        else:
            parts = [actions[rows.start : rows.stop] for rows in self.worker_rows]
            self._send([pickle.dumps(("step_shared", (part,))) for part in parts])
        self._own.actions = actions[: self._own.num_envs]
        self.waiting = True

    def step_wait(self) -> VecEnvStepReturn:
        """
        Step the environments of this process, wait for the others, and reset those whose episode ended.

        :return: Observations, rewards (float32), dones and infos, as ``DummyVecEnv`` returns them.
        """
        self.waiting = False
        self._own._step_envs()
        replies = self._receive()
        infos = self._own._infos_from_buf()
        self.reset_infos[: len(infos)] = self._own.reset_infos
        for rows, (packed, resets) in zip(self.worker_rows, replies, strict=True):
            infos += [_unpacked(*packed[row]) if row in packed else {"TimeLimit.truncated": False} for row in rows]
            for row, info in resets.items():
                self.reset_infos[row] = info
        return self._obs(), self._arrays["rewards"].copy(), self._arrays["dones"].copy(), infos

    def reset(self) -> VecEnvObs:
        """Begin an episode in every environment, with the seeds and options of ``seed`` and ``set_options``."""
        parts = [slice(rows.start, rows.stop) for rows in self._all_rows]
        self.reset_infos = self._call("begin", [(self._seeds[part], self._options[part]) for part in parts])
        self._reset_seeds()
        self._reset_options()
        return self._obs()

    def _obs(self) -> VecEnvObs:
        copies = OrderedDict((key, self._arrays["obs", key].copy()) for key in self._own.keys)
        return dict_to_obs(self.observation_space, copies)

    def close(self) -> None:
        """Close all environments and end the workers."""
        if self.closed:
            return
        self.closed, self.waiting = True, False
        try:
            self._end_workers()
        finally:
            self._own.close()

    def _end_workers(self) -> None:
        deadline = time.monotonic() + GRACE
        for remote, process in zip(self.remotes, self.processes, strict=True):
            with contextlib.suppress(EOFError, OSError):  # it has died
                if remote in self._pending:
                    if not remote.poll(max(0.0, deadline - time.monotonic())):
                        process.terminate()
                        continue
                    remote.recv_bytes()
                remote.send_bytes(_CLOSE)
        for remote, process in zip(self.remotes, self.processes, strict=True):
            process.join()
            remote.close()

    def get_images(self) -> Sequence[np.ndarray | None]:
        """Return an image of each environment, or None unless ``render_mode`` is rgb_array."""
        if self.render_mode != "rgb_array":
            warnings.warn(f"The render mode must be rgb_array for images, got {self.render_mode}.", stacklevel=2)
            return [None] * self.num_envs
        return self._call("get_images", [()] * (1 + len(self.remotes)))

    def has_attr(self, attr_name: str) -> bool:
        """Return whether all environments have an attribute."""
        return all(self._call("has_attrs", [(attr_name,)] * (1 + len(self.remotes))))

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

    def _call_envs(self, name: str, indices: VecEnvIndices, *args: Any, **kwargs: Any) -> list[Any]:
        """Call a method of ``DummyVecEnv`` for the environments at ``indices``, in the processes that have them."""
        wanted = [range(self.num_envs)[index] for index in self._get_indices(indices)]
        results: list[Any] = [None] * len(wanted)
        parts = [[place for place, row in enumerate(wanted) if row in rows] for rows in self._all_rows]
        calls = [(name, [wanted[place] for place in part], args, kwargs) if part else None for part in parts]
        for place, result in zip(sum(parts, []), self._call("call_rows", calls), strict=True):
            results[place] = result
        return results

    def _call(self, name: str, calls: list[Any]) -> list[Any]:
        """Call a method in each process with its arguments, unless they are None, and join the lists of results."""
        self._send([None if args is None else pickle.dumps((name, args)) for args in calls[1:]])
        results = [] if calls[0] is None else getattr(self._own, name)(*calls[0])
        return sum(self._receive(), results)

    def _send(self, messages: Sequence[bytes | None]) -> None:
        """Send each worker its message, unless it is None."""
        if self._pending:  # an error has interrupted the last call
            with contextlib.suppress(Exception):
                self._receive()
        for remote, message in zip(self.remotes, messages, strict=True):
            if message is not None:
                remote.send_bytes(message)
                self._pending.append(remote)

    def _receive(self) -> list[Any]:
        """Return the results of the workers that have been called; raise the first error once all have replied."""
        results, failures = [], []
        while self._pending:
            failure, result = pickle.loads(self._pending[0].recv_bytes())
            del self._pending[0]
            results.append(result)
            failures += [] if failure is None else [failure]
        for error, trace in failures:
            error.__cause__ = _WorkerError(trace)
            raise error
        return results


class _WorkerError(Exception):
    """The traceback of an error in a worker, as text."""

    def __str__(self) -> str:
        return f"\n\n{self.args[0]}"


class _SharedMemory:
    """Memory for observations, rewards, dones and actions of all environments; each process makes its arrays."""

    def __init__(self, context: Any, share: FastDummyVecEnv, n_envs: int) -> None:
        layout: dict[Any, Any] = {("obs", key): (rows.shape[1:], rows.dtype) for key, rows in share.buf_obs.items()}
        layout |= {"rewards": ((), np.dtype(np.float32)), "dones": ((), np.dtype(bool))}
        space = share.action_space  # actions of other spaces are sent
        layout["actions"] = (space.shape, space.dtype) if isinstance(space, _ARRAYS) else ((0,), np.dtype(bool))
        self._blocks = {}
        for key, (shape, dtype) in layout.items():
            if dtype.hasobject or not dtype.itemsize:
                raise ValueError(
                    f"`env_fns` must make environments whose observations are arrays of numbers, got the space "
                    f"{share.observation_space}. Use stable_baselines3's SubprocVecEnv."
                )
            shape = (n_envs, *shape)
            n_bytes = int(np.prod(shape)) * dtype.itemsize
            self._blocks[key] = (context.RawArray("b", max(1, n_bytes)), shape, dtype)

    def arrays(self) -> dict[Any, np.ndarray]:
        """Return the arrays of all environments, in this process."""
        return {
            key: np.frombuffer(block, dtype, int(np.prod(shape))).reshape(shape)
            for key, (block, shape, dtype) in self._blocks.items()
        }


class _Share(FastDummyVecEnv):
    """The environments of one process."""

    def use(self, memory: _SharedMemory, rows: range) -> None:
        """Step into these rows of the shared memory."""
        arrays, part = memory.arrays(), slice(rows.start, rows.stop)
        obs = OrderedDict((key[1], array[part]) for key, array in arrays.items() if key[0] == "obs")
        kinds = [[(key, array.shape, array.dtype) for key, array in found.items()] for found in (obs, self.buf_obs)]
        if kinds[0] != kinds[1]:
            raise ValueError(
                f"`env_fns` must make environments of one observation space, got {self.observation_space} as that of "
                f"environment {rows.start}, and another one as that of environment 0."
            )
        self.buf_obs, self._first = obs, rows.start
        self.buf_rews, self.buf_dones = arrays["rewards"][part], arrays["dones"][part]
        self._shared_actions = arrays["actions"][part]

    def begin(self, seeds: list[int | None], options: list[dict[str, Any]]) -> list[dict[str, Any]]:
        """Reset all environments, and return the infos of the resets."""
        self._seeds, self._options = seeds, options
        self.reset()
        return self.reset_infos

    def step_shared(self, actions: Any = None) -> tuple[dict[int, Any], dict[int, Any]]:
        """Step all environments, with shared actions by default; return infos and infos of resets, by row."""
        # A copy, since environments may keep their actions.
        self.actions = self._shared_actions.copy() if actions is None else actions
        self._step_envs()
        infos = {
            row: _packed(info)
            for row, info in enumerate(self.buf_infos, self._first)
            if len(info) != 1 or info["TimeLimit.truncated"] is not False
        }
        ended = np.flatnonzero(self.buf_dones).tolist() if np.count_nonzero(self.buf_dones) else ()
        return infos, {self._first + index: self.reset_infos[index] for index in ended}

    def call_rows(self, name: str, rows: list[int], args: tuple[Any, ...], kwargs: dict[str, Any]) -> list[Any]:
        """Call a method for the environments of these rows."""
        results = getattr(self, name)(*args, indices=[row - self._first for row in rows], **kwargs)
        return [None] * len(rows) if results is None else results

    def has_attrs(self, name: str) -> list[bool]:
        """Return whether all environments have an attribute."""
        return [self.has_attr(name)]


def _packed(info: dict[str, Any]) -> tuple[dict[str, Any], dict[str, int]]:
    """Return infos with Python's numbers in place of NumPy's scalars, and the types of these."""
    if not _FLAT.issuperset(map(type, info.values())):  # copies of containers would break references among them
        return info, {}
    codes = {key: _CODES[type(value)] for key, value in info.items() if type(value) in _CODES}
    return {key: value.item() if key in codes else value for key, value in info.items()}, codes


def _unpacked(info: dict[str, Any], codes: dict[str, int]) -> dict[str, Any]:
    for key, code in codes.items():
        info[key] = _SCALARS[code](info[key])
    return info


def _work(
    remote: Connection, parent_remote: Connection, env_fns: CloudpickleWrapper, memory: _SharedMemory, rows: range
) -> None:
    """Run a worker until the parent closes it or ends."""
    parent_remote.close()
    # Ctrl-C reaches all processes of a terminal, and the parent may go on. SIG_IGN would be inherited by programs that
    # environments start.
    signal.signal(signal.SIGINT, lambda *_: None)
    share: _Share | None = None

    def start() -> None:
        nonlocal share
        share = _Share(env_fns.var)
        share.use(memory, rows)

    def answer() -> Any:
        name, args = pickle.loads(message)
        return getattr(share, name)(*args)

    with contextlib.suppress(EOFError, OSError):  # the parent has ended
        remote.send_bytes(_reply(start))
        while (message := remote.recv_bytes()) != _CLOSE:
            remote.send_bytes(_reply(answer))
    if share is not None:
        share.close()


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
