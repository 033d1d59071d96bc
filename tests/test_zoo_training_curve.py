"""Training episodes of a run, read from the files of SB3's Monitor."""

from pathlib import Path

import numpy as np
import pytest

from sb3_clipvf.zoo.training_curve import TrainingCurve, read_training_curve


def write_monitor(folder: Path, index: int, start: float, rows: str) -> None:
    (folder / f"{index}.monitor.csv").write_text(f'#{{"t_start": {start}, "env_id": "E"}}\nr,l,t\n{rows}')


def test_curve_orders_episodes_by_their_end_and_counts_all_environments(tmp_path: Path) -> None:
    write_monitor(tmp_path, 0, 100.0, "1.0,10,1.0\n2.0,30,4.0\n")
    write_monitor(tmp_path, 1, 100.5, "5.0,20,1.5\n")
    curve = read_training_curve(tmp_path)
    # Environment 0 ends episodes at its own steps 10 and 40, environment 1 at 20; times two environments.
    np.testing.assert_array_equal(curve.steps, [20, 40, 80])
    np.testing.assert_array_equal(curve.returns, [1.0, 5.0, 2.0])
    np.testing.assert_array_equal(curve.seconds, [1.0, 2.0, 4.0])
    assert (curve.training_seconds, curve.steps_per_second) == (4.0, 20.0)


def test_a_curve_counts_the_steps_of_all_processes(tmp_path: Path) -> None:
    # Only the first process keeps the files of its environments.
    write_monitor(tmp_path, 0, 100.0, "1.0,10,1.0\n2.0,30,4.0\n")
    write_monitor(tmp_path, 1, 100.0, "5.0,20,2.0\n")
    curve = read_training_curve(tmp_path, 250, n_processes=3)
    np.testing.assert_array_equal(curve.steps, [60, 120, 240])
    assert curve.steps_per_second == 60


def test_a_file_of_all_environments_has_the_steps_of_the_training(tmp_path: Path) -> None:
    # Environment 0 ends episodes at its own steps 10 and 40, environment 1 at 25. The last line is cut.
    rows = "1.0,10,1.0,20\n2.0,25,2.0,50\n3.0,30,3.0,80\n4.0,30,3.1,1"
    (tmp_path / "0.monitor.csv").write_text(f'#{{"t_start": 0.0}}\nr,l,t,total_timesteps\n{rows}')
    np.testing.assert_array_equal(read_training_curve(tmp_path, 90).steps, [20, 50, 80])
    np.testing.assert_array_equal(read_training_curve(tmp_path, 180, n_processes=2).steps, [40, 100, 160])


def test_the_seconds_of_a_curve_count_from_the_start_of_the_training(tmp_path: Path) -> None:
    write_monitor(tmp_path, 0, 100.0, "1.0,10,6.0\n2.0,30,10.0\n")
    curve = read_training_curve(tmp_path, started=106.0)
    np.testing.assert_array_equal(curve.seconds, [0.0, 4.0])
    assert (curve.training_seconds, curve.steps_per_second) == (4.0, 10.0)
    # Kernels were compiled after the last episode.
    late = read_training_curve(tmp_path, started=111.0)
    assert (late.training_seconds, late.steps_per_second) == (None, None)


def test_curve_counts_the_trainings_steps_where_monitor_counts_frames(tmp_path: Path) -> None:
    write_monitor(tmp_path, 0, 0.0, "0.0,400,1.0\n0.0,3580,9.0\n")
    np.testing.assert_array_equal(read_training_curve(tmp_path, 1000).steps, [100, 995])
    np.testing.assert_array_equal(read_training_curve(tmp_path, 4000).steps, [400, 3980])
    # More steps than the files hold: a training that went on from another run.
    np.testing.assert_array_equal(read_training_curve(tmp_path, 100_000).steps, [400, 3980])


def test_a_continued_file_keeps_its_order_and_has_no_times(tmp_path: Path) -> None:
    # As Monitor(..., override_existing=False) writes it: the clock of the second part starts again.
    write_monitor(tmp_path, 0, 0.0, "1.0,10,1.0\n2.0,10,9.0\n3.0,10,0.5\n4.0,10,5.0\n")
    curve = read_training_curve(tmp_path)
    np.testing.assert_array_equal(curve.returns, [1, 2, 3, 4])
    np.testing.assert_array_equal(curve.steps, [10, 20, 30, 40])
    assert np.isnan(curve.seconds).all() and curve.training_seconds is None


def test_the_steps_of_several_environments_ascend_after_new_episodes(tmp_path: Path) -> None:
    # A resume has begun new episodes: environment 0 lost more steps than environment 1.
    write_monitor(tmp_path, 0, 0.0, "1.0,100,10.0\n2.0,100,110.0\n")
    write_monitor(tmp_path, 1, 0.0, "3.0,95,9.5\n4.0,50,15.0\n5.0,95,109.5\n")
    curve = read_training_curve(tmp_path)
    np.testing.assert_array_equal(curve.steps, [190, 200, 290, 400, 480])
    np.testing.assert_array_equal(curve.returns, [3, 1, 4, 2, 5])


@pytest.mark.parametrize(
    "starts",
    [(0.0, 0.2), (0.0, 100.0)],  # an evaluation with longer episodes; one seed after another
)
def test_files_of_several_trainings_are_refused(starts: tuple[float, float], tmp_path: Path) -> None:
    for index, start in enumerate(starts):
        length = 500 if start == 0.2 else 100
        write_monitor(tmp_path, index, start, "".join(f"1.0,{length},{n}.0\n" for n in range(1, 51)))
    with pytest.raises(
        ValueError, match=r"must hold one training, .* [01]\.monitor\.csv and [01]\.monitor.* Keep each"
    ):
        read_training_curve(tmp_path)


def test_an_environment_may_be_in_one_episode_while_others_end_many(tmp_path: Path) -> None:
    write_monitor(tmp_path, 0, 0.0, "".join(f"1.0,10,{n}.0\n" for n in range(1, 51)))
    write_monitor(tmp_path, 1, 0.0, "")
    write_monitor(tmp_path, 2, 0.0, "1.0,490,49.0\n")
    assert read_training_curve(tmp_path).steps[-1] == 1500


def test_files_of_evaluations_are_no_environments(tmp_path: Path) -> None:
    for name in ("train", "eval", "test_0"):
        write_monitor(tmp_path, 0, 0.0, "1.0,10,1.0\n")
        (tmp_path / "0.monitor.csv").rename(tmp_path / f"{name}.monitor.csv")
    np.testing.assert_array_equal(read_training_curve(tmp_path).steps, [10])
    (tmp_path / "train.monitor.csv").unlink()
    np.testing.assert_array_equal(read_training_curve(tmp_path).steps, [20, 20])


@pytest.mark.parametrize("rest", ["7.0,1", "7.0,", "7.0,1,", "7.0,1\n"])
def test_curve_ends_before_a_line_cut_short(tmp_path: Path, rest: str) -> None:
    write_monitor(tmp_path, 0, 0.0, "1.0,10,1.0\n" + rest)
    np.testing.assert_array_equal(read_training_curve(tmp_path).returns, [1.0])


def test_a_damaged_row_before_others_is_refused(tmp_path: Path) -> None:
    write_monitor(tmp_path, 0, 0.0, "1.0,10,1.0\n2.0,1\0\0\n3.0,10,3.0\n")
    with pytest.raises(ValueError, match=r"0\.monitor\.csv must have the columns .* \(line 4: .*Remove the line"):
        read_training_curve(tmp_path)


def test_empty_curve_has_no_speed(tmp_path: Path) -> None:
    empty = TrainingCurve(np.array([]), np.array([]), np.array([]))
    assert (empty.training_seconds, empty.steps_per_second) == (None, None)
    write_monitor(tmp_path, 0, 0.0, "")
    assert len(read_training_curve(tmp_path, 100).steps) == 0
    assert len(read_training_curve(tmp_path / "none").steps) == 0
