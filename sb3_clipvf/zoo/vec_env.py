"""
``--vec-env gymnasium|envpool|ale``: training environments of the RL Zoo that step together, with the meaning of the
settings kept, or the reason why that cannot be.
"""

import difflib
import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import gymnasium as gym
import numpy as np
from gymnasium import spaces
from gymnasium.envs.registration import EnvSpec
from gymnasium.vector import AutoresetMode, SyncVectorEnv
from rl_zoo3 import exp_manager
from stable_baselines3.common import env_util
from stable_baselines3.common.monitor import ResultsWriter
from stable_baselines3.common.vec_env import VecEnv

from sb3_clipvf.envs import as_vec_env, vector
from sb3_clipvf.zoo.entries import with_arguments
from sb3_clipvf.zoo.run_files import replaced

VEC_ENVS = ("gymnasium", "envpool", "ale")
"""What ``--vec-env`` takes besides the Zoo's ``dummy`` and ``subproc``."""

_ATARI_WRAPPER = "stable_baselines3.common.atari_wrappers.AtariWrapper"


@dataclass(frozen=True)
class EnvSettings:
    """
    What the Zoo's settings and command line say about the training environments.

    :param spec: Gymnasium's entry of the environment.
    :param env_kwargs: Arguments of the environment.
    :param wrappers: Full names and arguments of the wrappers of each environment, innermost first.
    :param monitor_kwargs: Arguments of ``Monitor``.
    :param frame_stack: Observations to stack, or None.
    :param normalize: Whether ``VecNormalize`` is asked for.
    :param monitor_folder: Folder for the files of episodes, or None.
    """

    spec: EnvSpec
    env_kwargs: dict[str, Any] = field(default_factory=dict)
    wrappers: tuple[tuple[str, dict[str, Any]], ...] = ()
    monitor_kwargs: dict[str, Any] = field(default_factory=dict)
    frame_stack: int | None = None
    normalize: bool = False
    monitor_folder: str | None = None

    @property
    def is_atari(self) -> bool:
        """Return whether it is one of ale-py's games."""
        return "AtariEnv" in str(self.spec.entry_point)

    @property
    def monitor_path(self) -> str | None:
        """File of episodes where one serves all environments."""
        return None if self.monitor_folder is None else os.path.join(self.monitor_folder, "0.monitor.csv")


def wrapper_list(entry: Any) -> tuple[tuple[str, dict[str, Any]], ...]:
    """
    Read ``env_wrapper`` of the settings.

    :param entry: A name or class, a dict of one name and its arguments, a list of these, or None.
    :return: Full names and arguments, innermost first.
    """
    wrappers = []
    for wrapper, kwargs in with_arguments(entry):
        name = wrapper if isinstance(wrapper, str) else f"{wrapper.__module__}.{wrapper.__qualname__}"
        wrappers.append((name, dict(kwargs)))
    return tuple(wrappers)


def stacks_frames(name: str, settings: EnvSettings) -> bool:
    """
    Return whether the environments stack observations themselves.

    :param name: One of ``VEC_ENVS``.
    :param settings: Of the training environments.
    :return: Whether they do, so that the Zoo must not.
    """
    return name != "gymnasium" and settings.is_atari


@contextmanager
def growing_files() -> Iterator[None]:
    """
    Make environments append to the files of episodes that are there; the checkpoint then cuts them to its own length.

    Not by the manager's ``monitor_kwargs``, since the Zoo completes them for some environments where they are empty,
    and replaces them for others.
    """

    def make(make_env: Any, *, monitor_kwargs: dict[str, Any], **kwargs: Any) -> VecEnv:
        monitor_kwargs = {**monitor_kwargs, "override_existing": False}
        return env_util.make_vec_env(make_env, monitor_kwargs=monitor_kwargs, **kwargs)

    appending = partial(ResultsWriter, override_existing=False)
    with replaced(exp_manager, "make_vec_env", make), replaced(vector, "ResultsWriter", appending):
        yield


@contextmanager
def known_keywords(env_kwargs: dict[str, Any] | None) -> Iterator[None]:
    """Name an argument that the environment does not know, and where it comes from: only making it shows which."""
    try:
        yield
    except TypeError as error:
        unknown = [name for name in env_kwargs or {} if f"unexpected keyword argument {name!r}" in str(error)]
        if not unknown:
            raise
        raise TypeError(
            f"`env_kwargs` must be arguments of the environment, got {unknown[0]!r} in it: {error}. Correct it in the "
            "settings or in `--env-kwargs`, or leave it out."
        ) from error


def make_vec_env(name: str, settings: EnvSettings, env_fns: Sequence[Callable[[], gym.Env[Any, Any]]]) -> VecEnv:
    """
    Make the training environments.

    :param name: One of ``VEC_ENVS``.
    :param settings: What they must be like.
    :param env_fns: The Zoo's own ways to make each of them, with its wrappers.
    :return: All of them, not normalised yet.
    :raises ValueError: If a setting cannot be honoured so.
    :raises ImportError: If the package is missing.
    """
    if name == "gymnasium":
        return _gymnasium(settings, env_fns)
    if settings.env_kwargs:
        raise ValueError(
            f"`env_kwargs` must be empty with `--vec-env {name}`, got {settings.env_kwargs}, which are Gymnasium's. "
            "Train with `--vec-env gymnasium`."
        )
    if settings.monitor_kwargs:
        raise ValueError(
            f"`monitor_kwargs` must be empty with `--vec-env {name}`, got {settings.monitor_kwargs}: no Monitor runs "
            "there. Train with `--vec-env gymnasium`."
        )
    if name == "ale" or settings.is_atari:
        return _atari(name, settings, len(env_fns))
    return _envpool(settings, len(env_fns))


def _gymnasium(settings: EnvSettings, env_fns: Sequence[Callable[[], gym.Env[Any, Any]]]) -> VecEnv:
    spec = settings.spec
    plain = not (settings.env_kwargs or settings.wrappers or settings.monitor_kwargs or spec.additional_wrappers)
    if plain and spec.vector_entry_point is not None and not settings.is_atari:
        return as_vec_env(gym.make_vec(spec.id, num_envs=len(env_fns)), monitor_path=settings.monitor_path)
    return as_vec_env(SyncVectorEnv(env_fns, autoreset_mode=AutoresetMode.SAME_STEP))


def _envpool(settings: EnvSettings, n_envs: int) -> VecEnv:
    import envpool

    if settings.wrappers:
        raise ValueError(
            f"`env_wrapper` must be empty with `--vec-env envpool`, got {settings.wrappers[0][0]}, which wraps one "
            "environment. Train with `--vec-env gymnasium`."
        )
    spec = settings.spec
    _check_task(spec.id, spec.id)
    limit = {} if spec.max_episode_steps is None else {"max_episode_steps": spec.max_episode_steps}
    pool = envpool.make_gymnasium(spec.id, num_envs=2 * n_envs, **limit)
    venv = as_vec_env(pool, monitor_path=settings.monitor_path, spares=True)
    single = gym.make(spec.id)
    _take_spaces(venv, single.observation_space, single.action_space)
    single.close()
    return venv


def _atari(name: str, settings: EnvSettings, n_envs: int) -> VecEnv:
    if not settings.is_atari:
        raise ValueError(
            f"`--env` must be an Atari game with `--vec-env ale`, got {settings.spec.id}. `--vec-env gymnasium` takes "
            "every environment."
        )
    options, clips = _atari_options(name, settings)
    game = settings.spec.kwargs["game"]
    if name == "ale":
        from ale_py.vector_env import AtariVectorEnv

        env = AtariVectorEnv(game, n_envs, reward_clipping=False, autoreset_mode=AutoresetMode.SAME_STEP, **options)
        return as_vec_env(env, clip_rewards=clips, monitor_path=settings.monitor_path)
    import envpool

    task = "".join(part.capitalize() for part in game.split("_")) + "-v5"
    _check_task(settings.spec.id, task)
    pool = envpool.make_gymnasium(task, num_envs=n_envs, reward_clip=clips, **options)
    return as_vec_env(pool, monitor_path=settings.monitor_path)


def _atari_options(name: str, settings: EnvSettings) -> tuple[dict[str, Any], bool]:
    """Return the pool's options for ``AtariWrapper`` and ``frame_stack``, and whether rewards are clipped."""
    spec = settings.spec.kwargs
    if [wrapper for wrapper, _ in settings.wrappers] != [_ATARI_WRAPPER]:
        names = ", ".join(wrapper for wrapper, _ in settings.wrappers) or "none"
        raise ValueError(
            f"`env_wrapper` must be {_ATARI_WRAPPER} alone for Atari games with `--vec-env {name}`, got {names}: that "
            "preprocessing is built in, and no other. Train with `--vec-env gymnasium`."
        )
    if spec.get("frameskip") != 1:
        raise ValueError(
            f"`--env` must be a game without frame skip with `--vec-env {name}`, got {settings.spec.id}: AtariWrapper "
            "skips frames itself. Take the game's NoFrameskip-v4."
        )
    if settings.normalize:
        raise ValueError(
            f"`normalize` must not be set for Atari games with `--vec-env {name}`, got it: it would see stacked "
            "observations, and single ones in the evaluation. Train with `--vec-env gymnasium`."
        )
    wrapper = {
        "noop_max": 30,
        "frame_skip": 4,
        "screen_size": 84,
        "terminal_on_life_loss": True,
        "clip_reward": True,
        "action_repeat_probability": 0.0,
        **settings.wrappers[0][1],
    }
    sticky = (spec.get("repeat_action_probability", 0.0), wrapper["action_repeat_probability"])
    if all(sticky):
        raise ValueError(
            f"`action_repeat_probability` must be 0 for {settings.spec.id}, which repeats actions itself, got "
            f"{sticky[1]}. Train with `--vec-env gymnasium` to have both."
        )
    options = {
        "stack_num": settings.frame_stack or 1,
        "img_height": wrapper["screen_size"],
        "img_width": wrapper["screen_size"],
        "repeat_action_probability": max(sticky),
        "full_action_space": spec.get("full_action_space", False),
        "use_fire_reset": True,
    }
    frames = spec.get("max_num_frames_per_episode", 108_000)
    if name == "ale":
        options |= {"frameskip": wrapper["frame_skip"], "noop_max": wrapper["noop_max"]}
        options |= {"life_loss_info": wrapper["terminal_on_life_loss"], "max_num_frames_per_episode": frames}
    else:
        # EnvPool draws from 0 to noop_max - 1, and adds one where it need not fire.
        options |= {"frame_skip": wrapper["frame_skip"], "noop_max": max(wrapper["noop_max"], 1)}
        options |= {"episodic_life": wrapper["terminal_on_life_loss"]}
        options |= {"max_episode_steps": frames // wrapper["frame_skip"]}
    return options, wrapper["clip_reward"]


def _check_task(env_id: str, task: str) -> None:
    import envpool

    tasks = envpool.list_all_envs()
    if task not in tasks:
        near = difflib.get_close_matches(task, tasks, n=1)
        hint = f"The nearest is {near[0]}. " if near else ""
        raise ValueError(
            f"`--env` must be a task of EnvPool with `--vec-env envpool`, got {env_id}. {hint}`--vec-env gymnasium` "
            "takes every environment."
        )


def _take_spaces(venv: VecEnv, observation_space: spaces.Space[Any], action_space: spaces.Space[Any]) -> None:
    """Set Gymnasium's own spaces, so that the model loads with Gymnasium's environments again."""
    same_actions = _same_form(venv.action_space, action_space) and _same_bounds(venv.action_space, action_space)
    for kind, same, ours, theirs in (
        ("action", same_actions, venv.action_space, action_space),
        # Observations come as they are, whatever bounds are declared.
        (
            "observation",
            _same_form(venv.observation_space, observation_space),
            venv.observation_space,
            observation_space,
        ),
    ):
        if not same:
            raise ValueError(
                f"`--env` must have the same {kind} space in EnvPool and Gymnasium, got {ours} and {theirs}: a model "
                "would not carry over. Train with `--vec-env gymnasium`."
            )
    venv.observation_space, venv.action_space = observation_space, action_space


def _same_form(first: spaces.Space[Any], second: spaces.Space[Any]) -> bool:
    if not (isinstance(first, spaces.Box) and isinstance(second, spaces.Box)):
        return first == second
    # EnvPool has the actions of MuJoCo's environments in float64, Gymnasium in float32.
    return first.shape == second.shape and first.dtype.kind == second.dtype.kind


def _same_bounds(first: spaces.Space[Any], second: spaces.Space[Any]) -> bool:
    if not (isinstance(first, spaces.Box) and isinstance(second, spaces.Box)):
        return True
    return np.allclose(first.low, second.low) and np.allclose(first.high, second.high)
