"""
Write the files of ``tests/data/<version>``, which later versions must read.

``python tests/saved_files.py`` writes those of the installed version, once: files of a released version are never
written again. ``tests/test_saved_files.py`` reads them.
"""

import sys
from pathlib import Path
from typing import Any

import gymnasium as gym
import numpy as np
from gymnasium import spaces
from stable_baselines3.common.callbacks import BaseCallback
from stable_baselines3.common.env_util import make_vec_env
from stable_baselines3.common.vec_env import VecEnv

import sb3_clipvf
from sb3_clipvf import ClipPPO, SaveBestTrainingReward
from sb3_clipvf.callbacks import IsolatedEvalCallback
from sb3_clipvf.checkpoint import TrainingCheckpoint
from sb3_clipvf.envs import FastVecNormalize

FOLDER = Path(__file__).parent / "data"
OBSERVATIONS = np.linspace(-1.0, 1.0, 12, dtype=np.float32).reshape(4, 3)
"""What models predict for."""

BOX = spaces.Box(-2.0, 2.0, (2,), np.float32)
MODELS: dict[str, dict[str, Any]] = {
    "discrete": {"space": spaces.Discrete(3), "clip_range": "lin_0.2", "kl_coef": 1.0, "lr_kl_target": 0.01},
    "multi_discrete": {"space": spaces.MultiDiscrete([2, 3]), "clip_range": None, "kl_coef": 1.0},
    "multi_binary": {"space": spaces.MultiBinary(3), "clip_range_vf": 1.0},
    "box": {"space": BOX, "kl_coef": 0.5, "adaptive_kl_target": 0.01},
    "gsde": {"space": BOX, "use_sde": True, "sde_sample_freq": 4},
    "squashed": {"space": BOX, "policy": "SquashedMlpPolicy"},
}
TIMESTEPS, KEPT = 576, 288
"""Steps of the training with checkpoints, and of the checkpoint that is kept."""


class Walk(gym.Env[np.ndarray, Any]):
    """Three numbers, any action."""

    observation_space = spaces.Box(-1.0, 1.0, (3,), np.float32)

    def __init__(self, space: spaces.Space[Any]) -> None:
        self.action_space = space

    def reset(
        self, *, seed: int | None = None, options: dict[str, Any] | None = None
    ) -> tuple[np.ndarray, dict[str, Any]]:
        super().reset(seed=seed)
        self.steps = 0
        return self._observe(), {}

    def step(self, action: Any) -> tuple[np.ndarray, float, bool, bool, dict[str, Any]]:
        self.steps += 1
        return self._observe(), float(np.sum(action)), False, self.steps == 7, {}

    def _observe(self) -> np.ndarray:
        return self.np_random.uniform(-1.0, 1.0, 3).astype(np.float32)


def walks(name: str) -> VecEnv:
    """Return the environments of a model."""
    return make_vec_env(Walk, n_envs=2, seed=0, env_kwargs={"space": MODELS[name]["space"]})


def pendulums(seed: int) -> FastVecNormalize:
    """Return the environments of the training with checkpoints."""
    return FastVecNormalize(make_vec_env("Pendulum-v1", n_envs=2, seed=seed))


def callbacks(folder: Path) -> list[BaseCallback]:
    """Return the callbacks of the training with checkpoints."""
    evaluation = FastVecNormalize(make_vec_env("Pendulum-v1", n_envs=1, seed=2), training=False, norm_reward=False)
    return [
        TrainingCheckpoint(every_timesteps=KEPT, path=folder / "checkpoints"),
        IsolatedEvalCallback(
            evaluation, eval_freq=96, n_eval_episodes=1, best_model_save_path=str(folder / "best_eval"), verbose=0
        ),
        SaveBestTrainingReward(folder / "best_training", min_episodes=1),
    ]


def train(folder: Path) -> ClipPPO:
    """
    Train with checkpoints.

    :param folder: Where callbacks write.
    :return: The model at the end.
    """
    model = ClipPPO(
        "MlpPolicy", pendulums(1), n_steps=48, batch_size=32, n_epochs=2, learning_rate="lin_0.001", kl_coef=0.5,
        adaptive_kl_target=0.01, seed=3, device="cpu", policy_kwargs={"net_arch": [4]},
    )  # fmt: skip
    return model.learn(TIMESTEPS, callback=callbacks(folder))


def weights(model: ClipPPO) -> np.ndarray:
    """Return all parameters of the policy in one vector."""
    return np.concatenate([parameter.detach().numpy().reshape(-1) for parameter in model.policy.parameters()])


def main(folder: Path) -> None:
    """
    Write all files.

    :param folder: Must not exist.
    """
    folder.mkdir(parents=True)
    expected: dict[str, np.ndarray] = {}
    for name, arguments in MODELS.items():
        settings = {key: value for key, value in arguments.items() if key not in ("space", "policy")}
        model = ClipPPO(
            arguments.get("policy", "MlpPolicy"), walks(name), n_steps=16, batch_size=16, n_epochs=2, seed=0,
            device="cpu", policy_kwargs={"net_arch": [4]}, **settings,
        )  # fmt: skip
        model.learn(64)
        model.save(folder / f"{name}.zip")
        expected[f"{name}_actions"] = model.predict(OBSERVATIONS, deterministic=True)[0]
        expected[f"{name}_weights"] = weights(model)
    model = train(folder)
    expected["training_weights"] = weights(model)
    normalizer = model.get_vec_normalize_env()
    if normalizer is not None:
        normalizer.save(str(folder / "vecnormalize.pkl"))
        expected["statistics"] = np.stack([normalizer.obs_rms.mean, normalizer.obs_rms.var])
    for checkpoint in (folder / "checkpoints").glob("*.zip"):
        if f"{KEPT}" not in checkpoint.name:
            checkpoint.unlink()
    np.savez(folder / "expected.npz", **expected)


if __name__ == "__main__":
    main(Path(sys.argv[1]) if len(sys.argv) > 1 else FOLDER / sb3_clipvf.__version__)
