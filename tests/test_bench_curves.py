"""``python -m tests.bench curves``: curves, and what the command runs, keeps, tabulates and draws."""

from pathlib import Path
from typing import Any

import gymnasium as gym
import numpy as np
import pytest
import yaml
from test_bench_learning import MAKE, log_of, make_with, runs_in, written

from sb3_clipvf import zoo
from sb3_clipvf.zoo.training_curve import TrainingCurve
from tests.bench import curves, curves_report
from tests.bench.curves import ROWS, main
from tests.bench.curves_report import Comparison, CurveRow, comparisons, render_table, write_figure
from tests.bench.experiments.episodes import N_POINTS, curve_on_grid, grid
from tests.bench.experiments.runs import Record
from tests.bench.results import Results, machine

NATIVE, AUTOGRAD = CurveRow.of("CartPole-v1", 256, "native"), CurveRow.of("CartPole-v1", 256, "autograd")
MADE_ON = {"cpu": "C", "cores": 2, "jobs": 1, "versions": {"python": "3"}}


CURVE = [None, *[float(point) for point in range(1, N_POINTS)]]
RECORD = Record({"mean_return": 20.5, "last_return": 38.25}, CURVE, {}, machine())


@pytest.fixture
def in_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty working folder, two rows, and the quick stand-in for a run."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(curves, "ROWS", (NATIVE, AUTOGRAD))
    make_with(monkeypatch, MAKE, str(written(RECORD, tmp_path)))
    return tmp_path


def result(row: CurveRow, seed: int, curve: list[float | None], mean: float, last: float) -> dict[str, Any]:
    return {**row.run(seed), "curve": curve, "mean_return": mean, "last_return": last, **MADE_ON}


# --- curves


def test_curve_is_the_mean_of_the_last_episodes_that_had_ended() -> None:
    curve = TrainingCurve(
        np.array([2.0, 4.0, 4.0, 7.0, 9.0, 10.0]), np.array([10.0, 20.0, 40.0, 70.0, 100.0, 160.0]), np.arange(6.0)
    )
    # Ended by 1: none; by 2: 10; by 4: 10, 20, 40; by 8: the last three of 10, 20, 40, 70; by 10: 70, 100, 160.
    assert curve_on_grid(curve, np.array([1, 2, 4, 8, 10]), window=3) == [None, 10.0, 23.333, 43.333, 110.0]


def test_curve_takes_episodes_by_steps_where_the_clock_has_them_in_another_order() -> None:
    curve = TrainingCurve(np.array([4.0, 2.0]), np.array([1.0, 5.0]), np.array([0.1, 0.2]))
    assert curve_on_grid(curve, np.array([2, 4]), window=1) == [5.0, 1.0]


def test_curve_of_a_training_in_which_no_episode_ended() -> None:
    empty = np.array([])
    assert curve_on_grid(TrainingCurve(empty, empty, empty), np.array([1, 2])) == [None, None]


def test_grid_ends_with_the_training() -> None:
    steps = grid(200)
    assert len(steps) == N_POINTS == 40
    assert steps[[0, 1, -1]].tolist() == [5.0, 10.0, 200.0]


def comparison_of(tmp_path: Path) -> Comparison:
    # The last quarter of the reference's curves is not known.
    reference: list[float | None] = [30.0] * 30 + [None] * 10
    results = Results(tmp_path / "r.json")
    for seed in (1, 2, 3):
        results.add(result(NATIVE, seed, [float(seed)] * N_POINTS, float(seed), 10.0 * seed))
        results.add(result(AUTOGRAD, seed, reference, 9.25, 15.0))
    empty = (CurveRow.of("Pendulum-v1", 5000, "native"), CurveRow.of("Pendulum-v1", 5000, "autograd"))
    comparison, not_run = comparisons(results, (NATIVE, AUTOGRAD, *empty), (1, 2, 3))
    assert not_run.so_far() == "not run"
    return comparison


# --- table and figure


def test_table_has_means_and_differences(tmp_path: Path) -> None:
    comparison = comparison_of(tmp_path)
    nothing = Comparison("Pendulum-v1", 5000, 2, {"native": [], "autograd": []})
    lines = render_table([comparison, nothing]).replace("\u00a0", " ").replace("\u2212", "-").splitlines()
    # Three equal draws of three seeds have probability 1 / 27, more than the tail.
    assert lines[:6] == [
        "| environment | mean return | native | autograd | native - autograd |",
        "| --- | --- | ---: | ---: | ---: |",
        "| CartPole-v1, 256 steps | whole training | 2.0 [1.0, 3.0] | 9.2 [9.2, 9.2] | -7.2 [-8.2, -6.2] |",
        "|  | last 100 episodes | 20.0 [10.0, 30.0] | 15.0 [15.0, 15.0] | 5.0 [-5.0, 15.0] |",
        "| Pendulum-v1, 5,000 steps, not run | whole training |  |  |  |",
        "|  | last 100 episodes |  |  |  |",
    ]
    assert lines[-1] == "- C, 2 cores, one run at a time, one thread each; python 3"


def test_table_names_the_seeds_that_there_are(tmp_path: Path) -> None:
    results = Results(tmp_path / "r.json")
    results.add(result(NATIVE, 1, [5.0] * N_POINTS, 5.0, 6.0))
    one, *_ = comparisons(results, (NATIVE, AUTOGRAD), (1, 2, 3))
    row = render_table([one]).replace("\u00a0", " ").splitlines()[2]
    first = "| CartPole-v1, 256 steps, so far 1 and 0 of 3 seeds | whole training |"
    assert row == f"{first} 5.0 [not enough data] |  |  |"
    for row_of, seed in ((NATIVE, 2), (AUTOGRAD, 1), (AUTOGRAD, 2)):
        results.add(result(row_of, seed, [5.0] * N_POINTS, 5.0, 6.0))
    whole, *_ = comparisons(results, (NATIVE, AUTOGRAD), (1, 2))
    assert whole.so_far() == ""


def n_pixels(path: Path, color: tuple[int, int, int]) -> int:
    from matplotlib.image import imread

    pixels = np.asarray(imread(path))[:, :, :3] * 255
    return int((np.abs(pixels - np.array(color)) < 2).all(axis=2).sum())


def test_figure_has_the_curves_of_both_engines(tmp_path: Path) -> None:
    empty = Comparison("CartPole-v1", 256, 2, {"native": [], "autograd": []})
    write_figure([empty] * 4, tmp_path / "new" / "empty.png")
    write_figure([comparison_of(tmp_path), *[empty] * 3], tmp_path / "one.png")
    assert (tmp_path / "one.png").read_bytes().startswith(b"\x89PNG")
    # The legend has both colours; a curve across a panel is longer than its sample there.
    for color in ((0x00, 0x72, 0xB2), (0xD5, 0x5E, 0x00)):
        before = n_pixels(tmp_path / "new" / "empty.png", color)
        assert before > 0
        assert n_pixels(tmp_path / "one.png", color) > 3 * before


# --- rows


def test_rows_are_each_environment_on_both_engines() -> None:
    assert [(row.name, row.n_timesteps, row.params) for row in ROWS if row.engine == "native"] == [
        ("CartPole-v1-native", 100_000, ("engine:'native'",)),
        ("Pendulum-v1-native", 100_000, ("engine:'native'",)),
        ("LunarLander-v3-native", 300_000, ("engine:'native'",)),
        ("HalfCheetah-v5-native", 200_000, ("engine:'native'",)),
    ]
    natives = [(row.env_id, row.n_timesteps) for row in ROWS if row.engine == "native"]
    assert natives == [(row.env_id, row.n_timesteps) for row in ROWS if row.engine == "autograd"]
    shipped = yaml.safe_load(zoo.hyperparams_path().read_text())
    assert all(row.env_id in gym.registry and row.env_id in shipped for row in ROWS)


def test_results_on_another_grid_do_not_count(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    results = Results(tmp_path / "r.json")
    results.add(result(NATIVE, 1, [5.0] * N_POINTS, 5.0, 6.0))
    for name in ("WINDOW", "N_POINTS"):
        with monkeypatch.context() as changed:
            changed.setattr(curves_report, name, 10)
            assert results.find(NATIVE.run(1)) is None
        assert results.find(NATIVE.run(1)) is not None


# --- the command


def test_results_table_and_figure_of_all_rows_and_seeds(in_folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--seeds", "1", "2", "--jobs", "2"]) == 0
    out = Path("docs/results/curves.json")
    runs = runs_in(out)
    names = [("CartPole-v1-autograd", 1), ("CartPole-v1-autograd", 2), ("CartPole-v1-native", 1)]
    assert [(run["name"], run["seed"]) for run in runs] == [*names, ("CartPole-v1-native", 2)]
    run = runs[2]
    assert (run["curve"], run["mean_return"], run["last_return"]) == (CURVE, 20.5, 38.25)
    assert run["jobs"] == 2
    assert run["cpu"] and run["versions"]["torch"]
    table = out.with_suffix(".md").read_text().replace("\u00a0", " ")
    assert "Made by `python -m tests.bench curves --seeds 1 2`." in table
    assert "| whole training | 20.5 [not enough data] | 20.5 [not enough data] | 0.0 [not enough data] |" in table
    assert out.with_suffix(".png").stat().st_size > 10_000
    printed = capsys.readouterr().out
    assert printed.startswith("4 runs to make, 0 are done already")
    assert "native, seed 1: mean return 20.5 over the training, 38.2 of the last episodes" in printed
    assert printed.endswith(
        "Results: docs/results/curves.json\nTable:   docs/results/curves.md\nFigure:  docs/results/curves.png\n"
    )


def test_finished_runs_are_skipped_until_asked_or_changed(
    in_folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    files = ["--out", "o/r.json", "--table", "o/t.md", "--log-folder", "l"]
    options = [*files, "--only", "CartPole-v1-native", "--seeds", "1"]
    assert main(options) == 0
    assert sorted(path.name for path in Path("o").iterdir()) == ["r.json", "t.md", "t.png"]
    assert log_of("CartPole-v1-native", 1, "l").exists()
    make_with(monkeypatch, "raise SystemExit('must not run')")
    capsys.readouterr()
    assert main(options) == 0
    assert "0 runs to make, 1 are done already" in capsys.readouterr().out
    assert main([*options, "2"]) == 1
    assert "CartPole-v1-native, seed 2: FAILED, must not run (code 1)" in capsys.readouterr().out
    assert main([*options, "--list"]) == 0
    assert capsys.readouterr().out.endswith("CartPole-v1-native        256 steps  done: 1  engine:'native'\n")
    monkeypatch.setattr(curves, "ROWS", (CurveRow.of("CartPole-v1", 257, "native"), AUTOGRAD))
    assert main([*options, "--list"]) == 0
    assert "done: none" in capsys.readouterr().out
    assert [run["seed"] for run in runs_in(Path("o/r.json"))] == [1]
    assert main([*options, "--rerun"]) == 1
    assert runs_in(Path("o/r.json")) == []


def test_training_without_an_ended_episode_has_no_curve(
    in_folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    nothing = Record({"mean_return": None, "last_return": None}, [None] * N_POINTS, {}, machine())
    make_with(monkeypatch, MAKE, str(written(nothing, in_folder)))
    assert main(["--seeds", "1"]) == 0
    assert "CartPole-v1-native, seed 1: no episode ended" in capsys.readouterr().out
    run = runs_in(Path("docs/results/curves.json"))[0]
    assert (run["curve"], run["mean_return"], run["last_return"]) == ([None] * N_POINTS, None, None)
    assert "| whole training |  |  |  |" in Path("docs/results/curves.md").read_text()
