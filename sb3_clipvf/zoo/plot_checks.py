"""Check that there is something to plot: otherwise the RL Zoo's plots are empty, print 0.0, or fail in NumPy."""

import sys
from argparse import Namespace
from pathlib import Path
from typing import Any

import numpy as np

from sb3_clipvf.files.statistics import read_pickle
from sb3_clipvf.zoo.comparison.series import read_evaluations

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
    """Check that each environment has evaluations that can be drawn, and each folder a label."""
    labels = options.exp_folders if options.labels is None else options.labels
    if not len(labels) == len(set(labels)) == len(options.exp_folders):
        raise ValueError(
            f"`--labels` must be as many different labels as `--exp-folders` has folders, {len(options.exp_folders)}, "
            f"got {', '.join(labels)}. Name each folder once, and one label for each."
        )
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
    for name in options.merge:
        for env, of_env in read_pickle(name).items():
            if env in results:
                results[env] |= of_env
    envs = _chosen(results, options.keep_envs, options.skip_envs)
    found = next(iter(results.values()), {})
    keys = _chosen(found, options.keep_keys, options.skip_keys)
    if not envs or not keys:
        raise ValueError(
            f"`--input` must hold results to plot, got {path}, of which the options select none. It has "
            f"{', '.join(results) or 'no environments'} and {', '.join(found) or 'no keys'}. Change the `--keep` and "
            "`--skip` options."
        )
    if options.labels is not None and len(options.labels) != len(keys):
        raise ValueError(
            f"`--labels` must be one label for each of {', '.join(keys)}, got {', '.join(options.labels)}. Pass "
            f"{len(keys)}, in this order."
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
    runs: dict[Path, tuple[Any, Any]] = {}
    for path in files:
        data = read_evaluations(path)
        if options.key not in data:
            return f"{path} has no {options.key!r} for `--key`. It has {', '.join(data)}."
        if len(data["timesteps"]) > 1:  # the Zoo omits others
            runs[path.parent] = steps, results = data["timesteps"], data[options.key]
            if steps[0] > options.max_timesteps:
                raise _not_comparable(env, f"{path} has none up to `-max` {options.max_timesteps}. Pass more.")
            if np.isnan(results[steps <= options.max_timesteps]).any():
                # IsolatedEvalCallback fills rows with fewer episodes than others.
                hint = f"Use `sb3-clipvf report {path.parent}`."
                raise _not_comparable(env, f"evaluations in {path} differ in the number of episodes. {hint}")
    if not runs:
        return f"they have one evaluation in {folder}. Train longer, or with a smaller `--eval-freq`."
    kept = _compared(runs, env, options)
    shapes = {np.shape(runs[run][1])[1:] for run in kept}
    if len(shapes) > 1:
        text = f"they differ in the episodes of an evaluation in {folder}. Keep them in different folders (`-f`)."
        raise _not_comparable(env, text)
    if len(kept) == 1 and np.prod(shapes.pop()) == 1:
        return f"one run with one episode in each evaluation in {folder}. Train again, or with more `--eval-episodes`."
    left_out = [path.parent.name for path in files if path.parent not in kept]
    if left_out:
        sys.stdout.write(f"Left out, with fewer evaluations than other runs in {folder}: {', '.join(left_out)}\n")
    return ""


def _compared(runs: dict[Path, tuple[Any, Any]], env: str, options: Namespace) -> list[Path]:
    """Return the runs that the RL Zoo compares; raise ValueError if it would compare evaluations at different steps."""
    lowest = options.min_timesteps
    steps = {run: steps for run, (steps, _) in runs.items()}
    if lowest > 0:  # the fewest evaluations of long runs; longer ones are compared at the nearest steps
        long = [run for run in runs if steps[run][-1] >= lowest]
        if not long:
            raise _not_comparable(env, f"no run reaches `-min` {lowest} in {next(iter(runs)).parent}. Pass less.")
        first = min(long, key=lambda run: len(steps[run]))
        n_evaluations = int((steps[first] <= options.max_timesteps).sum())
    else:
        n_evaluations, first = max((int((steps[run] <= options.max_timesteps).sum()), run) for run in runs)
        long = []
    kept = [run for run in runs if len(steps[run]) >= n_evaluations]
    for run in kept:
        is_resampled = run in long and len(steps[run]) != len(steps[first])
        if not (is_resampled or np.allclose(steps[run][:n_evaluations], steps[first][:n_evaluations], rtol=0.01)):
            hint = "Keep them in different folders (`-f`)"
            hint += "." if lowest > 0 else ", or pass `-min` to compare long runs at the nearest steps."
            raise _not_comparable(env, f"{first} and {run} were evaluated at different steps. {hint}")
    return kept
