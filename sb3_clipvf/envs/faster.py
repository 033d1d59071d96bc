"""
SB3's ``DummyVecEnv`` and ``VecNormalize`` at the cost of this package's classes, while ``ClipPPO`` trains in them.

Users keep their objects, and results are the same, bit for bit. Only objects that run SB3's own code are recognised:
of exactly these classes, without a replaced method.
"""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import stable_baselines3
from stable_baselines3.common.running_mean_std import RunningMeanStd
from stable_baselines3.common.vec_env import DummyVecEnv, VecEnv, VecNormalize
from stable_baselines3.common.vec_env.base_vec_env import VecEnvStepReturn

from sb3_clipvf.envs.dummy import fast_step_wait

# Methods that this package restates.
_NAMES: dict[type[Any], str] = {
    DummyVecEnv: "step step_async step_wait _save_obs _obs_from_buf",
    VecNormalize: "step step_async step_wait normalize_obs normalize_reward _normalize_obs _update_reward",
    RunningMeanStd: "update update_from_moments",
}
_METHODS = {cls: {name: getattr(cls, name) for name in names.split()} for cls, names in _NAMES.items()}
_FOLDER = str(Path(stable_baselines3.__file__).parent)


def runs_sb3s_code(venv: VecEnv, cls: type[VecEnv]) -> bool:
    """Return whether environments are exactly of a class of SB3, and none of its methods was replaced."""
    return (
        type(venv) is cls
        and _METHODS[cls].keys().isdisjoint(vars(venv))
        and all(
            getattr(owner, name, None) is method and _is_of_sb3(method)
            for owner, methods in _METHODS.items()
            for name, method in methods.items()
        )
    )


def _is_of_sb3(method: Any) -> bool:
    """Return whether a method was SB3's when this module was imported."""
    code = getattr(method, "__code__", None)
    return code is not None and code.co_filename.startswith(_FOLDER)


def faster_step_wait(venv: VecEnv) -> Callable[[DummyVecEnv], VecEnvStepReturn] | None:
    """
    Return a function of SB3's own ``DummyVecEnv`` with the results of its ``step_wait``; None for other classes.

    The function checks the shapes of observations. ``guards.env_checks`` replaces the method by it.
    """
    return fast_step_wait if runs_sb3s_code(venv, DummyVecEnv) else None


def faster_step(venv: VecEnv) -> Callable[[np.ndarray], VecEnvStepReturn]:
    """Return ``venv.step``, or for SB3's own ``VecNormalize`` a function with the same results."""
    if not runs_sb3s_code(venv, VecNormalize):
        return venv.step
    from sb3_clipvf.envs.normalize import normalized  # imports numba

    # Not a method put into the object, as `checked_and_faster` does with a DummyVecEnv: `save` would pickle it.
    def step(actions: np.ndarray) -> VecEnvStepReturn:
        venv.step_async(actions)
        return normalized(venv, venv.venv.step_wait())  # type: ignore[arg-type, attr-defined]

    return step
