"""Check that there is something to plot: otherwise the RL Zoo's plots are empty, print 0.0, or fail in NumPy."""

import sys
from argparse import Namespace
from pathlib import Path
from typing import Any

import numpy as np

from sb3_clipvf.files.statistics import read_pickle

_COLUMNS = {"success": "is_success", "reward": "r", "length": "l"}


def check_plot_train(options: Namespace) -> None:
    """Check that each environment has a run whose training returns can be drawn."""
    from stable_baselines3.common.monitor import LoadMonitorResultsError, load_results  # imports pandas

    folder, column = Path(options.exp_folder, options.algo), _COLUMNS[options.y_axis]
    for env in _names(options):
        most = -1
        for run in _runs([folder], env):
            try:
                episodes = load_results(str(run))
            except LoadMonitorResultsError:
                continue
            if options.max_timesteps is not None:
                episodes = episodes[episodes.l.cumsum() <= options.max_timesteps]
            most = max(most, len(episodes) if column in episodes else -1)
        if most < 0:
            raise ValueError(
                f"`--y-axis` must be a quantity that the training of {env} logged, got {options.y_axis!r}: its runs in "
                f"{folder} have no `{column}` of episodes. Use `--y-axis reward` to plot returns."
            )
        if most < options.episode_window:
            raise ValueError(
                f"`--episode-window` must be at most the number of episodes of a run, {most} for {env}, got "
                f"{options.episode_window}. Pass a smaller one, or train longer."
            )


def check_all_plots(options: Namespace) -> None:
    """Check that each environment has evaluations that can be drawn."""
    folders = [Path(folder, algo.lower()) for algo in options.algos for folder in options.exp_folders]
    for env in _names(options):
        _runs(folders, env)
        missing = {folder: _missing_evaluations(folder, env, options) for folder in folders}
        if all(missing.values()):
            raise _not_comparable(env, next(iter(missing.values())))
        for folder in (folder for folder, reason in missing.items() if reason):
            sys.stdout.write(f"{folder} has no evaluations of {env} to plot: the table shows 0.0 for it\n")


def check_plot_from_file(options: Namespace) -> None:
    """Check that a file of ``all_plots -o`` holds several runs of all that the options select."""
    path = Path(options.input if options.input.endswith(".pkl") else f"{options.input}.pkl")
    results: dict[str, dict[str, Any]] = dict(read_pickle(path))
    results.pop("results_table", None)
    envs = _chosen(results, options.keep_envs, options.skip_envs)
    keys = _chosen(next(iter(results.values()), {}), options.keep_keys, options.skip_keys)
    if not envs or not keys:
        raise ValueError(
            f"`--input` must hold results to plot, got {path}, of which the options select none. It has "
            f"{', '.join(results) or 'no environments'}. Change the `--keep` and `--skip` options."
        )
    for env, key in ((env, key) for env in envs for key in keys):
        if key not in results[env]:
            raise ValueError(
                f"`--input` must hold evaluations of {key} in all environments, got {path} without those in {env}. "
                "Omit one with `--skip-keys` or `--skip-envs`."
            )
        if np.ndim(results[env][key]["last_evals"]) == 0:
            raise ValueError(
                f"`--input` must hold at least two runs with at least two episodes in each evaluation, got {path} with "
                f"one of {key} in {env}. Train again, or with more `--eval-episodes`, then run `all_plots -o`."
            )


def _chosen(names: dict[str, Any], keep: list[str], skip: list[str]) -> list[str]:
    return [name for name in names if name not in skip and (name in keep or not keep)]


def _names(options: Namespace) -> list[str]:
    """Replace "/" in the names of environments, as in the folders of runs, and return them."""
    options.env = [env.replace("/", "-") for env in options.env]
    return list(options.env)


def _runs(folders: list[Path], env: str) -> list[Path]:
    present = [path for folder in folders if folder.is_dir() for path in sorted(folder.iterdir()) if path.is_dir()]
    runs = [path for path in present if env in path.name]
    if not runs:
        where = ", ".join(map(str, folders))
        names = ", ".join(path.name for path in present) or "none"
        raise ValueError(f"`--env` must be an environment with runs in {where}, got {env!r}. The runs are: {names}.")
    return runs


def _not_comparable(env: str, reason: str) -> ValueError:
    return ValueError(f"`--env` must be an environment whose runs can be compared, got {env!r}: {reason}")


def _missing_evaluations(folder: Path, env: str, options: Namespace) -> str:
    """
    Return why a folder has no evaluations to plot, and what to do about it; "" if it has some.

    :raises ValueError: If runs of the folder end the RL Zoo's command, or turn its means into NaN.
    """
    files = [path for path in folder.glob("*/evaluations.npz") if env in path.parent.name]
    if not files:
        return f"they were trained without evaluations in {folder}. Train with `--eval-freq`."
    results = []
    for path in files:
        with np.load(path) as data:
            if options.key not in data:
                return f"{path} has no {options.key!r} for `--key`. It has {', '.join(data)}."
            if len(data["timesteps"]) > 1:  # the Zoo omits others
                results.append(data[options.key][data["timesteps"] <= options.max_timesteps])
                if np.isnan(results[-1]).any():  # IsolatedEvalCallback fills rows with fewer episodes than others
                    way_out = f"Use `sb3-clipvf report {path.parent}`."
                    raise _not_comparable(env, f"evaluations in {path} differ in the number of episodes. {way_out}")
    longest = max(map(len, results), default=-1)
    if longest < 0:
        return f"they have one evaluation in {folder}. Train longer, or with a smaller `--eval-freq`."
    if longest == 0:
        return f"they have no evaluation up to `--max-timesteps` {options.max_timesteps} in {folder}. Pass more."
    shapes = [np.shape(result) for result in results if len(result) == longest]
    if len(set(shapes)) > 1:
        text = f"they differ in the episodes of an evaluation in {folder}. Keep them in different folders (`-f`)."
        raise _not_comparable(env, text)
    if len(shapes) == 1 and np.prod(shapes[0][1:]) == 1:
        return f"one run with one episode in each evaluation in {folder}. Train again, or with more `--eval-episodes`."
    return ""
