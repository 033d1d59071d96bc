"""Tables that a training shows on the terminal."""

import io
from pathlib import Path
from types import SimpleNamespace

import pytest
from stable_baselines3.common.logger import CSVOutputFormat, HumanOutputFormat, Logger

from sb3_clipvf.zoo import main, terminal
from sb3_clipvf.zoo.terminal import timed_tables


def test_tables_come_every_few_seconds_and_files_get_every_row(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    now = 100.0
    monkeypatch.setattr(terminal, "time", SimpleNamespace(monotonic=lambda: now))
    shown = io.StringIO()
    outputs = [
        HumanOutputFormat(shown),
        HumanOutputFormat(str(tmp_path / "log.txt")),
        CSVOutputFormat(str(tmp_path / "progress.csv")),
    ]
    logger = Logger(None, outputs)
    with timed_tables():
        for row in range(10):
            logger.record("train/row", row)
            if row == 4:  # its row is not shown
                logger.record("eval/best", 77)
                logger.record("rollout/length", 88)
            logger.dump(row)
            now += 2.0
        assert shown.getvalue().count("train/") == 4  # rows 0, 3, 6, 9
    logger.close()
    rows = [line.split("|")[2].strip() for line in shown.getvalue().splitlines() if "row" in line]
    assert rows == ["0", "3", "6", "9"]
    # Rows differ in what they hold. An evaluation is old after the next table, where training logs again and again.
    assert (shown.getvalue().count("77"), shown.getvalue().count("88")) == (1, 2)
    assert (tmp_path / "log.txt").read_text().count("train/") == 10
    assert len((tmp_path / "progress.csv").read_text().splitlines()) == 11


def test_the_last_table_is_shown_after_an_error_too(monkeypatch: pytest.MonkeyPatch) -> None:
    write = HumanOutputFormat.write
    monkeypatch.setattr(terminal, "time", SimpleNamespace(monotonic=lambda: 100.0))
    shown = io.StringIO()
    logger = Logger(None, [HumanOutputFormat(shown)])
    with pytest.raises(RuntimeError, match="fault"), timed_tables():
        for row in range(4):
            logger.record("row", row)
            logger.dump(row)
        raise RuntimeError("fault")
    rows = [line.split("|")[2].strip() for line in shown.getvalue().splitlines() if "row" in line]
    assert rows == ["0", "3"]
    assert HumanOutputFormat.write is write


@pytest.mark.parametrize(("options", "n_tables"), [("", 2), ("--log-interval 2", 4), ("--log-interval -2", 0)])
def test_an_interval_that_the_user_chose_is_honoured(
    options: str, n_tables: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(terminal, "TABLE_SECONDS", 1e9)
    params = "-params n_envs:2 n_steps:64 batch_size:64 n_epochs:1"
    command = f"train --env CartPole-v1 -n 1024 --eval-freq -1 --device cpu -f {tmp_path} {options} {params}"
    assert main(command.split()) == 0
    assert capsys.readouterr().out.count("total_timesteps") == n_tables
