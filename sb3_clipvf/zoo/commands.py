"""The sub-commands of ``sb3-clipvf``, the options that they set by default, and the packaged settings."""

from dataclasses import dataclass, field
from importlib.resources import files
from pathlib import Path
from typing import Any

ALGORITHM = "clipppo"
"""The algorithm's name in the RL Zoo."""

# Defaults of commands on runs. The Zoo's folder, rl-trained-agents, is a download of another project's agents.
_OF_RUNS = {"algo": ALGORITHM, "folder": "logs"}


@dataclass(frozen=True)
class Command:
    """One sub-command."""

    summary: str  # one line for the overview
    target: str  # `module:function`, or a module that runs as a script
    defaults: dict[str, Any] = field(default_factory=dict)  # values by the names under which options are parsed
    required: str | None = None  # option without which the Zoo fails with an error that does not name it
    renders: bool = False  # whether it draws environments off-screen, for a video
    loads: bool = False  # whether it reads files that could run code, so that it accepts `--trust-pickle`
    finds_model: bool = False  # whether the Zoo looks for the model of one run


COMMANDS: dict[str, Command] = {
    "train": Command(
        "train an agent; with -optimize, search hyperparameters", "rl_zoo3.train:train", {"algo": ALGORITHM}, loads=True
    ),
    "enjoy": Command("run a trained agent and show it", "rl_zoo3.enjoy:enjoy", _OF_RUNS, loads=True, finds_model=True),
    "report": Command(
        "evaluate a run, plot its learning curve, record a video", "sb3_clipvf.zoo.report:main", loads=True
    ),
    "compile": Command("compile the kernels ahead of training", "sb3_clipvf.zoo.compilation:main"),
    "plot_train": Command(
        "plot training returns of runs", "rl_zoo3.plots:plot_train", {"algo": ALGORITHM, "exp_folder": "logs"}
    ),
    "all_plots": Command(
        "plot evaluations of many runs and print a table",
        "rl_zoo3.plots:all_plots",
        {"algos": [ALGORITHM], "exp_folders": ["logs"], "max_timesteps": float("inf")},
        required="env",
    ),
    "plot_from_file": Command(
        "plot results saved by all_plots -o", "rl_zoo3.plots:plot_from_file", required="input", loads=True
    ),
    "record_video": Command(
        "record a video of a trained agent",
        "rl_zoo3.record_video",
        _OF_RUNS,
        renders=True,
        loads=True,
        finds_model=True,
    ),
    "record_training": Command(
        "record a video of all models and checkpoints of a run",
        "rl_zoo3.record_training",
        _OF_RUNS,
        renders=True,
        loads=True,
        finds_model=True,
    ),
    "benchmark": Command(
        "evaluate all trained agents of a folder", "rl_zoo3.benchmark", {"log_dir": "logs"}, loads=True
    ),
    "push_to_hub": Command(
        "upload a trained agent to the Hugging Face hub",
        "rl_zoo3.push_to_hub",
        _OF_RUNS,
        renders=True,
        loads=True,
        finds_model=True,
    ),
    "load_from_hub": Command("download a trained agent from the Hugging Face hub", "rl_zoo3.load_from_hub", _OF_RUNS),
}


def hyperparams_path() -> Path:
    """
    Return the path of the settings that come with the package, ``clipppo.yml``.

    :raises FileNotFoundError: If the installation lacks the file.
    """
    path = Path(str(files("sb3_clipvf"))) / "hyperparams" / f"{ALGORITHM}.yml"
    if not path.is_file():
        raise FileNotFoundError(
            f"{ALGORITHM}.yml must come with sb3_clipvf, but {path} does not exist. Install the package again, or pass "
            "a file of your own with `--conf-file`."
        )
    return path
