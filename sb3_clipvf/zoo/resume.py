"""``sb3-clipvf train --resume``: find an interrupted run, and the command line that builds it again."""

import argparse
import os
import shlex
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sb3_clipvf.zoo.commands import ALGORITHM
from sb3_clipvf.zoo.entries import ZOO_KEYS, drop_null, is_module_name
from sb3_clipvf.zoo.parsing import option_name, strict
from sb3_clipvf.zoo.run_folders import CHECKPOINTS

_KEPT: dict[str, type] = {
    "algo": str,
    "env": str,
    "seed": int,
    "vec_env": str,
    "eval_freq": int,
    "eval_episodes": int,
    "n_eval_envs": int,
    "save_freq": int,
    "checkpoint_freq": int,
    "log_interval": int,
    "log_folder": str,
    "tensorboard_log": str,
}
"""Options of the run, which the command line may only repeat."""

_FREE: dict[str, type] = {"n_timesteps": int, "verbose": int, "num_threads": int, "device": str}
"""Options of the process, which the command line may change."""

_SHORT = {"log_folder": ["-f"], "tensorboard_log": ["-tb"], "n_timesteps": ["-n"]}

_BUILT_FROM = ZOO_KEYS | {"gamma"}
"""Settings that environments and callbacks are built from. The model is in the checkpoint."""

_HINT = "Leave it out; --n-timesteps, --verbose, --progress, --num-threads and --device may differ."


@dataclass(frozen=True)
class ResumedRun:
    """A run to resume."""

    folder: Path
    settings_folder: Path  # inside `folder`
    checkpoint: Path
    args: dict[str, Any]  # options that the run was started with
    hyperparams: dict[str, Any]  # settings that its environments and callbacks are built from
    num_timesteps: int  # environment steps at the checkpoint
    total_timesteps: int  # environment steps at the end of the run
    is_complete: bool  # it has reached its end, and its last model is saved


def resumed_run(path: str, options: Sequence[str]) -> tuple[ResumedRun, list[str]]:
    """
    Find the run that a path names: its folder, its folder of checkpoints, or one of its checkpoints.

    Return the run and the options of the Zoo's ``train`` that build it again. ``options`` are the command line.
    Options that contradict the run are refused, and so are settings that could run code.
    """
    from sb3_clipvf.checkpoint import newest_checkpoint, read_checkpoint
    from sb3_clipvf.checkpoint.file import checkpoint_paths, sorted_checkpoints
    from sb3_clipvf.zoo.checked_files import check_no_code, read_settings, saved_progress

    place = Path(os.path.abspath(path))
    if not path or not place.exists():
        raise FileNotFoundError(
            f"`--resume` must be the folder of a run or one of its checkpoints, got {path!r}, which does not exist. "
            f"Runs are in logs/{ALGORITHM}, unless `-f` named another folder."
        )
    inner = place if place.is_dir() else place.parent
    folder = inner.parent if inner.name == CHECKPOINTS else inner
    settings_folder = _settings_folder(folder)
    args = read_settings(settings_folder / "args.yml")
    if args.get("algo") != ALGORITHM:
        raise ValueError(
            f"`--resume` must name a run of {ALGORITHM}, got {folder} of {args.get('algo')}, which keeps no "
            "checkpoints of the whole training state. Continue from its model with `-i`."
        )
    given = _given_options(options, args)
    checkpoints = sorted_checkpoints(folder / CHECKPOINTS) if place.is_dir() else [place]
    if not checkpoints:
        raise ValueError(
            f"`--resume` must name a run with checkpoints, got {folder} without any: it ended before its first one, or "
            "ran with `--checkpoint-freq -1`. Start it again: "
            f"`sb3-clipvf train --env {shlex.quote(str(args.get('env')))} --seed {shlex.quote(str(args.get('seed')))}`."
        )
    checkpoint = newest_checkpoint(folder / CHECKPOINTS) if place.is_dir() else read_checkpoint(place)
    hyperparams = read_settings(settings_folder / "config.yml")
    hyperparams = {key: value for key, value in hyperparams.items() if key in _BUILT_FROM}
    drop_null(hyperparams)
    check_no_code(settings_folder / "config.yml", hyperparams)
    steps, total = checkpoint.manifest.num_timesteps, checkpoint.manifest.total_timesteps
    # The last file is of the end, damaged or not, unless the run was continued from an earlier step or to a later end.
    last_steps = checkpoint_paths(checkpoints[-1].parent).get(checkpoints[-1], steps)
    is_saved = saved_progress(folder / f"{settings_folder.name}.zip") == (last_steps, total)
    # A callback may have ended the run early. But a user who names an earlier checkpoint wants to repeat what followed.
    is_complete = is_saved and (place.is_dir() or steps >= total)
    if "n_timesteps" in given:
        total = given["n_timesteps"]
        if total <= steps:
            raise ValueError(
                f"`--n-timesteps` must be more than the steps that the run has done, {steps}, got {total}: it counts "
                "from the run's start. Pass more, or leave it out to end where the run was meant to end."
            )
        is_complete = False
    run = ResumedRun(folder, settings_folder, checkpoint.path, args, hyperparams, steps, total, is_complete)
    return run, _command_line(folder, args, given)


def _settings_folder(folder: Path) -> Path:
    found = [path.parent for path in folder.glob("*/args.yml")]
    if len(found) != 1 or not (found[0] / "config.yml").is_file():
        raise FileNotFoundError(
            f"{folder} must be the folder of one run, with <environment>/args.yml and config.yml, but it is not. Name "
            f"one like logs/{ALGORITHM}/CartPole-v1_1. ClipPPO.resume resumes runs of scripts."
        )
    return found[0]


def _given_options(options: Sequence[str], args: dict[str, Any]) -> dict[str, Any]:
    """Parse the command line, and refuse what differs from the run's ``args``."""
    parser = argparse.ArgumentParser(
        prog="sb3-clipvf train --resume", add_help=False, argument_default=argparse.SUPPRESS
    )
    for name, kind in {**_KEPT, **_FREE}.items():
        parser.add_argument(*_SHORT.get(name, []), option_name(name), type=kind)
    parser.add_argument("-P", "--progress", action="store_true")
    parser.add_argument("--resume")
    parsed, others = strict(parser, "sb3-clipvf train").parse_known_args(list(options))
    if others:
        raise ValueError(
            f"`{others[0]}` must not be given with `--resume`, got `{shlex.join(others)}`: a run keeps the "
            f"settings that it was started with. {_HINT}"
        )
    given = vars(parsed)
    given.pop("resume", None)
    for name, value in given.items():
        if name in _KEPT and value != args.get(name):
            raise ValueError(f"`{option_name(name)}` must be {args.get(name)!r} as in the run, got {value!r}. {_HINT}")
    return given


def _command_line(folder: Path, args: dict[str, Any], given: dict[str, Any]) -> list[str]:
    kept = (*_KEPT, "verbose", "num_threads", "device")
    values = {name: args[name] for name in kept if args.get(name) is not None}
    values["log_folder"] = str(folder)  # the command creates it, and the run may have been moved or received
    values |= {name: value for name, value in given.items() if name in _FREE}
    # A value joined to its name cannot be taken for an option.
    arguments = [f"{option_name(name)}={value}" for name, value in values.items()]
    if given.get("progress") or args.get("progress"):
        arguments.append("--progress")
    packages = [str(name) for name in args.get("gym_packages") or ()]
    for package in packages:
        if not is_module_name(package):
            raise ValueError(
                f"`gym_packages` of the run must be names of modules, got {package!r}. Correct its args.yml."
            )
    return [*arguments, "--gym-packages", *packages] if packages else arguments
