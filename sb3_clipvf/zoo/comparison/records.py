"""Find runs in folders, and read what their files hold: the RL Zoo's runs, and folders with logs of SB3."""

from __future__ import annotations

import json
import os
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from sb3_clipvf.zoo.comparison.series import EVENT_FILES, Series, files_of, mean_evaluations
from sb3_clipvf.zoo.comparison.titles import plural
from sb3_clipvf.zoo.comparison.training import VERSIONS, SavedModel, noting, read_saved_model, read_training
from sb3_clipvf.zoo.run_folders import CHECKPOINTS, processes_of, resume_command
from sb3_clipvf.zoo.runs import Run, read_arguments, read_hyperparams
from sb3_clipvf.zoo.training_curve import is_of_evaluations, monitor_paths

OF_OPTIONS = ("n_timesteps", "env_kwargs", "eval_env_kwargs", "vec_env", "trained_agent", "n_processes")
"""Options of ``train`` and of ``torchrun`` that count as settings of a run."""

_ZOO_FILE, _MONITOR_FILES = "*/args.yml", "*monitor.csv"
_OF_RUNS = (_MONITOR_FILES, "evaluations.npz", "progress.json", "progress.csv", EVENT_FILES)


@dataclass(frozen=True)
class RunRecord:
    """
    What the files of one run hold.

    :param folder: Folder of the run.
    :param env_id: Id of the environment; "" if no file names it.
    :param algo: Name of the algorithm; "" if no file names it.
    :param seed: Seed of the run; None if unknown.
    :param settings: Settings of the run, {} if unknown.
    :param arguments: Options of the Zoo's ``train``, {} if unknown.
    :param episodes: Returns of the training episodes.
    :param is_mean: Whether ``episodes`` are means of 100 episodes, from the log, since there are no Monitor files.
    :param evaluations: Mean returns of the evaluations during training.
    :param log: Series of SB3's logger, by key.
    :param is_resumed: Whether the run was resumed, so that its times are not known.
    :param report: What ``sb3-clipvf report`` wrote about the final model, or the best one if ``is_best``:
        ``mean_return``, ``deterministic`` and ``is_best``; {} without it.
    :param steps: Environment steps of the run so far.
    :param versions: Versions of the packages that trained, by name.
    :param video: A video of the trained agent.
    """

    folder: Path
    env_id: str
    algo: str
    seed: int | None
    settings: Mapping[str, Any]
    arguments: Mapping[str, Any]
    episodes: Series
    is_mean: bool
    evaluations: Series | None
    log: Mapping[str, Series]
    is_resumed: bool
    report: Mapping[str, Any]
    steps: float
    versions: Mapping[str, str]
    video: Path | None

    @property
    def seconds(self) -> float | None:
        """Seconds of the training up to the end of its last episode; None if unknown."""
        known = self.episodes.seconds[np.isfinite(self.episodes.seconds)]
        return float(known[-1]) if len(known) > 0 and known[-1] > 0 else None


def find_records(folders: Sequence[str | os.PathLike[str]]) -> tuple[list[RunRecord], list[str]]:
    """
    Read all runs in folders, each a run or a folder of runs at any depth.

    :return: The runs in the order of their paths, and messages about those that could not be read or lack data.
    :raises ValueError: If a folder holds no run, or no run has anything to show.
    """
    paths: dict[Path, Path] = {}  # by real path, since several may lead to a run
    records: list[RunRecord] = []
    problems: list[str] = []
    for folder in folders:
        if not Path(folder).is_dir():
            what = "a file" if Path(folder).exists() else "nothing"
            raise ValueError(f"`RUNS` must be folders of runs, got {folder}, which is {what}. Check the path.")
        found = _run_folders(Path(folder), problems, set())
        if not found:
            raise ValueError(
                f"`RUNS` must be runs or folders of runs, but {folder} holds no files of a run: no Monitor files, "
                "evaluations, logs of SB3 or settings of the RL Zoo. Name another folder, or train with "
                f"`sb3-clipvf train --env CartPole-v1 -f {folder}`."
            )
        for path in found:
            paths.setdefault(Path(os.path.realpath(path)), path)
    for real_path, path in paths.items():
        inner = [other for other in paths if other != real_path and other.is_relative_to(real_path)]
        if inner:
            problems.append(
                f"{path} holds files of a run, and {plural(len(inner), 'run')} in its folders, which are shown as runs "
                "of their own."
            )
        try:
            record, found_problems = read_record(path, inner)
        except (ValueError, OSError) as error:
            problems.append(f"{path} was left out: {error}")
            continue
        problems += found_problems
        if len(record.episodes.steps) == 0 and record.evaluations is None and not record.log and not record.report:
            problems.append(f"{path} was left out: {_emptiness(record)}")
        else:
            records.append(record)
    if not records:
        raise ValueError("`RUNS` must hold a run with data to show, but none has:\n  " + "\n  ".join(problems))
    records = _without_copies(records, problems)
    return records, problems + _unknown_envs(records) + _unknown_times(records) + _mixed_versions(records)


def read_record(folder: Path, inner: Sequence[Path] = ()) -> tuple[RunRecord, list[str]]:
    """
    Read the files of one run.

    :param folder: Folder of the run.
    :param inner: Real paths of folders in it that belong to other runs.
    :return: The run, and a message about each file that is damaged and was left out.
    :raises ValueError: If its settings cannot be read.
    """
    problems: list[str] = []
    run = _zoo_run(folder)
    arguments, settings = ({}, {}) if run is None else (read_arguments(run), read_hyperparams(run))
    model = SavedModel() if run is None else read_saved_model(run.model_path, problems)
    training = read_training(folder, model, processes_of(arguments), problems, inner)
    evaluations = None
    paths = files_of(folder, "evaluations.npz", inner)
    for path in paths[:1]:
        with noting(problems):
            evaluations = mean_evaluations(path).timed(training.episodes)
    problems += [f"{path} was left out: those of {paths[0].parent} are shown." for path in paths[1:]]
    report = _read_report(folder, model.num_timesteps, problems)
    ends = [one.steps[-1] for one in (training.episodes, *training.log.values()) if len(one.steps) > 0]
    ends += [] if evaluations is None else [evaluations.steps[-1]]
    if run is not None and not run.model_path.is_file():
        problems.append(_unfinished(folder, arguments))
    record = RunRecord(
        folder=folder,
        env_id=str(arguments.get("env") or training.env_id or _env_of_path(folder)),
        algo=str(arguments.get("algo") or ""),
        seed=seed if isinstance(seed := arguments.get("seed"), int) else None,
        settings=_all_settings(settings, arguments),
        arguments=arguments,
        episodes=training.episodes,
        is_mean=training.is_mean,
        evaluations=evaluations,
        log=training.log,
        is_resumed=training.is_resumed,
        report=report,
        steps=float(model.num_timesteps or max(ends, default=0)),
        versions=model.versions,
        video=_newest_video(folder) if report or not (folder / "report.json").is_file() else None,
    )
    return record, problems


def _run_folders(folder: Path, problems: list[str], visited: set[str]) -> list[Path]:
    """
    Return the folders of runs at or below a folder; add messages about folders that were left out.

    Logs and evaluations inside another run belong to it. But runs of the Zoo are runs of their own, and so are other
    Monitor files that are not inside a run of the Zoo. ``visited`` holds the real paths of folders that were read.
    """
    visited.add(os.path.realpath(folder))
    places: list[Path] = []
    with noting(problems):
        found = sorted((path for path in folder.iterdir() if path.is_dir()), key=lambda path: (path.is_symlink(), path))
        places = [path for path in found if not _is_benchmark(path, problems)]
    inner = []
    for path in places:
        if os.path.realpath(path) not in visited:
            inner += _run_folders(path, problems, visited)
    if next(folder.glob(_ZOO_FILE), None) is not None:
        return [folder, *(path for path in inner if next(path.glob(_ZOO_FILE), None) is not None)]
    if not any(next(folder.glob(pattern), None) is not None for pattern in _OF_RUNS):
        return inner
    return [folder, *(path for path in inner if _is_own_run(path, folder))]


def _is_benchmark(path: Path, problems: list[str]) -> bool:
    """Return whether a folder is where the Zoo's ``benchmark`` evaluates agents; if it is, add a message."""
    if path.name != "benchmark" or next(path.glob("*/0.monitor.csv"), None) is None:
        return False
    problems.append(
        f"{path} was left out: it holds evaluations of `sb3-clipvf benchmark`. If they are trainings, name the folder."
    )
    return True


def _is_own_run(path: Path, folder: Path) -> bool:
    """Return whether a run inside the folder of another one is not a part of it."""
    if next(path.glob(_ZOO_FILE), None) is not None:
        return True
    monitors = monitor_paths(path)
    is_evaluation = any(map(is_of_evaluations, path.relative_to(folder).parts))
    return bool(monitors) and not is_evaluation and not is_of_evaluations(monitors[0].name)


def _without_copies(records: Sequence[RunRecord], problems: list[str]) -> list[RunRecord]:
    """Leave out logs that ``train -tb`` wrote beside the logs of runs that are shown; add a message."""
    names: set[tuple[Path, str]] = set()  # folder and first part of the name, as in <tb>/CartPole-v1/ClipPPO_1
    for record in records:
        written, logs = (record.arguments.get(key) for key in ("tensorboard_log", "log_folder"))
        if record.log and written and isinstance(written, str) and isinstance(logs, str):
            place = Path(written)
            if not place.is_absolute() or os.path.isabs(logs):
                # The log folder may have moved since, together with the folder inside it.
                place = record.folder.resolve().parent.parent / os.path.relpath(written, logs)
            algorithm = record.algo.replace("ppo_lstm", "recurrentppo")
            names.add(((place / record.env_id.replace("/", "-")).resolve(), algorithm))
    kept: list[RunRecord] = []
    copies: list[RunRecord] = []
    for record in records:
        is_log = not record.arguments and (record.is_mean or len(record.episodes.steps) == 0)
        path = record.folder.resolve()
        is_copy = is_log and (path.parent, path.name.rpartition("_")[0].lower()) in names
        (copies if is_copy else kept).append(record)
    if copies:
        where = ", ".join(sorted({str(record.folder.parent) for record in copies}))
        problems.append(f"{where}: {plural(len(copies), 'log')} of `-tb` left out, since the runs' own logs are shown.")
    return kept


def _zoo_run(folder: Path) -> Run | None:
    """Return the Zoo's run in a folder; None if the folder is not one."""
    names = sorted(path.parent.name for path in folder.glob(_ZOO_FILE))
    # The name of the folder finds the files, whatever environment they name.
    return Run("", names[0], folder, folder / f"{names[0]}.zip") if names else None


def _read_report(folder: Path, final_steps: int | None, problems: list[str]) -> dict[str, Any]:
    """Read ``report.json`` unless it is about an earlier model; the final one has ``final_steps`` steps, if known."""
    path = folder / "report.json"
    if not path.is_file():
        return {}
    with noting(problems):
        try:
            numbers = dict(json.loads(path.read_text(encoding="utf-8")))
            name, steps = Path(numbers["model"]).name, int(numbers["num_timesteps"])
            found = {"mean_return": float(numbers["mean_return"]), "deterministic": bool(numbers["deterministic"])}
        except (ValueError, TypeError, KeyError) as error:
            raise ValueError(
                f"{path} must be what `sb3-clipvf report --env` wrote, but is damaged ({type(error).__name__}: "
                f"{error}). Remove it."
            ) from error
        is_best = name == "best_model.zip"
        own_steps = read_saved_model(path.with_name(name), problems).num_timesteps if is_best else final_steps
        if own_steps in (None, steps):
            return {**found, "is_best": is_best}
        kind, option = ("best", " --load-best") if is_best else ("final", "")
        problems.append(
            f"{path} was left out: it is about {name} of step {steps:,}, not about the {kind} model of step "
            f"{own_steps:,}. Evaluate that one with `sb3-clipvf report --env{option}`."
        )
    return {}


def _newest_video(folder: Path) -> Path | None:
    return max(folder.glob("videos/*.mp4"), key=lambda path: path.stat().st_mtime, default=None)


def _all_settings(settings: Mapping[str, Any], arguments: Mapping[str, Any]) -> dict[str, Any]:
    """Return the settings with those options that affect training, too."""
    found = dict(settings)
    if found:
        from sb3_clipvf.zoo.entries import drop_null  # imports torch

        drop_null(found)
    n_timesteps = arguments.get("n_timesteps")
    if isinstance(n_timesteps, (int, float)) and n_timesteps > 0:  # else that of the settings holds
        found["n_timesteps"] = n_timesteps
    for key in OF_OPTIONS[1:]:
        if arguments.get(key):
            found[key] = arguments[key]
    return {_key_text(key): found[key] for key in sorted(found, key=_key_text)}


def _key_text(key: Any) -> str:
    """Return a key of settings as text, since YAML's keys have all types."""
    return key if isinstance(key, str) else repr(key)


def _unknown_envs(records: Sequence[RunRecord]) -> list[str]:
    n_unknown = sum(not record.env_id for record in records)
    if n_unknown < 2:
        return []
    return [
        f"The environments of {n_unknown} of {plural(len(records), 'run')} are not known: the report compares them as "
        "one. If they differ, write a report for each."
    ]


def _unknown_times(records: Sequence[RunRecord]) -> list[str]:
    n_resumed = sum(record.is_resumed for record in records)
    if n_resumed == 0:
        return []
    return [f"The times of {n_resumed} of {plural(len(records), 'run')} are not known, since they were resumed."]


def _mixed_versions(records: Sequence[RunRecord]) -> list[str]:
    """Return a message about each package of which the runs used several versions."""
    found = []
    for name in VERSIONS:
        counts = Counter(record.versions[name] for record in records if name in record.versions)
        if len(counts) > 1:
            versions = ", ".join(f"{version} ({n} of {len(records)} runs)" for version, n in sorted(counts.items()))
            found.append(
                f"The runs used several versions of {name}: {versions}. A difference between them may come "
                "from it. Train them again with one version to be sure."
            )
    return found


def _unfinished(folder: Path, arguments: Mapping[str, Any]) -> str:
    """Return the message for a run of the Zoo without a final model."""
    text = f"{folder} holds no final model: its training is still running, or was stopped. Its steps so far are shown."
    if any(folder.glob(f"{CHECKPOINTS}/checkpoint_*.zip")):
        text += f" `{resume_command(folder, arguments)}` resumes it."
    return text


def _emptiness(record: RunRecord) -> str:
    """Return why a run has nothing to show, and the hint."""
    if record.arguments:
        return "no training episode ended, and it has no evaluations. Train longer, or with `--eval-freq`."
    return "its files hold no episode, evaluation or number of a log. Remove it, or train longer."


def _env_of_path(folder: Path) -> str:
    """Return the innermost folder that is named like an environment, as in ``tensorboard/<env>/PPO_1``; or ""."""
    names = (re.sub(r"_\d+$", "", part) for part in reversed(folder.parts))
    return next((name for name in names if re.fullmatch(r"\S*-v\d+", name)), "")
