"""Generalised advantage estimation (GAE), and the buffer that holds one rollout and yields its minibatches."""

import inspect
from collections.abc import Generator
from typing import Any, NamedTuple, cast

import numpy as np
import torch as th
from gymnasium import spaces
from stable_baselines3.common.buffers import BaseBuffer, DictRolloutBuffer, RolloutBuffer
from stable_baselines3.common.vec_env import VecNormalize

from sb3_clipvf.common.messages import log
from sb3_clipvf.common.resources import free_memory


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
    Compute the advantages and lambda-returns of a rollout.

    ``delta_t = r_t + gamma * V_{t+1} * (1 - done_t) - V_t`` and
    ``A_t = delta_t + gamma * lambda * (1 - done_t) * A_{t+1}``; the returns are ``A_t + V_t``.

    :param rewards: Shape ``(n_steps, n_envs)``. The last reward of a truncated episode includes ``gamma * V`` of its
        final observation.
    :param values: V_old of each observation, shape ``(n_steps, n_envs)``, return units.
    :param episode_starts: 1 where an observation is the first of its episode, else 0, shape ``(n_steps, n_envs)``.
    :param last_values: V_old of the observations after the last step, shape ``(n_envs,)``.
    :param dones: Whether the last step ended an episode, shape ``(n_envs,)``.
    :param gamma: Discount factor, in [0, 1].
    :param gae_lambda: lambda, in [0, 1].
    :return: Advantages and returns, each of shape ``(n_steps, n_envs)`` and the dtype of ``values``.
    Source: Schulman et al. 2016, arXiv 1506.02438, equations 11, 12 and 16.
    """
    advantages = np.empty_like(values)
    next_values, next_non_terminal = last_values, 1.0 - dones.astype(values.dtype)
    advantage = np.zeros_like(last_values)
    for step in reversed(range(len(rewards))):
        delta = rewards[step] + gamma * next_values * next_non_terminal - values[step]
        advantage = delta + gamma * gae_lambda * next_non_terminal * advantage
        advantages[step] = advantage
        next_values, next_non_terminal = values[step], 1.0 - episode_starts[step]
    return advantages, advantages + values


class MiniBatch(NamedTuple):
    """
    Transitions of one gradient step. The first six fields are those of SB3's ``RolloutBufferSamples``.

    :param observations: Shape ``(n, *obs_shape)`` and dtype of the observation space, or a dict of tensors.
    :param actions: The policy's actions, not clipped, shape ``(n, action_dim)``, float32.
    :param old_values: Shape ``(n,)``, return units.
    :param old_log_prob: Shape ``(n,)``, nats.
    :param advantages: Not normalised, shape ``(n,)``.
    :param returns: Shape ``(n,)``, return units.
    :param old_dist_params: Parameters of pi_old (``distributions.dist_params``), shape ``(n, k)``; None if not stored.
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
    One rollout in NumPy arrays, with minibatches as tensors, which are rows gathered from the arrays.

    It replaces SB3's ``RolloutBuffer`` and ``DictRolloutBuffer``, and draws the same minibatches from the same NumPy
    random state. Its arrays keep their shape ``(n_steps, n_envs, ...)`` after :meth:`get`. Memory is allocated once, at
    the first :meth:`reset`.

    :param buffer_size: Steps of each environment, n_steps.
    :param observation_space: Observation space of one environment. A dict space has one array per key.
    :param action_space: Action space of one environment.
    :param device: Device of the minibatches.
    :param gae_lambda: lambda of the advantage estimate, in [0, 1].
    :param gamma: Discount factor, in [0, 1].
    :param n_envs: Number of environments.
    :param dist_param_dim: Number of parameters of pi_old per state (``distributions.dist_param_dim``); 0 stores none.
    """

    #: Marks classes of this package; a derived class does not count as one of them.
    is_of_this_package = True

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
        # The native engine replaces it by a compiled function with the same rounding.
        self.gae_fn = gae
        # Steps and environments for which memory is allocated.
        self._allocated: tuple[int, int] | None = None
        # Tensors of the whole rollout, by field, and the arrays that they were created from.
        self._flat: dict[str, Any] | None = None
        self._flat_arrays: list[np.ndarray] = []
        self._lacks_dist_params = False

    @property
    def has_dist_params(self) -> bool:
        """Whether all steps of this rollout so far were added with ``dist_params``, and these are stored."""
        return bool(self.dist_param_dim) and not self._lacks_dist_params

    @property
    def nbytes(self) -> int:
        """Bytes of the rollout, allocated or not."""
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
        # The policy's actions are floats, whatever the dtype of the Box that they are clipped to.
        return np.dtype(np.float32 if isinstance(self.action_space, spaces.Box) else self.action_space.dtype)

    def check_memory(self) -> None:
        """Raise ``ValueError`` if the rollout is not allocated and does not fit into free memory."""
        available = free_memory()
        if not self._is_allocated and self.nbytes > available:
            gib = 2**30
            raise ValueError(
                f"`n_steps` must be small enough for the rollout to fit into memory, got n_steps={self.buffer_size} "
                f"with n_envs={self.n_envs}, which takes {self.nbytes / gib:.1f} GiB, but {available / gib:.1f} GiB "
                "are free. Lower `n_steps` or the number of environments, or shrink the observations."
            )

    def reset(self) -> None:
        """
        Empty the buffer, and allocate memory if ``buffer_size`` or ``n_envs`` has changed.

        :raises ValueError: If the rollout does not fit into free memory.
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

        :param obs: Shape ``(n_envs, *obs_shape)``, or a dict of arrays.
        :param action: The policy's actions, not clipped, shape ``(n_envs, ...)``.
        :param reward: Shape ``(n_envs,)``.
        :param episode_start: Whether ``obs`` is the first of its episode, shape ``(n_envs,)``.
        :param value: V_old, shape ``(n_envs,)`` or ``(n_envs, 1)``, return units.
        :param log_prob: Shape ``(n_envs,)``, nats.
        :param dist_params: Parameters of pi_old, shape ``(n_envs, dist_param_dim)``. None: minibatches of this rollout
            hold none.
        :raises ValueError: If the rollout is complete.
        """
        self._check_has_room()
        if isinstance(self.observations, dict):
            for key, array in self.observations.items():
                array[self.pos] = _shaped(obs[key], array.shape[1:])
        else:
            self.observations[self.pos] = _shaped(obs, self.observations.shape[1:])
        self.actions[self.pos] = _shaped(action, self.actions.shape[1:])
        self.rewards[self.pos] = reward
        self.episode_starts[self.pos] = episode_start
        self.values[self.pos] = on_host(value).reshape(-1)
        self.log_probs[self.pos] = on_host(log_prob).reshape(-1)
        if dist_params is None:
            self._lacks_dist_params = True
        elif self.dist_param_dim:
            self.dist_params[self.pos] = on_host(dist_params)
        self.pos += 1
        self.full = self.pos == self.buffer_size

    def compute_returns_and_advantage(self, last_values: th.Tensor, dones: np.ndarray) -> None:
        """
        Compute ``advantages`` and ``returns`` by :func:`gae`.

        :param last_values: V_old of the observations after the last step, shape ``(n_envs,)`` or ``(n_envs, 1)``.
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
        Yield the minibatches of one epoch, in a random order of the transitions.

        :param batch_size: Transitions in a minibatch; the last one may be smaller. None: all transitions in one.
        :return: Minibatches on the buffer's device.
        :raises ValueError: If the rollout is not complete.
        """
        check_complete(self)
        indices = np.random.permutation(self.buffer_size * self.n_envs)
        yield from _minibatches(self, indices, len(indices) if batch_size is None else batch_size)

    def draw_rows(self) -> th.Tensor:
        """
        Return the rows of one epoch in the order in which :meth:`get` would use them, from the same random state.

        :return: Row numbers of the rollout with steps and environments in one axis, step by step; int64, on the
            buffer's device.
        :raises ValueError: If the rollout is not complete.
        """
        check_complete(self)
        return self._rows(np.random.permutation(self.buffer_size * self.n_envs))

    def in_order(self, batch_size: int) -> Generator[MiniBatch, None, None]:
        """
        Yield minibatches in the order of collection. No random state changes.

        :param batch_size: Transitions in a minibatch; the last one may be smaller.
        :return: Minibatches on the buffer's device.
        """
        indices = np.arange(self.buffer_size * self.n_envs).reshape(self.n_envs, self.buffer_size).T
        yield from _minibatches(self, indices.flatten(), batch_size)

    def forget_copies(self) -> None:
        """Make the next minibatch read the arrays again, since they may have changed in-place."""
        self._flat, self._flat_arrays = None, []

    def _check_has_room(self) -> None:
        if self._allocated is None:  # SB3's buffer needs no reset before its first rollout
            self.reset()
        if self.pos == self.buffer_size:
            raise ValueError(
                f"The rollout buffer is full ({self.buffer_size} steps). Call its `reset` before the next rollout; for "
                "longer rollouts, `load` with a larger `n_steps`."
            )

    def _rows(self, indices: np.ndarray) -> th.Tensor:
        # SB3 numbers transitions environment by environment; the arrays hold them step by step.
        rows = th.from_numpy((indices % self.buffer_size) * self.n_envs + indices // self.buffer_size)
        if self.device.type == "cuda":
            rows = rows.pin_memory()  # else the copy would wait for the operations before it
        return rows.to(self.device, non_blocking=True)

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
        """Return tensors with steps and environments in one axis: views of the arrays if possible, else copies."""
        fields = {name: getattr(self, name) for name in ("values", "log_probs", "advantages", "returns", "dist_params")}
        obs = self.observations
        arrays = [*fields.values(), self.actions, *(obs.values() if isinstance(obs, dict) else [obs])]
        # A callback may have assigned new arrays.
        if self._flat is None or list(map(id, arrays)) != list(map(id, self._flat_arrays)):
            fields["actions"] = self.actions
            flat: dict[str, Any] = {name: self._to_flat(array, np.float32) for name, array in fields.items()}
            if isinstance(obs, dict):
                flat["observations"] = {key: self._to_flat(array) for key, array in obs.items()}
            else:
                flat["observations"] = self._to_flat(obs)
            self._flat, self._flat_arrays = flat, arrays
        return self._flat

    def _to_flat(self, array: np.ndarray, dtype: Any = None) -> th.Tensor:
        rows: Any = array.reshape(self.buffer_size * self.n_envs, *array.shape[2:])
        with np.errstate(over="ignore"):  # the update reports numbers beyond float32
            # torch cannot read arrays with swapped bytes or negative strides, and warns of read-only ones.
            rows = np.require(rows, dtype or rows.dtype.newbyteorder("="), ["C", "A", "W"])
        return th.as_tensor(rows, device=self.device)

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


# SB3's buffers that hold one row per step, and whose `get` needs a complete rollout. Ours have `is_of_this_package`.
_KNOWN = (RolloutBuffer, DictRolloutBuffer)
# The original, since a user may replace the class's method.
_get_samples = TensorRolloutBuffer._get_samples


def fit_to_rollout(buffer: Any, n_steps: int, n_envs: int) -> None:
    """
    Set the size of a buffer before its next ``reset``.

    It is not set if the class is the user's, whose ``buffer_size`` may mean something else.
    """
    if is_known_class(type(buffer)):
        buffer.buffer_size, buffer.n_envs = n_steps, n_envs


def takes_dist_params(buffer: Any) -> bool:
    """Return whether a buffer stores ``dist_params`` and its ``add``, which may be the user's, accepts them."""
    if not getattr(buffer, "dist_param_dim", 0):
        return False
    if getattr(buffer.add, "__func__", None) is TensorRolloutBuffer.add:
        return True  # a hundred times faster than reading the signature
    parameters = inspect.signature(buffer.add).parameters.values()
    return any(parameter.name == "dist_params" or parameter.kind is parameter.VAR_KEYWORD for parameter in parameters)


def check_complete(buffer: Any) -> None:
    """Raise ``ValueError`` if a rollout is not complete: the missing rows hold zeros, or the previous rollout."""
    if not getattr(buffer, "full", True):
        raise ValueError(
            f"The rollout is incomplete: {buffer.pos} of {buffer.buffer_size} steps. Collect the rest before training; "
            "for shorter rollouts, `load` with a smaller `n_steps`."
        )


def needs_complete_rollout(buffer: Any) -> bool:
    """Return whether a buffer's ``get`` needs a complete rollout, as ours and SB3's do."""
    owner = next((cls for cls in type(buffer).__mro__ if "get" in vars(cls)), None)
    return "get" not in vars(buffer) and is_known_class(owner)


def is_known_class(cls: Any) -> bool:
    """Return whether a class of buffers is exactly one of this package or of SB3, not the user's."""
    return cls in _KNOWN or "is_of_this_package" in vars(cls)


def has_dist_params(buffer: Any) -> bool:
    """Return whether the rollout in a buffer holds the old distribution; a user's buffer may lack the property."""
    return bool(getattr(buffer, "has_dist_params", getattr(buffer, "dist_param_dim", 0)))


def space_of_rows(buffer: Any, stored: spaces.Space[Any]) -> spaces.Space[Any]:
    """Return the space of the observations that ``add`` takes; ``stored`` if the class, the user's, may extend them."""
    return cast(spaces.Space[Any], buffer.observation_space) if is_known_class(type(buffer)) else stored


def stored_observation_space(space: spaces.Space[Any], normalizer: VecNormalize | None) -> spaces.Space[Any]:
    """Return the space of the observations to store: float32 for boxes of integers that VecNormalize normalises."""
    if normalizer is None or not normalizer.norm_obs:
        return space
    if isinstance(space, spaces.Dict):
        keys = normalizer.norm_obs_keys or []
        return spaces.Dict({key: _float_space(sub) if key in keys else sub for key, sub in space.spaces.items()})
    return _float_space(space)


def on_host(tensor: th.Tensor | np.ndarray) -> np.ndarray:
    """Return a tensor as an array; an array is returned unchanged."""
    if isinstance(tensor, np.ndarray):
        return tensor
    try:
        return tensor.numpy()
    except (RuntimeError, TypeError):  # requires a gradient, or is on another device
        return tensor.detach().cpu().numpy()


def _float_space(space: spaces.Space[Any]) -> spaces.Space[Any]:
    if isinstance(space, spaces.Box) and np.issubdtype(space.dtype, np.integer):
        return spaces.Box(-np.inf, np.inf, space.shape, np.float32)
    return space


def _minibatches(buffer: TensorRolloutBuffer, indices: np.ndarray, size: int) -> Generator[MiniBatch, None, None]:
    """Yield the minibatches of indices in SB3's numbering, by a ``_get_samples`` of the user's if there is one."""
    if buffer.device.type == "cpu":
        buffer.forget_copies()  # mostly views, which are quick to create again
    if getattr(buffer._get_samples, "__func__", None) is not _get_samples:
        for start in range(0, len(indices), size):
            yield buffer._get_samples(indices[start : start + size])
        return
    rows = buffer._rows(indices)
    for start in range(0, len(indices), size):
        yield buffer._gather(rows[start : start + size])


def _shaped(array: Any, shape: tuple[int, ...]) -> np.ndarray:
    # np.reshape takes longer than the copy into the buffer.
    return array if isinstance(array, np.ndarray) and array.shape == shape else np.reshape(array, shape)
