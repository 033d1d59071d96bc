"""
The console command ``sb3-clipvf``: the RL Zoo's own sub-commands with ClipPPO registered as ``clipppo``.

The Zoo does the work; this module registers the algorithm, puts in what a user of ClipPPO would have to type each time,
and turns input errors into one line.
"""

import difflib
import importlib
import os
import runpy
import sys
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from importlib.metadata import version
from importlib.resources import files
from pathlib import Path

from sb3_clipvf.files.trust import TRUST_VARIABLE
from sb3_clipvf.zoo.defaults import ALGORITHM, COMMANDS, Command
from sb3_clipvf.zoo.hub import explained_listing, own_model_card
from sb3_clipvf.zoo.parsing import Default, checked_parsing, option_value, quote_schedules, with_defaults
from sb3_clipvf.zoo.process import (
    explain,
    ffmpeg_on_path,
    figures_to_files,
    has_display,
    importable_working_folder,
    own_subprocesses,
    patched_argv,
    patched_environment,
)
from sb3_clipvf.zoo.registration import register

PROGRAM = "sb3-clipvf"

TRUST_OPTION = "--trust-pickle"

_HELP = "sb3-clipvf adds to the options below:"
_TRAIN_HELP = """\
  --vec-env {gymnasium,envpool,ale}
                        Training environments that step together: Gymnasium's,
                        EnvPool's, or ale-py's (Atari games)
  --checkpoint-freq CHECKPOINT_FREQ
                        Environment steps between two checkpoints of the whole
                        training of clipppo (default: 100000; -1: none)
  --resume PATH         Resume the run of this folder, or of this checkpoint,
                        as if it had not been interrupted
"""
_TRUST_HELP = """\
  --trust-pickle        Let the files of models, statistics and settings that
                        are loaded run any code; without it such are refused
"""

# Those that look for the model of one run.
_FINDING = ("enjoy", "report", "record_video", "record_training", "push_to_hub")


def main(argv: Sequence[str] | None = None) -> int:
    """
    Run one sub-command in this process.

    An error of input, one raised by this package, the RL Zoo, Stable-Baselines3 or Gymnasium about what the user gave,
    becomes one line on stderr; with ``SB3_CLIPVF_TRACEBACK=1`` it comes with its traceback, as any other error does,
    those of a training that had begun included, with their notes.

    :param argv: Sub-command and its options; None takes the process's own.
    :return: Exit code: 0 for success, 2 for an error of input, else the sub-command's own.
    """
    arguments = list(sys.argv[1:] if argv is None else argv)
    if not arguments or arguments[0] in ("-h", "--help"):
        sys.stdout.write(overview())
        return 0
    if arguments[0] == "--version":
        versions = [f"{name} {version(name)}" for name in ("stable_baselines3", "rl_zoo3", "torch")]
        sys.stdout.write(f"sb3_clipvf {_own_version()} ({', '.join(versions)})\n")
        return 0
    name, *options = arguments
    if name not in COMMANDS:
        near = difflib.get_close_matches(name, COMMANDS, n=1)
        hint = f"Did you mean `{near[0]}`?" if near else f"`{PROGRAM} --help` lists them."
        sys.stderr.write(f"{PROGRAM}: `{name}` is not one of its sub-commands. {hint}\n")
        return 2
    try:
        return run_command(name, options)
    except SystemExit as stop:
        return _exit_code(stop)
    except Exception as error:
        message = explain(error)
        if message is None or os.environ.get("SB3_CLIPVF_TRACEBACK") == "1":
            raise
        sys.stderr.write(f"{PROGRAM} {name}: {message}\n(SB3_CLIPVF_TRACEBACK=1 shows where.)\n")
        return 2


def overview() -> str:
    """
    Describe the command.

    :return: Text of ``--help``.
    """
    width = max(map(len, COMMANDS))
    lines = [f"  {name:<{width}}  {command.summary}" for name, command in COMMANDS.items()]
    return "\n".join(
        (
            f"usage: {PROGRAM} <sub-command> [options]",
            "",
            "Train and use ClipPPO with the RL Zoo: its own sub-commands, where the algorithm is clipppo unless --algo",
            "names another. Options of a sub-command: `sb3-clipvf <sub-command> --help`.",
            "",
            *lines,
            "",
            "First steps:",
            "  sb3-clipvf train --env CartPole-v1 -P",
            "  sb3-clipvf report --env CartPole-v1",
            "  sb3-clipvf train --env CartPole-v1 -params clip_range:None kl_coef:1.0 adaptive_kl_target:0.01",
            "",
        )
    )


def run_command(name: str, options: Sequence[str]) -> int:
    """
    Run one sub-command, with the options completed and ``sys.argv`` set for it while it runs.

    :param name: Key of ``COMMANDS``.
    :param options: What the user gave after it.
    :return: Exit code.
    :raises ValueError: If something the sub-command needs is missing.
    """
    command = COMMANDS[name]
    if not (command.loads and TRUST_OPTION in options):
        return _run(name, command, options)
    with patched_environment({TRUST_VARIABLE: "1"}, replace=True):
        return _run(name, command, [option for option in options if option != TRUST_OPTION])


def _run(name: str, command: Command, options: Sequence[str]) -> int:
    module, _, function = command.target.partition(":")
    asks_for_help = not {"-h", "--help"}.isdisjoint(options)
    if asks_for_help and command.loads:
        sys.stdout.write(f"{_HELP}\n{_TRAIN_HELP if name == 'train' else ''}{_TRUST_HELP}\n")
    finds_model = name in _FINDING and not asks_for_help
    if module.startswith("sb3_clipvf."):
        with ExitStack() as stack:
            stack.enter_context(importable_working_folder())
            stack.enter_context(checked_parsing(f"{PROGRAM} {name}"))
            if finds_model:
                _find_own_models(stack, name)
            return _own_main(module, function)(list(options))
    display = has_display()
    arguments = with_defaults(quote_schedules(options), command.defaults)
    if name == "enjoy" and not display and not asks_for_help and option_value(arguments, None, "--no-render") is None:
        sys.stdout.write(f"No display: running with --no-render. `{PROGRAM} record_video` makes a video.\n")
        arguments = with_defaults(arguments, (Default(None, "--no-render", None),))
    with ExitStack() as stack:
        # Before settings are read: whether a module may be imported depends on where it would be found.
        stack.enter_context(importable_working_folder())
        if not display:
            stack.enter_context(patched_environment(_without_display(command)))
            if command.plots:
                stack.enter_context(figures_to_files(name))
        if name == "train" and not asks_for_help:
            from sb3_clipvf.zoo.options import own_train_options  # imports torch

            own = stack.enter_context(own_train_options(arguments))
            if own is None:
                return 0
            arguments = own
        if not asks_for_help:
            _check(name, command, arguments)
        register()
        # These import torch, as register() does.
        from sb3_clipvf.zoo.checks import checked_options
        from sb3_clipvf.zoo.run_files import checked_files

        stack.enter_context(checked_options(f"{PROGRAM} {name}", name, finds_run=finds_model))
        stack.enter_context(checked_files(plots=name == "plot_from_file"))
        if finds_model or name == "benchmark":
            _find_own_models(stack, name)
        if command.encodes:
            stack.enter_context(ffmpeg_on_path())
        if name == "benchmark":
            stack.enter_context(explained_listing())
        if name == "push_to_hub":
            stack.enter_context(own_model_card(ALGORITHM))
        stack.enter_context(patched_argv([f"{PROGRAM} {name}", *arguments]))
        stack.enter_context(own_subprocesses())
        if function:
            getattr(importlib.import_module(module), function)()
        else:
            package, _, script = module.rpartition(".")
            runpy.run_path(str(files(package) / f"{script}.py"), run_name="__main__")
    return 0


def _find_own_models(stack: ExitStack, name: str) -> None:
    from sb3_clipvf.zoo.models import own_models  # imports torch

    stack.enter_context(own_models(name))


def _without_display(command: Command) -> dict[str, str]:
    # MuJoCo fails at import where EGL is chosen and missing: choose it only where something will be drawn.
    return {"MPLBACKEND": "Agg"} | ({"MUJOCO_GL": "egl"} if command.renders else {})


def _check(name: str, command: Command, arguments: Sequence[str]) -> None:
    for short, long in command.required:
        if option_value(arguments, short, long) is None:
            raise ValueError(f"`{long}` must be given, got none. See `{PROGRAM} {name} --help`.")
    if name == "benchmark":
        log_dir = Path(option_value(arguments, None, "--log-dir") or "logs")
        if not log_dir.is_dir():
            raise ValueError(
                f"`--log-dir` must be a folder of trained agents, got {str(log_dir)!r}, which does not exist. Train "
                f"one with `{PROGRAM} train --env CartPole-v1`, or name another folder."
            )
        # The Zoo writes its table there even if it evaluated nothing.
        Path(option_value(arguments, None, "--benchmark-dir") or "logs/benchmark").mkdir(parents=True, exist_ok=True)


def _own_main(module: str, function: str) -> Callable[[list[str]], int]:
    main_function: Callable[[list[str]], int] = getattr(importlib.import_module(module), function)
    return main_function


def _own_version() -> str:
    import sb3_clipvf

    return str(sb3_clipvf.__version__)


def _exit_code(stop: SystemExit) -> int:
    if stop.code is None or isinstance(stop.code, int):
        return stop.code or 0
    sys.stderr.write(f"{stop.code}\n")
    return 1
