"""
Fast environments for SB3: adapters for vectorised ones, a faster loop over single ones and a faster normaliser.

The modules:

- ``dummy``, ``subproc``: single environments, in one process or several;
- ``channel``, ``info_rows``: messages between processes; infos as bytes;
- ``normalize``: ``VecNormalize`` in compiled kernels;
- ``faster``: the same code for SB3's own classes during training;
- ``adapters``, ``vector``: the choice of an adapter to SB3's ``VecEnv``; the base class of adapters;
- ``gymnasium_vector``, ``envpool``: adapters of two libraries;
- ``tensor``, ``tensor_normalize``, ``tensor_episodes``: environments whose steps are tensors; their statistics;
- ``graphed``, ``isaac_lab``, ``jax``: tensor environments of CUDA graphs, of Isaac Lab and of JAX;
- ``layers``, ``rows``, ``shapes``: wrappers of vectorised environments; rows of batches; checks of what steps return;
- ``episode_ends``: episodes that a wrapper outside of ``Monitor`` ends.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from sb3_clipvf.envs.adapters import as_vec_env
    from sb3_clipvf.envs.dummy import FastDummyVecEnv
    from sb3_clipvf.envs.graphed import GraphedTensorEnv
    from sb3_clipvf.envs.isaac_lab import IsaacLabTensorEnv
    from sb3_clipvf.envs.jax import JaxTensorEnv
    from sb3_clipvf.envs.normalize import FastVecNormalize
    from sb3_clipvf.envs.subproc import FastSubprocVecEnv
    from sb3_clipvf.envs.tensor import TensorStep, TensorVecEnv
    from sb3_clipvf.envs.tensor_normalize import TensorVecNormalize

__all__ = [
    "FastDummyVecEnv",
    "FastSubprocVecEnv",
    "FastVecNormalize",
    "GraphedTensorEnv",
    "IsaacLabTensorEnv",
    "JaxTensorEnv",
    "TensorStep",
    "TensorVecEnv",
    "TensorVecNormalize",
    "as_vec_env",
]

_HOMES = {
    "FastDummyVecEnv": "sb3_clipvf.envs.dummy",
    "FastSubprocVecEnv": "sb3_clipvf.envs.subproc",
    "FastVecNormalize": "sb3_clipvf.envs.normalize",
    "GraphedTensorEnv": "sb3_clipvf.envs.graphed",
    "IsaacLabTensorEnv": "sb3_clipvf.envs.isaac_lab",
    "JaxTensorEnv": "sb3_clipvf.envs.jax",
    "TensorStep": "sb3_clipvf.envs.tensor",
    "TensorVecEnv": "sb3_clipvf.envs.tensor",
    "TensorVecNormalize": "sb3_clipvf.envs.tensor_normalize",
    "as_vec_env": "sb3_clipvf.envs.adapters",
}


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'sb3_clipvf.envs' has no attribute {name!r}")
    return getattr(import_module(_HOMES[name]), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *_HOMES})
