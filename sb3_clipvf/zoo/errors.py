"""Recognise input errors, which the command reports in one line; other errors need their traceback."""

import importlib.util
import re
import sysconfig
import traceback
from pathlib import Path

from gymnasium.error import Error as GymnasiumError

# Package, pattern of the errors that its absence causes, and requirement to install.
_OPTIONAL_PACKAGES = (
    ("Box2D", r"box2d", "'sb3_clipvf[box2d]'"),
    ("mujoco", r"mujoco", "'sb3_clipvf[mujoco]'"),
    ("envpool", r"envpool", "'sb3_clipvf[envpool]'"),
    ("ale_py", r"ALE/|NoFrameskip-v|Deterministic-v|ale_py", "'sb3_clipvf[atari]'"),
    ("plotly", r"plotly", "plotly"),
    ("wandb", r"wandb", "'sb3_clipvf[tracking]'"),
    ("minigrid", r"MiniGrid-|BabyAI-|minigrid", "'sb3_clipvf[minigrid]'"),
    ("pybullet_envs_gymnasium", r"BulletEnv-v|pybullet_envs", "'sb3_clipvf[pybullet]'"),
    ("optunahub", r"optunahub", "optunahub cmaes"),
    ("panda_gym", r"Panda\w+-v", "panda_gym"),
)

_INPUT_ERRORS = (ValueError, TypeError, ImportError, AssertionError, OSError, GymnasiumError)
_INPUT_CHECKERS = ("sb3_clipvf", "rl_zoo3", "stable_baselines3", "gymnasium", "huggingface_hub", "huggingface_sb3")


def input_error(error: Exception) -> str | None:
    """Return the message of an input error, or None for an error that needs its traceback."""
    # An error after training has begun has notes: where it was raised matters more than a short message.
    if getattr(error, "__notes__", ()):
        return None
    missing = _missing_package(error)
    if missing is not None:
        return missing
    modules = [frame.filename for frame in traceback.extract_tb(error.__traceback__)]
    if isinstance(error, (ImportError, OSError)):
        # The standard library raises these about its caller's arguments.
        modules = [name for name in modules if not _is_of_python(name)]
    if not (isinstance(error, _INPUT_ERRORS) and modules and _checks_input(Path(modules[-1]))):
        return None
    # An OSError without a file has a message for the user, to which its number adds nothing.
    if isinstance(error, OSError) and error.filename is None and error.strerror:
        return error.strerror
    return str(error) or type(error).__name__


def _is_of_python(module: str) -> bool:
    is_in_library = Path(module).is_relative_to(sysconfig.get_path("stdlib")) and "site-packages" not in module
    return is_in_library or module.startswith("<frozen ")


def _checks_input(module: Path) -> bool:
    specs = (importlib.util.find_spec(package) for package in _INPUT_CHECKERS)
    folders = [folder for spec in specs if spec is not None for folder in spec.submodule_search_locations or ()]
    return any(module.is_relative_to(folder) for folder in folders)


def _missing_package(error: Exception) -> str | None:
    """Return a message that names the missing optional package and how to install it, or None."""
    text = str(error)
    # The Zoo raises KeyError or this ValueError for an unknown environment. Other ValueErrors are about something else.
    if isinstance(error, ValueError):
        unknown = re.match(r"\S+ not found in gym registry", text)
        missing = unknown[0] if unknown else ""
    else:
        missing = text if isinstance(error, (ImportError, KeyError, GymnasiumError)) else ""
    for package, pattern, requirement in _OPTIONAL_PACKAGES:
        if re.search(pattern, missing, re.IGNORECASE) and importlib.util.find_spec(package) is None:
            return f"the package {package} must be installed for this. Run `pip install {requirement}`. ({text})"
    return None
