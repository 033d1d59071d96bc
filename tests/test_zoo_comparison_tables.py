"""Groups of runs, their curves on common grids, and the tables of their numbers."""

import csv
import inspect
import io
from pathlib import Path

import numpy as np
import pytest
from rl_zoo3 import ALGOS
from sb3_contrib import MaskablePPO
from stable_baselines3.common.base_class import BaseAlgorithm

from sb3_clipvf import ClipPPO
from sb3_clipvf.zoo.comparison.curves import mean_and_std, panels, rolling_mean
from sb3_clipvf.zoo.comparison.groups import Group, group_records, repeated_seeds
from sb3_clipvf.zoo.comparison.records import find_records
from sb3_clipvf.zoo.comparison.sections import summary_table
from sb3_clipvf.zoo.comparison.summary import (
    csv_table,
    latex_table,
    markdown_table,
    number_text,
    numbers_of,
    statistics_of,
)
from tests.written_runs import write_evaluations, write_monitor, write_report, write_run


def groups_of(folder: Path) -> list[Group]:
    return group_records(find_records([folder])[0])


def names_of(folder: Path) -> list[tuple[str, str, int]]:
    return [(group.env_id, group.name, len(group.records)) for group in groups_of(folder)]


# --- groups


def test_runs_that_differ_in_their_seeds_are_a_group(tmp_path: Path) -> None:
    for number, seed in ((1, 12), (2, 3)):
        write_run(tmp_path / f"clipppo/CartPole-v1_{number}", seed=seed)
    (group,) = groups_of(tmp_path)
    assert (group.env_id, group.name) == ("CartPole-v1", "clipppo")
    assert [record.seed for record in group.records] == [3, 12]


def test_names_are_the_settings_that_differ(tmp_path: Path) -> None:
    for number, settings in enumerate(
        ({"clip_range": 0.1}, {"clip_range": 0.2, "gamma": 1.0}, {"clip_range": 0.2, "gamma": 1}), 1
    ):
        write_run(tmp_path / f"clipppo/CartPole-v1_{number}", settings={"n_steps": 8, **settings})
    # Equal numbers are one setting, written as a float or not.
    assert names_of(tmp_path) == [("CartPole-v1", "clip_range 0.1", 1), ("CartPole-v1", "clip_range 0.2, gamma 1", 2)]


def test_none_is_a_setting_of_its_own(tmp_path: Path) -> None:
    for number, settings in enumerate(({}, {"clip_range": None}, {"clip_range": 0.2}), 1):
        write_run(tmp_path / f"clipppo/CartPole-v1_{number}", settings=settings)
    groups = groups_of(tmp_path)
    assert [group.name for group in groups] == ["default", "clip_range None", "clip_range 0.2"]
    rows = csv.DictReader(io.StringIO(csv_table(groups)))
    assert [row["setting.clip_range"] for row in rows] == ["", "None", "0.2"]


def test_names_are_the_algorithms_that_differ(tmp_path: Path) -> None:
    for algo in ("a2c", "clipppo"):
        write_run(tmp_path / f"logs/{algo}/CartPole-v1_1", algo=algo, settings={"gamma": 0.9 if algo == "a2c" else 0.8})
        write_run(tmp_path / f"logs/{algo}/Pendulum-v1_1", algo=algo, env_id="Pendulum-v1")
    assert [name for _, name, _ in names_of(tmp_path)] == ["a2c", "clipppo"] * 2


def test_names_are_the_algorithm_and_its_settings_where_both_differ(tmp_path: Path) -> None:
    write_run(tmp_path / "a2c/CartPole-v1_1", algo="a2c", settings={"gamma": 0.5})
    for number, gamma in ((1, 0.8), (2, 0.9)):
        write_run(tmp_path / f"clipppo/CartPole-v1_{number}", settings={"gamma": gamma})
    assert [name for _, name, _ in names_of(tmp_path)] == ["a2c", "clipppo, gamma 0.8", "clipppo, gamma 0.9"]


def test_names_are_the_folders_that_differ(tmp_path: Path) -> None:
    # As an experiment's suite lays out its runs.
    for env_id in ("CartPole-v1", "Pendulum-v1"):
        for setting, clip_range in (("constant", 0.2), ("annealed", "lin_0.2")):
            for seed in (1000, 1001):
                inner = f"{env_id}/{setting}/seed_{seed}/clipppo/{env_id}_1"
                write_run(tmp_path / inner, env_id=env_id, seed=seed, settings={"clip_range": clip_range})
    assert names_of(tmp_path) == [
        (env_id, name, 2) for env_id in ("CartPole-v1", "Pendulum-v1") for name in ("annealed", "constant")
    ]


def test_digests_after_the_seeds_of_folders_set_no_runs_apart(tmp_path: Path) -> None:
    for seed in (1000, 1001):
        write_run(tmp_path / f"mine/seed_{seed}-3a65d43614db/clipppo/CartPole-v1_1", seed=seed)
    write_run(tmp_path / "other/seed_1000-5417ddd05a89/clipppo/CartPole-v1_1", settings={"gamma": 0.9})
    assert names_of(tmp_path) == [("CartPole-v1", "mine", 2), ("CartPole-v1", "other", 1)]


def test_numbers_at_the_end_of_folders_are_those_of_runs(tmp_path: Path) -> None:
    for name in (
        "mine/seed1",
        "mine/seed_2",
        "other/PPO_1",
        "other/PPO_2",
        "other/E-v0_1",
        "third/run-1",
        "third/run-2",
    ):
        write_monitor(tmp_path / name / "monitor.csv", [(1.0, 1, 1.0)], env_id="E-v0")
    assert names_of(tmp_path) == [
        ("E-v0", "mine", 2),
        ("E-v0", "other", 1),
        ("E-v0", "other/PPO", 2),
        ("E-v0", "third", 2),
    ]


def test_other_numbers_of_folders_are_settings_where_no_file_names_these(tmp_path: Path) -> None:
    for name in ("width_64/seed_1", "width_64/seed_2", "width_256", "lr/3", "lr/4"):
        write_monitor(tmp_path / name / "monitor.csv", [(1.0, 1, 1.0)], env_id="E-v0")
    # A run of the Zoo beside them does not change their names.
    write_run(tmp_path / "zoo/E-v0_1", env_id="E-v0")
    assert names_of(tmp_path) == [
        ("E-v0", name, n) for name, n in (("lr/3", 1), ("lr/4", 1), ("width_256", 1), ("width_64", 2), ("zoo", 1))
    ]


@pytest.mark.parametrize("algorithm", [*ALGOS.values(), ClipPPO, MaskablePPO], ids=lambda one: one.__name__)
def test_logs_of_all_algorithms_are_numbered_by_run(algorithm: type[BaseAlgorithm], tmp_path: Path) -> None:
    name = inspect.signature(algorithm.learn).parameters["tb_log_name"].default
    for number in (1, 2):
        write_monitor(tmp_path / f"{name}_{number}" / "monitor.csv", [(1.0, 1, 1.0)])
    (group,) = groups_of(tmp_path)
    assert len(group.records) == 2


def test_a_long_name_is_cut_and_stays_unique(tmp_path: Path) -> None:
    for number in (1, 2):
        kwargs = f"dict(net_arch=[{', '.join(['64'] * 30)}, {number}])"
        write_run(tmp_path / f"clipppo/CartPole-v1_{number}", settings={"policy_kwargs": kwargs})
    names = [name for _, name, _ in names_of(tmp_path)]
    assert len(set(names)) == 2 and all(len(name) <= 60 for name in names)


# --- curves


def test_rolling_mean_starts_with_fewer_values() -> None:
    np.testing.assert_allclose(rolling_mean(np.array([2.0, 4.0, 9.0, 5.0]), window=3), [2, 3, 5, 6])
    assert rolling_mean(np.array([])).shape == (0,)


@pytest.mark.parametrize("value", [np.inf, -np.inf, np.nan, 1e300])
def test_rolling_mean_forgets_a_value_that_has_left_its_window(value: float) -> None:
    means = rolling_mean(np.array([0.1, value, *[0.1] * 20]), window=5)
    np.testing.assert_array_equal(means[1:6], np.array([value / n for n in (2, 3, 4, 5, 5)]))
    np.testing.assert_allclose(means[6:], 0.1, rtol=1e-15)  # one rounding


def test_runs_share_a_grid_and_end_where_they_ended(tmp_path: Path) -> None:
    write_run(tmp_path / "clipppo/CartPole-v1_1", seed=1, returns=(10.0, 20.0, 30.0, 40.0))
    write_run(tmp_path / "clipppo/CartPole-v1_2", seed=2, returns=(0.0, 10.0))
    (group,) = groups_of(tmp_path)
    smooth, raw = panels([group])
    assert (smooth.key, raw.key) == ("return", "return/raw")
    grid, (first, second) = smooth.grids["steps"], smooth.lines["steps"]["clipppo"]
    assert grid[0] == 2 and grid[-1] == 400
    # Before the first episode ended there is no value; between two, it moves from one to the next.
    assert np.isnan(first[grid < 98]).all() and np.isfinite(first[grid >= 100]).all()
    np.testing.assert_allclose(first[[49, 74, 99, 199]], [10, 12.5, 15, 25])
    np.testing.assert_allclose(second[[49, 99]], [0, 5])
    assert np.isnan(second[grid > 202]).all()
    np.testing.assert_allclose(raw.lines["steps"]["clipppo"][0][[49, 99, 199]], [10, 20, 40])
    # One second for an episode.
    np.testing.assert_allclose(smooth.grids["seconds"][[0, -1]], [0.02, 4])
    first_timed, second_timed = smooth.lines["seconds"]["clipppo"]
    np.testing.assert_allclose(first_timed, first)
    # Against time, a run that has ended keeps its last return.
    np.testing.assert_allclose(second_timed[[49, 99, 199]], [0, 5, 5])


def test_mean_and_std_are_those_of_the_runs_that_are_there() -> None:
    nan = np.nan
    mean, std, n = mean_and_std(np.array([[1.0, 2.0, 3.0, nan], [3.0, 4.0, nan, nan], [5.0, nan, nan, nan]]))
    np.testing.assert_allclose(mean, [3, 3, nan, nan])
    np.testing.assert_allclose(std, [2, np.sqrt(2), nan, nan])
    assert n.tolist() == [3, 2, 1, 0]
    # One run has a mean, but no spread.
    mean, std, _ = mean_and_std(np.array([[1.0, nan], [1.0, 2.0]]))
    np.testing.assert_allclose((mean, std), [[1, 2], [0, nan]])


# --- tables


@pytest.fixture
def two_settings(tmp_path: Path) -> list[Group]:
    """Two seeds of one setting with evaluations, one of another; returns so that means are easy."""
    for seed, last in ((1, 30.0), (2, 50.0)):
        folder = write_run(
            tmp_path / f"clipppo/CartPole-v1_{seed}", seed=seed, returns=(10.0, last), settings={"gamma": 0.9}
        )
        write_evaluations(folder / "evaluations.npz", [100, 200], [[8.0, 8.0], [last, last + 2]])
    write_run(tmp_path / "clipppo/CartPole-v1_3", returns=(7.0,), settings={"gamma": 1.0})
    return groups_of(tmp_path)


def test_the_numbers_of_a_run(two_settings: list[Group]) -> None:
    run = two_settings[0].records[0]
    assert numbers_of(run) == {
        "last_return": 20.0,  # (10 + 30) / 2
        "mean_return": 10.0,  # 10 from step 100 to 200
        "last_evaluation": 31.0,
        "best_evaluation": 31.0,
        "trained_agent": None,
        "sampling_agent": None,
        "best_model": None,
        "sampling_best": None,
        "steps": 200.0,
        "seconds": 2.0,
        "steps_per_second": 100.0,
    }


def test_statistics_are_over_runs(two_settings: list[Group]) -> None:
    last = statistics_of(two_settings[0])["last_return"]
    assert last.values == (20, 30)
    assert (last.mean, last.std) == (25, pytest.approx(np.sqrt(50)))
    assert statistics_of(two_settings[1])["last_return"].std is None
    assert "last_evaluation" not in statistics_of(two_settings[1])


def test_the_csv_has_a_row_for_each_run(two_settings: list[Group]) -> None:
    rows = list(csv.DictReader(io.StringIO(csv_table(two_settings))))
    assert [(row["setting"], row["seed"], row["last_return"]) for row in rows] == [
        ("gamma 0.9", "1", "20.0"),
        ("gamma 0.9", "2", "30.0"),
        ("gamma 1", "1", "7.0"),
    ]
    assert [row["last_evaluation"] for row in rows] == ["31.0", "51.0", ""]
    assert [row["setting.gamma"] for row in rows] == ["0.9", "0.9", "1"]


def test_markdown_and_latex_have_the_means(two_settings: list[Group]) -> None:
    lines = markdown_table(two_settings).splitlines()
    assert lines[0].startswith(
        "| Environment | Setting | Runs | Last 100 episodes | Whole training | Last evaluation |"
    )
    assert lines[2].startswith("| CartPole-v1 | gamma 0.9 | 2 | 25.0 ± 7.1 | 10 ± 0 |")
    assert lines[3].startswith("| CartPole-v1 | gamma 1 | 1 | 7 | 7 | – |")
    rows = latex_table(two_settings).splitlines()
    assert rows[0] == r"\begin{tabular}{llrrrrrrrr}"
    assert rows[4].startswith(r"CartPole-v1 & gamma 0.9 & 2 & 25.0 $\pm$ 7.1 & 10 $\pm$ 0 & ")
    assert rows[-2] == r"\end{tabular}"


def test_reports_of_other_models_and_actions_are_not_averaged(tmp_path: Path) -> None:
    reports = ((1.0, "CartPole-v1", True), (3.0, "CartPole-v1", True), (10.0, "CartPole-v1", False))
    reports += ((20.0, "best_model", True), (30.0, "best_model", False))
    for seed, (value, model, deterministic) in enumerate(reports, 1):
        folder = write_run(tmp_path / f"clipppo/CartPole-v1_{seed}", seed=seed)
        write_report(folder, value, 400, model=f"logs/{model}.zip", deterministic=deterministic)
    (group,) = groups_of(tmp_path)
    found = {key: statistic.values for key, statistic in statistics_of(group).items()}
    assert (found["trained_agent"], found["sampling_agent"]) == ((1.0, 3.0), (10.0,))
    assert (found["best_model"], found["sampling_best"]) == ((20.0,), (30.0,))
    titles = "| Trained agent | Trained agent, sampled | Best model | Best model, sampled |"
    assert titles in markdown_table([group])


def test_a_mean_over_some_of_the_runs_has_their_number(tmp_path: Path) -> None:
    for seed, value in ((1, 100.0), (2, 200.0), (3, 300.0)):
        folder = write_run(tmp_path / f"clipppo/CartPole-v1_{seed}", seed=seed, returns=(value,) * 4)
        if seed > 1:
            write_report(folder, value, 400)
    groups = groups_of(tmp_path)
    assert "| 200 ± 100 | 250 ± 71 (2 of 3) | 400 |" in markdown_table(groups)
    assert r" & 250 $\pm$ 71 (2 of 3) & " in latex_table(groups)
    assert "<td>250 ± 71 (2 of 3)</td>" in summary_table({"CartPole-v1": groups}, {"clipppo": 0})


def test_a_seed_that_a_group_has_twice_is_named(tmp_path: Path) -> None:
    for name, seed in (("1", 5), ("2", 5), ("3", 6)):
        write_run(tmp_path / f"clipppo/CartPole-v1_{name}", seed=seed)
    (problem,) = repeated_seeds(groups_of(tmp_path))
    folder = tmp_path / "clipppo/CartPole-v1"
    assert problem == (
        f"clipppo in CartPole-v1 has several runs of seed 5, which its means count as independent: {folder}_1, "
        f"{folder}_2. Move those that do not belong to it."
    )
    write_monitor(tmp_path / "other/seed_1/monitor.csv", [(1.0, 1, 1.0)])  # unknown seeds may differ
    write_monitor(tmp_path / "other/seed_2/monitor.csv", [(1.0, 1, 1.0)])
    assert len(repeated_seeds(groups_of(tmp_path))) == 1


def test_latex_has_the_characters_of_names(tmp_path: Path) -> None:
    name = 'a_b{c}$5%#1&\\~^<x>|"'
    for other in (name, "other\nname"):
        write_run(tmp_path / other / "CartPole-v1_1")
    row, other = latex_table(groups_of(tmp_path)).splitlines()[4:6]
    escaped = (
        r"a\_b\{c\}\$5\%\#1\&\textbackslash{}\textasciitilde{}\textasciicircum{}\textless{}x\textgreater{}\textbar{}''"
    )
    assert row.startswith(f"CartPole-v1 & {escaped} & 1 & ")
    assert other.startswith("CartPole-v1 & other name & 1 & ")
    assert len(markdown_table(groups_of(tmp_path)).splitlines()) == 6


@pytest.mark.parametrize(
    ("value", "spread", "text"),
    [
        (1234.5, None, "1,234"),
        (-500.0, None, "−500"),
        (20.25, None, "20.2"),
        (1.2345, None, "1.23"),
        (0.1234, None, "0.123"),
        (1234.5, 20.0, "1,234"),
        (20.25, 2.0, "20.2"),
        (20.25, 0.2, "20.25"),
        (20.0, 0.0, "20"),
        (0.0004, 0.0001, "0.00040"),
        (-0.0004, None, "−0.000400"),
        (500.0, 1e-12, "500.000000"),
        (np.nan, np.nan, "nan"),
        (np.inf, None, "inf"),
    ],
)
def test_numbers_have_the_digits_of_their_spread(value: float, spread: float | None, text: str) -> None:
    assert number_text(value, spread) == text
