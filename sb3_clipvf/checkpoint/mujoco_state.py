"""The state of Gymnasium's MuJoCo environments: the simulation's state, and the values that Python code reads."""

from typing import Any

import numpy as np

from sb3_clipvf.checkpoint.errors import EnvironmentMismatchError
from sb3_clipvf.checkpoint.state_attributes import check_names

# MuJoCo computes these before it integrates, so after a step they belong to the state before that step. Rewards and
# observations read them. Computing them again would give the values of the state after the step.
_DERIVED = (
    "xpos xquat xmat xipos ximat xanchor xaxis geom_xpos geom_xmat site_xpos site_xmat cam_xpos cam_xmat light_xpos "
    "light_xdir subtree_com subtree_linvel subtree_angmom cinert cvel cacc cfrc_int cfrc_ext cdof cdof_dot qacc "
    "qacc_smooth qfrc_actuator qfrc_bias qfrc_constraint qfrc_inverse qfrc_passive qfrc_smooth actuator_force "
    "actuator_length actuator_velocity ten_length ten_velocity sensordata energy"
).split()

# Pusher and Reacher draw these at a reset, and the simulation's state holds them as well.
_DRAWN = ("goal", "goal_pos", "cylinder_pos")


def is_mujoco(env: Any) -> bool:
    """Return whether an environment without wrappers is of one of Gymnasium's own MuJoCo classes."""
    return type(env).__module__.startswith("gymnasium.envs.mujoco.")


def mujoco_state(env: Any) -> dict[str, Any]:
    """Return the state of an environment without wrappers, as copies."""
    import mujoco

    kind = mujoco.mjtState.mjSTATE_INTEGRATION
    integration = np.empty(mujoco.mj_stateSize(env.model, kind))
    mujoco.mj_getState(env.model, env.data, integration, kind)
    derived = {name: np.array(getattr(env.data, name)) for name in _DERIVED if hasattr(env.data, name)}
    drawn = {name: np.array(vars(env)[name]) for name in _DRAWN if name in vars(env)}
    return {"integration": integration, "derived": derived, "drawn": drawn}


def set_mujoco_state(env: Any, state: dict[str, Any]) -> None:
    """Restore the state from :func:`mujoco_state` in an environment without wrappers, which has been reset once."""
    import mujoco

    check_names(state["derived"], _DERIVED, "the simulation")
    check_names(state["drawn"], _DRAWN, type(env).__name__)
    kind = mujoco.mjtState.mjSTATE_INTEGRATION
    size = mujoco.mj_stateSize(env.model, kind)
    if state["integration"].size != size:
        raise EnvironmentMismatchError(
            f"The simulation of {type(env).__name__} must have {state['integration'].size} numbers in its state, as in "
            f"the checkpoint, got {size}. Build it with the same arguments, and with the same version of MuJoCo."
        )
    mujoco.mj_setState(env.model, env.data, state["integration"], kind)
    mujoco.mj_forward(env.model, env.data)
    mujoco.mj_setState(env.model, env.data, state["integration"], kind)  # the forward pass changed some of it
    for name, values in state["derived"].items():
        getattr(env.data, name)[...] = values
    for name, values in state["drawn"].items():
        setattr(env, name, values)
