"""A wrapper by which checkpoints save and restore environments in other processes."""

import os
from typing import Any

import gymnasium as gym

from sb3_clipvf.checkpoint.env_state import describe_env, env_state, restore_env
from sb3_clipvf.checkpoint.random_state import global_states, set_global_states


class ResumableEnv(gym.Wrapper[Any, Any, Any, Any]):
    """
    Wrapper by which checkpoints save and restore an environment that runs in another process.

    It must be the outermost wrapper, outside of ``Monitor``, and checkpoints refuse environments where it is not:
    ``make_vec_env(..., wrapper_class=ResumableEnv, vec_env_cls=SubprocVecEnv)`` puts it there. Environments in a
    ``DummyVecEnv`` do not need it.

    :param env: Environment with all its other wrappers.
    """

    def whole_state(self) -> dict[str, Any]:
        """
        Return the state of the environment and of all its wrappers, for :meth:`set_whole_state`.

        It includes the random generators that the process shares, since environments may draw from them.
        """
        return {**env_state(self.env), "process": {"id": os.getpid(), "random": global_states()}}

    def set_whole_state(self, state: dict[str, Any], training_process: int | None = None) -> None:
        """
        Restore the state of the environment and of all its wrappers, from :meth:`whole_state`.

        :param state: The state.
        :param training_process: Id of the process of the training, which restores its own shared generators.
        """
        restore_env(self.env, state)
        if state.get("process") is not None and os.getpid() != training_process:
            set_global_states(state["process"]["random"])

    def whole_description(self) -> list[str]:
        """Return the classes of the wrappers and the environment, from the outermost one."""
        return describe_env(self.env)
