"""One run of an experiment: its folder, its process, its training, and what is kept of it."""

import fcntl
import json
import os
import shutil
import signal
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from sb3_clipvf import ClipPPO, zoo
from sb3_clipvf.zoo.runs import find_run
from sb3_clipvf.zoo.training_curve import TrainingCurve
from tests.bench.experiments import executors, runs
from tests.bench.experiments.episodes import MAX_ROWS, binned_episodes
from tests.bench.experiments.executors import LocalExecutor
from tests.bench.experiments.networks import SharedLayerPolicy
from tests.bench.experiments.runs import (
    IN_PROGRESS_CODE,
    Record,
    RunSpec,
    check_folder,
    make_run,
    prepare_folder,
    process_variables,
    this_machine,
    train_and_measure,
    train_options,
)

TINY = {"n_envs": 2, "n_steps": 16, "batch_size": 16, "n_epochs": 1}

# A quick stand-in for the process of a run: it counts its starts, and writes the record at sys.argv[1].
MAKE = """
import pathlib, shutil, sys
folder = pathlib.Path(sys.argv[2])
with (folder / "starts").open("a") as file:
    file.write("x")
print("made")
shutil.copy(sys.argv[1], folder / "record.json")
"""


def record_of(mean: float = 5.0) -> Record:
    scores: dict[str, float | None] = {"last_return": mean, "mean_return": None, "evaluation_mean": 2 * mean}
    scores |= {"num_timesteps": 64, "n_episodes": 2, "seconds": 2.0, "run_seconds": 3.5}
    episodes: dict[str, list[float | None]] = {"step": [10, 20], "return": [1.5, 2.0], "episodes": [1, 1]}
    return Record(scores, [], {**episodes, "seconds": [0.5, None]}, this_machine())


def spec_of(folder: Path, **changes: Any) -> RunSpec:
    hyperparams = {"policy": "MlpPolicy", "n_timesteps": 64, **TINY}
    spec = RunSpec(label="tiny", folder=folder, env_id="CartPole-v1", seed=1000, n_timesteps=64)
    return replace(spec, **{"hyperparams": hyperparams, "n_eval_episodes": 2, **changes})


# --- episodes of a run


def test_few_episodes_have_a_row_each() -> None:
    curve = TrainingCurve(np.array([30.0, 10.0]), np.array([3.0, 1.25]), np.array([0.26, 0.1]))
    assert binned_episodes(curve, 64) == {
        "step": [10, 30],
        "return": [1.25, 3.0],
        "episodes": [1, 1],
        "seconds": [0.1, 0.3],
    }
    empty = np.array([])
    columns = binned_episodes(TrainingCurve(empty, empty, empty), 64)
    assert list(columns.values()) == [[], [], [], []]


def test_many_episodes_are_averaged_over_equal_parts_of_the_training() -> None:
    # Two episodes end in each part of 10 steps but the last ten, in which none ends.
    steps = np.arange(5.0, 10 * (MAX_ROWS - 10) + 1, 5.0)
    returns = np.arange(len(steps), dtype=np.float64)
    columns = binned_episodes(TrainingCurve(steps, returns, steps / 100), 10 * MAX_ROWS)
    assert columns["step"] == [10 * part for part in range(1, MAX_ROWS - 9)]
    assert columns["return"][:3] == [0.5, 2.5, 4.5]
    assert set(columns["episodes"]) == {2}
    assert columns["seconds"][:2] == [0.1, 0.2]


# --- folder of a run


def test_folder_of_another_run_is_refused(tmp_path: Path) -> None:
    spec = spec_of(tmp_path / "run")
    check_folder(spec)
    spec.folder.mkdir()
    (spec.folder / ".run.json.12-0123abcd.tmp").touch()  # a kill left it
    check_folder(spec)
    prepare_folder(spec)
    check_folder(replace(spec, label="other"))
    before = (spec.folder / "run.json").read_text()
    for changes, match in (
        ({"seed": 1001}, r"seed 1000 \(now 1001\)"),
        ({"hyperparams": {**(spec.hyperparams or {}), "n_epochs": 2}}, r"n_epochs 1 \(now 2\)"),
        ({"vec_env": "envpool"}, r"vec_env 'dummy' \(now 'envpool'\)"),
    ):
        with pytest.raises(ValueError, match=f"must hold a run of tiny, but it was made with {match}. Move"):
            prepare_folder(replace(spec, **changes))
    assert (spec.folder / "run.json").read_text() == before


@pytest.mark.parametrize("text", [None, "", "{}", '{"spec": 3, "versions": {}}'])
def test_half_written_folder_is_refused(tmp_path: Path, text: str | None) -> None:
    spec = spec_of(tmp_path)
    (tmp_path / "train.log").touch()
    if text is not None:
        (tmp_path / "run.json").write_text(text)
    with pytest.raises(ValueError, match="must be empty or the folder of a run, but has no readable run.json"):
        check_folder(spec)


# --- processes of runs


@pytest.fixture
def made_record(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The record that the quick stand-in writes."""
    path = tmp_path / "made.json"
    record_of().write(path)
    run_with(monkeypatch, MAKE, str(path))
    return path


def run_with(monkeypatch: pytest.MonkeyPatch, program: str, *arguments: str) -> None:
    """Run a program instead of the command of a run."""
    monkeypatch.setattr(executors, "RUN_COMMAND", (sys.executable, "-c", program, *arguments))


def test_executor_makes_each_run_once(made_record: Path, tmp_path: Path) -> None:
    specs = [spec_of(tmp_path / name) for name in ("a", "b")]
    for is_first in (True, False):
        found = {one.spec.folder.name: one for one in LocalExecutor(1).run(specs)}
        assert {name: one.record for name, one in found.items()} == {"a": record_of(), "b": record_of()}
        assert all((one.seconds > 0) is is_first for one in found.values())
    assert (tmp_path / "a" / "starts").read_text() == "x"
    assert (tmp_path / "a" / "train.log").read_text() == "made\n"


def test_failures_keep_their_tracebacks(made_record: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    failing = "import sys\nif sys.argv[2].endswith('bad'): raise ValueError('broken settings')\n" + MAKE
    run_with(monkeypatch, failing, str(made_record))
    specs = [spec_of(tmp_path / name) for name in ("bad", "good")]
    for n_attempts in (1, 2):
        bad, good = sorted(LocalExecutor(1).run(specs), key=lambda one: one.spec.folder.name)
        log = tmp_path / "bad" / "train.log"
        assert bad.error == f"ValueError: broken settings (code 1), see {log}"
        assert (bad.record, good.record) == (None, record_of())
        assert log.read_text().count("Traceback (most recent call last)") == n_attempts
    run_with(monkeypatch, "import os; os._exit(9)")
    (killed,) = LocalExecutor(1).run(specs[:1])
    assert killed.error.startswith("the process ended without a message (code 9)")


def test_damaged_record_is_reported(made_record: Path, tmp_path: Path) -> None:
    spec = spec_of(tmp_path / "a")
    made_record.write_text("{")
    (finished,) = LocalExecutor(1).run([spec])
    assert f"{spec.folder / 'record.json'} must be the record of a run, but is damaged" in finished.error


def test_jobs_run_side_by_side(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    # Each ends with code 7 once the other has begun. In sequence, the first would give up with code 8.
    program = (
        "import pathlib, sys, time\n"
        "folder = pathlib.Path(sys.argv[1])\n"
        "for _ in range(2000):\n"
        "    if len(list(folder.parent.glob('*/train.log'))) == 2: sys.exit(7)\n"
        "    time.sleep(0.01)\n"
        "sys.exit(8)\n"
    )
    run_with(monkeypatch, program)
    finished = LocalExecutor(2).run([spec_of(tmp_path / name) for name in ("a", "b")])
    assert ["(code 7)" in one.error for one in finished] == [True, True]


def test_closing_the_executor_ends_what_has_begun(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run_with(monkeypatch, "import sys, time\nif sys.argv[1].endswith('first'): sys.exit(7)\ntime.sleep(60)")
    started: list[subprocess.Popen[bytes]] = []

    class Recorded(subprocess.Popen):  # type: ignore[type-arg]
        def __init__(self, *args: Any, **kwargs: Any) -> None:
            super().__init__(*args, **kwargs)
            started.append(self)

    monkeypatch.setattr(executors.subprocess, "Popen", Recorded)
    ended = LocalExecutor(2).run([spec_of(tmp_path / name) for name in ("first", "second", "third", "fourth")])
    assert next(ended).spec.folder.name == "first"
    ended.close()
    assert {process.returncode for process in started} <= {7, -signal.SIGTERM}
    assert not (tmp_path / "fourth").exists()


# --- one run


def test_train_command_of_a_run(tmp_path: Path) -> None:
    spec = spec_of(tmp_path, hyperparams=None)
    assert " ".join(train_options(spec)) == (
        f"--algo clipppo --env CartPole-v1 --seed 1000 -n 64 -f {tmp_path} --eval-freq -1 --num-threads 1 --device cpu "
        "--verbose 0"
    )
    assert train_options(replace(spec, params=("clip_range:None",)))[-2:] == ["-params", "clip_range:None"]
    assert train_options(replace(spec, vec_env="envpool"))[-2:] == ["--vec-env", "envpool"]
    assert train_options(spec_of(tmp_path))[-2:] == ["--conf-file", str(tmp_path / "settings.yml")]


def test_finished_runs_are_recognised_by_later_versions_of_the_runner(tmp_path: Path) -> None:
    # Results in docs/results have digests of this kind: a new field of RunSpec must not change them.
    spec = spec_of(tmp_path, hyperparams={"gamma": 0.9}, n_eval_episodes=20)
    assert spec.digest() == replace(spec, label="other", folder=tmp_path / "other", seed=1).digest() == "f7e0aa489af2"
    assert replace(spec, algo="ppo").digest() != spec.digest()
    prepare_folder(spec)
    content = json.loads((tmp_path / "run.json").read_text())
    del content["spec"]["algo"]  # as if it had been written before there was such a field
    (tmp_path / "run.json").write_text(json.dumps(content))
    check_folder(spec)
    with pytest.raises(ValueError, match=r"algo 'clipppo' \(now 'ppo'\)"):
        check_folder(replace(spec, algo="ppo"))


def test_training_of_another_algorithm(tmp_path: Path) -> None:
    spec = spec_of(tmp_path / "run", algo="ppo")
    prepare_folder(spec)
    record = train_and_measure(spec)
    assert record.scores["num_timesteps"] == 64 and (record.scores["n_episodes"] or 0) >= 1
    assert [path.name for path in (tmp_path / "run/ppo").glob("*_*")] == ["CartPole-v1_1"]
    assert train_and_measure(spec).scores["run_seconds"] is None  # it is not trained again


def test_policy_class_of_a_suite_is_trained_and_loaded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    policy = f"{SharedLayerPolicy.__module__}.{SharedLayerPolicy.__name__}"
    hyperparams = {"policy": policy, "n_timesteps": 64, **TINY, "policy_kwargs": "dict(width=5)"}
    spec = spec_of(tmp_path / "run", hyperparams=hyperparams)
    assert process_variables(spec_of(tmp_path)) == {"OMP_NUM_THREADS": "1", "SB3_CLIPVF_TRACEBACK": "1"}
    for name, value in process_variables(spec).items():
        monkeypatch.setenv(name, value)
    prepare_folder(spec)
    assert (train_and_measure(spec).scores["evaluation_mean"] or 0) >= 8
    model = ClipPPO.load(find_run(spec.folder, spec.env_id).model_path)
    # 4 observations, 5 units, 2 actions, 1 value: one layer for both.
    assert sum(parameter.numel() for parameter in model.policy.parameters()) == 5 * (4 + 1) + (2 + 1) * (5 + 1)


def test_callback_and_buffer_of_a_suite_are_trained_loaded_and_resumed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    changes = {
        "callback": [{"tests.bench.experiments.candidates.OuterStep": {"rate": 1.5}}],
        "rollout_buffer_class": "tests.bench.experiments.candidates.TwoLambdaBuffer",
        "rollout_buffer_kwargs": {"value_lambda": 1.0},
    }
    spec = spec_of(tmp_path / "run", hyperparams={"policy": "MlpPolicy", "n_timesteps": 64, **TINY, **changes})
    for key in ("callback", "rollout_buffer_class"):
        assert process_variables(replace(spec, hyperparams={key: changes[key]}))["SB3_CLIPVF_TRUST_PICKLE"] == "1"
    monkeypatch.setenv("SB3_CLIPVF_TRUST_PICKLE", "1")
    prepare_folder(spec)
    assert (train_and_measure(spec).scores["evaluation_mean"] or 0) >= 8
    run = find_run(spec.folder, spec.env_id)
    assert ClipPPO.load(run.model_path).rollout_buffer_kwargs == {"value_lambda": 1.0}
    run.model_path.unlink()  # as if the kill had come after the last checkpoint
    assert train_and_measure(spec).scores["num_timesteps"] == 64


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> tuple[RunSpec, Record]:
    spec = spec_of(tmp_path_factory.mktemp("trained") / "run")
    prepare_folder(spec)
    return spec, train_and_measure(spec)


def test_record_of_a_training(trained: tuple[RunSpec, Record], tmp_path: Path) -> None:
    spec, record = trained
    folder = find_run(spec.folder, spec.env_id).folder
    lines = [line for path in folder.glob("*.monitor.csv") for line in path.read_text().splitlines()[2:]]
    returns = [float(line.split(",")[0]) for line in lines]
    assert 1 <= len(returns) == record.scores["n_episodes"]
    assert record.scores["last_return"] == pytest.approx(np.mean(returns), rel=1e-4)  # five digits are kept
    assert sorted(record.episodes["return"]) == sorted(returns)  # type: ignore[type-var]
    assert record.scores["num_timesteps"] == 64
    assert (record.scores["evaluation_mean"] or 0) >= 8  # no episode of CartPole is shorter
    assert record.scores["seconds"] == pytest.approx(record.episodes["seconds"][-1], abs=0.06)
    assert (record.scores["run_seconds"] or 0) >= (record.scores["seconds"] or 0)
    record.write(tmp_path / "r.json")
    assert Record.read(tmp_path / "r.json") == record


@pytest.fixture
def copied(trained: tuple[RunSpec, Record], tmp_path: Path) -> RunSpec:
    """The trained run in a folder of its own, where a resumed training would look for it."""
    spec = replace(trained[0], folder=tmp_path / "run")
    shutil.copytree(trained[0].folder, spec.folder)
    return spec


@pytest.fixture
def train_commands(monkeypatch: pytest.MonkeyPatch) -> list[list[str]]:
    """The train commands of the test."""
    commands: list[list[str]] = []
    train = zoo.main

    def record(argv: list[str]) -> int:
        commands.append(argv)
        return train(argv)

    monkeypatch.setattr(zoo, "main", record)
    return commands


def test_complete_training_is_only_measured(
    trained: tuple[RunSpec, Record], copied: RunSpec, train_commands: list[list[str]]
) -> None:
    record = trained[1]
    costs = dict.fromkeys(("cpu_seconds", "run_seconds"))
    assert train_and_measure(copied) == replace(record, scores={**record.scores, **costs})
    assert train_commands == []


def test_killed_training_resumes_from_its_checkpoint(copied: RunSpec, train_commands: list[list[str]]) -> None:
    run = find_run(copied.folder, copied.env_id)
    run.model_path.unlink()  # as if the kill had come after the last checkpoint
    record = train_and_measure(copied)
    assert train_commands == [["train", "--resume", str(run.folder)]]
    assert record.scores["num_timesteps"] == 64
    # The clock of a resumed training is not one of training.
    assert record.scores["seconds"] is record.scores["cpu_seconds"] is record.scores["run_seconds"] is None
    assert set(record.episodes["seconds"]) == {None}


def test_training_killed_before_its_first_checkpoint_begins_again(
    copied: RunSpec, train_commands: list[list[str]], monkeypatch: pytest.MonkeyPatch
) -> None:
    run = find_run(copied.folder, copied.env_id)
    run.model_path.unlink()
    for path in (run.folder / "checkpoints").iterdir():
        path.unlink()
    trained, measure = [], runs._measure
    monkeypatch.setattr(runs, "_measure", lambda run: (trained.append(sum(os.times()[:4])), measure(run))[1])
    started = sum(os.times()[:4])
    record = train_and_measure(copied)
    assert record.scores["num_timesteps"] == 64
    # Not that of the process, which is seconds longer
    assert record.scores["cpu_seconds"] == pytest.approx(trained[0] - started, abs=0.1)
    assert [command[:3] for command in train_commands] == [["train", "--algo", "clipppo"]]
    assert len(list((copied.folder / "clipppo").glob("CartPole-v1_*"))) == 2


def test_training_that_ended_early_is_no_result(copied: RunSpec, train_commands: list[list[str]]) -> None:
    with pytest.raises(ValueError, match="the training was interrupted at step 64"):
        train_and_measure(replace(copied, n_timesteps=65))


def test_two_processes_do_not_make_the_same_run(copied: RunSpec) -> None:
    with (copied.folder / ".lock").open("w") as file:
        fcntl.flock(file, fcntl.LOCK_SH)  # a weaker lock than its own stops it, too
        assert make_run(copied.folder) == IN_PROGRESS_CODE
    assert not (copied.folder / "record.json").exists()
    prepare_folder(copied, jobs=3)
    assert make_run(copied.folder) == 0
    record = Record.read(copied.folder / "record.json")
    assert (record.scores["num_timesteps"], record.jobs) == (64, 3)
    # A process that was started before this record was written leaves it alone.
    record_of().write(copied.folder / "record.json")
    assert make_run(copied.folder) == 0
    assert Record.read(copied.folder / "record.json") == record_of()


def test_run_that_another_command_makes_is_left_out(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run_with(monkeypatch, f"import sys\nsys.exit({IN_PROGRESS_CODE} if sys.argv[1].endswith('a') else 7)")
    assert [one.spec.folder.name for one in LocalExecutor(1).run([spec_of(tmp_path / name) for name in "ab"])] == ["b"]
    assert json.loads((tmp_path / "b" / "run.json").read_text())["jobs"] == 1
