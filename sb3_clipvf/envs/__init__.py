"""
Fast environments for SB3: adapters for vectorised ones, a faster loop over single ones and a faster normaliser.

Environments in processes:

- ``dummy``: single environments in one process;
- ``subproc``: single environments in several processes;
- ``channel``: messages between processes;
- ``info_rows``: infos as bytes.

Faster wrappers:

- ``normalize``: ``VecNormalize`` in compiled kernels;
- ``faster``: the same code for SB3's own classes during training.

Adapters to SB3's ``VecEnv``:

- ``adapters``: the choice of an adapter;
- ``vector``: the base class of adapters;
- ``gymnasium_vector``: gymnasium's vectorised environments;
- ``envpool``: EnvPool's environments.

Tensor environments:

- ``tensor``: environments whose steps are tensors, and their adapter;
- ``tensor_normalize``: ``VecNormalize`` for them;
- ``tensor_episodes``: statistics of their episodes;
- ``graphed``: steps as CUDA graphs;
- ``isaac_lab``: environments of Isaac Lab;
- ``jax``: environments in JAX.

What these share:

- ``layers``: wrappers of vectorised environments;
- ``rows``: rows of batches;
- ``shapes``: checks of what steps return;
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
