"""``as_vec_env``, which chooses an adapter from a vectorised environment to SB3's ``VecEnv``."""

import sys
from collections.abc import Callable
from os import PathLike
from typing import Any

import gymnasium as gym
from gymnasium.envs.classic_control.cartpole import CartPoleVectorEnv
from gymnasium.vector import AsyncVectorEnv, SyncVectorEnv, VectorEnv
from stable_baselines3.common.vec_env import VecEnv

from sb3_clipvf.envs.envpool import EnvPoolVecEnv, SparedEnvPoolVecEnv
from sb3_clipvf.envs.gymnasium_vector import AtariVecEnv, CartPoleVecEnv, GymnasiumVecEnv, SeparateVecEnv
from sb3_clipvf.envs.tensor import TensorEnvAdapter, is_tensor_vec_env
from sb3_clipvf.envs.vector import BatchedVecEnv


def as_vec_env(
    env: Any,
    *,
    clip_rewards: bool = False,
    monitor_path: str | PathLike[str] | None = None,
    spares: bool = False,
) -> BatchedVecEnv:
    """
    Turn a vectorised environment into an SB3 ``VecEnv`` that behaves like ``DummyVecEnv`` over ``Monitor``.

    The step that ends an episode returns the first observation of the next one, with the true final observation in the
    infos. Steps that only reset an environment are no transitions, and are never returned. Do not step the environment
    yourself while the adapter is in use.

    :param env: A gymnasium ``VectorEnv`` of any autoreset mode, an EnvPool of ``env_type="gymnasium"``, an
        ``AtariVectorEnv`` of ale-py, or a :class:`TensorVecEnv`.
    :param clip_rewards: Whether the algorithm gets the sign of each reward. Returns in ``info["episode"]`` stay true.
    :param monitor_path: File for the return, length and time of each episode, in the format of SB3's ``Monitor``, with
        a column ``total_timesteps``: steps of all environments at the end of the episode. ``.monitor.csv`` is appended
        if the name lacks it. None: no file.
    :param spares: For an EnvPool: two environments per row, of which one plays and the other waits, already reset.
        Resets then run during the next step of all rows, instead of in a step of their own.
    :return: The environment with SB3's interface. ``.env`` is ``env``.
    :raises TypeError: If ``env`` is something else.
    :raises ValueError: If it runs in a mode that has no exact counterpart in SB3; the message states what to change.
    """
    adapter = _adapter_of(env)
    if spares:
        if adapter is not EnvPoolVecEnv:
            raise ValueError(
                f"`spares` must be False for {type(env).__name__}, got True: only an EnvPool can step a part of "
                "its environments. Omit it."
            )
        adapter = SparedEnvPoolVecEnv
    return adapter(env, clip_rewards=clip_rewards, monitor_path=monitor_path)


def _adapter_of(env: Any) -> Callable[..., BatchedVecEnv]:
    if is_tensor_vec_env(env):
        return TensorEnvAdapter
    # EnvPools of the gymnasium type are VectorEnvs as well, with single spaces where VectorEnvs have batched ones.
    if _is_of(env, "envpool.python.envpool", "EnvPoolMixin"):
        return EnvPoolVecEnv
    if not isinstance(env, VectorEnv):
        raise TypeError(
            "`env` must be a gymnasium VectorEnv, an EnvPool or ale-py's AtariVectorEnv, "
            f"got {type(env).__name__}. {_hint(env)}"
        )
    core = env.unwrapped
    if _is_of(core, "envpool.python.envpool", "EnvPoolMixin"):
        raise TypeError(
            f"`env` must be the EnvPool itself, got it inside {type(env).__name__}, which expects all rows in every "
            "step. Use wrappers of SB3's vec_env module around the adapter."
        )
    if isinstance(core, CartPoleVectorEnv):
        return CartPoleVecEnv
    if isinstance(core, (SyncVectorEnv, AsyncVectorEnv)):
        return SeparateVecEnv
    if _is_of(core, "ale_py.vector_env", "AtariVectorEnv"):
        return AtariVecEnv
    return GymnasiumVecEnv


def _is_of(env: Any, module: str, name: str) -> bool:
    """Return whether ``env`` is of a class of an optional package, which this does not import."""
    return module in sys.modules and isinstance(env, getattr(sys.modules[module], name))


def _hint(env: Any) -> str:
    if isinstance(env, VecEnv):
        return "It is an SB3 VecEnv already: use it as it is."
    if isinstance(env, gym.Env):
        return "Pass a single environment directly to the algorithm, or create many with gymnasium.make_vec."
    if isinstance(env, str):
        return f"Create it first, with gymnasium.make_vec({env!r}, num_envs=8) for example."
    return "Create one with gymnasium.make_vec or envpool.make_gymnasium."
