"""The trainings of the fault campaign, and a digest of what must be the same at their end."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch as th

if TYPE_CHECKING:
    from stable_baselines3.common.vec_env import VecEnv

    from sb3_clipvf import ClipPPO


@dataclass(frozen=True)
class Training:
    """
    A training of some seconds, with a checkpoint after each update.

    :param arguments: further arguments of ClipPPO
    :param in_processes: whether each environment runs in a process of its own
    """

    name: str
    env_id: str
    total_timesteps: int
    arguments: Mapping[str, Any] = field(default_factory=dict)
    n_envs: int = 2
    in_processes: bool = False
    normalized: bool = False

    def make_env(self, monitor: Path | None) -> VecEnv:
        """Build the environments, the same ones each time; ``monitor`` is the folder for the files of episodes."""
        from stable_baselines3.common.env_util import make_vec_env
        from stable_baselines3.common.vec_env import DummyVecEnv, SubprocVecEnv

        from sb3_clipvf.checkpoint import ResumableEnv
        from sb3_clipvf.envs import FastVecNormalize

        env = make_vec_env(
            self.env_id,
            self.n_envs,
            seed=3,
            monitor_dir=None if monitor is None else str(monitor),
            vec_env_cls=SubprocVecEnv if self.in_processes else DummyVecEnv,
            # This process has no threads, and another start method would import everything for each environment.
            vec_env_kwargs={"start_method": "fork"} if self.in_processes else None,
            wrapper_class=ResumableEnv if self.in_processes else None,
        )
        return FastVecNormalize(env) if self.normalized else env

    def make_model(self, env: VecEnv) -> ClipPPO:
        """Build the model, the same one each time."""
        from sb3_clipvf import ClipPPO

        common: dict[str, Any] = {"n_steps": 64, "batch_size": 32, "n_epochs": 3, "seed": 0, "device": "cpu"}
        common |= {"clip_range": "lin_0.2", "clip_range_vf": 1.0}
        return ClipPPO("MlpPolicy", env, **{**common, "learning_rate": "lin_0.001", **self.arguments})


def digest(model: ClipPPO, monitor: Path | None = None) -> dict[str, str]:
    """Return the SHA-256 of each part of the state that affects the next update, and of the files of episodes."""
    from sb3_clipvf.checkpoint.random_state import global_states
    from sb3_clipvf.checkpoint.vec_env_state import vec_env_state

    names = (
        *("num_timesteps", "_total_timesteps", "_n_updates", "_episode_num", "_current_progress_remaining"),
        *("adaptive_kl", "adaptive_lr", "seed", "n_steps", "batch_size", "n_epochs", "gamma", "gae_lambda"),
        *("clip_range", "clip_range_vf", "learning_rate", "ent_coef", "vf_coef", "kl_coef", "max_grad_norm"),
    )
    parts: dict[str, Any] = {
        "weights": model.policy.state_dict(),
        "optimizer": model.policy.optimizer.state_dict(),
        "numbers": {name: getattr(model, name) for name in names},
        "episodes": [(episode["r"], episode["l"]) for episode in model.ep_info_buffer or ()],
    }
    if model.env is not None:
        parts["observations"] = [model._last_obs, model._last_episode_starts, model._last_original_obs]
        parts["random"] = global_states()
        parts["environments"] = _without_files(vec_env_state(model.env)[0])
    for path in sorted(monitor.glob("*.monitor.csv")) if monitor is not None else ():
        # Without the times.
        parts[path.name] = [row.split(",")[:2] for row in path.read_text(encoding="utf-8").splitlines()[1:]]
    return {name: digest_of(part) for name, part in parts.items()}


def digest_of(value: Any) -> str:
    """Return the SHA-256 of a tree of containers, arrays, tensors, and values with a complete ``repr``."""
    sha = hashlib.sha256()
    _feed(sha, value)
    return sha.hexdigest()


def _feed(sha: Any, value: Any) -> None:
    if isinstance(value, th.Tensor):
        value = value.detach().numpy()
    if isinstance(value, np.ndarray):
        sha.update(f"{value.dtype.str}{value.shape}".encode() + value.tobytes())
    elif isinstance(value, Mapping):
        for key, item in value.items():
            sha.update(repr(key).encode())
            _feed(sha, item)
    elif isinstance(value, (list, tuple)):
        sha.update(f"{len(value)}[".encode())
        for item in value:
            _feed(sha, item)
    else:
        sha.update(repr(value).encode())


def _without_files(tree: Any) -> Any:
    """Remove files of episodes, which hold times and thus differ in length."""
    if isinstance(tree, dict):
        return {key: _without_files(item) for key, item in tree.items() if key not in ("file", "t_start")}
    return [_without_files(item) for item in tree] if isinstance(tree, list) else tree
