"""``python -m tests.bench learning``, and what all benchmarks share: options, resuming, results files, tables."""

import importlib
import json
import signal
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import gymnasium as gym
import pytest
import yaml

from sb3_clipvf import zoo
from sb3_clipvf.zoo.settings import check_hyperparams
from tests.bench import learning
from tests.bench.__main__ import BENCHMARKS
from tests.bench.__main__ import main as run_benchmark
from tests.bench.experiments import executors
from tests.bench.experiments.runs import Record, RunSpec
from tests.bench.experiments.suite import zoo_settings
from tests.bench.learning import ROWS, Row, main, render_table, with_peers
from tests.bench.learning_figure import TimeComparison, time_band
from tests.bench.results import Results, machine
from tests.bench.time_left import seconds_left, time_left

PARAMS = ("n_envs:2", "n_steps:16", "batch_size:16", "n_epochs:1")
TINY = Row("tiny", "CartPole-v1", 64, PARAMS, goal=8.0, comparison="9 (others)", n_episodes=2)
HARD = Row("hard", "CartPole-v1", 64, PARAMS, goal=501.0, n_episodes=2)
CURVE: list[float | None] = [None, *(float(index) for index in range(39))]

# A quick stand-in for the process of a run: it writes the record at sys.argv[1] to the folder at the end.
MAKE = """
import pathlib, shutil, sys
print("made", sys.argv[2])
shutil.copy(sys.argv[1], pathlib.Path(sys.argv[2], "record.json"))
"""


@pytest.fixture
def in_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty working folder, two rows, and the quick stand-in for a run."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(learning, "ROWS", (TINY, HARD))
    scores = {"evaluation_mean": 9.375, "evaluation_std": 0.25, "cpu_seconds": 90.0, "run_seconds": 100.0}
    record = Record(scores, CURVE, {}, {**machine(["numba"]), "cpu": "another"})
    make_with(monkeypatch, MAKE, str(written(record, tmp_path)))
    return tmp_path


def written(record: Record, folder: Path) -> Path:
    path = folder / "made.json"
    record.write(path)
    return path


def make_with(monkeypatch: pytest.MonkeyPatch, program: str, *arguments: str) -> None:
    """Run a program instead of the command of a run."""
    monkeypatch.setattr(executors, "RUN_COMMAND", (sys.executable, "-c", program, *arguments))


def log_of(name: str, seed: int, log_folder: str = "logs/bench") -> Path:
    (path,) = Path(log_folder, name).glob(f"seed_{seed}-*/train.log")
    return path


def runs_in(path: Path = Path("docs/results/learning.json")) -> list[dict[str, Any]]:
    runs = json.loads(path.read_text())["runs"]
    assert isinstance(runs, list)
    return runs


# --- rows


def test_rows_have_the_goals_to_reach() -> None:
    goals = {row.name: (row.n_timesteps, row.goal) for row in ROWS if not row.params and row.goal is not None}
    assert goals == {
        "CartPole-v1": (100_000, 500),
        "MountainCarContinuous-v0": (50_000, 92),
        "Pendulum-v1": (100_000, -170),
        "Acrobot-v1": (500_000, -80),
        "LunarLander-v3": (1_000_000, 240),
        "BipedalWalker-v3": (5_000_000, 290),
    }
    assert len({row.name for row in ROWS}) == len(ROWS)


def test_mujoco_has_rows() -> None:
    rows = [row for row in ROWS if row.goal is None]
    assert [row.env_id for row in rows] == ["Hopper-v5", "HalfCheetah-v5", "Walker2d-v5"]
    assert {row.n_timesteps for row in rows} == {1_000_000}


def test_each_environment_has_one_peer_after_its_first_row() -> None:
    rows = with_peers(ROWS)
    peers = [row for row in rows if row.algo == "ppo"]
    assert [row for row in rows if row.algo == "clipppo"] == list(ROWS)
    assert [row.env_id for row in peers] == list(dict.fromkeys(row.env_id for row in ROWS))
    for row in ROWS:
        # All rows of an environment share its peer, which is trained and evaluated like each of them.
        (peer,) = (other for other in peers if other.env_id == row.env_id)
        assert peer == row.peer()
    assert [row.name for row in rows[:2]] == ["CartPole-v1", "CartPole-v1-sb3-ppo"]
    # The longest trainings are the last of each seed.
    steps = [row.n_timesteps for row in rows if row.env_id != "MountainCarContinuous-v0"]
    assert steps == sorted(steps)


@pytest.mark.parametrize("row", [row for row in with_peers(ROWS) if row.algo == "ppo"], ids=lambda row: row.name)
def test_peers_have_the_settings_of_the_zoo(row: Row, in_folder: Path) -> None:
    spec = row.spec(2000)
    assert (spec.algo, spec.params) == ("ppo", ())
    assert spec.hyperparams == zoo_settings(row.env_id, "ppo")
    assert spec.hyperparams["policy"] == "MlpPolicy"


@pytest.mark.parametrize("row", ROWS, ids=lambda row: row.name)
def test_row_names_an_environment_with_packaged_settings_and_legal_parameters(row: Row) -> None:
    assert row.env_id in gym.registry
    settings = yaml.safe_load(zoo.hyperparams_path().read_text())
    assert row.env_id in settings
    # As the Zoo reads -params: the text after the first colon is Python.
    params = {key: eval(value) for key, _, value in (param.partition(":") for param in row.params)}
    check_hyperparams(settings[row.env_id] | params, params, "the settings")


def test_run_of_a_row(tmp_path: Path) -> None:
    row = Row("r", "Acrobot-v1", 1000, ("clip_range:None",), goal=0.0, vec_env="envpool", n_episodes=7)
    assert row.run(3)["vec_env"] == "envpool"
    spec = row.spec(3, tmp_path)
    assert spec == RunSpec(
        label="r, seed 3",
        folder=tmp_path / "r" / f"seed_3-{spec.digest()}",
        env_id="Acrobot-v1",
        seed=3,
        n_timesteps=1000,
        vec_env="envpool",
        hyperparams=yaml.safe_load(zoo.hyperparams_path().read_text())["Acrobot-v1"],
        params=("clip_range:None",),
        n_eval_episodes=7,
    )


def test_results_of_changed_settings_are_stale(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    results = Results(tmp_path / "r.json")
    results.add(result(TINY, 2000, 9.0))
    assert results.find(TINY.run(2000)) is not None
    changed = tmp_path / "clipppo.yml"
    changed.write_text(zoo.hyperparams_path().read_text().replace("gae_lambda: 0.8 ", "gae_lambda: 0.81 "))
    monkeypatch.setattr("sb3_clipvf.zoo.commands.hyperparams_path", lambda: changed)
    assert results.find(TINY.run(2000)) is None


# --- the command


def test_results_and_table_of_all_rows_and_seeds(in_folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--seeds", "2000", "2001", "--jobs", "2"]) == 0
    runs = runs_in()
    names = ("CartPole-v1-sb3-ppo", "hard", "tiny")
    assert [(run["name"], run["seed"]) for run in runs] == [(name, seed) for name in names for seed in (2000, 2001)]
    assert [run.get("algo") for run in runs] == ["ppo", "ppo", None, None, None, None]
    run = runs[4]
    assert (run["n_timesteps"], run["params"], run["jobs"]) == (64, list(PARAMS), 2)
    lines = Path("docs/results/learning.json").read_text().splitlines()
    assert len(lines) == 6 + 2  # a line a run
    # The machine is the run's, not that of the command that reads its record.
    assert run["cpu"] == "another" and run["versions"]["numba"] and run["versions"]["sb3_clipvf"]
    assert (run["curve"], run["run_seconds"]) == (CURVE, 100.0)
    assert log_of("tiny", 2000).read_text().startswith("made ")
    table = Path("docs/results/learning.md").read_text()
    assert "Made by `python -m tests.bench learning --seeds 2000 2001`." in table
    assert (run["mean_return"], run["std_return"], run["cpu_seconds"]) == (9.375, 0.25, 90.0)
    cells = "9.4 [not enough data] | 9.4 [not enough data] | 0.0 [not enough data]"
    assert f"| {cells} |  | 8 | yes (2 of 2) | 1.5 / 1.5 |" in table.replace("\u00a0", " ")
    printed = capsys.readouterr().out
    assert printed.startswith("6 runs to make, 0 are done already (--rerun makes them again); time left is not known")
    assert "[6/6] " in printed and "tiny, seed 2000: 9.38 +/- 0.25 (goal 8), " in printed
    assert " | about 0 h 00 min left\n\nMade by" in printed


def test_finished_runs_are_skipped_until_asked_or_changed(
    in_folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    options = ["--seeds", "2000", "--only", "tiny"]
    assert main(options) == 0
    command = executors.RUN_COMMAND
    make_with(monkeypatch, "raise SystemExit('must not run')")
    assert main(options) == 0
    assert "0 runs to make, 1 are done already" in capsys.readouterr().out
    assert main([*options, "--rerun"]) == 1
    assert main(["--only", "tiny", "--seeds", "2000", "2001"]) == 1  # seed 2001 is new
    capsys.readouterr()
    monkeypatch.setattr(learning, "ROWS", (Row("tiny", "CartPole-v1", 64, PARAMS, goal=8.0, n_episodes=3), HARD))
    monkeypatch.setattr(executors, "RUN_COMMAND", command)
    assert main(options) == 0
    assert "1 runs to make" in capsys.readouterr().out
    assert [run["n_episodes"] for run in runs_in()] == [3]


def test_rerun_can_be_resumed_and_mixes_nothing(
    in_folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    options = ["--only", "tiny", "--seeds", "2000", "2001"]
    assert main([*options, "2002"]) == 0
    record = Record.read(in_folder / "made.json")
    made = written(replace(record, scores={**record.scores, "evaluation_mean": 1.0}), in_folder)
    make_with(monkeypatch, "import sys\nif 'seed_2001' in sys.argv[2]: raise SystemExit('stopped')\n" + MAKE, str(made))
    assert main([*options, "--rerun"]) == 1
    assert "The same command without --rerun tries again." in capsys.readouterr().out
    # The old result of seed 2001 is gone, that of a seed that was not named stays.
    assert [(run["seed"], run["mean_return"]) for run in runs_in()] == [(2000, 1.0), (2002, 9.375)]
    make_with(monkeypatch, MAKE, str(made))
    assert main(options) == 0
    assert "1 runs to make, 1 are done already" in capsys.readouterr().out
    assert [run["mean_return"] for run in runs_in()] == [1.0, 1.0, 9.375]


def test_failed_run_is_reported_not_kept_and_does_not_stop_the_others(
    in_folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    program = "import sys\nif 'tiny' in sys.argv[2]: raise SystemExit('broken settings')\n" + MAKE
    make_with(monkeypatch, program, str(in_folder / "made.json"))
    assert main(["--seeds", "2000"]) == 1
    printed = capsys.readouterr().out
    assert f"tiny, seed 2000: FAILED, broken settings (code 1), see {log_of('tiny', 2000).absolute()}" in printed
    assert "Failed:\n  tiny, seed 2000: broken settings (code 1)" in printed
    assert log_of("tiny", 2000).read_text() == "broken settings\n"
    assert [run["name"] for run in runs_in()] == ["CartPole-v1-sb3-ppo", "hard"]


@pytest.mark.parametrize("name", ["SIGINT", "SIGTERM"])
def test_interrupt_ends_the_training_and_keeps_what_is_done(
    in_folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], name: str
) -> None:
    assert main(["--seeds", "2000", "--only", "tiny"]) == 0
    before = signal.getsignal(signal.SIGTERM)
    # The training interrupts the benchmark and would then last for an hour.
    make_with(monkeypatch, f"import os, signal, time\nos.kill(os.getppid(), signal.{name})\ntime.sleep(3600)")
    assert main(["--seeds", "2000", "2001"]) == 130
    assert "Interrupted. The same command resumes with what is missing." in capsys.readouterr().out
    assert signal.getsignal(signal.SIGTERM) is before
    assert [(run["name"], run["seed"]) for run in runs_in()] == [("tiny", 2000)]
    assert "Not run: hard" in Path("docs/results/learning.md").read_text()


def test_report_writes_the_table_and_the_figure_and_runs_nothing(
    in_folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    plain = Row("CartPole-v1", "CartPole-v1", 64, goal=8.0)
    monkeypatch.setattr(learning, "ROWS", (plain, HARD))
    for row in (plain, plain.peer()):
        Results(Path("docs/results/learning.json")).add({**result(row, 2000, 9.0), "cpu_seconds": 5.0, "curve": CURVE})
    make_with(monkeypatch, "raise SystemExit('must not run')")
    assert main(["--report", "--seeds", "2000"]) == 0
    assert "runs to make" not in capsys.readouterr().out
    text = Path("docs/results/learning.md").read_text()
    assert "| CartPole-v1 | 64 | 9.0" in text and "](learning.png)\n\nMean return of the last 20 training" in text
    assert Path("docs/results/learning.png").stat().st_size > 10_000


def test_curves_have_the_time_of_the_fastest_run() -> None:
    timed = [{"cpu_seconds": seconds, "curve": CURVE} for seconds in (80.0, 40.0)]
    band = time_band([*timed, {"cpu_seconds": None, "curve": CURVE}], 4000)
    assert band is not None
    # 40 points of which the first has no episode.
    assert list(band.x) == pytest.approx(range(2, 41)) and list(band.values) == CURVE[1:]
    assert time_band([], 4000) is None


def test_environments_without_all_runs_and_times_of_both_algorithms_are_not_drawn() -> None:
    timed, resumed = {"cpu_seconds": 40.0, "curve": CURVE}, {"cpu_seconds": None, "curve": CURVE}
    assert not TimeComparison("E-v0", 4000, [timed], [resumed], 1).is_drawn()
    assert not TimeComparison("E-v0", 4000, [timed], [{"cpu_seconds": 1.0}], 1).is_drawn()  # kept without curves
    assert not TimeComparison("E-v0", 4000, [timed, timed], [timed], 2).is_drawn()
    assert TimeComparison("E-v0", 4000, [timed, timed], [timed, resumed], 2).is_drawn()


@pytest.mark.slow
def test_real_train_command(in_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(executors, "RUN_COMMAND", (sys.executable, "-m", "tests.bench.experiments.runs"))
    only = ["--only", "tiny", "CartPole-v1-sb3-ppo"]
    assert main(["--seeds", "2005", *only, "--out", "o/r.json", "--table", "o/t.md", "--log-folder", "l"]) == 0
    peer, run = runs_in(Path("o/r.json"))
    assert (run["seed"], run["n_episodes"]) == (2005, 2)
    assert peer["algo"] == "ppo"
    assert peer["cpu_seconds"] > 0 and run["cpu_seconds"] > 0
    assert log_of("tiny", 2005, "l").exists()
    assert Path("o/t.md").exists()


def test_list_shows_what_is_done_and_runs_nothing(
    in_folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["--seeds", "2001", "--only", "tiny"]) == 0
    make_with(monkeypatch, "raise SystemExit('must not run')")
    capsys.readouterr()
    assert main(["--list"]) == 0
    params = " ".join(PARAMS)
    assert capsys.readouterr().out.splitlines() == [
        f"tiny                 goal    8         64 steps  done: 2001  {params}",
        "CartPole-v1-sb3-ppo                    64 steps  done: none",
        f"hard                 goal  501         64 steps  done: none  {params}",
    ]


def test_overview_and_unknown_benchmarks(capsys: pytest.CaptureFixture[str]) -> None:
    for argv in ([], ["-h"], ["--help"]):
        assert run_benchmark(argv) == 0
        assert "learning" in capsys.readouterr().out
    assert run_benchmark(["lerning"]) == 2
    error = capsys.readouterr().err
    assert error.startswith("`benchmark` must be one of learning, ")
    assert error.endswith("got 'lerning'.\n")
    for name in BENCHMARKS:
        assert f" {name}," in error
        assert callable(importlib.import_module(f"tests.bench.{name}").main)
    with pytest.raises(SystemExit, match="0"):
        run_benchmark(["learning", "--help"])
    assert "usage: python -m tests.bench learning" in capsys.readouterr().out


@pytest.mark.parametrize(
    "options, match",
    [
        ("--jobs 0", "--jobs: must be a whole number of at least 1, got 0"),
        ("--jobs two", "--jobs: must be a whole number of at least 1, got two"),
        ("--seeds 1999", "--seeds: must be a whole number of at least 2000, got 1999"),
        ("--seeds -1", "--seeds: must be a whole number of at least 2000, got -1"),
        ("--only tiny huge", "--only/--rows: invalid choice: 'huge' (choose from"),
        ("--out a.md", "`--table` must be another file than `--out`, got a.md for both."),
        ("--out foreign.json", "`--out` must be a results file of this benchmark (format 1) or a new one, but foreign"),
    ],
)
def test_bad_options_are_refused(in_folder: Path, capsys: pytest.CaptureFixture[str], options: str, match: str) -> None:
    Path("foreign.json").write_text("{}")
    with pytest.raises(SystemExit, match="2"):
        main(options.split())
    assert match in capsys.readouterr().err


# --- results and table


def result(row: Row, seed: int, mean: float) -> dict[str, Any]:
    where = {"cpu": "C", "cores": 2, "jobs": 1, "versions": {"python": "3"}}
    numbers = {"mean_return": mean, "std_return": 0.5}
    return {**row.run(seed), **numbers, **where}


@pytest.mark.parametrize(
    "text", ["no json", "[]", "{}", '{"format": 2, "runs": []}', '{"format": 1, "runs": [{"name": "r"}]}']
)
def test_foreign_results_are_refused(tmp_path: Path, text: str) -> None:
    (tmp_path / "r.json").write_text(text)
    with pytest.raises(ValueError, match=r"`--out` must be a results file of this benchmark \(format 1\) or a new one"):
        Results(tmp_path / "r.json")


def test_results_replace_the_run_of_the_same_row_and_seed(tmp_path: Path) -> None:
    results = Results(tmp_path / "new" / "r.json")
    for row, seed, mean in ((TINY, 2, 1.0), (TINY, 1, 2.0), (HARD, 1, 3.0), (TINY, 2, 4.0)):
        results.add(result(row, seed, mean))
    again = Results(tmp_path / "new" / "r.json")
    assert [(run["name"], run["seed"], run["mean_return"]) for run in again.runs] == [
        ("hard", 1, 3.0),
        ("tiny", 1, 2.0),
        ("tiny", 2, 4.0),
    ]
    assert again.find(TINY.run(2)) == result(TINY, 2, 4.0)
    assert again.find(TINY.run(3)) is None


@pytest.mark.parametrize(
    "changed",
    [
        Row("tiny", "CartPole-v1", 65, PARAMS, goal=8.0, n_episodes=2),
        Row("tiny", "Pendulum-v1", 64, PARAMS, goal=8.0, n_episodes=2),
        Row("tiny", "CartPole-v1", 64, PARAMS[1:], goal=8.0, n_episodes=2),
        Row("tiny", "CartPole-v1", 64, PARAMS, goal=8.0, n_episodes=3),
        Row("tiny", "CartPole-v1", 64, PARAMS, goal=8.0, n_episodes=2, vec_env="envpool"),
    ],
)
def test_results_of_other_settings_do_not_count(tmp_path: Path, changed: Row) -> None:
    results = Results(tmp_path / "r.json")
    results.add(result(TINY, 1, 1.0))
    assert results.find(TINY.run(1)) is not None
    assert results.find(replace(TINY, goal=99.0, comparison="other").run(1)) is not None
    assert results.find(changed.run(1)) is None


def test_two_benchmarks_may_write_the_same_file(tmp_path: Path) -> None:
    first, second = Results(tmp_path / "r.json"), Results(tmp_path / "r.json")
    first.add(result(TINY, 1, 1.0))
    second.add(result(TINY, 2, 2.0))
    assert [run["seed"] for run in Results(tmp_path / "r.json").runs] == [1, 2]


def test_table_means_over_seeds_and_names_what_is_missing(tmp_path: Path) -> None:
    results = Results(tmp_path / "r.json")
    plain = Row("plain", "Acrobot-v1", 5000, goal=8.0, comparison="7 (a2c)")
    variant = Row("variant", "Acrobot-v1", 5000, PARAMS, vec_env="envpool")
    empty = Row("empty", "Pendulum-v1", 5000, goal=8.0)
    for row, seed, mean, minutes in (
        (plain, 1000, 7.0, 1.0),
        (plain, 1001, 9.0, 2.0),
        (plain.peer(), 1000, 6.0, 30.0),
        (plain.peer(), 1001, 6.0, None),
        (variant, 1000, 8.5, None),
    ):
        results.add({**result(row, seed, mean), "cpu_seconds": None if minutes is None else 60 * minutes})
    lines = render_table(results, (plain, variant, empty), (1000, 1001)).replace("\u00a0", " ").splitlines()
    # Intervals begin with three seeds.
    assert lines[:6] == [
        "| environment and settings | steps | ClipPPO | SB3 PPO | difference from SB3 PPO "
        "| difference from the packaged settings | goal | reached | CPU minutes | others (RL Zoo) |",
        "| --- | ---: | ---: | ---: | ---: | ---: | ---: | --- | ---: | --- |",
        "| plain | 5,000 | 8.0 [not enough data] | 6.0 [not enough data] | 2.0 [not enough data] |  | 8 | yes (1 of 2) "
        "| 1.0 / 30.0 | 7 (a2c) |",
        f"| variant<br>`{' '.join(PARAMS)} --vec-env envpool` | 5,000 "
        "| 8.5 [not enough data] (1 of 2 seeds) | not run |  | 0.5 [not enough data] |  |  |  |  |",
        "",
        "Not run: empty.",
    ]
    assert lines[7].startswith("Seeds: 1000, 1001. ")
    assert lines[-1] == "- C, 2 cores, one run at a time, one thread each; python 3"


def test_times_are_not_shown_if_the_machine_was_slower_for_one_algorithm(tmp_path: Path) -> None:
    results = Results(tmp_path / "r.json")
    for row in (TINY, TINY.peer()):
        results.add({**result(row, 1000, 7.0), "cpu_seconds": 60.0})
    assert "| 1.0 / 1.0 |" in render_table(results, (TINY,), (1000,))
    assert "1.0 / 1.0" not in render_table(results, (replace(TINY, has_times=False),), (1000,))


def test_a_mean_below_the_goal_does_not_reach_it(tmp_path: Path) -> None:
    results = Results(tmp_path / "r.json")
    for seed, mean in ((1000, 7.0), (1001, 8.5)):
        results.add({**result(TINY, seed, mean), "cpu_seconds": 6.0})
    assert "| 8 | no (1 of 2) |  | 9 (others) |" in render_table(results, (TINY,), (1000, 1001))


def test_machine_names_the_versions_that_decide() -> None:
    assert {"python", "sb3_clipvf", "stable_baselines3", "rl_zoo3", "gymnasium", "torch", "numpy"} == set(
        machine()["versions"]
    )


def test_time_left_counts_each_kind_of_run_by_its_own_runs() -> None:
    done = [("cartpole", 100, 10.0), ("pendulum", 300, 10.0)]
    # 0.1 s a step of CartPole, 20 / 400 s of unknown kinds.
    assert seconds_left([("cartpole", 200)], done, 1) == (pytest.approx(20.0), True)
    assert seconds_left([("cartpole", 200), ("acrobot", 200)], done, 2) == (pytest.approx((20.0 + 10.0) / 2), False)
    assert seconds_left([("cartpole", 200)], [], 1) == (None, False)
    assert seconds_left([], [], 1) == (0.0, True)
    assert time_left([("cartpole", 72_000)], done, 1) == "about 2 h 00 min left"
    assert time_left([("acrobot", 72_000)], done, 1) == (
        "about 1 h 00 min left, a guess until each kind of run has finished once"
    )
