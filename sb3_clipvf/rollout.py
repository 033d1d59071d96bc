"""Rollouts: generalised advantage estimation, and the buffer that holds one rollout and draws minibatches from it."""

import inspect
from collections.abc import Generator
from typing import Any, NamedTuple

import numpy as np
import torch as th
from gymnasium import spaces
from stable_baselines3.common.buffers import BaseBuffer, DictRolloutBuffer, RolloutBuffer
from stable_baselines3.common.vec_env import VecNormalize

from sb3_clipvf.common.memory import free_memory
from sb3_clipvf.common.messages import log


def gae(
    rewards: np.ndarray,
    values: np.ndarray,
    episode_starts: np.ndarray,
    last_values: np.ndarray,
    dones: np.ndarray,
    gamma: float,
    gae_lambda: float,
) -> tuple[np.ndarray, np.ndarray]:
    """
    Advantages and lambda-returns of a rollout.

    ``delta_t = r_t + gamma * V_{t+1} * (1 - done_t) - V_t`` and
    ``A_t = delta_t + gamma * lambda * (1 - done_t) * A_{t+1}``; the returns are ``A_t + V_t``.

    :param rewards: Shape ``(n_steps, n_envs)``; a truncated episode's last reward already holds ``gamma * V`` of its
        final observation.
    :param values: V_old of each observation, shape ``(n_steps, n_envs)``, return units.
    :param episode_starts: 1 where an observation is the first of its episode, shape ``(n_steps, n_envs)``.
    :param last_values: V_old of the observation after the last step, shape ``(n_envs,)``.
    :param dones: Whether the last step ended an episode, shape ``(n_envs,)``.
    :param gamma: Discount factor, in [0, 1].
    :param gae_lambda: lambda, in [0, 1].
    :return: Advantages and returns, each of shape ``(n_steps, n_envs)`` and the dtype of ``values``.
    Source: Schulman et al. 2016, arXiv 1506.02438, equations 11, 12 and 16.
    """
    n_steps = len(rewards)
    advantages = np.empty_like(values)
    next_values, next_non_terminal = last_values, 1.0 - dones.astype(values.dtype)
    advantage = np.zeros_like(last_values)
    for step in reversed(range(n_steps)):
        delta = rewards[step] + gamma * next_values * next_non_terminal - values[step]
        advantage = delta + gamma * gae_lambda * next_non_terminal * advantage
        advantages[step] = advantage
        next_values, next_non_terminal = values[step], 1.0 - episode_starts[step]
    return advantages, advantages + values


class MiniBatch(NamedTuple):
    """
    Transitions of one gradient step; the first six fields are SB3's ``RolloutBufferSamples``.

    :param observations: In the observation space's own dtype, shape ``(n, *obs_shape)``, or a dict of such.
    :param actions: As the policy gave them, shape ``(n, action_dim)``, float32.
    :param old_values: Shape ``(n,)``, return units.
    :param old_log_prob: Shape ``(n,)``, nats.
    :param advantages: Not normalised, shape ``(n,)``.
    :param returns: Shape ``(n,)``, return units.
    :param old_dist_params: Parameters of the rollout's action distribution, shape ``(n, k)``, or None if not stored.
    """

    observations: Any
    actions: th.Tensor
    old_values: th.Tensor
    old_log_prob: th.Tensor
    advantages: th.Tensor
    returns: th.Tensor
    old_dist_params: th.Tensor | None = None


class TensorRolloutBuffer(BaseBuffer):
    """
    One rollout in contiguous memory that NumPy and torch share; a minibatch is one gather from it.

    It serves SB3's callbacks and ``collect_rollouts`` like SB3's ``RolloutBuffer`` and ``DictRolloutBuffer``, and draws
    the same minibatches from the same NumPy random state. Unlike there, the arrays keep their shape
    ``(n_steps, n_envs, ...)`` after :meth:`get`, and memory is allocated once, at the first :meth:`reset`.

    :param buffer_size: Steps of each environment, n_steps.
    :param observation_space: Of one environment; dict spaces give one array a key.
    :param action_space: Of one environment.
    :param device: Where minibatches are needed.
    :param gae_lambda: lambda of the advantage estimate, in [0, 1].
    :param gamma: Discount factor, in [0, 1].
    :param n_envs: Number of environments.
    :param dist_param_dim: Width of the old distribution's parameter rows; 0 stores none.
    :raises ValueError: By :meth:`check_memory` and the first :meth:`reset`, if the memory is not there.
    """

    def __init__(
        self,
        buffer_size: int,
        observation_space: spaces.Space[Any],
        action_space: spaces.Space[Any],
        device: th.device | str = "auto",
        gae_lambda: float = 1.0,
        gamma: float = 0.99,
        n_envs: int = 1,
        dist_param_dim: int = 0,
    ) -> None:
        super().__init__(buffer_size, observation_space, action_space, device, n_envs=n_envs)
        self.gae_lambda = gae_lambda
        self.gamma = gamma
        self.dist_param_dim = dist_param_dim
        # The native engine puts a compiled one with the same roundings here.
        self.gae_fn = gae
        # Steps and environments that there is memory for.
        self._allocated: tuple[int, int] | None = None
        self._flat: dict[str, Any] | None = None
        # The arrays that it was made from.
        self._flat_arrays: list[np.ndarray] = []
        self._lacks_dist_params = False

    @property
    def has_dist_params(self) -> bool:
        """
        Whether each step of this rollout so far came with the old distribution's parameters.

        :return: False where they are not stored, or a step came without.
        """
        return bool(self.dist_param_dim) and not self._lacks_dist_params

    @property
    def nbytes(self) -> int:
        """
        Memory that the rollout takes once allocated.

        :return: Bytes.
        """
        cells = self.buffer_size * self.n_envs
        obs_bytes: int = sum(
            int(np.prod(shape)) * np.dtype(dtype).itemsize for shape, dtype in self._obs_layout().values()
        )
        action_bytes: int = self.action_dim * self._action_dtype.itemsize
        # rewards, returns, episode_starts, values, log_probs, advantages
        return cells * (obs_bytes + action_bytes + 4 * (6 + self.dist_param_dim))

    @property
    def _is_allocated(self) -> bool:
        return self._allocated == (self.buffer_size, self.n_envs)

    @property
    def _action_dtype(self) -> np.dtype[Any]:
        # The policy's own actions are floats, whatever the Box that they are clipped to takes.
        return np.dtype(np.float32 if isinstance(self.action_space, spaces.Box) else self.action_space.dtype)

    def check_memory(self) -> None:
        """
        Refuse a rollout that does not fit into the memory that is free now.

        :raises ValueError: If :attr:`nbytes` exceeds it.
        """
        available = free_memory()
        if not self._is_allocated and self.nbytes > available:
            gib = 2**30
            raise ValueError(
                f"`n_steps` must be small enough for the rollout to fit into memory, got n_steps={self.buffer_size} "
                f"with n_envs={self.n_envs}, which takes {self.nbytes / gib:.1f} GiB where {available / gib:.1f} GiB "
                "are free. Lower `n_steps` or the number of environments, or shrink the observations."
            )

    def reset(self) -> None:
        """
        Make ready for the next rollout; memory is allocated for ``buffer_size`` and ``n_envs`` as they are now.

        :raises ValueError: Where memory is allocated, if the rollout does not fit into it.
        """
        if not self._is_allocated:
            self.check_memory()
            log.info("The rollout of %d x %d steps takes %.2f MiB", self.buffer_size, self.n_envs, self.nbytes / 2**20)
            self._allocate()
        self.forget_copies()
        self._lacks_dist_params = False
        super().reset()

    def add(
        self,
        obs: np.ndarray | dict[str, np.ndarray],
        action: np.ndarray,
        reward: np.ndarray,
        episode_start: np.ndarray,
        value: th.Tensor | np.ndarray,
        log_prob: th.Tensor | np.ndarray,
        dist_params: th.Tensor | np.ndarray | None = None,
    ) -> None:
        """
        Store one step of all environments.

        :param obs: Shape ``(n_envs, *obs_shape)``, or a dict of such.
        :param action: Shape ``(n_envs, ...)``, as the policy gave it.
        :param reward: Shape ``(n_envs,)``.
        :param episode_start: Whether ``obs`` begins an episode, shape ``(n_envs,)``.
        :param value: Shape ``(n_envs,)`` or ``(n_envs, 1)``.
        :param log_prob: Shape ``(n_envs,)``.
        :param dist_params: Shape ``(n_envs, dist_param_dim)``. None, as SB3's loop calls it: the rollout has no old
            distribution (:attr:`has_dist_params`).
        :raises ValueError: If the rollout is complete.
        """
        if self._allocated is None:  # a loop of the user's need not reset SB3's buffer before its first rollout
            self.reset()
        if self.pos == self.buffer_size:
            raise ValueError(
                f"`rollout_buffer` must take {self.buffer_size} steps at most, got one more. Call its `reset` before "
                "the next rollout; `load` with another `n_steps` builds one for longer rollouts."
            )
        if isinstance(self.observations, dict):
            for key, array in self.observations.items():
                array[self.pos] = np.reshape(obs[key], array.shape[1:])
        else:
            self.observations[self.pos] = _shaped(obs, self.observations.shape[1:])
        self.actions[self.pos] = _shaped(action, self.actions.shape[1:])
        self.rewards[self.pos] = reward
        self.episode_starts[self.pos] = episode_start
        self.values[self.pos] = _on_host(value).reshape(-1)
        self.log_probs[self.pos] = _on_host(log_prob).reshape(-1)
        if dist_params is None:
            self._lacks_dist_params = True
        elif self.dist_param_dim:
            self.dist_params[self.pos] = _on_host(dist_params)
        self.pos += 1
        self.full = self.pos == self.buffer_size

    def compute_returns_and_advantage(self, last_values: th.Tensor, dones: np.ndarray) -> None:
        """
        Fill :attr:`advantages` and :attr:`returns` by :func:`gae`.

        :param last_values: V_old of the observations after the last step, ``n_envs`` of them.
        :param dones: Whether the last step ended an episode, shape ``(n_envs,)``.
        """
        self.advantages[:], self.returns[:] = self.gae_fn(
            self.rewards,
            self.values,
            self.episode_starts,
            last_values.detach().cpu().numpy().reshape(-1),
            dones,
            self.gamma,
            self.gae_lambda,
        )
        self.forget_copies()

    def get(self, batch_size: int | None = None) -> Generator[MiniBatch, None, None]:
        """
        Draw a new permutation of the rollout and walk through it.

        :param batch_size: Transitions in each minibatch, the last one may be shorter; None: all in one.
        :return: Minibatches on the buffer's device.
        :raises ValueError: If the rollout is not complete.
        """
        check_complete(self)
        indices = np.random.permutation(self.buffer_size * self.n_envs)
        yield from _minibatches(self, indices, len(indices) if batch_size is None else batch_size)

    def in_order(self, batch_size: int) -> Generator[MiniBatch, None, None]:
        """
        Walk through the rollout in the order of its memory, without touching a random state.

        :param batch_size: Transitions in each minibatch, the last one may be shorter.
        :return: Minibatches on the buffer's device.
        """
        indices = np.arange(self.buffer_size * self.n_envs).reshape(self.n_envs, self.buffer_size).T
        yield from _minibatches(self, indices.flatten(), batch_size)

    def forget_copies(self) -> None:
        """Read the arrays again at the next minibatch, since they may have been changed in place."""
        self._flat, self._flat_arrays = None, []

    def _rows(self, indices: np.ndarray) -> th.Tensor:
        # SB3 numbers transitions environment by environment; memory here runs step by step.
        rows = (indices % self.buffer_size) * self.n_envs + indices // self.buffer_size
        return th.as_tensor(rows, device=self.device)

    def _gather(self, rows: th.Tensor) -> MiniBatch:
        flat = self._flat_tensors()
        observations = flat["observations"]
        return MiniBatch(
            observations=(
                {key: tensor[rows] for key, tensor in observations.items()}
                if isinstance(observations, dict)
                else observations[rows]
            ),
            actions=flat["actions"][rows],
            old_values=flat["values"][rows],
            old_log_prob=flat["log_probs"][rows],
            advantages=flat["advantages"][rows],
            returns=flat["returns"][rows],
            old_dist_params=flat["dist_params"][rows] if self.has_dist_params else None,
        )

    def _get_samples(self, batch_inds: np.ndarray, env: VecNormalize | None = None) -> MiniBatch:  # type: ignore[override]
        return self._gather(self._rows(batch_inds))

    def _flat_tensors(self) -> dict[str, Any]:
        """The rollout with steps and environments in one axis: views on the CPU where they can be, copies elsewhere."""
        by_key = self.observations if isinstance(self.observations, dict) else {"": self.observations}
        arrays = [self.values, self.log_probs, self.advantages, self.returns, self.actions, self.dist_params]
        arrays += by_key.values()
        # A callback may have assigned others.
        if self._flat is None or list(map(id, arrays)) != list(map(id, self._flat_arrays)):
            names = ["values", "log_probs", "advantages", "returns"]
            flat: dict[str, Any] = {name: self._to_flat(getattr(self, name)) for name in names}
            flat["actions"] = self._to_flat(self.actions.astype(np.float32, copy=False))
            if self.has_dist_params:
                flat["dist_params"] = self._to_flat(self.dist_params)
            tensors = {key: self._to_flat(array) for key, array in by_key.items()}
            flat["observations"] = tensors if isinstance(self.observations, dict) else tensors[""]
            self._flat, self._flat_arrays = flat, arrays
        return self._flat

    def _to_flat(self, array: np.ndarray) -> th.Tensor:
        return th.as_tensor(array.reshape(self.buffer_size * self.n_envs, *array.shape[2:]), device=self.device)

    def _obs_layout(self) -> dict[str, tuple[tuple[int, ...], Any]]:
        if isinstance(self.observation_space, spaces.Dict):
            keys = self.observation_space.spaces
            return {key: (self.obs_shape[key], space.dtype) for key, space in keys.items()}  # type: ignore[call-overload]
        return {"": (self.obs_shape, self.observation_space.dtype)}

    def _allocate(self) -> None:
        cells = (self.buffer_size, self.n_envs)
        arrays = {key: np.zeros((*cells, *shape), dtype) for key, (shape, dtype) in self._obs_layout().items()}
        self.observations = arrays if isinstance(self.observation_space, spaces.Dict) else arrays[""]
        self.actions = np.zeros((*cells, self.action_dim), self._action_dtype)
        self.rewards = np.zeros(cells, np.float32)
        self.returns = np.zeros(cells, np.float32)
        self.episode_starts = np.zeros(cells, np.float32)
        self.values = np.zeros(cells, np.float32)
        self.log_probs = np.zeros(cells, np.float32)
        self.advantages = np.zeros(cells, np.float32)
        self.dist_params = np.zeros((*cells, self.dist_param_dim), np.float32)
        self._allocated = cells


_get_samples = TensorRolloutBuffer._get_samples


def _minibatches(buffer: TensorRolloutBuffer, indices: np.ndarray, size: int) -> Generator[MiniBatch, None, None]:
    """Walk through transitions in SB3's numbering, by the ``_get_samples`` of a subclass where it has one."""
    if buffer.device.type == "cpu":
        buffer.forget_copies()  # mostly views, which take no time to make again
    if getattr(buffer._get_samples, "__func__", None) is not _get_samples:
        for start in range(0, len(indices), size):
            yield buffer._get_samples(indices[start : start + size])
        return
    rows = buffer._rows(indices)
    for start in range(0, len(indices), size):
        yield buffer._gather(rows[start : start + size])


# What holds one row a step, and draws from complete rollouts alone.
_PLAIN = (TensorRolloutBuffer, RolloutBuffer, DictRolloutBuffer)


def fit_to_rollout(buffer: Any, n_steps: int, n_envs: int) -> None:
    """
    Resize a buffer to the rollout that it will hold, as its next ``reset`` does with the memory.

    A buffer of another class than ours and SB3's is left as it is: it may hold several rows a step.

    :param buffer: About to be reset.
    :param n_steps: Steps of each environment.
    :param n_envs: Number of environments.
    """
    if type(buffer) in _PLAIN:
        buffer.buffer_size, buffer.n_envs = n_steps, n_envs


def takes_dist_params(buffer: Any) -> bool:
    """
    Return whether a buffer's ``add`` takes the old distribution's parameters.

    :param buffer: With the interface of SB3's ``RolloutBuffer``.
    :return: False where none are stored, or an ``add`` of the user's has SB3's arguments alone.
    """
    if not getattr(buffer, "dist_param_dim", 0):
        return False
    if getattr(buffer.add, "__func__", None) is TensorRolloutBuffer.add:
        return True  # as the signature would say, in a hundredth of the time
    parameters = inspect.signature(buffer.add).parameters.values()
    return any(parameter.name == "dist_params" or parameter.kind is parameter.VAR_KEYWORD for parameter in parameters)


def check_complete(buffer: Any) -> None:
    """
    Refuse to draw from a rollout that is not complete: its other rows are zeros, or of a rollout before.

    :param buffer: With the interface of SB3's ``RolloutBuffer``.
    :raises ValueError: If it is not complete.
    """
    if not getattr(buffer, "full", True):
        raise ValueError(
            f"`rollout_buffer` must be full to be trained on, got {buffer.pos} of {buffer.buffer_size} steps. Collect "
            "the others first; `load` with another `n_steps` builds one for shorter rollouts."
        )


def draws_from_complete(buffer: Any) -> bool:
    """
    Return whether a buffer's ``get`` is ours or SB3's, which need all rows.

    :param buffer: With the interface of SB3's ``RolloutBuffer``.
    :return: False for a ``get`` of the user's.
    """
    return "get" not in vars(buffer) and getattr(type(buffer), "get", None) in [known.get for known in _PLAIN]


def has_dist_params(buffer: Any) -> bool:
    """Return whether the rollout in a buffer holds the old distribution; a user's buffer may lack the property."""
    return bool(getattr(buffer, "has_dist_params", getattr(buffer, "dist_param_dim", 0)))


def stored_observation_space(space: spaces.Space[Any], normalizer: VecNormalize | None) -> spaces.Space[Any]:
    """Return the space of the observations to store: float32 for boxes of integers that VecNormalize normalises."""
    if normalizer is None or not normalizer.norm_obs:
        return space
    if isinstance(space, spaces.Dict):
        keys = normalizer.norm_obs_keys or []
        return spaces.Dict({key: _as_float(sub) if key in keys else sub for key, sub in space.spaces.items()})
    return _as_float(space)


def _as_float(space: spaces.Space[Any]) -> spaces.Space[Any]:
    if isinstance(space, spaces.Box) and np.issubdtype(space.dtype, np.integer):
        return spaces.Box(-np.inf, np.inf, space.shape, np.float32)
    return space


def _shaped(array: Any, shape: tuple[int, ...]) -> np.ndarray:
    # np.reshape takes longer than the copy that follows.
    return array if isinstance(array, np.ndarray) and array.shape == shape else np.reshape(array, shape)


def _on_host(tensor: th.Tensor | np.ndarray) -> np.ndarray:
    if isinstance(tensor, np.ndarray):
        return tensor
    try:
        return tensor.numpy()
    except (RuntimeError, TypeError):  # it needs a gradient, or lies on another device
        return tensor.detach().cpu().numpy()
