"""A wrapper by which checkpoints save and restore environments in other processes."""

from typing import Any

import gymnasium as gym

from sb3_clipvf.checkpoint.env_state import describe_env, env_state, restore_env


class ResumableEnv(gym.Wrapper[Any, Any, Any, Any]):
    """
    Wrapper by which checkpoints save and restore an environment that runs in another process.

    It must be the outermost wrapper, outside of ``Monitor``: ``make_vec_env(..., wrapper_class=ResumableEnv,
    vec_env_cls=SubprocVecEnv)`` puts it there. Environments in a ``DummyVecEnv`` do not need it.

    :param env: Environment with all its other wrappers.
    """

    def whole_state(self) -> dict[str, Any]:
        """Return the state of the environment and of all its wrappers, for :meth:`set_whole_state`."""
        return env_state(self.env)

    def set_whole_state(self, state: dict[str, Any]) -> None:
        """Restore the state of the environment and of all its wrappers, from :meth:`whole_state`."""
        restore_env(self.env, state)

    def whole_description(self) -> list[str]:
        """Return the classes of the wrappers and the environment, from the outermost one."""
        return describe_env(self.env)
