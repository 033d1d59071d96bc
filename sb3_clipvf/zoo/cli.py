"""
The console command ``sb3-clipvf``: the RL Zoo's own sub-commands with ClipPPO registered as ``clipppo``.

The Zoo does the work. This module runs its scripts with the options, defaults and patches of this package, and reports
input errors in one line.
"""

import difflib
import importlib
import os
import runpy
import sys
from argparse import ArgumentParser
from collections.abc import Sequence
from contextlib import ExitStack
from importlib.metadata import version
from importlib.resources import files

from sb3_clipvf import __version__
from sb3_clipvf.files.trust import TRUST_VARIABLE
from sb3_clipvf.zoo.commands import COMMANDS, Command
from sb3_clipvf.zoo.errors import input_error
from sb3_clipvf.zoo.parsing import add_trust_option, next_parser
from sb3_clipvf.zoo.patching import replaced
from sb3_clipvf.zoo.process import (
    ffmpeg_on_path,
    figures_to_files,
    has_display,
    one_output,
    patched_environment,
    redirected_calls,
)
from sb3_clipvf.zoo.registration import register

PROGRAM = "sb3-clipvf"


def main(argv: Sequence[str] | None = None) -> int:
    """
    Run one sub-command in this process.

    An error about the user's input becomes one line on stderr. With ``SB3_CLIPVF_TRACEBACK=1`` it is raised, as all
    other errors are. An error after training has begun is always raised, with its notes.

    :param argv: Sub-command and its options; None: ``sys.argv[1:]``.
    :return: Exit code: 0 for success, 2 for an input error, 141 if stdout is a closed pipe, else the sub-command's own.
    """
    name, *options = (sys.argv[1:] if argv is None else argv) or ["--help"]
    try:
        code = run_command(name, options)
        sys.stdout.flush()
        return code
    except SystemExit as stop:
        if isinstance(stop.code, str):
            sys.stderr.write(f"{stop.code}\n")
            return 1
        return stop.code or 0
    except Exception as error:
        if _is_closed_output(error):
            return 141  # the shell's exit code of a command that SIGPIPE ended
        message = input_error(error)
        if message is None or os.environ.get("SB3_CLIPVF_TRACEBACK") == "1":
            raise
        sys.stderr.write(f"{PROGRAM} {name}: {message}\n(Set SB3_CLIPVF_TRACEBACK=1 to see the traceback.)\n")
        return 2


def run_command(name: str, options: Sequence[str]) -> int:
    """Run one sub-command, ``--help`` or ``--version``, and return the exit code."""
    if name in ("-h", "--help"):
        sys.stdout.write(overview())
    elif name == "--version":
        versions = [f"{package} {version(package)}" for package in ("stable_baselines3", "rl_zoo3", "torch")]
        sys.stdout.write(f"sb3_clipvf {__version__} ({', '.join(versions)})\n")
    elif name in COMMANDS:
        return _run(name, COMMANDS[name], options)
    else:
        near = difflib.get_close_matches(name, COMMANDS, n=1)
        hint = f"Did you mean `{near[0]}`?" if near else f"`{PROGRAM} --help` lists them."
        sys.stderr.write(f"{PROGRAM}: `{name}` is not a sub-command. {hint}\n")
        return 2
    return 0


def overview() -> str:
    """Return the text of ``--help``."""
    width = max(map(len, COMMANDS))
    commands = "\n".join(f"  {name:<{width}}  {command.summary}" for name, command in COMMANDS.items())
    return f"""\
usage: {PROGRAM} <sub-command> [options]

The RL Zoo's command line with ClipPPO registered as `clipppo`, the default algorithm.
`{PROGRAM} <sub-command> --help` lists the options of a sub-command.

{commands}

First steps:
  {PROGRAM} train --env CartPole-v1 -P
  {PROGRAM} report --env CartPole-v1
  {PROGRAM} train --env CartPole-v1 -params clip_range:None kl_coef:1.0 adaptive_kl_target:0.01
"""


def _run(name: str, command: Command, options: Sequence[str]) -> int:
    module, _, function = command.target.partition(":")
    with ExitStack() as stack:
        if command.loads:
            trust = ArgumentParser(add_help=False, allow_abbrev=False)
            add_trust_option(trust)
            given, options = trust.parse_known_args(options)
            if vars(given):
                stack.enter_context(patched_environment({TRUST_VARIABLE: "1"}, replace=True))
        # The working folder comes last, so that it hides no installed module. Trust depends on where a module is found.
        stack.enter_context(replaced(sys, "path", [*sys.path, os.getcwd()]))
        if module.startswith("sb3_clipvf."):
            stack.enter_context(next_parser(f"{PROGRAM} {name}", add_trust_option if command.loads else None))
            return int(getattr(importlib.import_module(module), function)(list(options)))
        _enter_contexts(stack, name, command)
        if name == "train":
            stack.enter_context(one_output())
        stack.enter_context(replaced(sys, "argv", [f"{PROGRAM} {name}", *options]))
        if function:
            getattr(importlib.import_module(module), function)()
        else:
            package, _, script = module.rpartition(".")
            runpy.run_path(str(files(package) / f"{script}.py"), run_name="__main__")
    return 0


def _enter_contexts(stack: ExitStack, name: str, command: Command) -> None:
    """Enter the contexts in which a script of the Zoo supports ClipPPO and its runs, and needs no display."""
    if not has_display():
        # MuJoCo fails at import if EGL is chosen and missing: choose it only if environments are drawn.
        drivers = {"MPLBACKEND": "Agg"} | ({"MUJOCO_GL": "egl"} if command.renders else {})
        stack.enter_context(patched_environment(drivers))
        if command.target.startswith("rl_zoo3.plots:"):
            stack.enter_context(figures_to_files(name))
    register()
    # These import torch, as `register` does.
    from sb3_clipvf.zoo.benchmark import benchmarked_runs
    from sb3_clipvf.zoo.checked_files import checked_files
    from sb3_clipvf.zoo.hub import explained_listing, own_downloads, own_model_card
    from sb3_clipvf.zoo.model_choice import own_models
    from sb3_clipvf.zoo.options import command_options

    stack.enter_context(command_options(name))
    stack.enter_context(checked_files(plots=name == "plot_from_file"))
    if command.finds_model or name == "benchmark":
        stack.enter_context(own_models())
    if command.renders:
        stack.enter_context(ffmpeg_on_path())
    if name == "benchmark":
        stack.enter_context(explained_listing())
        stack.enter_context(benchmarked_runs())
    if name in ("enjoy", "load_from_hub"):  # `benchmark` downloads by `enjoy`
        stack.enter_context(own_downloads())
    if name == "push_to_hub":
        stack.enter_context(own_model_card())
    stack.enter_context(redirected_calls())


def _is_closed_output(error: Exception) -> bool:
    """Return whether stdout is a closed pipe, as after ``head``; if so, discard the rest of the output."""
    if not isinstance(error, BrokenPipeError) or getattr(error, "__notes__", None):
        return False
    try:
        sys.stdout.write("\n")  # the broken pipe may be another one, such as an environment worker's
        sys.stdout.flush()
    except BrokenPipeError:
        # Python flushes stdout at exit, which must not fail again.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return True
    return False
