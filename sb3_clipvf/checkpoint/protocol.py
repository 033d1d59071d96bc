"""The attributes and methods of a model that checkpoints use."""

import os
from collections import deque
from typing import Any, Protocol, Self, runtime_checkable

import numpy as np
import torch as th
from gymnasium import spaces
from stable_baselines3.common.logger import Logger
from stable_baselines3.common.policies import ActorCriticPolicy
from stable_baselines3.common.type_aliases import GymEnv
from stable_baselines3.common.vec_env import VecEnv, VecNormalize


@runtime_checkable
class ResumableModel(Protocol):
    """A model whose training can be saved and resumed: SB3's on-policy algorithm, and what ``ClipPPO`` adds to it."""

    # SB3's
    action_space: spaces.Space[Any]
    device: th.device
    env: VecEnv | None
    ep_info_buffer: deque[Any] | None
    num_timesteps: int
    observation_space: spaces.Space[Any]
    policy: ActorCriticPolicy
    seed: int | None
    tensorboard_log: str | None
    verbose: int
    _custom_logger: bool
    _last_episode_starts: np.ndarray | None
    _last_obs: np.ndarray | dict[str, np.ndarray] | None
    _last_original_obs: np.ndarray | dict[str, np.ndarray] | None
    _total_timesteps: int

    # ClipPPO's
    _checkpoint_folder: os.PathLike[str] | None
    _n_envs_before: int | None
    """Number of environments in the file from which the model was loaded, if it is not known to be the same."""
    _resumed: Any
    """``resume.Resumed`` between ``resume`` and the following ``learn``, else None."""
    _schedule_timesteps: int | None
    _training_id: str | None

    @property
    def logger(self) -> Logger:
        """The logger of the running ``learn``."""

    @classmethod
    def load(cls, path: Any, env: GymEnv | None, device: th.device | str, **kwargs: Any) -> Self:
        """Load a model from a file or an open file."""

    def set_logger(self, logger: Logger) -> None:
        """Use a logger of the user."""

    def get_vec_normalize_env(self) -> VecNormalize | None:
        """Return the ``VecNormalize`` around the environments."""

    def get_parameters(self) -> dict[str, dict[Any, Any]]:
        """Return state dicts, by name."""

    def _states_of_other_processes(self) -> list[tuple[dict[str, Any], list[str]]]:
        """Return what ``process_state`` returns in each other process of the run."""

    def _saved_attributes(self) -> dict[str, Any]:
        """Return the attributes that a file holds besides tensors, by name."""

    def _saved_variables(self) -> dict[str, Any]:
        """Return the tensors that a file holds besides state dicts, by name."""
