"""Tensor environments whose step is the same operations each time, which a CUDA graph replays."""

import copy
import random
import sys
from collections import deque
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from types import MethodType, ModuleType
from typing import Any

import numpy as np
import torch as th
from gymnasium import spaces

from sb3_clipvf.engines.cuda.capture import Graph, GraphCapturer, warn_about_failure
from sb3_clipvf.envs.tensor import TensorObs, TensorStep, TensorVecEnv, actions_as_tensor, with_index

_KEPT = (th.Tensor, th.Generator, bool, int, float, str, np.generic, type(None))
_HOOKS = vars(th.nn.Module()).keys() - {"training", "_parameters", "_buffers", "_modules"}


class GraphedTensorEnv:
    """
    A :class:`.TensorVecEnv` whose step is captured once on a CUDA device, and then launched by one call.

    The step must be the same operations each time. It reads nothing from the device, and writes its state in-place, as
    ``reset_tensors`` does. Random numbers come from the device's generator, or from a ``torch.Generator`` of it that
    the environment keeps. The constructor resets the environment and steps it, to check what it keeps. The step is
    captured at its first call, and again after something that the environment keeps, such as a number, was changed from
    outside. On the CPU, or after a failed capture, which is logged, the operations run one by one.

    With ``engine="cuda_graph"``, one graph has the whole step of a rollout: policy, environments and buffer.

    :param env: Environment to capture.
    :raises ValueError: If it keeps anything that ``step_tensors`` or ``reset_tensors`` does not write in-place, or
        ``step_tensors`` draws random numbers on the host.
    """

    def __init__(self, env: TensorVecEnv) -> None:
        self.env = env
        self.num_envs, self.device = int(env.num_envs), with_index(th.device(env.device))
        self.observation_space, self.action_space = env.observation_space, env.action_space
        space = copy.deepcopy(self.action_space)  # whose random state may change
        space.seed(0)
        sample = np.repeat(np.asarray(space.sample())[None], self.num_envs, axis=0)
        self._actions = actions_as_tensor(sample, self.action_space, self.device)
        self._graph: Graph | None = None
        self._step: TensorStep | None = None
        self._is_part, self._captures = False, self.device.type == "cuda"
        env.reset_tensors()
        before, random_states = _kept(env), _host_random_states(env)
        env.step_tensors(self._actions)
        _check_in_place("step_tensors", before, _kept(env))
        _check_draws(random_states, _host_random_states(env))
        env.reset_tensors()
        _check_in_place("reset_tensors", before, _kept(env))
        self._kept = before

    @property
    def generators(self) -> list[th.Generator]:
        """Random number generators of the device that the environment keeps."""
        generators = [value for value in self._kept.values() if isinstance(value, th.Generator)]
        # That of `th.Generator("cuda")` has no index.
        return [generator for generator in generators if generator.device.type == self.device.type]

    def reset_tensors(self, seed: int | None = None) -> TensorObs:
        """Begin an episode in every environment."""
        return self.env.reset_tensors(seed)

    def step_tensors(self, actions: th.Tensor) -> TensorStep:
        """Step all environments. The next step may overwrite the result."""
        if self._is_part or not self._captures:
            return TensorStep(*self.env.step_tensors(actions))
        self._actions.copy_(actions)
        self.kept()
        if self._graph is None:
            try:
                with self.unchanged():
                    self._graph = GraphCapturer(self.device).capture(self._run, self._run, self.generators)
            except RuntimeError as error:
                warn_about_failure("the environments' step", error)
                self._captures = False
        if self._graph is None:
            return self.step_tensors(actions)
        self._graph.replay()
        return self._step  # type: ignore[return-value]

    def kept(self) -> dict[str, Any]:
        """Return what the environment keeps: the same object until something was changed, which drops the graph."""
        now = _kept(self.env)
        if _changed(self._kept, now) is not None:
            self._kept, self._graph = now, None
        return self._kept

    def close(self) -> None:
        """Close the environment."""
        self.env.close()

    @contextmanager
    def as_part(self) -> Iterator[None]:
        """Run the operations of steps one by one within the context, where a larger graph captures them."""
        self._is_part = True
        try:
            yield
        finally:
            self._is_part = False

    @contextmanager
    def unchanged(self) -> Iterator[None]:
        """Restore the environment's tensors and random states at the end of the context."""
        restore = restorer_of([value for value in self._kept.values() if isinstance(value, th.Tensor | th.Generator)])
        try:
            yield
        finally:
            restore()

    def _run(self) -> None:
        self._step = TensorStep(*self.env.step_tensors(self._actions))


def restorer_of(kept: list[Any]) -> Callable[[], None]:
    """Return a function that restores tensors and generators in-place to their present states."""
    places = [_without_repeats(value) if isinstance(value, th.Tensor) else value for value in kept]
    states = [place.clone() if isinstance(place, th.Tensor) else place.get_state() for place in places]

    @th.inference_mode()  # which may write tensors that were created in it
    def restore() -> None:
        for place, state in zip(places, states, strict=True):
            if isinstance(place, th.Tensor):
                place.copy_(state)
            else:
                place.set_state(state)

    return restore


def _without_repeats(tensor: th.Tensor) -> th.Tensor:
    """Return a writable view: detached from autograd, with each expanded axis reduced to length 1."""
    return tensor.detach()[tuple(slice(None if stride else 1) for stride in tensor.stride())]


def _check_in_place(method: str, before: dict[str, Any], after: dict[str, Any]) -> None:
    name = _changed(before, after)
    if name is not None:
        raise ValueError(
            f"`env` must write what it keeps in-place, got a new `{name}` after `{method}`. Keep tensors, and "
            "write to them with copy_(), add_() or out=; or use the environment without GraphedTensorEnv."
        )


def _check_draws(before: dict[str, str], after: dict[str, str]) -> None:
    drawn = [name for name in after if before.get(name) != after[name]]
    if drawn:
        raise ValueError(
            f"`env` must draw random numbers on its device, got one from {drawn[0]} in `step_tensors`, which a graph "
            "would replay in each step. Draw from the device's generator, or from a torch.Generator of it that the "
            "environment keeps; or use the environment without GraphedTensorEnv."
        )


def _host_random_states(env: TensorVecEnv) -> dict[str, str]:
    """Return the states of the host's random generators, those of the process and those that an environment keeps."""
    states: dict[str, Any] = {"Python's random": random.getstate(), "NumPy's random": np.random.get_state(legacy=False)}
    if th.device(env.device).type != "cpu":
        states["torch's generator of the CPU"] = th.get_rng_state().tolist()
    for name, value in _found(env, (np.random.Generator, np.random.RandomState, random.Random, th.Generator)):
        if isinstance(value, np.random.Generator):
            states[f"`{name}`"] = value.bit_generator.state
        elif isinstance(value, np.random.RandomState):
            states[f"`{name}`"] = value.get_state(legacy=False)
        elif isinstance(value, random.Random):
            states[f"`{name}`"] = value.getstate()
        elif isinstance(value, th.Generator) and value.device.type != th.device(env.device).type:
            states[f"`{name}`"] = value.get_state().tolist()
    with np.printoptions(threshold=sys.maxsize):
        return {name: repr(state) for name, state in states.items()}


def _changed(before: dict[str, Any], after: dict[str, Any]) -> str | None:
    """Return the name of the first thing that is not the same, or None."""
    for name in before | after:
        if name not in before or name not in after or not _is_same(before[name], after[name]):
            return name
    return None


def _is_same(before: Any, after: Any) -> bool:
    """Return whether two tensors are in the same memory, or two other values are equal."""
    if before is after or type(before) is not type(after):
        return before is after
    if isinstance(before, th.Tensor):
        places = [(tensor.data_ptr(), tensor.shape, tensor.stride(), tensor.dtype) for tensor in (before, after)]
        return places[0] == places[1]
    if isinstance(before, np.ndarray):
        return bool(before.shape == after.shape and before.tobytes() == after.tobytes())
    return bool(before == after)


def _kept(env: Any) -> dict[str, Any]:
    """
    Return the tensors, arrays, numbers, texts and generators that an environment keeps, by name.

    Tensors on another device are arrays, since a graph does not write them.
    """
    kind = th.device(env.device).type

    def kept(value: Any) -> Any:
        if isinstance(value, th.Tensor) and value.device.type != kind:
            return value.numpy(force=True).copy()
        return value.copy() if isinstance(value, np.ndarray) else value

    return {name: kept(value) for name, value in _found(env, (*_KEPT, np.ndarray))}


def _found(env: Any, kinds: tuple[type, ...]) -> list[tuple[str, Any]]:
    """Return the objects of some kinds that an environment keeps, with their names."""
    found: list[tuple[str, Any]] = []
    visited: set[int] = set()

    def visit(name: str, value: Any) -> None:
        if isinstance(value, kinds):
            found.append((name, value))
        elif id(value) not in visited:
            visited.add(id(value))
            for key, part in _parts(value):
                visit(f"{name}.{key}" if name else key, part)

    visit("", env)
    return found


def _parts(value: Any) -> list[tuple[str, Any]]:
    """Return what an object keeps, by name. Functions keep nothing; a ``torch.nn.Module`` is an object."""
    parts: list[tuple[Any, Any]] = []
    if isinstance(value, Mapping):
        parts = list(value.items())
    elif isinstance(value, list | tuple | deque):
        parts = list(enumerate(value))
    elif isinstance(value, MethodType):
        parts = [("__self__", value.__self__)]
    elif isinstance(value, partial):
        parts = [("func", value.func), ("args", value.args), ("keywords", value.keywords)]
    elif not (isinstance(value, spaces.Space | ModuleType | type) or _is_function(value)):
        state = object.__getstate__(value)  # of a class with __slots__, a pair of dicts or None
        for names in state if isinstance(state, tuple) else (state,):
            parts += (names or {}).items()
        if isinstance(value, th.nn.Module):  # its dicts of hooks take most of the time
            parts = [(key, part) for key, part in parts if key not in _HOOKS]
    return [(str(key), part) for key, part in parts]


def _is_function(value: Any) -> bool:
    """Return whether a value is a function. Compiled ones may be objects with the function's name, and keep caches."""
    if isinstance(value, th.nn.Module) or not callable(value):
        return False
    return hasattr(value, "__name__") or type(value).__module__.startswith("torch._dynamo.")
