"""The whole training state between two rollouts: everything that changes the next update."""

from dataclasses import dataclass
from typing import Any, cast

import numpy as np
import torch as th
from stable_baselines3.common.callbacks import BaseCallback
from stable_baselines3.common.vec_env import VecEnv
from torch.nn.modules.conv import _ConvNd

from sb3_clipvf.checkpoint.callback_state import callback_states
from sb3_clipvf.checkpoint.errors import UnsavableModelError
from sb3_clipvf.checkpoint.protocol import ResumableModel
from sb3_clipvf.checkpoint.random_state import global_states, space_states
from sb3_clipvf.checkpoint.vec_env_state import vec_env_state
from sb3_clipvf.common.tensors import map_tree, without_numpy
from sb3_clipvf.files.codec import frozen
from sb3_clipvf.files.model import frozen_attributes

OBSERVATIONS = ("_last_obs", "_last_episode_starts", "_last_original_obs")
"""Attributes from which the next rollout starts. SB3's ``save`` writes them, but its ``load`` drops them."""


@dataclass(frozen=True)
class TrainingState:
    """A copy of the training state between two rollouts."""

    # SB3's model file: attributes as JSON, state dicts, other tensors
    attributes: dict[str, Any]
    parameters: dict[str, Any]
    variables: dict[str, Any]
    # Everything else
    tree: dict[str, Any]
    # Fields of CheckpointManifest
    differences: tuple[str, ...]
    training: str
    num_timesteps: int
    total_timesteps: int
    mean_return: float | None


def training_state(
    model: ResumableModel, callback: BaseCallback, build: dict[str, Any], resets: dict[str, Any] | None
) -> TrainingState:
    """
    Return the training state between two rollouts, with that of the other processes.

    ``callback`` is the one that ``learn`` created from its argument, ``build`` the description of the environments. If
    the environments are reset right after this checkpoint, ``resets`` is the state of the generator of their seeds.
    Raise UnsavableModelError if an attribute of the model cannot be written.
    """
    tree, differences = process_state(model, callback, build, resets)
    tree["processes"] = []
    for other, reasons in model._states_of_other_processes():
        tree["processes"].append(other)
        differences += [reason for reason in reasons if reason not in differences]
    return TrainingState(
        attributes=_attributes(model._saved_attributes()),
        parameters=map_tree(_cloned, model.get_parameters()),
        variables=map_tree(_cloned, model._saved_variables()),
        tree=tree,
        differences=(*differences, *_rounding(model)),
        training=model._training_id or "",
        num_timesteps=model.num_timesteps,
        total_timesteps=model._total_timesteps,
        mean_return=_mean_return(model),
    )


def process_state(
    model: ResumableModel, callback: BaseCallback, build: dict[str, Any], resets: dict[str, Any] | None
) -> tuple[dict[str, Any], list[str]]:
    """Return the state of this process, and a text for each part that a resume will not repeat exactly."""
    environments, differences = vec_env_state(cast(VecEnv, model.env))
    callbacks, reasons = callback_states(callback)
    if resets is not None:
        differences = []
    tree = {
        "random": global_states(),
        "model": frozen({name: getattr(model, name) for name in OBSERVATIONS}, "model"),
        "spaces": space_states(model),
        "logger": _logger_state(model),
        "environments": environments,
        "build": build,
        "callbacks": callbacks,
        "resets": resets,
    }
    return tree, [*differences, *reasons]


def set_logger_state(model: ResumableModel, state: dict[str, Any]) -> None:
    """Restore the recorded values that were not logged yet."""
    model.logger.name_to_value.update(state["values"])
    model.logger.name_to_count.update(state["counts"])
    model.logger.name_to_excluded.update(state["excluded"])


def _rounding(model: ResumableModel) -> list[str]:
    """Return a text if a library may round the same sums differently in another process."""
    if model.device.type != "cpu":
        return [f"Sums on {model.device} have no fixed order: weights may differ in their last digits."]
    if any(isinstance(module, _ConvNd) for module in model.policy.modules()):
        return ["Sums of convolutions depend on where tensors lie in memory: weights may differ in their last digits."]
    return []


def _attributes(values: dict[str, Any]) -> dict[str, Any]:
    try:
        return frozen_attributes(values)
    except Exception as error:  # pickling calls methods of any class
        for name, value in values.items():
            try:
                frozen_attributes({name: value})
            except Exception as reason:
                raise UnsavableModelError(
                    f"`model.{name}` must be a value that can be pickled, got a {type(value).__name__} ({reason}). "
                    "Keep it outside of the model, such as in a callback."
                ) from error
        raise


def _cloned(value: Any) -> Any:
    if isinstance(value, th.Tensor):
        return value.detach().to("cpu", copy=True)  # `load` moves it to its device
    return without_numpy(value)


def _logger_state(model: ResumableModel) -> dict[str, Any]:
    """Return the recorded values that were not logged yet: numbers and text, no images or videos."""
    logger = model.logger
    plain = (bool, int, float, str, np.generic)
    values = {name: value for name, value in logger.name_to_value.items() if isinstance(value, plain)}
    return {
        "folder": logger.dir if model.tensorboard_log is not None else None,
        "values": frozen(values, "logger"),
        "counts": dict(logger.name_to_count),
        "excluded": {name: logger.name_to_excluded[name] for name in values if name in logger.name_to_excluded},
    }


def _mean_return(model: ResumableModel) -> float | None:
    """Return the mean return of a full window of episodes, None without one."""
    episodes = model.ep_info_buffer
    if episodes is None or len(episodes) != episodes.maxlen:
        return None
    mean = float(np.mean([episode["r"] for episode in episodes]))
    return mean if np.isfinite(mean) else None
