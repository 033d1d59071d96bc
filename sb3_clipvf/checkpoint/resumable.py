"""A wrapper by which environments in other processes can be asked for their state."""

from typing import Any

import gymnasium as gym

from sb3_clipvf.checkpoint.env_state import describe, environment_state, restore_environment


class ResumableEnv(gym.Wrapper[Any, Any, Any, Any]):
    """
    Let a checkpoint reach an environment that runs in another process.

    It must be the outermost wrapper, outside of ``Monitor``: ``make_vec_env(..., wrapper_class=ResumableEnv,
    vec_env_cls=SubprocVecEnv)`` puts it there. In the process of the training itself it is not needed.

    :param env: The environment, in all its other wrappers.
    """

    def whole_state(self) -> dict[str, Any]:
        """
        Read the state of the environment and of all its wrappers.

        :return: What :meth:`set_whole_state` takes.
        """
        return environment_state(self.env)

    def set_whole_state(self, state: dict[str, Any]) -> None:
        """
        Put the environment and all its wrappers into a state.

        :param state: From :meth:`whole_state`, of an environment that was built alike.
        """
        restore_environment(self.env, state)

    def whole_description(self) -> list[str]:
        """
        Name the environment and its wrappers.

        :return: Classes, from the outermost wrapper to the environment.
        """
        return describe(self.env)
