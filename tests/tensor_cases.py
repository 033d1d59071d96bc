"""Tensor environments for the tests: a scripted walk, and the pendulum of the examples."""

import importlib.util
from pathlib import Path
from typing import Any

import numpy as np
import torch as th
from gymnasium import spaces
from stable_baselines3.common.vec_env.base_vec_env import VecEnvWrapper

from sb3_clipvf.envs.tensor import TensorObs, TensorStep

BOX = spaces.Box(-0.3, 0.3, (2,), np.float32)
VECTOR = spaces.Box(-np.inf, np.inf, (3,), np.float32)
IMAGE = spaces.Box(0, 255, (1, 36, 36), np.uint8)
DICT = spaces.Dict({"image": IMAGE, "vector": VECTOR})


class TensorWalk:
    """
    Rows walk on a line. Row ``i`` ends its episodes after ``2 + i % 3`` steps, truncated if ``i`` is even.

    With ``reuses_memory``, each step writes into the same tensors. With ``finals=False``, final observations are not
    known.
    """

    def __init__(
        self,
        num_envs: int = 6,
        observation_space: spaces.Space[Any] = VECTOR,
        action_space: spaces.Space[Any] = BOX,
        device: str = "cpu",
        finals: bool = True,
        reuses_memory: bool = False,
    ) -> None:
        self.num_envs, self.device = num_envs, th.device(device)
        self.observation_space, self.action_space = observation_space, action_space
        self.finals, self.reuses_memory = finals, reuses_memory
        self.x = th.zeros(num_envs, device=device)
        self.rows = th.arange(num_envs, device=device)
        self.n_steps = th.zeros_like(self.rows)
        self.received: list[th.Tensor] = []
        self.closed = False
        self._memory: Any = None

    def reset_tensors(self, seed: int | None = None) -> TensorObs:
        self.x = th.full_like(self.x, 0.5 if seed is None else 0.01 * seed)
        self.n_steps = th.zeros_like(self.n_steps)
        return self._returned(self._observe())

    def step_tensors(self, actions: th.Tensor) -> TensorStep:
        self.received.append(actions.clone())
        self.x = self.x + actions.reshape(self.num_envs, -1).float().mean(1)
        self.n_steps = self.n_steps + 1
        final = self._observe()
        rewards = -self.x.abs()
        ended = self.n_steps == 2 + self.rows % 3
        truncated = ended & (self.rows % 2 == 0)
        self.x = th.where(ended, 0.5, self.x)
        self.n_steps = th.where(ended, 0, self.n_steps)
        observations = self._returned(self._observe())
        infos = {"position": self.x.clone(), "height": 3.0}
        return TensorStep(observations, rewards, ended & ~truncated, truncated, final if self.finals else None, infos)

    def close(self) -> None:
        self.closed = True

    def _observe(self) -> TensorObs:
        vector = th.stack([self.x, self.n_steps.float(), self.rows.float() / self.num_envs], dim=1)
        if self.observation_space == VECTOR:
            return vector
        image = (40 * self.x.abs() + self.n_steps)[:, None, None, None].clamp(0, 255).to(th.uint8)
        image = image.expand(-1, 1, 36, 36).contiguous()
        return image if self.observation_space == IMAGE else {"image": image, "vector": vector}

    def _returned(self, observations: TensorObs) -> TensorObs:
        if not self.reuses_memory:
            return observations
        assert isinstance(observations, th.Tensor)
        self._memory = observations if self._memory is None else self._memory.copy_(observations)
        return self._memory  # type: ignore[no-any-return]


class InPlaceWalk(TensorWalk):
    """The same walk, whose step writes all that it keeps in-place, and has successes as infos."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        del self.received
        shape = self.action_space.shape or ()
        whole = isinstance(self.action_space, spaces.Discrete | spaces.MultiDiscrete)
        self.last = th.zeros((self.num_envs, *shape), dtype=th.int64 if whole else th.float32, device=self.device)

    def reset_tensors(self, seed: int | None = None) -> TensorObs:
        self.x.fill_(0.5 if seed is None else 0.01 * seed)
        self.n_steps.zero_()
        return self._observe()

    def step_tensors(self, actions: th.Tensor) -> TensorStep:
        self.last.copy_(actions)
        self.x.add_(actions.reshape(self.num_envs, -1).float().mean(1))
        self.n_steps.add_(1)
        final, rewards, successes = self._observe(), -self.x.abs(), self.x > 0.45
        ended = self.n_steps == 2 + self.rows % 3
        truncated = ended & (self.rows % 2 == 0)
        self.x.masked_fill_(ended, 0.5)
        self.n_steps.masked_fill_(ended, 0)
        infos = {"position": self.x.clone(), "is_success": successes}
        return TensorStep(
            self._observe(), rewards, ended & ~truncated, truncated, final if self.finals else None, infos
        )


class ReadingWalk(InPlaceWalk):
    """The same walk, whose step reads from the device, so that no graph can have it."""

    def step_tensors(self, actions: th.Tensor) -> TensorStep:
        step = super().step_tensors(actions)
        if step.truncated.any():
            self.x.mul_(1.0)
        return step


class KeepingWalk(InPlaceWalk):
    """The same walk, which also keeps an expanded tensor, parameters with gradients, and a generator of the CPU."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.expanded = th.zeros(1, device=self.device).expand(self.num_envs)
        self.network = th.nn.Linear(2, 2, device=self.device)
        self.generator = th.Generator()

    def step_tensors(self, actions: th.Tensor) -> TensorStep:
        with th.no_grad():
            self.expanded[:1] += self.network(actions).sum()
        return super().step_tensors(actions)


class Plain(VecEnvWrapper):
    """A wrapper that changes nothing. Around a tensor environment, it makes steps go through arrays."""

    def reset(self) -> Any:
        return self.venv.reset()

    def step_wait(self) -> Any:
        return self.venv.step_wait()


def tensor_pendulum() -> Any:
    """Return the module of the example with the tensor pendulum."""
    path = Path(__file__).resolve().parents[1] / "docs" / "examples" / "tensor_environment.py"
    spec = importlib.util.spec_from_file_location("tensor_environment", path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module
