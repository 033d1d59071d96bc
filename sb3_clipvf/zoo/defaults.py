"""What the console command puts in where its user gave nothing: the sub-commands, their options, the settings."""

from dataclasses import dataclass
from importlib.resources import files
from pathlib import Path

from sb3_clipvf.zoo.parsing import Default

ALGORITHM = "clipppo"
"""The algorithm's name in the RL Zoo."""

_ALGO = Default(None, "--algo", ALGORITHM)
# The Zoo's own default, rl-trained-agents, is a download of another project's agents.
_FOLDER = Default("-f", "--folder", "logs")


@dataclass(frozen=True)
class Command:
    """
    One sub-command.

    :param summary: One line for the overview.
    :param target: ``module:function``, or the name of a module that runs as a script.
    :param defaults: Options to put in where the user gave none.
    :param required: Options without which the Zoo's script fails with an error that does not name them.
    :param plots: Whether it shows figures.
    :param renders: Whether it draws environments off-screen.
    :param encodes: Whether it starts the program ``ffmpeg``.
    :param loads: Whether it reads files that could run code, so that it takes ``--trust-pickle``.
    """

    summary: str
    target: str
    defaults: tuple[Default, ...] = ()
    required: tuple[tuple[str, str], ...] = ()
    plots: bool = False
    renders: bool = False
    encodes: bool = False
    loads: bool = False


COMMANDS: dict[str, Command] = {
    "train": Command(
        "train an agent; with -optimize, search hyperparameters", "rl_zoo3.train:train", (_ALGO,), loads=True
    ),
    "enjoy": Command("run a trained agent and show it", "rl_zoo3.enjoy:enjoy", (_ALGO, _FOLDER), loads=True),
    "report": Command(
        "evaluate a run, plot its learning curve, record a video", "sb3_clipvf.zoo.report:main", loads=True
    ),
    "plot_train": Command(
        "plot training returns of runs",
        "rl_zoo3.plots:plot_train",
        (Default("-a", "--algo", ALGORITHM), Default("-f", "--exp-folder", "logs")),
        plots=True,
    ),
    "all_plots": Command(
        "plot evaluations of many runs and print a table",
        "rl_zoo3.plots:all_plots",
        (Default("-a", "--algos", ALGORITHM), Default("-f", "--exp-folders", "logs")),
        required=(("-e", "--env"),),
        plots=True,
    ),
    "plot_from_file": Command(
        "plot what all_plots -o saved",
        "rl_zoo3.plots:plot_from_file",
        required=(("-i", "--input"),),
        plots=True,
        loads=True,
    ),
    "record_video": Command(
        "record a video of a trained agent", "rl_zoo3.record_video", (_ALGO, _FOLDER), renders=True, loads=True
    ),
    "record_training": Command(
        "record a video of each checkpoint of a run",
        "rl_zoo3.record_training",
        (_ALGO, _FOLDER),
        renders=True,
        encodes=True,
        loads=True,
    ),
    "benchmark": Command(
        "evaluate all trained agents of a folder",
        "rl_zoo3.benchmark",
        (Default(None, "--log-dir", "logs"),),
        loads=True,
    ),
    "push_to_hub": Command(
        "upload a trained agent to the Hugging Face hub",
        "rl_zoo3.push_to_hub",
        (_ALGO, _FOLDER),
        renders=True,
        encodes=True,
        loads=True,
    ),
    "load_from_hub": Command(
        "download a trained agent from the Hugging Face hub", "rl_zoo3.load_from_hub", (_ALGO, _FOLDER)
    ),
}


def hyperparams_path() -> Path:
    """
    Find the settings that come with the package.

    :return: Path of ``clipppo.yml``.
    :raises FileNotFoundError: If the installation lacks the file.
    """
    path = Path(str(files("sb3_clipvf"))) / "hyperparams" / f"{ALGORITHM}.yml"
    if not path.is_file():
        raise FileNotFoundError(
            f"{ALGORITHM}.yml must come with sb3_clipvf, but {path} does not exist. Install the package again, or name "
            "a file of your own with `--conf-file`."
        )
    return path
