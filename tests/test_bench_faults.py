"""``python -m tests.bench faults``: a short campaign passes, and each kind of failure is counted correctly."""

import json
import os
import signal
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest import mock

import numpy as np
import pytest

from sb3_clipvf.checkpoint import DamagedCheckpointError, training_checkpoint
from tests.bench import faults, faults_kills
from tests.bench.faults import ROWS, main, render_table
from tests.bench.faults_files import _outcome, _place, _result, damaged
from tests.bench.faults_files import is_clear as is_clear_of_file
from tests.bench.faults_fuzz import is_clear, judged
from tests.bench.faults_kills import KillCampaign, _die_in_write, _Unbroken, judge
from tests.bench.faults_processes import Tally, append_line, read_lines
from tests.bench.faults_training import Training, digest_of
from tests.bench.results import Results

pytest.importorskip("hypothesis")

SHORT = ["kills-CartPole-v1", "checkpoint-CartPole-v1", "model-CartPole-v1", "arguments"]
OPTIONS = ["--only", *SHORT, "--kills", "2", "--corruptions", "30", "--examples", "120"]


def run(folder: Path, *options: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "tests.bench", "faults", *options],
        cwd=folder,
        env={**os.environ, "PYTHONPATH": str(Path(__file__).parents[1])},
        capture_output=True,
        text=True,
        check=False,
    )


# --- a short campaign


@pytest.fixture(scope="module")
def campaign(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, subprocess.CompletedProcess[str]]:
    folder = tmp_path_factory.mktemp("campaign")
    return folder, run(folder, *OPTIONS)


def test_a_short_campaign_is_survived(campaign: tuple[Path, subprocess.CompletedProcess[str]]) -> None:
    folder, done = campaign
    runs = {found["name"]: found for found in json.loads((folder / "docs/results/faults.json").read_text())["runs"]}
    assert [text for found in runs.values() for text in found["failures"]] == []
    assert done.returncode == 0, done.stdout + done.stderr
    assert {name: found["attempts"] for name, found in runs.items()} == dict(zip(SHORT, [2, 30, 30, 120], strict=True))
    assert all(found["survived"] == found["attempts"] for found in runs.values())
    # Some damage hits bytes that matter, and some arguments are illegal.
    assert runs["checkpoint-CartPole-v1"]["counts"]["refused by a reader"] > 15
    assert runs["arguments"]["counts"]["refused"] > 20
    assert runs["arguments"]["counts"]["models built"] > 3
    table = (folder / "docs/results/faults.md").read_text()
    assert "| a run is killed and resumed | CartPole-v1 | 2 | 2 | 0 | 0 | 0 |" in table
    assert "| a run is killed and resumed | HalfCheetah-v5 | not run |" in table
    assert "bench faults --kills 2 --corruptions 30 --examples 120`" in table


def test_what_is_done_is_not_done_again(campaign: tuple[Path, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(campaign[0])
    monkeypatch.setattr(faults, "make_campaign", lambda *args: pytest.fail("nothing is missing"))
    monkeypatch.setattr("tests.bench.faults.start_server", lambda: None)
    # `make_campaign` is only made where attempts are missing.
    assert main(OPTIONS) == 0


class _Failing:
    def run(self, index: int, wanted: int) -> Tally:
        tally = Tally()
        tally.add("survived")
        tally.add("wrong" if index else "survived", f"part {index}" if index else "")
        return tally


def test_a_failure_is_counted_and_reported_and_ends_with_1(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(faults, "make_campaign", lambda *args: _Failing())
    monkeypatch.setattr("tests.bench.faults.start_server", lambda: None)
    assert main(["--only", "arguments", "--examples", "4"]) == 1
    assert "arguments: 4 of 4, 3 survived, 0 lost, 1 wrong, 0 unclear" in capsys.readouterr().out
    assert "`arguments`: `` part 1 ``" in Path("docs/results/faults.md").read_text()
    # It resumes with part 2, and earlier failures stay.
    assert main(["--only", "arguments", "--examples", "6"]) == 1
    assert "arguments: 6 of 6, 4 survived, 0 lost, 2 wrong" in capsys.readouterr().out
    assert main(["--only", "arguments", "--examples", "2", "--rerun"]) == 0


def test_an_interruption_keeps_what_is_done(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class Interrupted(_Failing):
        def run(self, index: int, wanted: int) -> Tally:
            if index:
                raise KeyboardInterrupt
            return super().run(index, wanted)

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(faults, "make_campaign", lambda *args: Interrupted())
    monkeypatch.setattr("tests.bench.faults.start_server", lambda: None)
    assert main(["--only", "arguments"]) == 130
    (found,) = Results(Path("docs/results/faults.json")).runs
    assert (found["attempts"], found["parts"]) == (2, 1)


@pytest.mark.parametrize(
    "options, match",
    [
        ("--kills 0", "--kills: must be a whole number of at least 1, got 0"),
        ("--seed -1", "--seed: must be a whole number of at least 0, got -1"),
        ("--only nothing", "--only/--rows: invalid choice: 'nothing'"),
        ("--only settings", "The row settings needs hypothesis. Run `pip install 'sb3_clipvf[dev]'`"),
    ],
)
def test_options_are_checked(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], options: str, match: str
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(SystemExit, match="2"):
        main(options.split())
    assert match in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []


def test_list(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.chdir(tmp_path)
    assert main(["--list"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == len(ROWS)
    assert lines[0].split() == [*"kills-CartPole-v1 a run is killed and resumed 0 of 100 done".split()]
    assert list(tmp_path.iterdir()) == []


# --- kills

END = {"event": "end", "digest": {"weights": "a", "optimizer": "b"}}
EXPECTED = {"weights": "a", "optimizer": "b"}
BEGIN, WRITTEN, RESUMED = (
    {"event": name, "step": step} for name, step in (("begins", 0), ("written", 64), ("begins", 64))
)


@pytest.mark.parametrize(
    ("lines", "code", "outcome", "reason"),
    [
        ([BEGIN, WRITTEN, RESUMED, END], 0, "survived", ""),
        ([BEGIN, BEGIN, WRITTEN, END], 0, "survived", ""),
        # The kill came after the file was there, and before it was reason.
        ([BEGIN, {"event": "begins", "step": 64}, END], 0, "survived", ""),
        ([BEGIN, WRITTEN, BEGIN, END], 0, "lost", "at step 0, after the checkpoint of step 64"),
        ([BEGIN, WRITTEN, {"event": "written", "step": 128}, RESUMED, END], 0, "lost", "at step 64, after"),
        (
            [BEGIN, WRITTEN, RESUMED, {**END, "digest": {"weights": "c", "optimizer": "b"}}],
            0,
            "wrong",
            "weights differ",
        ),
        ([BEGIN, {**END, "digest": {"weights": "a"}}], 0, "wrong", "optimizer differ"),
        ([BEGIN, {**END, "digest": {**EXPECTED, "more": "d"}}], 0, "wrong", "more differ"),
        ([BEGIN, WRITTEN, {"event": "error", "text": "KeyError: 3"}], 1, "unclear", "KeyError: 3"),
        ([BEGIN, WRITTEN], -11, "unclear", "ended with code -11"),
        ([BEGIN, WRITTEN], None, "unclear", "ended with code None"),
        ([], 0, "unclear", "nothing"),
    ],
)
def test_the_end_of_a_killed_training_is_judged(lines: Any, code: int | None, outcome: str, reason: str) -> None:
    found, text = judge(lines, code, EXPECTED)
    assert found == outcome
    assert reason in text


def test_a_training_that_fails_before_its_kill_is_counted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    ended = SimpleNamespace(join=lambda seconds: None, is_alive=lambda: False)
    monkeypatch.setattr(faults_kills, "start", lambda *args: ended)
    monkeypatch.setattr(faults_kills, "finish", lambda process: 1)
    monkeypatch.setattr(faults_kills, "_wait", lambda *args: None)
    monkeypatch.setattr(faults_kills, "read_lines", lambda path: [BEGIN, {"event": "error", "text": "KeyError: 3"}])
    campaign = KillCampaign((Training("t", "CartPole-v1", 64),), tmp_path, seed=0)
    campaign._unbroken["t"] = _Unbroken(EXPECTED, 1.0, 2)
    tally = campaign.run(0, wanted=5)
    assert (tally.attempts, tally.unclear, tally.failures) == (1, 1, ["t, training 0 without a kill: KeyError: 3"])


@pytest.mark.parametrize(("share", "left_behind"), [(0.0, b""), (0.5, b"ab"), (1.1, None)])
def test_a_process_can_be_killed_inside_a_write(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, share: float, left_behind: bytes | None
) -> None:
    class KilledError(BaseException):
        pass

    def kill(number: int) -> None:
        found.extend(path.read_bytes() for path in tmp_path.glob(".second.zip.*.tmp"))
        raise KilledError(number)

    found: list[bytes] = []
    monkeypatch.setattr(signal, "raise_signal", kill)
    try:
        _die_in_write(1, share)
        with training_checkpoint.atomic_write(tmp_path / "first.zip") as file:
            file.write(b"1234")
        with pytest.raises(KilledError, match=str(int(signal.SIGKILL))):
            with training_checkpoint.atomic_write(tmp_path / "second.zip") as file:
                file.write(b"abcd")
    finally:
        mock.patch.stopall()
    assert (tmp_path / "first.zip").read_bytes() == b"1234"
    assert found == ([] if left_behind is None else [left_behind])
    assert (tmp_path / "second.zip").exists() == (left_behind is None)


def test_a_report_is_read_as_it_was_written(tmp_path: Path) -> None:
    assert read_lines(tmp_path / "report") == []
    append_line(tmp_path / "report", event="begins", step=0)
    append_line(tmp_path / "report", event="written", step=np.int64(1))
    assert read_lines(tmp_path / "report") == [{"event": "begins", "step": 0}, {"event": "written", "step": "1"}]


def test_a_digest_differs_by_value_type_and_shape() -> None:
    values = [
        1,
        1.0,
        "1",
        True,
        None,
        [1],
        [1, 1],
        [[1], 1],
        {"a": 1},
        {"a": 2},
        np.float32(1),
        np.ones(2),
        np.ones((2, 1)),
    ]
    values += [np.ones(2, np.float32), -0.0, 0.0, np.array([0.0, 0.0]), np.array([0.0, -0.0])]
    assert len({digest_of(value) for value in values}) == len(values)
    assert digest_of({"a": np.arange(3), "b": [None]}) == digest_of({"a": np.arange(3), "b": [None]})


# --- files


def test_damage_changes_the_file_and_is_the_same_for_the_same_seed() -> None:
    content = bytes(range(256)) * 40 + b"PK\x01\x02" + bytes(100)
    kinds = set()
    n_unchanged = 0
    for number in range(200):
        first, what = damaged(content, np.random.default_rng((1, number)))
        assert (first, what) == damaged(content, np.random.default_rng((1, number)))
        kinds.add(what.split()[0])
        n_unchanged += first == content
    assert kinds == {"bit", "byte", "bytes", "zeros", "cut", "insert", "remove"}
    assert n_unchanged < 30  # some damage writes the bytes that were there


def test_half_of_the_damage_hits_headers() -> None:
    content = bytes(5000) + b"PK\x03\x04" + bytes(5000)
    places = np.array([_place(content, np.random.default_rng(number)) for number in range(400)])
    assert 150 < np.count_nonzero((places >= 5000) & (places < 5064)) < 250
    assert places.max() > 9000


def test_only_errors_that_help_count_as_clear(tmp_path: Path) -> None:
    path = tmp_path / "model.damaged"
    assert is_clear_of_file(DamagedCheckpointError("damaged"), path)
    assert is_clear_of_file(ValueError(f"{path} is damaged"), path)
    for error in (
        ValueError("bad"),
        KeyError(str(path)),
        MemoryError(str(path)),
        UnicodeDecodeError("a", b"", 0, 1, "b"),
    ):
        assert not is_clear_of_file(error, path)


def test_results_of_readers_are_judged(tmp_path: Path) -> None:
    def refusing(path: Path) -> dict[str, str]:
        raise KeyError("x")

    whole = {"weights": "a", "numbers": "b"}
    assert _result(lambda path: dict(whole), tmp_path, whole) == "same"
    assert _result(lambda path: {**whole, "weights": "c"}, tmp_path, whole) == "other: weights"
    assert _result(lambda path: {"weights": "a"}, tmp_path, whole) == "other: numbers"
    assert _result(refusing, tmp_path, whole) == "unclear: KeyError: 'x'"

    def outcome(*results: str) -> str:
        return _outcome({"results": dict(enumerate(results))})[0]

    assert outcome("same", "refused: ValueError") == "survived"
    assert outcome("same", "other: weights") == "wrong"
    assert outcome("unclear: KeyError: 'x'") == outcome("unclear: x", "other: y") == "unclear"


# --- arguments


def test_errors_about_arguments_are_clear_where_they_name_them_and_what_they_got() -> None:
    changes = {"gamma": 2.0}
    assert is_clear(ValueError("`gamma` must be in [0, 1], got 2.0. Pass 0.99."), changes)
    for error in (
        ValueError("gamma must be in [0, 1], got 2.0"),
        ValueError("`gamma` is bad"),
        ValueError("`n_steps` must be positive, got 0"),
        OverflowError("`gamma` is too large, got 2.0"),
    ):
        assert not is_clear(error, changes)


def test_models_of_illegal_numbers_are_wrong() -> None:
    class Model:
        learning_rate = gamma = gae_lambda = clip_range = vf_coef = ent_coef = kl_coef = max_grad_norm = 0.5
        clip_range_vf = target_kl = adaptive_kl_target = lr_kl_target = None

    model = Model()
    assert judged(lambda changes: model, {})[:2] == ("survived", "models built")
    model.gamma = float("nan")
    assert judged(lambda changes: model, {}) == ("wrong", "wrong", "accepted as gamma=nan")


def test_rows_not_run_are_named(tmp_path: Path) -> None:
    table = render_table(Results(tmp_path / "none.json"), ROWS, 0)
    assert table.count("| not run |") == len(ROWS)
