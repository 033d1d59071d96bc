"""
Trainings that between them run every kernel: all action distributions, and all forms of the objective.

The forms take turns among the activations, and observations and rewards are normalised.

Run as a program it prints a digest of each training: ``python kernel_cases.py native fused``, engine by engine.
"""

import hashlib
import itertools
import json
import sys
from typing import Any

import gymnasium as gym
import numpy as np
import pytest
import torch as th
from gymnasium import spaces
from stable_baselines3.common.torch_layers import FlattenExtractor
from stable_baselines3.common.vec_env import DummyVecEnv

from sb3_clipvf import ClipPPO
from sb3_clipvf.engines.threads import ThreadChoice
from sb3_clipvf.envs import FastVecNormalize

N_ENVS, N_STEPS = 3, 32
N_UPDATES = 3
"""Where the native engine may use two threads, the first update runs on one and the second on two."""


class Noise(gym.Env[np.ndarray, Any]):
    """An environment of random observations and rewards, for every action space."""

    observation_space = spaces.Box(-9.0, 9.0, (5,), np.float32)

    def __init__(self, action_space: spaces.Space[Any]) -> None:
        self.action_space = action_space

    def reset(self, *, seed: int | None = None, options: Any = None) -> tuple[np.ndarray, dict[str, Any]]:
        super().reset(seed=seed)
        return self._observe(), {}

    def step(self, action: Any) -> tuple[np.ndarray, float, bool, bool, dict[str, Any]]:
        reward = self.np_random.normal() + float(np.mean(action))
        return self._observe(), reward, bool(self.np_random.random() < 0.1), False, {}

    def _observe(self) -> np.ndarray:
        return self.np_random.normal(size=5).astype(np.float32)


class Doubling(FlattenExtractor):
    """A features extractor that the native engine does not run."""

    def forward(self, observations: th.Tensor) -> th.Tensor:
        return 2.0 * super().forward(observations)


# Wide enough for the vector instructions of loops over actions, with some left over.
BOX = spaces.Box(-1.0, 1.0, (19,), np.float32)
GSDE = {"use_sde": True, "sde_sample_freq": 4}
ACTIONS: dict[str, tuple[spaces.Space[Any], dict[str, Any]]] = {
    "discrete": (spaces.Discrete(3), {}),
    "multi_discrete": (spaces.MultiDiscrete([2, 3, 17]), {}),
    "multi_binary": (spaces.MultiBinary(19), {}),
    "box": (spaces.Box(-1.0, 1.0, (1,), np.float32), {}),
    "wide_box": (BOX, {}),
    "gsde": (BOX, GSDE),
    "gsde_std_per_latent": (BOX, {**GSDE, "policy_kwargs": {"full_std": False}}),
    "gsde_expln": (BOX, {**GSDE, "policy_kwargs": {"use_expln": True, "log_std_init": 0.0}}),
}
# Ranges that some transitions leave and others do not.
OBJECTIVES: dict[str, dict[str, Any]] = {
    "clip": {"clip_range": 0.05},
    "neither": {"normalize_advantage": False},
    "kl": {"kl_coef": 1.0},
    "both": {"clip_range": 0.05, "kl_coef": 2.0, "ent_coef": 0.01},
    "adaptive_kl": {"kl_coef": 1.0, "adaptive_kl_target": 1e-4, "advantage_scope": "rollout"},
    "value_max": {"clip_range": 0.05, "clip_range_vf": 0.01, "target_kl": 1e-3},
    "value_prediction": {"clip_range_vf": 0.01, "vf_clip": "prediction", "lr_kl_target": 1e-4},
}
# Kernels branch on the kind of distribution in the gradients of "both", which has all terms, in those without a KL
# penalty, and in the KL after an update, which "adaptive_kl" and "value_prediction" measure. Each kind has all of them.
PAIRS = [(actions, "both") for actions in ACTIONS] + [
    ("discrete", "adaptive_kl"),
    ("multi_discrete", "clip"),
    ("multi_binary", "value_prediction"),
    ("box", "value_prediction"),
    ("wide_box", "value_max"),
    ("gsde", "adaptive_kl"),
    ("gsde_std_per_latent", "kl"),
    ("gsde_expln", "neither"),
]
_ACTIVATIONS = (th.nn.Tanh, th.nn.ReLU, th.nn.ELU, th.nn.LeakyReLU, th.nn.SiLU)
ACTIVATIONS = dict(zip(OBJECTIVES, itertools.cycle(_ACTIVATIONS), strict=False))
ENGINES: dict[str, tuple[str, dict[str, Any]]] = {
    "native": ("NativeEngine", {}),
    "fused": ("FusedEngine", {"features_extractor_class": Doubling}),
}


def divide(patch: pytest.MonkeyPatch, n_threads: int) -> None:
    """Make the native engine run minibatches in small groups and blocks, on this number of threads."""
    for name, number in {"LEAST_ROWS": 3, "LEAST_WORK": 0, "BLOCK_ROWS": 2, "PIECE_SIZE": 10}.items():
        patch.setattr(f"sb3_clipvf.engines.division.{name}", number)
    patch.setattr("sb3_clipvf.engines.native.EVALUATION_ROWS", 7)
    run_on(patch, n_threads)


def run_on(patch: pytest.MonkeyPatch, n_threads: int) -> None:
    """Make the native engine run on this number of threads."""
    patch.setattr(ThreadChoice, "next", lambda _: n_threads)
    patch.setattr(ThreadChoice, "record", lambda *_: None)


def digest(engine: str, actions: str, form: str) -> str:
    """Return a digest of the weights, the statistics and the normalisation at the end of one training."""
    action_space, kwargs = ACTIONS[actions]
    class_name, policy_kwargs = ENGINES[engine]
    arguments: dict[str, Any] = {"clip_range": None, "clip_range_vf": None, **kwargs, **OBJECTIVES[form]}
    policy_kwargs = arguments.get("policy_kwargs", {}) | policy_kwargs
    arguments["policy_kwargs"] = {"net_arch": [24], "activation_fn": ACTIVATIONS[form], **policy_kwargs}
    env = FastVecNormalize(DummyVecEnv([lambda: Noise(action_space)] * N_ENVS))
    model = ClipPPO(
        "MlpPolicy", env, 3e-3, n_steps=N_STEPS, batch_size=40, n_epochs=3, device="cpu", seed=1, **arguments
    )
    # Sums of torch may depend on the number of threads; those of the native engine do not.
    th.set_num_threads(2 if engine == "native" else 1)
    model.learn(N_UPDATES * N_STEPS * N_ENVS)
    th.set_num_threads(1)
    if type(model._engine).__name__ != class_name:
        raise RuntimeError(f"{engine} ran on {model._engine}")
    statistics = {name: value for name, value in model.logger.name_to_value.items() if name.startswith("train/")}
    arrays = [tensor.numpy() for tensor in model.policy.state_dict().values()]
    arrays += [env.obs_rms.mean, env.obs_rms.var, env.ret_rms.mean, env.ret_rms.var]
    content = [array.tobytes() for array in arrays]
    return hashlib.sha256(b"".join(content) + repr(statistics).encode()).hexdigest()


if __name__ == "__main__":
    th.set_num_threads(1)
    cases = [(engine, *pair) for engine in sys.argv[1:] for pair in PAIRS]
    sys.stdout.write(json.dumps({" ".join(case): digest(*case) for case in cases}))
