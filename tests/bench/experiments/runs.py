"""
One run: a training by ``sb3-clipvf train`` and the scores of it, as a function of a specification.

``python -m tests.bench.experiments.runs FOLDER`` makes the run that ``run.json`` in the folder specifies.
"""

from __future__ import annotations

import contextlib
import fcntl
import functools
import json
import os
import sys
import time
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import Any

import yaml

from sb3_clipvf.files.trust import TRUST_VARIABLE
from tests.bench.experiments.episodes import LAST_EPISODES, binned_episodes, curve_on_grid, grid, rounded_mean
from tests.bench.results import digest, machine, write_text

SPEC_FILE, RECORD_FILE, LOG_FILE = "run.json", "record.json", "train.log"
IN_PROGRESS_CODE = os.EX_TEMPFAIL
"""Exit code of the process of a run that another process makes."""

MORE_PACKAGES = ("numba", "scipy", "mujoco", "box2d", "envpool")
"""Packages that decide on the results of some runs, besides those of all benchmarks."""


@dataclass(frozen=True, kw_only=True)
class RunSpec:
    """
    Everything that decides on a run. It can be pickled, and written as JSON.

    A field that is added later needs the default under which earlier runs were made, and no default may change:
    otherwise, finished runs are not recognised.

    :param label: name for messages
    :param folder: folder of the run's own files
    :param env_id: id of the environment
    :param seed: seed of the training
    :param n_timesteps: environment steps of training
    :param vec_env: training environments, as ``--vec-env`` takes them; evaluation has Gymnasium's
    :param hyperparams: settings of the environment; None: the packaged ones
    :param params: changes to the settings, as ``-params`` takes them
    :param algo: name of the algorithm in the Zoo
    :param n_eval_episodes: episodes of the final evaluation; 0: none
    """

    label: str
    folder: Path
    env_id: str
    seed: int
    n_timesteps: int
    vec_env: str = "dummy"
    hyperparams: Mapping[str, Any] | None = None
    params: tuple[str, ...] = ()
    algo: str = "clipppo"
    n_eval_episodes: int = 20

    def deciding(self) -> dict[str, Any]:
        """Return what decides on the result, in JSON's types."""
        entries = asdict(self)
        del entries["label"], entries["folder"]
        return {**entries, "params": [*self.params]}

    def digest(self) -> str:
        """Return a short name of the deciding values that are not defaults, the seed apart."""
        names = {field.name for field in fields(self) if getattr(self, field.name) != field.default} - {"seed"}
        return digest({name: value for name, value in self.deciding().items() if name in names})


@dataclass(frozen=True)
class Record:
    """
    What is kept of a run.

    :param scores: numbers by name, None where unknown
    :param curve: mean return of the last episodes on a grid of the training's steps, None before the first episode
    :param episodes: columns of the run's file of episodes, see :func:`binned_episodes`
    :param machine: processor and versions, see :func:`tests.bench.results.machine`
    :param jobs: parallel runs; None in records of earlier versions
    """

    scores: dict[str, float | None]
    curve: list[float | None]
    episodes: dict[str, list[float | None]]
    machine: dict[str, Any]
    jobs: int | None = None

    @classmethod
    def read(cls, path: Path) -> Record:
        """Read a file of :meth:`write`."""
        try:
            return cls(**json.loads(path.read_text(encoding="utf-8")))
        except (TypeError, ValueError) as error:
            raise ValueError(f"{path} must be the record of a run, but is damaged ({error}). Remove it.") from error

    def write(self, path: Path) -> None:
        """Write the record atomically."""
        write_text(path, json.dumps(asdict(self)) + "\n")


@functools.cache
def this_machine() -> dict[str, Any]:
    """Return processor, cores and versions of this process."""
    return machine(MORE_PACKAGES)


class RunInProgressError(ValueError):
    """Another process makes the same run."""


def make_run(folder: Path) -> int:
    """Make the run of a folder unless it is made, write its record, and return the exit code of the process."""
    content = json.loads((folder / SPEC_FILE).read_text(encoding="utf-8"))
    try:
        with _locked(folder):
            # Another process may have made it since this one was started.
            if not (folder / RECORD_FILE).exists():
                record = train_and_measure(_spec_of(folder, content))
                replace(record, jobs=content.get("jobs")).write(folder / RECORD_FILE)
    except RunInProgressError:
        return IN_PROGRESS_CODE
    return 0


def train_and_measure(spec: RunSpec) -> Record:
    """
    Train in this process, or resume the interrupted training in the run's folder, and return the record.

    :raises ValueError: if the training ended early
    """
    started, cpu_started = time.perf_counter(), _cpu_seconds()
    is_complete = any(_model_steps(folder, spec) >= spec.n_timesteps for folder in _zoo_runs(spec))
    is_whole = not is_complete and _train(spec)
    cpu_seconds = _cpu_seconds() - cpu_started
    record = _measure(spec)
    costs = {"cpu_seconds": cpu_seconds, "run_seconds": time.perf_counter() - started}
    known = {name: round(seconds, 1) if is_whole else None for name, seconds in costs.items()}
    return replace(record, scores={**record.scores, **known})


def train_options(spec: RunSpec) -> list[str]:
    """Return the options of ``sb3-clipvf train``; one thread and the CPU, since other runs may train beside it."""
    options = ["--algo", spec.algo, "--env", spec.env_id, "--seed", str(spec.seed), "-n", str(spec.n_timesteps)]
    options += ["-f", str(spec.folder), "--eval-freq", "-1", "--num-threads", "1", "--device", "cpu", "--verbose", "0"]
    if spec.vec_env != "dummy":
        options += ["--vec-env", spec.vec_env]
    if spec.hyperparams is not None:
        options += ["--conf-file", str(spec.folder / "settings.yml")]
    return [*options, "-params", *spec.params] if spec.params else options


def process_variables(spec: RunSpec) -> dict[str, str]:
    """Return the environment variables of the process of a run."""
    # One thread for numerical libraries: two runs of several threads each would compete for the cores. Errors of the
    # settings keep their traceback, too.
    variables = {"OMP_NUM_THREADS": "1", "SB3_CLIPVF_TRACEBACK": "1"}
    named = ((spec.hyperparams or {}).get(key, "") for key in ("callback", "policy", "rollout_buffer_class"))
    if any("." in str(value) for value in named):
        # The run's own files name classes that no list of safe classes has.
        variables[TRUST_VARIABLE] = "1"
    return variables


def prepare_folder(spec: RunSpec, jobs: int | None = None) -> None:
    """
    Check that the run's folder is new or holds the same run, see :func:`check_folder`, and write its files.

    :param spec: the run
    :param jobs: parallel runs, for the record
    """
    check_folder(spec)
    spec.folder.mkdir(parents=True, exist_ok=True)
    if spec.hyperparams is not None:
        text = yaml.safe_dump({spec.env_id: {**spec.hyperparams}}, sort_keys=False)
        write_text(spec.folder / "settings.yml", text)
    content = {"label": spec.label, "spec": spec.deciding(), "versions": this_machine()["versions"], "jobs": jobs}
    write_text(spec.folder / SPEC_FILE, json.dumps(content, indent=1) + "\n")


def check_folder(spec: RunSpec) -> None:
    """
    Check that the run's folder is missing or empty, or holds the same run, made with the same versions.

    :raises ValueError: with the difference
    """
    folder = spec.folder
    hint = "Move the folder away, or name another `--log-folder`."
    # A kill may have left the temporary file of a write, whose name begins with a point.
    if not folder.is_dir() or all(
        path.name.startswith(".") or path.name == "settings.yml" for path in folder.iterdir()
    ):
        return
    try:
        content = json.loads((folder / SPEC_FILE).read_text(encoding="utf-8"))
        made, versions = _spec_of(folder, content).deciding(), dict(content["versions"])
    except (OSError, KeyError, TypeError, ValueError) as error:
        raise ValueError(
            f"{folder} must be empty or the folder of a run, but has no readable {SPEC_FILE} "
            f"({type(error).__name__}: {error}). {hint}"
        ) from error
    # As JSON has it, which knows no tuples.
    difference = differing(made, json.loads(json.dumps(spec.deciding())))
    if difference:
        raise ValueError(f"{folder} must hold a run of {spec.label}, but it was made with {difference}. {hint}")
    difference = differing(versions, this_machine()["versions"])
    if difference:
        raise ValueError(f"{folder} must be continued with the versions of its start, but has {difference}. {hint}")


def differing(found: Mapping[str, Any], wanted: Mapping[str, Any]) -> str:
    """Return the first entry in which two dicts differ as ``name found (now wanted)``, or ""."""
    for name in dict.fromkeys((*wanted, *found)):
        ours, theirs = wanted.get(name), found.get(name)
        if isinstance(ours, Mapping) and isinstance(theirs, Mapping):
            if inner := differing(theirs, ours):
                return inner
        elif ours != theirs:
            return f"{name} {theirs!r} (now {ours!r})"
    return ""


def _cpu_seconds() -> float:
    """Return the processor time of this process and of its workers that have ended."""
    return sum(os.times()[:4])


@contextlib.contextmanager
def _locked(folder: Path) -> Iterator[None]:
    """Hold the lock of a run's folder, which ends with the process."""
    with (folder / ".lock").open("w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise RunInProgressError(
                f"{folder} must be trained by one process, but another one trains it. Wait for it, or end it."
            ) from error
        yield


def _zoo_runs(spec: RunSpec) -> list[Path]:
    """Return the folders of the Zoo's runs, newest first. A run that was killed before its first checkpoint has one."""
    found = (spec.folder / spec.algo).glob("*_*")
    return sorted(found, key=lambda path: int(path.name.rpartition("_")[2]), reverse=True)


def _model_steps(zoo_run: Path, spec: RunSpec) -> int:
    from huggingface_sb3 import EnvironmentName

    from sb3_clipvf.zoo.checked_files import saved_timesteps

    return saved_timesteps(zoo_run / f"{EnvironmentName(spec.env_id)}.zip")


def _train(spec: RunSpec) -> bool:
    """Train, and return whether this process did all of it."""
    from sb3_clipvf import zoo
    from sb3_clipvf.checkpoint.file import sorted_checkpoints
    from sb3_clipvf.zoo.run_folders import CHECKPOINTS

    interrupted = [run for run in _zoo_runs(spec) if sorted_checkpoints(run / CHECKPOINTS)]
    options = ["--resume", str(interrupted[0])] if interrupted else train_options(spec)
    code = zoo.main(["train", *options])
    if code != 0:
        raise ValueError(f"the train command ended with code {code}")
    return not interrupted


def _measure(spec: RunSpec) -> Record:
    from sb3_clipvf.zoo.runs import evaluate_run, find_run
    from sb3_clipvf.zoo.training_curve import read_training_curve

    run = find_run(spec.folder, spec.env_id, spec.algo)
    num_timesteps = _model_steps(run.folder, spec)
    if num_timesteps < spec.n_timesteps:
        # The Zoo saves the model and ends with code 0 when it is interrupted.
        raise ValueError(f"the training was interrupted at step {num_timesteps:,}")
    scores: dict[str, float | None] = {"num_timesteps": num_timesteps}
    started = None
    if spec.n_eval_episodes > 0:
        evaluation = evaluate_run(run, spec.n_eval_episodes, device="cpu")
        scores |= {"evaluation_mean": evaluation.mean, "evaluation_std": evaluation.std}
        started = evaluation.started
    curve = read_training_curve(run.folder, num_timesteps, started)
    on_grid = curve_on_grid(curve, grid(spec.n_timesteps))
    episodes = binned_episodes(curve, num_timesteps)
    if started is None:
        # A resumed training's clock includes the time between its processes.
        episodes["seconds"] = [None for _ in episodes["step"]]
    scores |= {
        "last_return": rounded_mean(curve.returns[-LAST_EPISODES:]),
        "mean_return": rounded_mean([value for value in on_grid if value is not None]),
        "n_episodes": len(curve.returns),
        "seconds": curve.training_seconds if started is not None else None,
    }
    return Record(scores, on_grid, episodes, this_machine())


def _spec_of(folder: Path, content: Mapping[str, Any]) -> RunSpec:
    """Return the run of a file of specifications, which may lack fields that were added later."""
    entries = {**content["spec"], "params": tuple(content["spec"].get("params", ()))}
    return RunSpec(label=content["label"], folder=folder, **entries)


if __name__ == "__main__":
    sys.exit(make_run(Path(sys.argv[1])))
