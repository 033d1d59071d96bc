"""Environments and model of each peer of the speed benchmark."""

from __future__ import annotations

from collections.abc import Callable
from importlib import import_module
from importlib.util import module_from_spec, spec_from_file_location
from pathlib import Path
from typing import Any

import torch as th
from torch import nn

from tests.bench.speed_free import FreeVecEnv
from tests.bench.speed_rows import SpeedRow, is_clipppo

# Engines of peers; the others have "auto".
_ENGINES = {"clipppo_autograd": "autograd", "clipppo_bf16": "cuda_graph_bf16"}


def make_model(row: SpeedRow, peer: str, seed: int) -> Any:
    """Build a peer's algorithm, which logs nothing; ClipPPO has SB3's objective and its peer's engine, or "auto"."""
    from sb3_clipvf.schedules import make_schedule

    arguments = dict(row.settings)
    for name in ("learning_rate", "clip_range"):
        if isinstance(arguments.get(name), str):  # SB3 accepts no strings
            arguments[name] = make_schedule(arguments[name], name)
    if "policy_kwargs" in arguments:
        arguments["policy_kwargs"] = _policy_kwargs(arguments["policy_kwargs"], peer)
    if row.custom_extractor:
        arguments["policy_kwargs"] = {"features_extractor_class": _extractor_class()}
    if is_clipppo(peer):
        from sb3_clipvf import SB3_EQUIVALENT, ClipPPO

        algorithm: Any = ClipPPO
        arguments = SB3_EQUIVALENT | {"engine": _ENGINES.get(peer, "auto")} | arguments
    else:
        algorithm = import_module("sbx" if peer == "sbx" else "stable_baselines3").PPO
    env, device = make_env(row, peer, seed), row.device_of(peer)
    model = algorithm(row.policy, env, seed=seed, device=device, verbose=0, **arguments)
    if peer == "sb3_compiled":
        # `th.compile(policy)` compiles `forward` alone, which updates do not call.
        model.policy.forward = th.compile(model.policy.forward)
        model.policy.evaluate_actions = th.compile(model.policy.evaluate_actions)
    return model


def _policy_kwargs(kwargs: dict[str, Any], peer: str) -> dict[str, Any]:
    if "activation_fn" not in kwargs:
        return kwargs
    name = kwargs["activation_fn"]
    activation = getattr(import_module("jax.nn"), name.lower()) if peer == "sbx" else getattr(nn, name)
    return kwargs | {"activation_fn": activation}


def make_env(row: SpeedRow, peer: str, seed: int) -> Any:
    """Build a peer's VecEnv."""
    env = ENVIRONMENTS[row.kind(peer)](row, peer, seed)
    if not row.normalize:
        return env
    if is_clipppo(peer) and row.env != "sb3":
        from sb3_clipvf.envs import FastVecNormalize

        return FastVecNormalize(env)
    from stable_baselines3.common.vec_env import VecNormalize

    return VecNormalize(env)


def _gym(row: SpeedRow, peer: str, seed: int) -> Any:
    from stable_baselines3.common.env_util import make_vec_env
    from stable_baselines3.common.vec_env import DummyVecEnv

    from sb3_clipvf.envs import FastDummyVecEnv

    vec_env_cls = FastDummyVecEnv if is_clipppo(peer) and row.env != "sb3" else DummyVecEnv
    return make_vec_env(row.env_id, row.n_envs, seed=seed, vec_env_cls=vec_env_cls)


def _atari(row: SpeedRow, peer: str, seed: int) -> Any:
    import ale_py
    import gymnasium as gym
    from stable_baselines3.common.env_util import make_atari_env
    from stable_baselines3.common.vec_env import VecFrameStack

    gym.register_envs(ale_py)
    return VecFrameStack(make_atari_env(row.env_id, row.n_envs, seed=seed), 4)


def raw_vector(row: SpeedRow, seed: int, spares: bool = False) -> Any:
    """Build Gymnasium's, EnvPool's (with ``spares``, two environments a row) or ALE's vector environment of a row."""
    if row.env == "vector":
        import gymnasium as gym

        return gym.make_vec(row.env_id, row.n_envs)
    if row.env == "envpool":
        import envpool

        return envpool.make_gymnasium(row.env_id, num_envs=row.n_envs * (1 + spares), seed=seed)
    from ale_py.vector_env import AtariVectorEnv

    # As SB3's AtariWrapper: each life is an episode, and rewards are clipped, by the adapter, after they are summed.
    game = row.env_id.partition("NoFrameskip")[0].lower()
    return AtariVectorEnv(game, row.n_envs, autoreset_mode="SameStep", life_loss_info=True, reward_clipping=False)


def _adapted(row: SpeedRow, peer: str, seed: int) -> Any:
    from sb3_clipvf.envs import as_vec_env

    spares = row.env == "envpool"
    env = as_vec_env(raw_vector(row, seed, spares), clip_rewards=row.env == "ale", spares=spares)
    if not spares:  # an EnvPool takes its seed in the constructor
        env.seed(seed)
    return env


def _free(row: SpeedRow, peer: str, seed: int) -> Any:
    n_inputs, n_actions = row.env_id.split(" -> ")
    return FreeVecEnv(row.n_envs, int(n_inputs), int(n_actions), seed)


def _tensor(row: SpeedRow, peer: str, seed: int) -> Any:
    """Build tensor environments on the policy's device, on a GPU captured. SB3 steps them through arrays."""
    from sb3_clipvf.envs import GraphedTensorEnv, as_vec_env

    device = row.device_of(peer)
    on_gpu = device == "cuda" or (device == "auto" and th.cuda.is_available())
    pendulums = _example("tensor_environment").TensorPendulum(row.n_envs, "cuda" if on_gpu else "cpu")
    env = as_vec_env(GraphedTensorEnv(pendulums) if on_gpu and is_clipppo(peer) else pendulums)
    env.seed(seed)
    return env


def _example(name: str) -> Any:
    """Return a module of the documentation's examples."""
    path = Path(__file__).resolve().parents[2] / "docs" / "examples" / f"{name}.py"
    spec: Any = spec_from_file_location(name, path)
    module = module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


ENVIRONMENTS: dict[str, Callable[[SpeedRow, str, int], Any]] = {
    "gym": _gym,
    "sb3": _gym,
    "atari": _atari,
    "vector": _adapted,
    "envpool": _adapted,
    "ale": _adapted,
    "free": _free,
    "tensor": _tensor,
}
"""
Functions that make a peer's VecEnv by kind of environment, with ``Monitor``'s episode statistics. For "gym", ClipPPO
gets a FastDummyVecEnv, as from its command ``train``, and the others SB3's DummyVecEnv. For "sb3", all get SB3's.
"""


def _extractor_class() -> type[Any]:
    import torch as th
    from stable_baselines3.common.torch_layers import BaseFeaturesExtractor

    class TwoLayers(BaseFeaturesExtractor):
        """Layers before the policy's own, which only autograd can differentiate."""

        def __init__(self, observation_space: Any, features_dim: int = 64) -> None:
            super().__init__(observation_space, features_dim)
            n_inputs = observation_space.shape[0]
            layers = (th.nn.Linear(n_inputs, features_dim), th.nn.LayerNorm(features_dim), th.nn.ReLU())
            self.layers = th.nn.Sequential(*layers)

        def forward(self, observations: th.Tensor) -> th.Tensor:
            """Compute features of shape ``(n, features_dim)``."""
            return th.as_tensor(self.layers(observations))

    return TwoLayers
