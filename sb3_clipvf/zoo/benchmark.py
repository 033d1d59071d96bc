"""The RL Zoo's ``benchmark``: what it evaluates and overwrites, and the run that a row of its table is about."""

from argparse import Namespace
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from huggingface_sb3 import EnvironmentName
from rl_zoo3 import utils

from sb3_clipvf.zoo.checked_files import saved_timesteps
from sb3_clipvf.zoo.patching import patched

_DOWNLOADS = "rl-trained-agents"
_TITLE = "## Performance of trained agents"


def check_benchmark(options: Namespace) -> None:
    """Check the folders of ``benchmark``, and remove earlier evaluations, which the Zoo would not repeat."""
    if not Path(options.log_dir).is_dir():
        raise ValueError(
            f"`--log-dir` must be a folder of trained agents, got {options.log_dir!r}, which does not exist. Train one "
            "with `sb3-clipvf train --env CartPole-v1`, or name another folder."
        )
    if _DOWNLOADS not in options.log_dir:
        options.no_hub = True  # the Zoo downloads no agent to another folder, and fails for each
    folder, copy = Path(options.benchmark_dir), Path("benchmark.md")
    # The Zoo writes its table to this folder even if it has evaluated nothing.
    folder.mkdir(parents=True, exist_ok=True)
    if not options.test_mode and folder.samefile("."):
        raise ValueError(
            f"`--benchmark-dir` must not be the working folder, to which the table is copied, got "
            f"{options.benchmark_dir!r}. Name another folder."
        )
    if not options.test_mode and copy.exists() and _TITLE not in copy.read_text(encoding="utf-8", errors="replace"):
        raise ValueError(
            "`benchmark.md` in the working folder must be a table of this command, which replaces it, got another "
            "file. Move it, or run the command in another folder."
        )
    for log in (folder / model for model in utils.get_trained_models(options.log_dir)):
        for path in log.glob("*.monitor.csv"):
            path.unlink()
        if log.is_dir():  # the Zoo expects a file there, and evaluates if it has no episode
            (log / "0.monitor.csv").write_text('#{"t_start": 0.0}\nr,l,t\n')


@contextmanager
def benchmarked_runs() -> Iterator[None]:
    """Make the table of the RL Zoo's script show the steps of each model, also if the environment's ID contains "/"."""
    latest, settings = utils.get_latest_run_id, utils.get_saved_hyperparams
    run, name = Path(), EnvironmentName("")

    def get_latest_run_id(log_path: str, env_id: str) -> int:
        nonlocal run, name
        name = EnvironmentName(env_id)
        number = latest(log_path, name)
        run = Path(log_path, f"{name}_{number or 1}")  # 1 is the number of a download
        return number

    def get_saved_hyperparams(_: str) -> tuple[dict[str, Any], str | None]:
        # The script's path has the ID instead of the name; its number of steps is the settings', not that of `-n`.
        hyperparams, path = settings(str(run / name))
        steps = saved_timesteps(run / f"{name}.zip")
        return (hyperparams | {"n_timesteps": steps} if steps >= 0 else hyperparams), path

    with patched(latest_run=get_latest_run_id, saved_settings=get_saved_hyperparams):
        yield
