"""Add the options and defaults of this package to the RL Zoo's parsers, and check the values that the user gives."""

import importlib.util
import re
import secrets
import sys
from argparse import ArgumentParser, Namespace
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from rl_zoo3 import utils

from sb3_clipvf.common.validation import MAX_SEED, check_device, check_int, ensure_writable_folder
from sb3_clipvf.distributed import current_group
from sb3_clipvf.zoo.benchmark import check_benchmark, remove_evaluations
from sb3_clipvf.zoo.commands import ALGORITHM, COMMANDS
from sb3_clipvf.zoo.entries import SCHEDULE
from sb3_clipvf.zoo.experiment import ClipPPOExperimentManager
from sb3_clipvf.zoo.model_choice import choose_run_of_options
from sb3_clipvf.zoo.parsing import add_trust_option, next_parser, option_name
from sb3_clipvf.zoo.plot_checks import check_all_plots, check_plot_from_file, check_plot_train
from sb3_clipvf.zoo.process import has_display
from sb3_clipvf.zoo.recording import recorded_training
from sb3_clipvf.zoo.resume import resumed_run
from sb3_clipvf.zoo.run_folders import RunId, processes_of, resume_command
from sb3_clipvf.zoo.settings import import_packages
from sb3_clipvf.zoo.tuning import DRAWN
from sb3_clipvf.zoo.vec_env import VEC_ENVS

CHECKPOINT_FREQ = 100_000
"""Environment steps between two checkpoints by default."""

_COUNTS = "episode_window eval_episodes max_total_trials n_envs n_eval_envs n_evaluations n_jobs n_trials".split()
_FOLDERS = ("benchmark_dir", "log_folder", "optimization_log_path", "output_folder", "reward_log", "tensorboard_log")

_PAIR = re.compile(r"(\w+):(.+)", re.DOTALL)
_CONSTANTS = {"true": "True", "false": "False", "none": "None", "null": "None"}


@contextmanager
def command_options(name: str) -> Iterator[None]:
    """Add the options, defaults and checks of a sub-command to the parser that parses next in the context."""
    manager, stack = ClipPPOExperimentManager, ExitStack()

    def finish(parse_args: Callable[..., Namespace], options: Namespace) -> Namespace:
        if name == "train":
            options = _train_options(parse_args, options)
            if current_group().rank > 0:  # only the first process of a run keeps files
                options.log_folder = stack.enter_context(TemporaryDirectory())
        if name in _CHECKS:
            _CHECKS[name](options)
        prepare_options(options)
        if COMMANDS[name].finds_model:
            choose_run_of_options(options)
        if name == "benchmark":
            remove_evaluations(options)
        if name == "record_training":
            stack.enter_context(recorded_training(options))
        return options

    try:
        with stack, next_parser(f"sb3-clipvf {name}", lambda parser: _prepare(parser, name), finish):
            yield
    finally:
        manager.vec_env, manager.checkpoint_freq, manager.resumed = None, -1, None


def _prepare(parser: ArgumentParser, name: str) -> None:
    """Set the defaults of a sub-command and add its own options."""
    command = COMMANDS[name]
    for action in parser._actions:
        if action.dest in command.defaults:
            action.default, action.required = command.defaults[action.dest], False
        if action.dest == command.required:
            action.required = True
        if action.dest == "exp_id" and command.finds_model:
            action.type = RunId.parse
        if isinstance(action, utils.StoreDict):
            action.__class__ = StorePairs
        if action.dest == "vec_env":
            action.choices = [*(action.choices or ()), *VEC_ENVS]
            action.help = (
                "Vectorisation of the training environments; gymnasium, envpool and ale use these libraries' own "
                "vectorised environments"
            )
    if name == "train":
        parser.add_argument(
            "--checkpoint-freq",
            type=int,
            help=f"Environment steps between checkpoints of a clipppo run (default: {CHECKPOINT_FREQ}; -1: none)",
        )
        parser.add_argument(
            "--resume",
            metavar="PATH",
            help="Resume an interrupted run, given its folder or one of its checkpoints",
        )
    if command.loads:
        add_trust_option(parser)


def _train_options(parse_args: Callable[..., Namespace], options: Namespace) -> Namespace:
    """Pass this package's options of ``train`` to the experiment manager, and return the Zoo's."""
    manager, group = ClipPPOExperimentManager, current_group()
    if group.size > 1:
        _check_shared(options)
    if options.resume is not None:
        manager.resumed, arguments = resumed_run(options.resume, sys.argv[1:])
        if manager.resumed.is_complete:
            sys.stdout.write(
                f"{manager.resumed.folder} is complete, with {manager.resumed.num_timesteps} steps: nothing is left to "
                "train. Pass a larger `-n` to continue it.\n"
            )
            raise SystemExit
        _check_processes(manager.resumed.folder, manager.resumed.args, group.size)
        options = parse_args(arguments)
    if group.size > 1:  # the Zoo would draw a seed in each process, and args.yml would have the first one only
        options.seed = group.broadcast(options.seed if options.seed >= 0 else secrets.randbelow(2**31))
    if options.optimize_hyperparameters:
        _check_search(options)
    freq = options.checkpoint_freq
    if freq is not None and freq > 0 and options.algo != ALGORITHM:
        raise ValueError(
            f"`--checkpoint-freq` must be left out with --algo {options.algo}, got {freq}: only runs of "
            f"{ALGORITHM} are checkpointed. Use `--save-freq` to save models of any algorithm."
        )
    manager.checkpoint_freq = CHECKPOINT_FREQ if freq is None else freq
    if options.vec_env in VEC_ENVS:
        manager.vec_env, options.vec_env = options.vec_env, "dummy"
    del options.resume, options.checkpoint_freq
    return options


def _check_search(options: Namespace) -> None:
    """Raise ValueError for options that a search of hyperparameters would ignore, or not search for."""
    for name in ("trained_agent", "checkpoint_freq", "save_freq", "trial_id"):
        value = getattr(options, name)
        if value not in (None, "", -1):
            raise ValueError(
                f"`{option_name(name)}` must be left out in a search of hyperparameters, got {value!r}: each trial "
                "trains a new agent with drawn settings. `--optimization-log-path` saves the best agent of each trial."
            )
    ignored = [key for key in options.hyperparams or () if key in DRAWN and options.algo == ALGORITHM]
    if ignored:
        raise ValueError(
            f"`{ignored[0]}` must be left out of `-params` in a search of hyperparameters, got "
            f"{options.hyperparams[ignored[0]]!r}: each trial draws its own. Train without `-optimize` to set it."
        )
    if options.sampler == "auto" and importlib.util.find_spec("optunahub") is None:
        raise ImportError("`--sampler auto` needs optunahub; `--sampler tpe` and `random` need no package.")


def _check_shared(options: Namespace) -> None:
    """Raise ValueError for what processes of ``torchrun`` cannot do together."""
    for name in ("optimize_hyperparameters", "track"):
        if getattr(options, name, None):
            raise ValueError(
                f"`{option_name(name)}` must be left out of a run on several processes, got "
                f"{getattr(options, name)!r}. Start it without torchrun."
            )
    if options.algo != ALGORITHM:
        raise ValueError(
            f"`--algo` must be {ALGORITHM} in a run on several processes, got {options.algo!r}: other algorithms "
            "would train a model in each of them. Start it without torchrun."
        )


def _check_processes(folder: Path, arguments: dict[str, Any], number: int) -> None:
    """Raise ValueError if a run would resume on a different number of processes, on which its settings depend."""
    if processes_of(arguments) != number:
        raise ValueError(
            f"`--resume` must name a run of as many processes as resume it, {number}, got {folder} of "
            f"{processes_of(arguments)}. Run `{resume_command(folder, arguments)}`."
        )


class StorePairs(utils.StoreDict):
    """The RL Zoo's pairs ``key:value``. Errors name the pair, schedules need no quotes, repeated options add up."""

    def __call__(
        self, parser: ArgumentParser, namespace: Namespace, values: Any, option_string: str | None = None
    ) -> None:
        """Add the pairs to those of the namespace."""
        option = option_string or self.option_strings[-1]
        pairs = dict(_pair(option, text) for text in values)
        setattr(namespace, self.dest, {**(getattr(namespace, self.dest) or {}), **pairs})


def _pair(option: str, text: str) -> tuple[str, Any]:
    match = _PAIR.fullmatch(text)
    if match is None:
        hint = f"Write `{text.replace('=', ':', 1)}`." if re.match(r"\w+=.", text) else "Write `key:value`."
        raise ValueError(f"`{option}` must be pairs of key and value with a colon, got {text!r}. {hint}")
    key, value = match.groups()
    if SCHEDULE.fullmatch(value):
        return key, value
    try:
        return key, eval(value, dict(vars(utils)))  # as the Zoo does, with the names that it has imported
    except Exception as error:
        hint = f"Quote text inside the shell's quotes: \"{key}:'{value}'\"."
        if value.lower() in _CONSTANTS:
            hint = f"Write `{key}:{_CONSTANTS[value.lower()]}`."
        raise ValueError(
            f"`{option}` must have Python values, got {text!r}: {type(error).__name__}: {error}. {hint}"
        ) from error


def prepare_options(options: Namespace) -> None:
    """Check values that the RL Zoo does not check well, create folders, and import ``--gym-packages``."""
    given = vars(options)
    for name in _COUNTS:
        if given.get(name) is not None:
            check_int(option_name(name), given[name], 1, "Pass a positive number.")
    if given.get("n_timesteps", -1) != -1:
        check_int("--n-timesteps", given["n_timesteps"], 1, "Pass a number of environment steps.")
    if given.get("num_threads", -1) != -1:
        check_int("--num-threads", given["num_threads"], 1, "Omit it to use PyTorch's own number.")
    if "seed" in given:
        # `train` draws a random seed if this one is negative.
        lowest = -MAX_SEED if "trained_agent" in given else 0
        check_int("--seed", given["seed"], lowest, "Omit it to use the default.", MAX_SEED)
    if given.get("log_interval") == 0:
        raise ValueError(
            "`--log-interval` must not be 0. Pass the number of updates between two logs, -1 for the default, or -2 "
            "to turn logging off."
        )
    if given.get("log_folder") == "":
        raise ValueError("`--log-folder` must be a folder, got ''. Use `.` for the working folder.")
    if "device" in given and given.get("algo") != ALGORITHM:  # ClipPPO checks its own
        check_device(given["device"])
    _check_study(given)
    _check_agent(given)
    for name in _FOLDERS:
        if given.get(name):
            ensure_writable_folder(option_name(name), given[name], "Pass another one.")
    import_packages(given.get("gym_packages"), "--gym-packages")


def _check_study(given: dict[str, Any]) -> None:
    """Raise for an incomplete reference to a trial, which the Zoo would ignore."""
    if "trial_id" not in given or given.get("optimize_hyperparameters"):
        return
    parts = {name: given.get(name) for name in ("storage", "study_name", "trial_id")}
    missing = [option_name(name) for name, value in parts.items() if value is None]
    if missing and len(missing) < len(parts):
        named = next(option_name(name) for name, value in parts.items() if value is not None)
        raise ValueError(
            f"`{missing[0]}` must be given with `{named}`, got none. Pass `--storage`, `--study-name` and "
            "`--trial-id` together to train with the settings of a trial, or `-optimize` to search."
        )


def _check_agent(given: dict[str, Any]) -> None:
    """Raise for settings of networks in ``-params`` with an agent, which the Zoo would ignore and save as used."""
    for key in sorted({"policy", "policy_kwargs"} & set(given.get("hyperparams") or ())):
        if given["trained_agent"]:
            raise ValueError(
                f"`{key}` must be left out of `-params` with `--trained-agent`, got {given['hyperparams'][key]!r}: the "
                "agent keeps its own networks. Train a new agent to change them."
            )


def _check_enjoy(options: Namespace) -> None:
    if not (options.no_render or has_display()):
        sys.stdout.write("No display: running with --no-render. `sb3-clipvf record_video` makes a video.\n")
        options.no_render = True


def _check_load_from_hub(options: Namespace) -> None:
    folder = Path(options.folder, options.algo)
    if options.force and options.exp_id < 0 and folder.is_dir():
        raise ValueError(
            f"`--exp-id` must be the number of the run that `--force` replaces, got {options.exp_id}, with which the "
            f"Zoo would delete all runs in {folder}. Pass a number, or 0 for a new run."
        )


def _check_push_to_hub(options: Namespace) -> None:
    found = [path.name for name in ("test.mp4", "*.meta.json") for path in Path().glob(name)]
    if found and not options.no_render:
        raise ValueError(
            f"`--no-render` must be given if the working folder has {found[0]}, which the Zoo would delete after "
            "the video. Pass it, or run the command in another folder."
        )


_CHECKS: dict[str, Callable[[Namespace], None]] = {
    "all_plots": check_all_plots,
    "benchmark": check_benchmark,
    "enjoy": _check_enjoy,
    "load_from_hub": _check_load_from_hub,
    "plot_from_file": check_plot_from_file,
    "plot_train": check_plot_train,
    "push_to_hub": _check_push_to_hub,
}
