"""Vectorised environments whose steps are tensors on a device, and SB3's ``VecEnv`` over them."""

from collections.abc import Mapping, Sequence
from types import MappingProxyType
from typing import Any, NamedTuple, Protocol, TypeAlias, TypeGuard, cast, overload, runtime_checkable

import numpy as np
import torch as th
from gymnasium import spaces
from stable_baselines3.common.vec_env.base_vec_env import VecEnv, VecEnvIndices

from sb3_clipvf.common.tensors import torch_dtype
from sb3_clipvf.common.validation import as_gymnasium
from sb3_clipvf.envs.layers import vec_env_layers
from sb3_clipvf.envs.rows import UNKNOWN_FINAL, fill_infos, take_rows
from sb3_clipvf.envs.shapes import name_of, parts
from sb3_clipvf.envs.vector import BatchedVecEnv, Step, keep_final_obs

TensorObs: TypeAlias = th.Tensor | dict[str, th.Tensor]
"""Observations of all environments, shape ``(n_envs, *obs_shape)`` and the dtype of the space, or a dict of these."""

_HINT = "Correct the environment, or its space."


class TensorStep(NamedTuple):
    """
    One step of all environments. All tensors are on the device of the environments.

    :param observations: Observations after the step; where an episode ended, the first one of the next episode.
    :param rewards: Shape ``(n_envs,)``, floating point.
    :param terminated: Whether an episode ended in a state without a future, shape ``(n_envs,)``, bool.
    :param truncated: Whether an episode ended for another reason, such as a time limit, shape ``(n_envs,)``, bool.
    :param final_observations: Like ``observations``, with the final observation in the rows whose episode ended. Other
        rows are not read. None: they are not known. The reward of a truncated episode then includes ``gamma * V`` of
        the observation before the step.
    :param infos: Values of all environments by name. A tensor or an array whose first axis is ``n_envs`` has one row
        for each of them. Nothing reads them until a callback does.
    """

    observations: TensorObs
    rewards: th.Tensor
    terminated: th.Tensor
    truncated: th.Tensor
    final_observations: TensorObs | None = None
    infos: Mapping[str, Any] = MappingProxyType({})


@runtime_checkable
class TensorVecEnv(Protocol):
    """
    Vectorised environment whose steps are tensors. Any class with these attributes and methods is one.

    ``ClipPPO`` trains in it without copying a step to the host. The environment resets each row whose episode ends
    within the same step. It may return the same tensors at each step, since their values are copied.
    """

    num_envs: int  #: Number of environments.
    observation_space: spaces.Space[Any]  #: Observation space of one environment.
    action_space: spaces.Space[Any]  #: Action space of one environment.
    device: th.device  #: Device of all tensors.

    def reset_tensors(self, seed: int | None = None) -> TensorObs:
        """
        Begin an episode in every environment.

        :param seed: Seed of all environments together. None: the random state continues.
        :return: First observations.
        """

    def step_tensors(self, actions: th.Tensor) -> TensorStep:
        """
        Step all environments.

        :param actions: Actions inside the action space, shape ``(n_envs, *action_shape)``: float32 for a Box and
            MultiBinary, int64 for Discrete and MultiDiscrete.
        :return: The step.
        """

    def close(self) -> None:
        """Free what the environments hold."""


class TensorEnvAdapter(BatchedVecEnv):
    """
    SB3's ``VecEnv`` over a :class:`TensorVecEnv`, which is one itself.

    SB3's tools step it like other environments, with arrays on the host. ``ClipPPO`` steps it with tensors. Both check
    what the environments return.
    """

    def __init__(self, env: TensorVecEnv, **kwargs: Any) -> None:
        self.device = with_index(th.device(env.device))
        #: Observations after the latest step; None before the first reset.
        self.observations: TensorObs | None = None
        #: Rewards of the latest step, before clipping.
        self.true_rewards = th.zeros(int(env.num_envs), device=self.device)
        super().__init__(env, int(env.num_envs), env.observation_space, env.action_space, **kwargs)
        self._check = TensorCheck(self.observation_space, self.num_envs, self.device)

    @property
    def may_train_on_tensors(self) -> bool:
        """Whether training steps tensors: a file of statistics gets its rows from steps on the host."""
        return self._writer is None

    def reset_tensors(self, seed: int | None = None) -> TensorObs:
        """Begin an episode in every environment, and return the first observations."""
        observations = self._check.observations("reset_tensors", self.env.reset_tensors(seed))
        self.statistics.restart()
        self._was_reset = True
        self.observations = observations
        return observations

    def step_tensors(self, actions: th.Tensor) -> TensorStep:
        """Step all environments; with ``clip_rewards``, the step has the signs of the finite rewards."""
        step = self._check.step(TensorStep(*self.env.step_tensors(actions)))
        self.observations, self.true_rewards = step.observations, step.rewards
        if not self.clip_rewards:
            return step
        rewards = step.rewards
        return step._replace(rewards=th.where(rewards.isfinite(), rewards.sign(), rewards))  # NaN has the sign 0

    def get_attr(self, attr_name: str, indices: VecEnvIndices = None) -> list[Any]:
        """Return an attribute that all environments share, once for each of ``indices``."""
        if attr_name == "render_mode" and not hasattr(self.env, attr_name):
            return [None for _ in self._get_indices(indices)]
        return super().get_attr(attr_name, indices)

    def _reset_all(self, seeds: list[int] | None, options: dict[str, Any] | None) -> tuple[Any, dict[str, Any]]:
        if options:
            raise ValueError(
                f"`options` must be empty for tensor environments, got {options}. Set them on the environment itself."
            )
        return host_copy(self.reset_tensors(None if seeds is None else seeds[0])), {}

    def _step_all(self, actions: np.ndarray) -> Step:
        self._step = step = self.step_tensors(actions_as_tensor(actions, self.action_space, self.device))
        rewards = host_copy(self.true_rewards)
        masks = host_copy(step.terminated), host_copy(step.truncated)
        return Step(host_copy(step.observations), rewards, rewards, *masks, host_infos(step.infos))

    def _begin_next(self, step: Step, ended: np.ndarray, infos: list[dict[str, Any]]) -> np.ndarray:
        final = self._step.final_observations
        if final is not None:
            keep_final_obs(infos, host_copy(final), ended)
        else:
            for index in ended.tolist():
                infos[index][UNKNOWN_FINAL] = True
        return np.ones(len(ended), dtype=bool)


class TensorCheck:
    """
    Check what tensor environments return: torch would broadcast or cast wrong shapes and types without an error.

    A check reads attributes of the tensors, and no numbers.
    """

    def __init__(self, space: spaces.Space[Any], n_envs: int, device: th.device) -> None:
        self._n_envs, self._device = n_envs, device
        self._parts = [
            (key, th.Size((n_envs, *(part.shape or ()))), torch_dtype(part.dtype)) for key, part in parts(space)
        ]

    def observations(self, name: str, observations: Any) -> TensorObs:
        """
        Check the observations of all environments; messages call them ``name``.

        Return them, a mapping of any class as a dict with the keys of the space.
        """
        for key, shape, dtype in self._parts:
            if key is not None and not (isinstance(observations, Mapping) and key in observations):
                raise TypeError(
                    f"`{name}` must return a dict of tensors with the keys of the observation space, got "
                    f"{_kind(observations)} without {key!r}. {_HINT}"
                )
            part = observations if key is None else observations[key]
            self._tensor(name, name_of(key), part, shape, dtype)
        if isinstance(observations, Mapping):
            return {key: observations[key] for key, *_ in self._parts}
        return cast(th.Tensor, observations)

    def step(self, step: TensorStep) -> TensorStep:
        """Check a step, and return it, with observations as :meth:`observations` returns them."""
        observations, final = self.observations("step_tensors", step.observations), step.final_observations
        if final is not None:
            final = self.observations("step_tensors", final)
        if not isinstance(step.infos, Mapping):
            raise TypeError(f"`step_tensors` must return infos as a dict, got {_kind(step.infos)}. {_HINT}")
        column = th.Size((self._n_envs,))
        self._tensor("step_tensors", "rewards", step.rewards, column, None)
        self._tensor("step_tensors", "terminated", step.terminated, column, th.bool)
        self._tensor("step_tensors", "truncated", step.truncated, column, th.bool)
        return step._replace(observations=observations, final_observations=final)

    def _tensor(self, name: str, what: str, tensor: Any, shape: th.Size, dtype: th.dtype | None) -> None:
        if not isinstance(tensor, th.Tensor):
            raise TypeError(f"`{name}` must return {what} as a tensor, got {_kind(tensor)}. {_HINT}")
        is_right = tensor.is_floating_point() if dtype is None else tensor.dtype == dtype
        if is_right and tensor.shape == shape and is_same_device(tensor.device, self._device):
            return
        raise ValueError(
            f"`{name}` must return {what} of shape {tuple(shape)}, {dtype or 'floating point'}, on {self._device}, got "
            f"{tuple(tensor.shape)}, {tensor.dtype}, on {tensor.device}. {_HINT}"
        )


class LazyInfos(Sequence[dict[str, Any]]):
    """The infos of a step, one dict for each environment. They are built, on the host, when the first one is read."""

    def __init__(self, step: TensorStep, n_envs: int) -> None:
        self._step, self._n_envs = step, n_envs
        self._rows: list[dict[str, Any]] | None = None

    def __len__(self) -> int:
        return self._n_envs

    @overload
    def __getitem__(self, index: int) -> dict[str, Any]: ...

    @overload
    def __getitem__(self, index: slice) -> list[dict[str, Any]]: ...

    def __getitem__(self, index: int | slice) -> dict[str, Any] | list[dict[str, Any]]:
        if self._rows is None:
            self._rows = self._build()
        return self._rows[index]

    def _build(self) -> list[dict[str, Any]]:
        step = self._step
        terminated, truncated = host_copy(step.terminated), host_copy(step.truncated)
        rows = [{"TimeLimit.truncated": timed_out} for timed_out in (truncated & ~terminated).tolist()]
        fill_infos(rows, host_infos(step.infos))
        ended = np.flatnonzero(terminated | truncated)
        if step.final_observations is None:
            for index in ended.tolist():
                rows[index][UNKNOWN_FINAL] = True
        elif len(ended):
            finals = take_rows(host_copy(step.final_observations), ended)
            for row, index in enumerate(ended.tolist()):
                rows[index]["terminal_observation"] = take_rows(finals, row)  # type: ignore[arg-type]
        return rows


def as_sb3_env(env: Any) -> Any:
    """Return SB3's ``VecEnv`` over a tensor environment; another environment as :func:`.as_gymnasium` returns it."""
    return TensorEnvAdapter(env) if is_tensor_vec_env(env) else as_gymnasium(env)


def is_tensor_vec_env(env: Any) -> TypeGuard[TensorVecEnv]:
    """Return whether an environment has the members of :class:`TensorVecEnv`, and is not an SB3 ``VecEnv``."""
    # Before Python 3.12, isinstance reads the members, in any order, and EnvPool's spaces warn when they are read.
    # `device` is the member that environments of other libraries lack.
    return hasattr(env, "device") and not isinstance(env, VecEnv) and isinstance(env, TensorVecEnv)


def tensor_device(env: VecEnv | None) -> th.device | None:
    """Return the device of tensor environments, or None for others."""
    base = None if env is None else vec_env_layers(env)[-1]
    return base.device if isinstance(base, TensorEnvAdapter) else None


def check_tensor_device(env: VecEnv | None, device: th.device) -> None:
    """Raise ValueError if tensor environments are on a different device from the policy's."""
    own = tensor_device(env)
    if own is not None and not is_same_device(own, device):
        raise ValueError(
            f"`device` must be that of the tensor environments, {own}, got {device}. Leave it out, or build the "
            "environments on that device."
        )


def is_same_device(first: th.device, second: th.device) -> bool:
    """Return whether two devices are one; without an index, the current one of its kind is meant."""
    first, second = with_index(first), with_index(second)
    return first.type == second.type and (first.index or 0) == (second.index or 0)


def with_index(device: th.device) -> th.device:
    """Return a device with the index of the current one of its kind, if it has no index and there are several."""
    module = getattr(th, device.type, None)
    if device.index is not None or device.type == "cpu" or not hasattr(module, "current_device"):
        return device
    return th.device(device.type, module.current_device())


def host_copy(tensors: Any) -> Any:
    """Return a tensor, or nested dicts of tensors, as arrays in memory of their own."""
    if isinstance(tensors, Mapping):
        return {key: host_copy(tensor) for key, tensor in tensors.items()}
    whole = tensors.detach()
    # NumPy has no bfloat16.
    array = (whole.float() if whole.dtype == th.bfloat16 else whole).cpu().numpy()
    return array.copy() if tensors.device.type == "cpu" else array


def copy_step(step: TensorStep) -> TensorStep:
    """Return a step in memory of its own, since environments may write the next one into the same tensors."""
    return TensorStep(*map(copy_tensors, step))


def copy_tensors(value: Any) -> Any:
    """Return a value whose tensors, also those in dicts, lists and tuples, are copies."""
    if isinstance(value, th.Tensor):
        return value.clone()
    if isinstance(value, Mapping):
        return {key: copy_tensors(part) for key, part in value.items()}
    return type(value)(map(copy_tensors, value)) if type(value) in (list, tuple) else value


def host_infos(infos: Any) -> Any:
    """Return infos whose tensors, also those in dicts, lists and tuples, are converted to arrays or numbers."""
    if isinstance(infos, Mapping):
        return {key: host_infos(value) for key, value in infos.items()}
    if type(infos) in (list, tuple):
        return type(infos)(map(host_infos, infos))
    if not isinstance(infos, th.Tensor):
        return infos
    return host_copy(infos) if infos.ndim else infos.item()


def actions_as_tensor(actions: np.ndarray, space: spaces.Space[Any], device: th.device) -> th.Tensor:
    """Return actions of all environments, from SB3's tools, as :meth:`TensorVecEnv.step_tensors` takes them."""
    is_whole = isinstance(space, spaces.Discrete | spaces.MultiDiscrete)
    array = np.asarray(actions, np.int64 if is_whole else np.float32)
    return th.tensor(array.reshape(len(array), *(space.shape or ())), device=device)


def _kind(value: Any) -> str:
    return f"a value of type {type(value).__name__}"
