"""The state of Gymnasium's MuJoCo environments: that of the simulation, and what Python code reads of it."""

import sys
from typing import Any

import numpy as np

from sb3_clipvf.checkpoint.errors import EnvironmentMismatchError

# MuJoCo computes these before it moves on, so that after a step they are those of the state before. Rewards and
# observations are made of them, and computing them anew would give those of the state after.
_DERIVED = (
    "xpos xquat xmat xipos ximat xanchor xaxis geom_xpos geom_xmat site_xpos site_xmat cam_xpos cam_xmat light_xpos "
    "light_xdir subtree_com subtree_linvel subtree_angmom cinert cvel cacc cfrc_int cfrc_ext cdof cdof_dot qacc "
    "qacc_smooth qfrc_actuator qfrc_bias qfrc_constraint qfrc_inverse qfrc_passive qfrc_smooth actuator_force "
    "actuator_length actuator_velocity ten_length ten_velocity sensordata energy"
).split()

# Drawn at a reset, by Pusher and Reacher; they stand in the simulation's state as well.
_DRAWN = ("goal", "goal_pos", "cylinder_pos")


def is_mujoco(env: Any) -> bool:
    """
    Tell whether an environment is one of Gymnasium's that run on MuJoCo.

    :param env: Without wrappers.
    :return: False for classes that others derived from these: what they add is not known here.
    """
    module = sys.modules.get("gymnasium.envs.mujoco.mujoco_env")
    return (
        module is not None
        and isinstance(env, module.MujocoEnv)
        and type(env).__module__.startswith("gymnasium.envs.mujoco.")
    )


def mujoco_state(env: Any) -> dict[str, Any]:
    """
    Read the state.

    :param env: Without wrappers.
    :return: Arrays of its own memory.
    """
    import mujoco

    kind = mujoco.mjtState.mjSTATE_INTEGRATION
    integration = np.empty(mujoco.mj_stateSize(env.model, kind))
    mujoco.mj_getState(env.model, env.data, integration, kind)
    derived = {name: np.array(getattr(env.data, name)) for name in _DERIVED if hasattr(env.data, name)}
    drawn = {name: np.array(vars(env)[name]) for name in _DRAWN if name in vars(env)}
    return {"integration": integration, "derived": derived, "drawn": drawn}


def set_mujoco_state(env: Any, state: dict[str, Any]) -> None:
    """
    Put the simulation into a state.

    :param env: Without wrappers, and reset.
    :param state: From :func:`mujoco_state`.
    :raises EnvironmentMismatchError: If the state is that of another simulation.
    """
    import mujoco

    kind = mujoco.mjtState.mjSTATE_INTEGRATION
    size = mujoco.mj_stateSize(env.model, kind)
    if state["integration"].size != size:
        raise EnvironmentMismatchError(
            f"The simulation of {type(env).__name__} must have {state['integration'].size} numbers in its state, as in "
            f"the checkpoint, got {size}. Make it with the same arguments, and with the same version of MuJoCo."
        )
    mujoco.mj_setState(env.model, env.data, state["integration"], kind)
    mujoco.mj_forward(env.model, env.data)
    # The forward pass wrote to some of it.
    mujoco.mj_setState(env.model, env.data, state["integration"], kind)
    for name, values in state["derived"].items():
        getattr(env.data, name)[...] = values
    for name, values in state["drawn"].items():
        setattr(env, name, values)
