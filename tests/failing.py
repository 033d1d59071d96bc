"""Functions, environments and callbacks that fail at a given call or step, and trainings with them."""

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import gymnasium as gym
import numpy as np
from gymnasium import spaces
from stable_baselines3.common.callbacks import BaseCallback
from stable_baselines3.common.vec_env import DummyVecEnv, VecEnv

from sb3_clipvf import ClipPPO
from sb3_clipvf.checkpoint import TrainingCheckpoint, newest_checkpoint

ENGINES = ("native", "autograd")
SPACE = spaces.Box(-1, 1, (4,))
Step = tuple[Any, Any, Any, Any, dict[str, Any]]


class Killed(BaseException):
    """Stand-in for a kill: nothing in the package handles it."""


def fail_at(call: int, function: Callable[..., Any], error: BaseException, after: bool) -> Callable[..., Any]:
    """Return ``function`` with ``error`` raised at call number ``call`` (from 0), before or after the call itself."""
    count = -1

    def wrapper(*args: Any) -> Any:
        nonlocal count
        count += 1
        if count == call and not after:
            raise error
        result = function(*args)
        if count == call:
            raise error
        return result

    return wrapper


class BrokenError(Exception):
    """Error in an environment or a callback."""


def broken(*_: Any) -> Any:
    raise BrokenError("the user's own words")


class Faulty(gym.Env[Any, Any]):
    """Episodes of 9 steps; from step ``at`` on, ``change`` replaces what a step returns. Its state can be saved."""

    action_space = spaces.Discrete(2)

    def __init__(
        self, change: Callable[[Step], Step] = lambda step: step, at: int = 0, space: spaces.Space[Any] = SPACE
    ) -> None:
        self.change, self.at, self.observation_space = change, at, space
        self.n = self.resets = 0

    def _step(self) -> Step:
        step: Step = (np.full(4, (self.n % 7) / 7, np.float32), 1.0, False, self.n % 9 == 0, {})
        return self.change(step) if self.n >= self.at else step

    def reset(self, *, seed: int | None = None, options: dict[str, Any] | None = None) -> tuple[Any, dict[str, Any]]:
        super().reset(seed=seed)
        self.resets += 1
        return self._step()[0], {}

    def step(self, action: Any) -> Step:
        self.n += 1
        return self._step()

    def get_training_state(self) -> dict[str, Any]:
        return {"n": self.n}

    def set_training_state(self, state: dict[str, Any]) -> None:
        self.n = state["n"]


def make(change: Callable[[Step], Step] | None = None, at: int = 0, cls: Any = DummyVecEnv, bad: int = 1) -> VecEnv:
    """Return two environments, of which number ``bad`` fails."""
    return cls([partial(Faulty, change, at) if change and index == bad else Faulty for index in range(2)])


def model_of(venv: Any, engine: str = "native", **kwargs: Any) -> ClipPPO:
    arguments = {"n_steps": 16, "batch_size": 16, "n_epochs": 1, "seed": 0, "device": "cpu", "engine": engine}
    return ClipPPO("MlpPolicy", venv, **{**arguments, **kwargs})


def check_resumes(folder: Path, venv: VecEnv, num_timesteps: int = 32) -> None:
    """Check that the last checkpoint is that of the given step, and that a training continues from it."""
    assert newest_checkpoint(folder).manifest.num_timesteps == num_timesteps
    assert not [path for path in folder.iterdir() if path.suffix == ".tmp"]
    model = ClipPPO.resume(folder, venv, device="cpu")
    model.learn(model.remaining_timesteps, reset_num_timesteps=False, callback=TrainingCheckpoint(32, folder))
    assert model.num_timesteps == 96
    venv.close()


def notes(error: BaseException) -> str:
    return "\n".join(getattr(error, "__notes__", ()))


class Call(BaseCallback):
    """Calls a function at one step. The training continues if it returns a true value."""

    def __init__(self, function: Callable[[], Any], at: int = 40) -> None:
        super().__init__()
        self.function, self.at = function, at

    def _on_step(self) -> bool:
        return self.num_timesteps != self.at or bool(self.function())
