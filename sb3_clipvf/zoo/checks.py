"""Checks of the RL Zoo's parsed options, before its scripts use them."""

from argparse import Namespace
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from rl_zoo3 import utils

from sb3_clipvf.common.validation import check_device, check_folder, check_int
from sb3_clipvf.zoo.defaults import ALGORITHM
from sb3_clipvf.zoo.models import choose_run_of_options
from sb3_clipvf.zoo.parsing import checked_parsing, option_name, store_pairs
from sb3_clipvf.zoo.plots import check_all_plots, check_plot_from_file, check_plot_train
from sb3_clipvf.zoo.run_files import replaced
from sb3_clipvf.zoo.runs import RunId
from sb3_clipvf.zoo.settings import import_packages

_COUNTS = {
    "episode_window": "Pass a number of episodes.",
    "eval_episodes": "Pass a number of episodes.",
    "max_total_trials": "Pass a number of trials.",
    "n_envs": "Pass a number of environments.",
    "n_eval_envs": "Pass a number of environments.",
    "n_evaluations": "Pass a number of evaluations.",
    "n_jobs": "Pass a number of threads.",
    "n_trials": "Pass a number of trials.",
}
_FOLDERS = ("benchmark_dir", "log_folder", "optimization_log_path", "output_folder", "reward_log", "tensorboard_log")
_WAY_OUT_OF_FOLDER = "Name another one."
_LARGEST_SEED = 2**32 - 1


_PLOTS = {"all_plots": check_all_plots, "plot_from_file": check_plot_from_file, "plot_train": check_plot_train}


@contextmanager
def checked_options(program: str, name: str, *, finds_run: bool = False) -> Iterator[None]:
    """
    Check the options that the RL Zoo's script parses next.

    :param program: Name of the command, for messages.
    :param name: Sub-command.
    :param finds_run: Whether the script loads a model: ``--exp-id`` then becomes that of the run to take.
    """

    def check(options: Namespace) -> None:
        check_options(options)
        if finds_run:
            choose_run_of_options(options)
        if name in _PLOTS:
            _PLOTS[name](options)

    with (
        replaced(utils.StoreDict, "__call__", store_pairs),
        checked_parsing(program, check, {"exp_id": RunId.parse} if finds_run else None),
    ):
        yield


def check_options(options: Namespace) -> None:
    """
    Check what the RL Zoo would not, or with an error that does not name the option.

    :param options: Parsed options of one of its scripts.
    :raises ValueError: If a value is out of range, or an option would be ignored.
    :raises OSError: If a folder cannot be written to.
    :raises ImportError: If a module of ``--gym-packages`` cannot be imported.
    """
    given = vars(options)
    for name, way_out in _COUNTS.items():
        if given.get(name) is not None:
            check_int(option_name(name), given[name], 1, way_out)
    if given.get("n_timesteps", -1) != -1:
        check_int("--n-timesteps", given["n_timesteps"], 1, "Pass a number of environment steps.")
    if given.get("num_threads", -1) != -1:
        check_int("--num-threads", given["num_threads"], 1, "Leave it out to take PyTorch's own number.")
    if "seed" in given:
        # `train` draws one itself where it is negative.
        lowest = -_LARGEST_SEED if "trained_agent" in given else 0
        check_int("--seed", given["seed"], lowest, "Leave it out for the default.", _LARGEST_SEED)
    if given.get("log_interval") == 0:
        raise ValueError(
            "`--log-interval` must not be 0, got 0. Pass the number of updates between two logs, -1 for the default, "
            "or -2 for no log."
        )
    if given.get("log_folder") == "":
        raise ValueError("`--log-folder` must be a folder, got ''. `.` is the working folder.")
    if "device" in given and given.get("algo") != ALGORITHM:  # ClipPPO checks its own
        check_device(given["device"])
    _check_study(given)
    for name in _FOLDERS:
        if given.get(name):
            check_folder(option_name(name), given[name], _WAY_OUT_OF_FOLDER)
    import_packages(given.get("gym_packages"), "--gym-packages")


def _check_study(given: dict[str, Any]) -> None:
    """Refuse a study that is neither searched nor read, which the Zoo would ignore."""
    if "trial_id" not in given or given.get("optimize_hyperparameters"):
        return
    parts = {name: given.get(name) for name in ("storage", "study_name", "trial_id")}
    missing = [option_name(name) for name, value in parts.items() if value is None]
    if missing and len(missing) < len(parts):
        named = next(option_name(name) for name, value in parts.items() if value is not None)
        raise ValueError(
            f"`{missing[0]}` must be given with `{named}`, got none. `--storage`, `--study-name` and `--trial-id` "
            "together train with the settings of a trial; `-optimize` searches."
        )
