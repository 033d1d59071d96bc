"""Runs as their files show them: where runs are found, and what damaged or unusual files lead to."""

import errno
import json
import os
import re
import struct
import zipfile
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from stable_baselines3 import PPO
from stable_baselines3.common.logger import configure

from sb3_clipvf.zoo.comparison.curves import panels
from sb3_clipvf.zoo.comparison.groups import group_records
from sb3_clipvf.zoo.comparison.records import find_records, read_record
from sb3_clipvf.zoo.comparison.series import read_evaluations, read_logs
from sb3_clipvf.zoo.comparison.summary import csv_table, numbers_of
from tests.written_runs import write_evaluations, write_monitor, write_report, write_run


def test_runs_are_found_at_any_depth_and_once(tmp_path: Path) -> None:
    folders = [write_run(tmp_path / f"logs/{algo}/CartPole-v1_1", algo=algo) for algo in ("a2c", "clipppo")]
    (folders[0] / "videos").mkdir()
    records, problems = find_records([tmp_path / "logs" / "a2c", tmp_path / "logs"])
    assert [record.folder for record in records] == folders
    assert [record.algo for record in records] == ["a2c", "clipppo"]
    assert problems == []


def test_runs_below_a_stray_file_are_found(tmp_path: Path) -> None:
    write_monitor(tmp_path / "logs/monitor.csv", [(5.0, 10, 1.0)], env_id="Other-v1")
    own = [write_run(tmp_path / "logs/clipppo/CartPole-v1_1"), tmp_path / "logs/mine/seed_1"]
    write_monitor(own[1] / "monitor.csv", [(1.0, 1, 1.0)], env_id="Other-v1")
    for folder, value in ((tmp_path / "logs/PPO_1", 1.0), (own[0], 2.0)):
        folder.mkdir(exist_ok=True)
        (folder / "progress.json").write_text(json.dumps({"time/total_timesteps": 10, "train/loss": value}) + "\n")
    write_evaluations(own[0] / "evaluations.npz", [100], [[1.0, 3.0]])
    # Episodes of an evaluation are no training.
    for name in ("eval_env/monitor.csv", "other/eval.monitor.csv"):
        write_monitor(tmp_path / "logs" / name, [(9.0, 1, 1.0)])
    records, problems = find_records([tmp_path / "logs"])
    assert [record.folder for record in records] == [tmp_path / "logs", *own]
    # The log of another run is not its own.
    assert records[0].log["train/loss"].values.tolist() == [1.0] and records[0].evaluations is None
    assert records[1].evaluations is not None
    assert problems == [
        f"{tmp_path}/logs holds files of a run, and 2 runs in its folders, which are shown as runs of their own."
    ]


def test_a_run_that_several_paths_lead_to_is_found_once(in_empty_folder: Path) -> None:
    outer = write_run(Path("logs/clipppo/CartPole-v1_1"))
    inner = outer / "eval"
    write_monitor(inner / "monitor.csv", [(1.0, 1, 1.0)])
    write_evaluations(inner / "evaluations.npz", [100], [[1.0]])
    folders = ["logs", Path("logs").resolve(), "logs/../logs", inner.resolve()]
    records, (problem,) = find_records(folders)
    assert [record.folder for record in records] == [outer, inner.resolve()]
    # What belongs to a named run inside another is not the other's.
    assert [record.evaluations is None for record in records] == [True, False]
    assert "1 run in its folders" in problem


def test_links_to_runs_are_followed(tmp_path: Path) -> None:
    far = write_run(tmp_path / "scratch/clipppo/CartPole-v1_1")
    logs = tmp_path / "logs"
    own = write_run(logs / "own")
    for link, place in (
        ("all", logs),
        ("first", far),
        ("more", tmp_path / "scratch"),
        ("a", own),
        ("none", tmp_path / "x"),
    ):
        (logs / link).symlink_to(place)
    records, problems = find_records([logs])
    assert [record.folder for record in records] == [own, logs / "first"] and problems == []


def test_runs_of_the_zoo_inside_another_are_found(tmp_path: Path) -> None:
    outer = write_run(tmp_path / "CartPole-v1_1")
    inner = write_run(outer / "fine_tuned/clipppo/CartPole-v1_1", seed=2)
    write_evaluations(inner / "evaluations.npz", [100], [[1.0]])
    write_monitor(outer / "videos/monitor.csv", [(1.0, 1, 1.0)])  # but others belong to the run
    records, (problem,) = find_records([tmp_path])
    assert [record.folder for record in records] == [outer, inner]
    assert records[0].evaluations is None and "1 run in its folders" in problem


def test_evaluations_of_the_zoos_benchmark_are_no_runs(tmp_path: Path) -> None:
    own = write_run(tmp_path / "logs/clipppo/CartPole-v1_1")
    folder = tmp_path / "logs/benchmark/clipppo-CartPole-v1"
    write_monitor(folder / "0.monitor.csv", [(500.0, 500, 1.0)])
    records, (problem,) = find_records([tmp_path])
    assert [record.folder for record in records] == [own]
    assert f"{folder.parent} was left out: it holds evaluations of `sb3-clipvf benchmark`" in problem
    assert len(find_records([folder.parent])[0]) == 1


@pytest.mark.parametrize("written", ["logs/tb", "{}/moved/tb"])
@pytest.mark.parametrize("has_log", [True, False])
def test_a_tensorboard_log_of_a_run_with_a_log_is_no_run(has_log: bool, written: str, tmp_path: Path) -> None:
    arguments = {"tensorboard_log": written.format(tmp_path)}
    own = write_run(tmp_path / "moved/clipppo/CartPole-v1_1", arguments=arguments)
    rows = json.dumps({"time/total_timesteps": 100, "train/loss": 1.0}) + "\n"
    if has_log:
        (own / "progress.json").write_text(rows)
    others = ["my_sac/SAC_1", "CartPole-v1/SAC_1", "CartPole-v1/notes"]
    for name in ("CartPole-v1/ClipPPO_1", *others):
        logger = configure(str(tmp_path / "moved/tb" / name), ["tensorboard"])
        logger.record("train/loss", 1.0)
        logger.dump(100)
        logger.close()
    records, problems = find_records([tmp_path])
    assert len(records) - len(others) == (1 if has_log else 2)
    left_out = f"{tmp_path}/moved/tb/CartPole-v1: 1 log of `-tb` left out, since the runs' own logs are shown."
    assert [problem for problem in problems if "-tb" in problem] == [left_out] * has_log


def test_keys_of_settings_may_have_any_type(tmp_path: Path) -> None:
    folder = write_run(tmp_path / "CartPole-v1_1", settings={"gamma": 0.9})
    config = folder / "CartPole-v1" / "config.yml"
    config.write_text(config.read_text() + "2: a\nnull: b\n1.5: c\n? !!python/tuple [x, 1]\n: d\n")
    records, _ = find_records([tmp_path])
    assert list(records[0].settings) == ["('x', 1)", "1.5", "2", "None", "gamma", "policy"]
    (group,) = group_records(records)
    assert "setting.2" in csv_table([group])


@pytest.mark.parametrize("source", ["model", "log"])
def test_times_of_resumed_runs_are_not_known(tmp_path: Path, source: str) -> None:
    folder = write_run(tmp_path / "CartPole-v1_1", returns=(1.0, 2.0, 3.0))
    rows = [(100, 1.0), (200, 2.0), (300, 0.5 if source == "log" else 3.0)]
    lines = ({"time/total_timesteps": step, "time/time_elapsed": time, "train/loss": 1.0} for step, time in rows)
    (folder / "progress.json").write_text("".join(json.dumps(line) + "\n" for line in lines))
    write_evaluations(folder / "evaluations.npz", [100], [[1.0, 3.0]])
    if source == "model":
        data = {"num_timesteps": 300, "_num_timesteps_at_start": 200, "start_time": 1000 * 10**9}
        with zipfile.ZipFile(folder / "CartPole-v1.zip", "w") as archive:
            archive.writestr("data", json.dumps(data))
    records, problems = find_records([tmp_path])
    (record,) = records
    assert record.seconds is None and record.is_resumed
    assert record.evaluations is not None
    for series in (record.episodes, record.log["train/loss"], record.evaluations):
        assert np.isnan(series.seconds).all() and np.isfinite(series.values).all()
    assert problems == ["The times of 1 of 1 run are not known, since they were resumed."]
    # Its curves have steps alone.
    returns, *_ = panels(group_records(records))
    assert np.isfinite(returns.lines["steps"]["clipppo"]).any()
    assert not np.isfinite(returns.lines["seconds"]["clipppo"]).any()


def test_a_continued_monitor_file_is_that_of_a_resumed_run(tmp_path: Path) -> None:
    write_monitor(tmp_path / "monitor.csv", [(1.0, 10, 5.0), (2.0, 10, 9.0), (3.0, 10, 1.0)])
    (record,), (problem,) = find_records([tmp_path])
    assert record.is_resumed and record.seconds is None and record.steps == 30
    assert record.episodes.values.tolist() == [1, 2, 3]
    assert "times of 1 of 1 run are not known" in problem


@pytest.mark.parametrize(
    ("n_rows", "step", "seconds", "last"),
    [
        (20, 100, 5.0, 2000),
        (20, 400, 5.0, 8000),
        # A log lags behind the episodes by up to a row: few rows do not tell the frame skip.
        (2, 2500, 50.0, 8000),
        # Evaluations or other trainings in the same Monitor file, after the steps of this log.
        (20, 100, 1.25, 8000),
        (20, 200, 2.5, 8000),
        (20, 100, None, 8000),
    ],
)
def test_frames_are_no_steps_without_a_model(
    n_rows: int, step: int, seconds: float | None, last: float, tmp_path: Path
) -> None:
    write_monitor(tmp_path / "monitor.csv", [(1.0, 80, float(i)) for i in range(1, 101)])
    rows = []
    for n in range(1, n_rows + 1):
        clock = {} if seconds is None else {"time/time_elapsed": seconds * n}
        rows.append({"time/total_timesteps": step * n, "train/loss": 1.0, **clock})
    (tmp_path / "progress.json").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (record,), _ = find_records([tmp_path])
    assert record.episodes.steps[-1] == last


def test_a_run_of_several_processes_has_the_steps_of_all(tmp_path: Path) -> None:
    folder = write_run(tmp_path / "CartPole-v1_1", arguments={"n_processes": 2})
    with zipfile.ZipFile(folder / "CartPole-v1.zip", "w") as archive:
        archive.writestr("data", json.dumps({"num_timesteps": 850}))
    record, _ = read_record(folder)
    np.testing.assert_array_equal(record.episodes.steps, [200, 400, 600, 800])
    (folder / "CartPole-v1.zip").unlink()
    (folder / "checkpoints").mkdir()
    (folder / "checkpoints" / "checkpoint_64.zip").touch()
    _, (problem,) = read_record(folder)
    assert f"`torchrun --standalone --nproc-per-node 2 -m sb3_clipvf train --resume {folder}` resumes it." in problem


def test_a_run_has_what_its_files_hold(tmp_path: Path) -> None:
    folder = write_run(
        tmp_path / "CartPole-v1_1",
        seed=7,
        returns=(1.0, 2.0, 6.0),
        settings={"clip_range": 0.1, "clip_range_vf": None, "env_wrapper": None},
        arguments={"n_timesteps": 300, "vec_env": "envpool"},
    )
    write_evaluations(folder / "evaluations.npz", [100, 200], [[1.0, 3.0], [4.0, 8.0]])
    write_report(folder, 9.0, 300, env="other")
    (folder / "videos").mkdir()
    (folder / "videos" / "CartPole-v1.mp4").touch()
    record, problems = read_record(folder)
    assert problems == []
    assert (record.env_id, record.algo, record.seed, record.steps, record.seconds) == (
        "CartPole-v1",
        "clipppo",
        7,
        300,
        3,
    )
    # A null argument of the algorithm has a meaning; a null key of the Zoo is the same as none.
    assert record.settings == {
        "clip_range": 0.1,
        "clip_range_vf": None,
        "n_timesteps": 300,
        "policy": "MlpPolicy",
        "vec_env": "envpool",
    }
    np.testing.assert_array_equal(record.episodes.steps, [100, 200, 300])
    np.testing.assert_array_equal(record.episodes.values, [1, 2, 6])
    assert record.evaluations is not None
    np.testing.assert_array_equal(record.evaluations.values, [2, 6])
    # The file has no times: they are those of the episodes at the same steps.
    np.testing.assert_array_equal(record.evaluations.seconds, [1, 2])
    assert record.report["mean_return"] == 9.0
    assert record.video == folder / "videos" / "CartPole-v1.mp4"
    assert record.versions == {"Python": "3.11.7", "Stable-Baselines3": "2.9.2"}


def test_files_of_sb3_alone_are_a_run(tmp_path: Path) -> None:
    write_monitor(tmp_path / "monitor.csv", [(5.0, 10, 1.0), (7.0, 10, 2.0)], env_id="Pendulum-v1")
    (tmp_path / "eval").mkdir()
    write_evaluations(tmp_path / "eval" / "evaluations.npz", [20], [[3.0]])
    (record,), problems = find_records([tmp_path])
    assert (record.env_id, record.algo, record.seed, record.steps) == ("Pendulum-v1", "", None, 20)
    assert record.settings == {} and problems == []
    assert record.evaluations is not None


@pytest.mark.parametrize("kind", ["csv", "json", "tensorboard"])
def test_the_log_of_a_training_is_read_in_all_formats(kind: str, tmp_path: Path) -> None:
    folder = tmp_path / "CartPole-v1" / "PPO_1"
    model = PPO("MlpPolicy", "CartPole-v1", n_steps=32, batch_size=32, n_epochs=1, device="cpu", seed=1)
    model.set_logger(configure(str(folder), [kind]))
    written = []
    dump = model.logger.dump

    def dumped(step: int = 0) -> None:
        written.append({**model.logger.name_to_value, "step": step})
        dump(step)

    model.logger.dump = dumped  # type: ignore[method-assign]
    model.learn(96)
    model.logger.close()
    (record,), _ = find_records([tmp_path])
    assert record.env_id == "CartPole-v1"
    loss = record.log["train/value_loss"]
    # The first row comes before the first update.
    assert loss.steps.tolist() == [row["step"] for row in written[1:]] == [64, 96]
    np.testing.assert_allclose(loss.values, [row["train/value_loss"] for row in written[1:]], rtol=1e-6)
    # There are no Monitor files: the log's means stand for the episodes.
    assert record.is_mean
    np.testing.assert_allclose(record.episodes.values, [row["rollout/ep_rew_mean"] for row in written], rtol=1e-6)
    assert not {"time/total_timesteps", "time/iterations"} & record.log.keys()


def test_the_cut_end_of_a_log_is_left_out(tmp_path: Path) -> None:
    rows = [{"time/total_timesteps": step, "train/loss": step / 10} for step in (10, 20)]
    text = "".join(json.dumps(row) + "\n" for row in rows)
    (tmp_path / "progress.json").write_text(text[:-8])
    assert read_logs(tmp_path)["train/loss"].steps.tolist() == [10]
    (tmp_path / "progress.json").write_text("{")
    with pytest.raises(ValueError, match=r"progress\.json must hold a row of SB3's JSON log in each line.* Remove it"):
        read_logs(tmp_path)


@pytest.mark.parametrize("columns", ["time/total_timesteps,train/loss", "train/loss,time/total_timesteps"])
def test_the_cut_last_row_of_a_csv_log_is_left_out(columns: str, tmp_path: Path) -> None:
    (tmp_path / "progress.csv").write_text(f"{columns}\n10,10\n20,20\n30,3")
    assert read_logs(tmp_path)["train/loss"].steps.tolist() == [10, 20]


def test_an_event_file_is_read_up_to_its_cut_end(tmp_path: Path) -> None:
    logger = configure(str(tmp_path), ["tensorboard"])
    for step in (10, 20):
        logger.record("train/loss", step / 10)
        logger.dump(step)
    logger.close()
    (path,) = tmp_path.glob("events*")
    content = path.read_bytes()
    path.write_bytes(content[:-5])
    assert read_logs(tmp_path)["train/loss"].steps.tolist() == [10]
    # The length of the first record stays; its content is none of a protocol buffer.
    path.write_bytes(content[:12] + b"\xff" * (len(content) - 12))
    with pytest.raises(ValueError, match=r"must hold events of TensorBoard, but is damaged .* Remove it"):
        read_logs(tmp_path)


def test_later_rows_of_a_resumed_training_replace_those_of_their_steps(tmp_path: Path) -> None:
    rows = [(10, 1.0), (20, 2.0), (20, 5.0), (30, 6.0)]
    lines = (json.dumps({"time/total_timesteps": step, "train/loss": value}) + "\n" for step, value in rows)
    (tmp_path / "progress.json").write_text("".join(lines))
    assert read_logs(tmp_path)["train/loss"].values.tolist() == [1, 5, 6]


def test_only_the_last_of_several_logs_in_a_folder_is_read(tmp_path: Path) -> None:
    """As of a script with ``Monitor(env, folder)`` and ``tensorboard_log=folder`` that has run several times."""
    write_monitor(tmp_path / "monitor.csv", [(1.0, 10, 1.0), (2.0, 10, 2.0)])
    for name, value in (("PPO_2", 2.0), ("PPO_10", 10.0), ("PPO_9", 9.0), ("other_3", 3.0)):
        rows = [{"time/total_timesteps": 10 * n, f"train/{name[:3]}": value} for n in range(1, 30 - int(value))]
        (tmp_path / name).mkdir()
        (tmp_path / name / "progress.json").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (record,), (problem,) = find_records([tmp_path])
    assert set(record.log["train/PPO"].values) == {10.0} and len(record.log["train/PPO"].values) == 19
    assert set(record.log["train/oth"].values) == {3.0}
    assert f"{tmp_path} holds logs of earlier trainings, which were left out: PPO_2, PPO_9. Keep each" in problem


# --- bad input


def test_a_path_that_is_no_folder_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"`RUNS` must be folders of runs, got .*none, which is nothing\. Check"):
        find_records([tmp_path / "none"])
    (tmp_path / "file").touch()
    with pytest.raises(ValueError, match=r"got .*file, which is a file"):
        find_records([tmp_path / "file"])


def test_a_folder_without_a_run_is_refused(tmp_path: Path) -> None:
    write_run(tmp_path / "good")
    (tmp_path / "empty" / "inner").mkdir(parents=True)
    with pytest.raises(ValueError, match=r"but \S*empty holds no files of a run.*`sb3-clipvf train .* -f \S*empty`"):
        find_records([tmp_path / "good", tmp_path / "empty"])


def test_a_run_without_data_is_left_out_with_the_reason(tmp_path: Path) -> None:
    good = write_run(tmp_path / "CartPole-v1_1")
    write_run(tmp_path / "CartPole-v1_2", returns=())
    records, (problem,) = find_records([tmp_path])
    assert [record.folder for record in records] == [good]
    assert "CartPole-v1_2 was left out: no training episode ended, and it has no evaluations. Train longer" in problem
    with pytest.raises(
        ValueError, match=r"must hold a run with data to show, but none has:\n .*CartPole-v1_2 was left"
    ):
        find_records([tmp_path / "CartPole-v1_2"])


def test_an_unfinished_run_is_shown_with_the_way_to_resume_it(tmp_path: Path) -> None:
    folder = write_run(tmp_path / "my runs" / "CartPole-v1_1")
    (folder / "CartPole-v1.zip").unlink()
    (record,), (problem,) = find_records([tmp_path])
    assert record.steps == 400
    assert "holds no final model" in problem and "resume" not in problem
    (folder / "checkpoints").mkdir()
    (folder / "checkpoints" / "checkpoint_64.zip").touch()
    _, (problem,) = find_records([tmp_path])
    assert f"`sb3-clipvf train --resume '{folder}'` resumes it." in problem


def test_files_of_several_trainings_are_named(tmp_path: Path) -> None:
    for seed in (1, 2):
        episodes = [(1.0, 100, float(n)) for n in range(1, 11)]
        write_monitor(tmp_path / f"seed_{seed}.monitor.csv", episodes, start=100.0 * seed)
    write_evaluations(tmp_path / "evaluations.npz", [100], [[1.0]])
    (record,), (problem,) = find_records([tmp_path])
    assert len(record.episodes.steps) == 0 and record.evaluations is not None
    assert f"{tmp_path} must hold one training, got seed_1.monitor.csv and seed_2.monitor.csv" in problem


MONITOR = b'#{"t_start": 0.0, "env_id": "CartPole-v1"}\n'
LONG = b"1" * 140_000 + b"\n"  # more than a field of the module csv may have


@pytest.mark.parametrize(
    ("name", "content", "match"),
    [
        ("0.monitor.csv", b"", r"0\.monitor\.csv must begin with the header of SB3's Monitor"),
        ("evaluations.npz", b"PK\x03\x04", r"evaluations\.npz must hold evaluations .* but is damaged"),
        (
            "report.json",
            b'{"mean_return": 1',
            r"report\.json must be what `sb3-clipvf report --env` wrote, but is damaged",
        ),
        ("CartPole-v1.zip", b"PK", r"CartPole-v1\.zip"),
        ("progress.json", b"[", r"progress\.json must hold a row"),
        ("0.monitor.csv", MONITOR + b"a,b\n1,2\n", r"0\.monitor\.csv must have the columns .* \(KeyError: 'r'\)"),
        ("0.monitor.csv", MONITOR + b"r,l,t\n" + LONG, r"0\.monitor\.csv must have the columns .* \(Error: field"),
        ("progress.csv", b"time/total_timesteps\n" + LONG, r"progress\.csv must be SB3's log as CSV, but is damaged"),
    ],
)
def test_a_damaged_file_is_named_and_the_rest_of_the_run_shown(
    name: str, content: bytes, match: str, tmp_path: Path
) -> None:
    folder = write_run(tmp_path / "CartPole-v1_1")
    if name == "0.monitor.csv":
        write_evaluations(folder / "evaluations.npz", [100], [[1.0]])
    (folder / name).write_bytes(content)
    (record,), problems = find_records([tmp_path])
    assert record.folder == folder
    (problem,) = (problem for problem in problems if name in problem)
    assert re.search(match, problem)


def test_an_event_without_a_tag_is_named(tmp_path: Path) -> None:
    folder = write_run(tmp_path / "CartPole-v1_1")
    # A summary (field 5) of one value (field 1), which has a `simple_value` (field 2) alone.
    record = b"\x2a\x07\x0a\x05\x15" + bytes(4)
    (folder / "events.out.tfevents.1").write_bytes(struct.pack("<Q", len(record)) + bytes(4) + record + bytes(4))
    (found,), (problem,) = find_records([tmp_path])
    assert found.steps == 400
    assert "events.out.tfevents.1 must hold events of TensorBoard, but is damaged" in problem


def test_a_folder_that_cannot_be_read_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = write_run(tmp_path / "logs/clipppo/CartPole-v1_1")
    (tmp_path / "logs/lost+found").mkdir()
    iterdir = Path.iterdir

    def refusing(self: Path) -> Iterator[Path]:
        if self.name == "lost+found":
            raise PermissionError(errno.EACCES, "Permission denied", str(self))
        return iterdir(self)

    monkeypatch.setattr(Path, "iterdir", refusing)
    (record,), (problem,) = find_records([tmp_path])
    assert record.folder == folder
    assert "Permission denied" in problem and "lost+found" in problem


@pytest.mark.parametrize(
    ("content", "reason"),
    [({}, "KeyError: 'data'"), ({"data": "{"}, "JSONDecodeError: "), ({"data": "3"}, "TypeError: ")],
)
def test_a_damaged_model_is_named_with_what_it_lacks(content: dict[str, str], reason: str, tmp_path: Path) -> None:
    folder = write_run(tmp_path / "CartPole-v1_1")
    with zipfile.ZipFile(folder / "CartPole-v1.zip", "w") as archive:
        archive.writestr("system_info.txt", "")
        for name, text in content.items():
            archive.writestr(name, text)
    (record,), (problem,) = find_records([tmp_path])
    assert record.steps == 400
    assert f"{folder}/CartPole-v1.zip must hold a model of SB3, but is damaged ({reason}" in problem


@pytest.mark.parametrize(
    ("name", "kind", "option"), [("CartPole-v1", "final", ""), ("best_model", "best", " --load-best")]
)
def test_reports_of_earlier_models_are_left_out(name: str, kind: str, option: str, tmp_path: Path) -> None:
    folder = write_run(tmp_path / "CartPole-v1_1")
    with zipfile.ZipFile(folder / "best_model.zip", "w") as archive:
        archive.writestr("data", json.dumps({"num_timesteps": 200}))
    steps = 400 if kind == "final" else 200
    write_report(folder, 9.0, steps, model=f"logs/{name}.zip")
    (record,), problems = find_records([tmp_path])
    assert problems == []
    assert record.report == {"mean_return": 9.0, "deterministic": True, "is_best": kind == "best"}
    write_report(folder, 9.0, 1100, model=f"logs/{name}.zip")
    (record,), problems = find_records([tmp_path])
    assert record.report == {}
    assert problems == [
        f"{folder}/report.json was left out: it is about {name}.zip of step 1,100, not about the {kind} model of step "
        f"{steps}. Evaluate that one with `sb3-clipvf report --env{option}`."
    ]
    # Without the model's file, its step is not known.
    (folder / f"{name}.zip").unlink()
    (record,), _ = find_records([tmp_path])
    assert record.report["mean_return"] == 9.0


def test_the_newest_video_is_shown_unless_its_model_was_replaced(tmp_path: Path) -> None:
    folder = write_run(tmp_path / "CartPole-v1_1")
    (folder / "videos").mkdir()
    for time, name in enumerate(("best_model", "CartPole-v1")):
        (folder / "videos" / f"{name}.mp4").touch()
        os.utime(folder / "videos" / f"{name}.mp4", (time, time))
    assert read_record(folder)[0].video == folder / "videos" / "CartPole-v1.mp4"
    write_report(folder, 9.0, 400)
    assert read_record(folder)[0].video == folder / "videos" / "CartPole-v1.mp4"
    write_report(folder, 9.0, 1100)
    assert read_record(folder)[0].video is None


def test_evaluations_that_are_not_shown_are_named(tmp_path: Path) -> None:
    write_monitor(tmp_path / "monitor.csv", [(1.0, 100, 1.0)], env_id="E-v0")
    for name, value in (("eval_easy", 1.0), ("eval_hard", -5.0)):
        (tmp_path / name).mkdir()
        write_evaluations(tmp_path / name / "evaluations.npz", [100], [[value]])
    (record,), (problem,) = find_records([tmp_path])
    assert record.evaluations is not None and record.evaluations.values.tolist() == [1]
    assert problem == f"{tmp_path}/eval_hard/evaluations.npz was left out: those of {tmp_path}/eval_easy are shown."


def test_environments_without_a_name_are_unknown(tmp_path: Path) -> None:
    for name in ("robot_a", "robot_b"):  # SB3 writes "None" for an environment that is not registered
        write_monitor(tmp_path / name / "monitor.csv", [(1.0, 10, 1.0)], env_id="None")
    write_run(tmp_path / "CartPole-v1_1")
    records, (problem,) = find_records([tmp_path])
    assert sorted(record.env_id for record in records) == ["", "", "CartPole-v1"]
    assert problem.startswith("The environments of 2 of 3 runs are not known: the report compares them as one.")


def test_evaluations_of_fewer_episodes_count(tmp_path: Path) -> None:
    """As a training resumed with another number of episodes writes them."""
    folder = write_run(tmp_path / "CartPole-v1_1")
    write_evaluations(folder / "evaluations.npz", [100, 200, 400], [[1.0, 3.0], [np.nan] * 2, [5.0, np.nan]])
    (record,), _ = find_records([tmp_path])
    assert record.evaluations is not None
    np.testing.assert_array_equal(record.evaluations.values, [2, np.nan, 5])
    numbers = numbers_of(record)
    assert (numbers["last_evaluation"], numbers["best_evaluation"]) == (5, 5)


@pytest.mark.parametrize("arrays", [{}, {"timesteps": [1, 2], "results": [[1.0]]}, {"timesteps": [], "results": []}])
def test_evaluations_of_other_shapes_are_refused(arrays: dict[str, list[float]], tmp_path: Path) -> None:
    np.savez(tmp_path / "evaluations.npz", **arrays)
    with pytest.raises(ValueError, match=r"must hold evaluations of SB3's EvalCallback, but is damaged"):
        read_evaluations(tmp_path / "evaluations.npz")


def test_evaluations_are_read_although_another_array_cannot_be(tmp_path: Path) -> None:
    path = tmp_path / "evaluations.npz"
    ragged = np.array([[True], [True, False]], dtype=object)
    np.savez(path, timesteps=[1, 2], results=[[1.0], [2.0]], successes=ragged, ep_lengths=[[3], [4]])
    assert read_evaluations(path).keys() == {"timesteps", "results", "ep_lengths"}


def test_settings_that_could_run_code_leave_the_run_out(tmp_path: Path, mark: Path) -> None:
    write_run(tmp_path / "CartPole-v1_1")
    bad = write_run(tmp_path / "CartPole-v1_2")
    (bad / "CartPole-v1" / "config.yml").write_text(f"a: !!python/object/apply:os.system ['touch {mark}']")
    records, (problem,) = find_records([tmp_path])
    assert len(records) == 1 and "CartPole-v1_2 was left out" in problem and not mark.exists()


def test_mixed_versions_are_named(tmp_path: Path) -> None:
    for number, version in enumerate(("2.9.2", "2.8.0", "2.9.2"), 1):
        write_run(tmp_path / f"CartPole-v1_{number}", version=version)
    records, (problem,) = find_records([tmp_path])
    assert len(records) == 3
    assert "several versions of Stable-Baselines3: 2.8.0 (1 of 3 runs), 2.9.2 (2 of 3 runs). A difference" in problem
