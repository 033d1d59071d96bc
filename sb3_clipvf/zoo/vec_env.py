"""
``--vec-env gymnasium|envpool|ale``: vectorised training environments of the RL Zoo. A setting keeps its meaning, or
is refused with the reason.
"""

import difflib
import inspect
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
from stable_baselines3.common import env_util
from stable_baselines3.common.atari_wrappers import AtariWrapper
from stable_baselines3.common.monitor import ResultsWriter
from stable_baselines3.common.vec_env import VecEnv

from sb3_clipvf.envs import as_vec_env, vector
from sb3_clipvf.zoo.entries import with_arguments
from sb3_clipvf.zoo.patching import patched, replaced

VEC_ENVS = ("gymnasium", "envpool", "ale")
"""Values of ``--vec-env`` besides the Zoo's ``dummy`` and ``subproc``."""

# Their vector classes cannot reset single environments (Gymnasium 1.4).
_WITHOUT_RESET_MASK = "gymnasium.envs.phys2d."

_ATARI_WRAPPER = "stable_baselines3.common.atari_wrappers.AtariWrapper"


@dataclass(frozen=True)
class EnvSettings:
    """Settings of the training environments, from the Zoo's settings and command line."""

    spec: EnvSpec
    env_kwargs: dict[str, Any] = field(default_factory=dict)
    wrappers: tuple[tuple[str, dict[str, Any]], ...] = ()  # full names and arguments, innermost first
    monitor_kwargs: dict[str, Any] = field(default_factory=dict)
    frame_stack: int | None = None
    normalize: bool = False  # whether `VecNormalize` is asked for
    monitor_folder: str | None = None  # folder for the files of episodes

    @property
    def is_atari(self) -> bool:
        """Whether the environment is one of ale-py's games."""
        return "AtariEnv" in str(self.spec.entry_point)

    @property
    def monitor_path(self) -> str | None:
        """File of episodes, if one file serves all environments."""
        return None if self.monitor_folder is None else os.path.join(self.monitor_folder, "0.monitor.csv")


def wrapper_list(entry: Any) -> tuple[tuple[str, dict[str, Any]], ...]:
    """Return full names and arguments of the wrappers in an ``env_wrapper`` entry, innermost first."""
    wrappers = []
    for wrapper, kwargs in with_arguments(entry):
        name = wrapper if isinstance(wrapper, str) else f"{wrapper.__module__}.{wrapper.__qualname__}"
        wrappers.append((name, dict(kwargs)))
    return tuple(wrappers)


def stacks_frames(name: str, settings: EnvSettings) -> bool:
    """Return whether the environments of ``--vec-env <name>`` stack observations themselves."""
    return name != "gymnasium" and settings.is_atari


@contextmanager
def appended_monitor_files() -> Iterator[None]:
    """
    Make environments append to existing files of episodes, which a checkpoint cuts to its own length.

    The manager's ``monitor_kwargs`` cannot do this: the Zoo completes or replaces them for some environments.
    """

    def make(make_env: Any, *, monitor_kwargs: dict[str, Any], **kwargs: Any) -> VecEnv:
        monitor_kwargs = {**monitor_kwargs, "override_existing": False}
        return env_util.make_vec_env(make_env, monitor_kwargs=monitor_kwargs, **kwargs)

    appending = partial(ResultsWriter, override_existing=False)
    with patched(make_vec_env=make), replaced(vector, "ResultsWriter", appending):
        yield


@contextmanager
def known_keywords(env_kwargs: dict[str, Any] | None) -> Iterator[None]:
    """Raise an error that names the argument in ``env_kwargs`` that an environment created in the context refuses."""
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
    Create the training environments of ``--vec-env <name>``, not normalised yet; refuse settings without effect.

    ``env_fns`` are the Zoo's functions, each of which creates one environment with its wrappers.
    """
    if name == "gymnasium":
        return _make_gymnasium(settings, env_fns)
    for key, reason in (("env_kwargs", "which are Gymnasium's"), ("monitor_kwargs", "but no Monitor runs there")):
        value = getattr(settings, key)
        if value:
            raise ValueError(
                f"`{key}` must be empty with `--vec-env {name}`, got {value}, {reason}. Train with `--vec-env "
                "gymnasium`."
            )
    if name == "ale" or settings.is_atari:
        return _make_atari(name, settings, len(env_fns))
    return _make_envpool(settings, len(env_fns))


def _make_gymnasium(settings: EnvSettings, env_fns: Sequence[Callable[[], gym.Env[Any, Any]]]) -> VecEnv:
    spec = settings.spec
    plain = not (settings.env_kwargs or settings.wrappers or settings.monitor_kwargs or spec.additional_wrappers)
    entry_point = spec.vector_entry_point
    resets_rows = entry_point is not None and not str(entry_point).startswith(_WITHOUT_RESET_MASK)
    if plain and resets_rows and not settings.is_atari:
        return as_vec_env(gym.make_vec(spec.id, num_envs=len(env_fns)), monitor_path=settings.monitor_path)
    return as_vec_env(SyncVectorEnv(env_fns, autoreset_mode=AutoresetMode.SAME_STEP))


def _make_envpool(settings: EnvSettings, n_envs: int) -> VecEnv:
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
    _take_spaces(venv, single)
    single.close()
    return venv


def _make_atari(name: str, settings: EnvSettings, n_envs: int) -> VecEnv:
    if not settings.is_atari:
        raise ValueError(
            f"`--env` must be an Atari game with `--vec-env ale`, got {settings.spec.id}. `--vec-env gymnasium` "
            "accepts every environment."
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
            f"`env_wrapper` must be {_ATARI_WRAPPER} alone for Atari games with `--vec-env {name}`, got {names}: only "
            "that preprocessing is built in. Train with `--vec-env gymnasium`."
        )
    if spec.get("frameskip") != 1:
        raise ValueError(
            f"`--env` must be a game without frame skip with `--vec-env {name}`, got {settings.spec.id}: AtariWrapper "
            "skips frames itself. Use the game's NoFrameskip-v4."
        )
    if settings.normalize:
        raise ValueError(
            f"`normalize` must be left out for Atari games with `--vec-env {name}`, got True: training would "
            "normalise stacked observations, and evaluation single ones. Train with `--vec-env gymnasium`."
        )
    defaults = {key: parameter.default for key, parameter in inspect.signature(AtariWrapper).parameters.items()}
    wrapper = {**defaults, **settings.wrappers[0][1]}
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
        # EnvPool draws from 0 to noop_max - 1, and adds one if it need not fire.
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
            "accepts every environment."
        )


def _take_spaces(venv: VecEnv, single: gym.Env[Any, Any]) -> None:
    """Set the spaces of Gymnasium's environment, so that the model loads there; refuse an environment with others."""
    for name in ("action_space", "observation_space"):
        ours, theirs = getattr(venv, name), getattr(single, name)
        # Observations are not clipped to the declared bounds.
        if not _is_same_space(ours, theirs, with_bounds=name == "action_space"):
            raise ValueError(
                f"`--env` must have the same {name.replace('_', ' ')} in EnvPool and Gymnasium, got {ours} and "
                f"{theirs}: a model would not carry over. Train with `--vec-env gymnasium`."
            )
        setattr(venv, name, theirs)


def _is_same_space(first: spaces.Space[Any], second: spaces.Space[Any], *, with_bounds: bool) -> bool:
    if not (isinstance(first, spaces.Box) and isinstance(second, spaces.Box)):
        return first == second
    # EnvPool has the actions of MuJoCo's environments in float64, Gymnasium in float32.
    if first.shape != second.shape or first.dtype.kind != second.dtype.kind:
        return False
    return not with_bounds or (np.allclose(first.low, second.low) and np.allclose(first.high, second.high))
