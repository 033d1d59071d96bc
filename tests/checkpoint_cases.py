"""
Trainings that are interrupted and resumed: how each is built, and what must be the same to the last bit.

Run as a program it resumes them in a separate process: ``python checkpoint_cases.py <folder> <case> ...``.
"""

import hashlib
import json
import random
import sys
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import gymnasium as gym
import numpy as np
import torch as th
from gymnasium import spaces
from stable_baselines3.common.callbacks import (
    BaseCallback,
    CallbackList,
    CheckpointCallback,
    EvalCallback,
    EveryNTimesteps,
    StopTrainingOnMaxEpisodes,
    StopTrainingOnNoModelImprovement,
)
from stable_baselines3.common.env_util import make_vec_env
from stable_baselines3.common.vec_env import DummyVecEnv, SubprocVecEnv, VecEnv, VecFrameStack, VecMonitor, VecNormalize

from sb3_clipvf import ClipPPO, SaveBestTrainingReward
from sb3_clipvf.checkpoint import ResumableEnv, TrainingCheckpoint
from sb3_clipvf.checkpoint.random_state import space_states
from sb3_clipvf.envs import FastSubprocVecEnv, FastVecNormalize, as_vec_env

TOTAL = 320
EVERY = 128
KILLED_AT = 210
"""In the middle of a rollout; the last checkpoint is that of step 128."""


class Walk(gym.Env[dict[str, np.ndarray], np.ndarray]):
    """A random walk with observations of two parts, whose class has no methods for its state."""

    observation_space = spaces.Dict({"place": spaces.Box(-9, 9, (2,)), "time": spaces.Box(0, 99, (1,), np.int64)})
    action_space = spaces.Box(-1, 1, (2,))

    def __init__(self) -> None:
        self._place, self._time = np.zeros(2), 0

    def _observation(self) -> dict[str, np.ndarray]:
        return {"place": self._place.astype(np.float32), "time": np.array([self._time])}

    def reset(self, *, seed: int | None = None, options: dict[str, Any] | None = None) -> tuple[Any, dict[str, Any]]:
        super().reset(seed=seed)
        self._place, self._time = self.np_random.normal(size=2), 0
        return self._observation(), {}

    def step(self, action: np.ndarray) -> tuple[Any, float, bool, bool, dict[str, Any]]:
        self._time += 1
        self._place = np.clip(self._place + 0.3 * action + self.np_random.normal(0, 0.1, 2), -9, 9)
        # Some environments draw from the generators that all share.
        noise = 0.01 * np.random.rand() + 0.01 * random.random()
        return self._observation(), noise - float(np.abs(self._place).sum()), False, self._time >= 23, {}


class SavedWalk(Walk):
    """The walk with the two methods that save and restore its state."""

    def get_training_state(self) -> dict[str, Any]:
        return {"place": self._place, "time": self._time}

    def set_training_state(self, state: dict[str, Any]) -> None:
        self._place, self._time = state["place"], state["time"]


class KilledError(BaseException):
    """Ends a training as a kill does: nothing more is saved, unlike after an ``Exception``."""


class Kill(BaseCallback):
    """Ends the training in the middle of a rollout, if it is to be killed."""

    def __init__(self, at: int | None) -> None:
        super().__init__()
        self.at = at

    def _on_step(self) -> bool:
        if self.at is not None and self.num_timesteps >= self.at:
            raise KilledError
        return True

    def training_state(self) -> dict[str, Any]:
        return {}

    def load_training_state(self, state: dict[str, Any]) -> None:
        """Nothing is kept."""


def dummy(env_id: str, n_envs: int = 2, **kwargs: Any) -> VecEnv:
    return make_vec_env(env_id, n_envs=n_envs, seed=3, **kwargs)


def pendulums(**kwargs: Any) -> VecEnv:
    return dummy("Pendulum-v1", env_kwargs={"max_episode_steps": 20}, **kwargs)


def normalized_pendulum(folder: Path) -> VecEnv:
    return VecNormalize(pendulums(monitor_dir=str(folder / "monitor")), gamma=0.95)


def stacked(folder: Path) -> VecEnv:
    return VecMonitor(VecFrameStack(DummyVecEnv([lambda: gym.make("CartPole-v1")]), 3), str(folder / "stacked"))


def processes(folder: Path) -> VecEnv:
    kwargs = {"start_method": "fork"}
    return dummy("CartPole-v1", vec_env_cls=SubprocVecEnv, vec_env_kwargs=kwargs, wrapper_class=ResumableEnv)


def few_processes(folder: Path) -> VecEnv:
    kwargs = {"n_workers": 2, "start_method": "fork"}
    venv = make_vec_env(
        "Pendulum-v1",
        3,
        seed=3,
        vec_env_cls=FastSubprocVecEnv,
        vec_env_kwargs=kwargs,
        wrapper_class=ResumableEnv,
        env_kwargs={"max_episode_steps": 20},
        monitor_dir=str(folder / "monitor"),
    )
    return FastVecNormalize(venv)


def rows(folder: Path) -> VecEnv:
    return as_vec_env(gym.make_vec("CartPole-v1", num_envs=4), monitor_path=folder / "rows")


def sync_rows(folder: Path) -> VecEnv:
    return as_vec_env(gym.make_vec("Acrobot-v1", num_envs=2, vectorization_mode="sync", max_episode_steps=30))


def evaluations(folder: Path) -> list[BaseCallback]:
    evaluation = EvalCallback(
        VecNormalize(pendulums(), training=False),
        eval_freq=20,
        n_eval_episodes=1,
        callback_after_eval=StopTrainingOnNoModelImprovement(99),
        log_path=str(folder),
        best_model_save_path=str(folder),
        deterministic=False,
        verbose=0,
    )
    saving = CheckpointCallback(50, str(folder / "sb3"))
    lists = CallbackList([EveryNTimesteps(70, saving), StopTrainingOnMaxEpisodes(99)])
    return [evaluation, lists, SaveBestTrainingReward(folder / "best_training", min_episodes=1)]


@dataclass
class Case:
    """One training; ``make_env`` and ``make_callbacks`` get the folder of its files."""

    make_env: Callable[[Path], Any]
    arguments: dict[str, Any] = field(default_factory=dict)
    policy: str = "MlpPolicy"
    make_callbacks: Callable[[Path], list[BaseCallback]] = lambda folder: []
    reset_envs: bool = False

    def model(self, folder: Path) -> ClipPPO:
        common = {"n_steps": 32, "batch_size": 32, "n_epochs": 2, "seed": 0, "device": "cpu", "stats_window_size": 5}
        common |= {"clip_range": "lin_0.2", "clip_range_vf": 1.0}
        return ClipPPO(self.policy, self.make_env(folder), **{**common, **self.arguments})

    def callbacks(self, folder: Path, kill_at: int | None = None) -> list[BaseCallback]:
        checkpoint = TrainingCheckpoint(EVERY, folder / "checkpoints", reset_envs=self.reset_envs, on_signal=False)
        return [checkpoint, *self.make_callbacks(folder), Kill(kill_at)]


CASES = {
    "native": Case(lambda _: dummy("CartPole-v1"), {"engine": "native", "learning_rate": "lin_0.01"}),
    "autograd": Case(lambda _: dummy("CartPole-v1"), {"engine": "autograd", "clip_range": "cos_0.3"}),
    "single": Case(lambda _: gym.make("MountainCarContinuous-v0", max_episode_steps=50)),
    "gsde": Case(normalized_pendulum, {"use_sde": True, "sde_sample_freq": 7}),
    "processes": Case(processes),
    "few processes": Case(few_processes),
    "cheetah": Case(lambda _: FastVecNormalize(dummy("HalfCheetah-v5", env_kwargs={"max_episode_steps": 40}))),
    "stacked": Case(stacked),
    "controllers": Case(
        lambda _: dummy("CartPole-v1"),
        {"kl_coef": 1.0, "adaptive_kl_target": 0.01, "lr_kl_target": 0.01, "ent_coef": "exp_0.01", "target_kl": 0.1},
    ),
    "evaluations": Case(
        lambda _: VecNormalize(pendulums()), {"policy_kwargs": {"ortho_init": False}}, "MlpPolicy", evaluations
    ),
    "resets": Case(lambda _: VecNormalize(make_vec_env(Walk, 2)), policy="MultiInputPolicy", reset_envs=True),
    "own state": Case(lambda _: make_vec_env(SavedWalk, 2), policy="MultiInputPolicy"),
    "rows": Case(rows),
    "sync_rows": Case(sync_rows),
}


def digest(model: ClipPPO, folder: Path) -> dict[str, str]:
    """Return what must be the same, by name."""
    optimizer = model.policy.optimizer.state_dict()["state"]
    normalizer = model.get_vec_normalize_env()
    parts: dict[str, Any] = {
        "weights": [tensor.numpy() for tensor in model.policy.state_dict().values()],
        "optimizer": [value.numpy() for state in optimizer.values() for value in state.values()],
        "random": [th.get_rng_state().numpy(), np.random.get_state()[1], random.getstate()],
        "actions": space_states(model)["action_space"],
        "observations": [model._last_obs, model._last_episode_starts],
        "episodes": [(episode["r"], episode["l"]) for episode in model.ep_info_buffer or ()],
        "counters": [model.num_timesteps, model._n_updates, model._current_progress_remaining],
        "controllers": [model.adaptive_kl, model.adaptive_lr],
        "logged": [{k: v for k, v in model.logger.name_to_value.items() if not k.startswith("time/")}],
    }
    for path in sorted(folder.rglob("*.monitor.csv")):
        table = [row.split(",") for row in path.read_text().splitlines()[1:]]
        parts[path.name] = [row[:2] + row[3:] for row in table]  # without the times
    if (folder / "evaluations.npz").exists():
        with np.load(folder / "evaluations.npz") as history:
            parts["evaluations"] = {name: history[name] for name in history.files}
    if normalizer is not None:
        moments: Any = normalizer.obs_rms
        observed = list(moments.values()) if isinstance(moments, dict) else [moments]
        parts["statistics"] = [*map(vars, [*observed, normalizer.ret_rms]), normalizer.returns]
    return {name: hashlib.sha256(_bytes(part)).hexdigest() for name, part in parts.items()}


def _bytes(value: Any) -> bytes:
    if isinstance(value, np.ndarray):
        return value.dtype.str.encode() + value.tobytes()
    if isinstance(value, dict):
        return b"".join(_bytes(key) + _bytes(item) for key, item in value.items())
    if isinstance(value, list):
        return b"".join(_bytes(item) for item in value)
    return repr(value).encode()


def uninterrupted(case: Case, folder: Path) -> dict[str, str]:
    """Train without a kill, and without checkpoints unless these reset environments."""
    model = case.model(folder)
    callbacks = case.callbacks(folder)
    model.learn(TOTAL, callback=callbacks if case.reset_envs else callbacks[1:])
    found = digest(model, folder)
    model.env.close()
    return found


def killed(case: Case, folder: Path) -> None:
    model = case.model(folder)
    try:
        model.learn(TOTAL, callback=case.callbacks(folder, KILLED_AT))
    except KilledError:
        model.env.close()
        return
    raise RuntimeError("the training was not killed")


def resumed(case: Case, folder: Path) -> dict[str, str]:
    model = ClipPPO.resume(folder / "checkpoints", case.make_env(folder), device="cpu")
    model.learn(model.remaining_timesteps, reset_num_timesteps=False, callback=case.callbacks(folder))
    found = digest(model, folder)
    model.env.close()
    return found


if __name__ == "__main__":
    th.set_num_threads(1)
    results = {name: resumed(CASES[name], Path(sys.argv[1]) / name) for name in sys.argv[2:]}
    sys.stdout.write(json.dumps(results))
