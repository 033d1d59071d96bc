"""The RL Zoo's ``benchmark``: its folders, its evaluations, and the run that a row of its table is about."""

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
    """Check the folders of ``benchmark``, and create those that it writes to."""
    if _DOWNLOADS not in options.log_dir:
        options.no_hub = True  # the Zoo downloads no agent to another folder, and fails for each
    if not options.no_hub:
        Path(options.log_dir).mkdir(parents=True, exist_ok=True)
    if not Path(options.log_dir).is_dir():
        raise ValueError(
            f"`--log-dir` must be a folder of trained agents, got {options.log_dir!r}, which does not exist. Train one "
            "with `sb3-clipvf train --env CartPole-v1`, or name another folder."
        )
    folder = Path(options.benchmark_dir)
    # The Zoo writes its table to this folder even if it has evaluated nothing.
    folder.mkdir(parents=True, exist_ok=True)
    if not options.test_mode and folder.samefile("."):
        raise ValueError(
            f"`--benchmark-dir` must not be the working folder, to which the table is copied, got "
            f"{options.benchmark_dir!r}. Name another folder."
        )
    for table in (folder / "benchmark.md", *(() if options.test_mode else (Path("benchmark.md"),))):
        if table.exists() and _TITLE not in table.read_text(encoding="utf-8", errors="replace"):
            raise ValueError(
                f"`{table}` must be a table of this command, which replaces it, got a different file. Move it, or use "
                "another `--benchmark-dir` or working folder."
            )


def remove_evaluations(options: Namespace) -> None:
    """Remove earlier evaluations of the agents that are evaluated, which the Zoo would not repeat."""
    models = utils.get_trained_models(options.log_dir)
    if options.test_mode:  # evaluates one agent
        models = dict(list(models.items())[:1])
    paths = [Path(options.benchmark_dir, model) for model in models if options.with_mujoco or "Fetch" not in model]
    logs = [path for path in paths if path.is_dir()]
    for log in logs:
        others = [path for path in log.iterdir() if not path.name.endswith(".monitor.csv")]
        if others:
            raise ValueError(
                f"`--benchmark-dir` must hold evaluations of this command, got {others[0]}. Name another folder."
            )
    for log in logs:
        for path in log.iterdir():
            path.unlink()
        # The Zoo expects a file there, and evaluates if it has no episode.
        (log / "0.monitor.csv").write_text('#{"t_start": 0.0}\nr,l,t\n')


@contextmanager
def benchmarked_runs() -> Iterator[None]:
    """Make the table of the RL Zoo's script show the steps of each model, even if the environment's ID contains "/"."""
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
