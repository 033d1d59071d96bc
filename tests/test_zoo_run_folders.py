"""Folders of runs: their numbers, and which run a command takes."""

import os
import re
from argparse import ArgumentTypeError
from pathlib import Path

import pytest

from sb3_clipvf.zoo.run_folders import RunId, choose_run, program

UUIDS = ("0b0c7c1e-5a52-4a51-8c3e-111111111111", "0b0c7c1e-5a52-4a51-8c3e-222222222222")


def _make_run(parent: Path, name: str, *files: str, time: float = 1000.0) -> None:
    settings = parent / name / "E-v0" / "args.yml"
    settings.parent.mkdir(parents=True)
    settings.touch()
    os.utime(settings, (time, time))
    for file in files:
        (parent / name / file).parent.mkdir(exist_ok=True)
        (parent / name / file).touch()


def _has_model(folder: Path) -> bool:
    return (folder / "E-v0.zip").is_file()


def test_the_newest_run_with_a_model_is_used_and_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for name in ("E-v0_2", "E-v0_10"):
        _make_run(tmp_path, name, "E-v0.zip")
    assert choose_run(tmp_path, "E-v0", 0, _has_model) == 10
    assert capsys.readouterr().out == ""
    _make_run(tmp_path, "E-v0_11", "0.monitor.csv")
    _make_run(tmp_path, "E-v0_x", "E-v0.zip")
    _make_run(tmp_path, "E-v0_12_extra", "E-v0.zip")
    assert choose_run(tmp_path, "E-v0", 0, _has_model) == 10
    expected = f"{tmp_path / 'E-v0_11'} does not hold the model: using {tmp_path / 'E-v0_10'}\n"
    assert capsys.readouterr().out == expected


@pytest.mark.parametrize("exp_id", [11, 99, -1, RunId(1, UUIDS[0])])
def test_a_run_that_is_named_is_not_replaced(exp_id: int, tmp_path: Path) -> None:
    _make_run(tmp_path, "E-v0_10", "E-v0.zip")
    _make_run(tmp_path, "E-v0_11")
    assert str(choose_run(tmp_path, "E-v0", exp_id, _has_model)) == str(exp_id)


def test_without_any_model_the_newest_run_is_used(tmp_path: Path) -> None:
    assert choose_run(tmp_path / "none", "E-v0", 0, _has_model) == 0
    _make_run(tmp_path, "E-v0_1")
    _make_run(tmp_path, "E-v0_2")
    assert choose_run(tmp_path, "E-v0", 0, _has_model) == 2


def test_runs_with_unique_ids_are_found(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for uuid, time in zip(UUIDS, (2000.0, 1000.0), strict=True):
        _make_run(tmp_path, f"E-v0_1_{uuid}", "E-v0.zip", time=time)
    for exp_id in (0, 1):
        assert f"E-v0_{choose_run(tmp_path, 'E-v0', exp_id, _has_model)}" == f"E-v0_1_{UUIDS[0]}"
    assert capsys.readouterr().out == f"2 runs have the number 1: using {tmp_path / f'E-v0_1_{UUIDS[0]}'}\n"
    (tmp_path / f"E-v0_1_{UUIDS[0]}" / "E-v0.zip").unlink()
    assert str(choose_run(tmp_path, "E-v0", 1, _has_model)) == f"1_{UUIDS[1]}"


@pytest.mark.parametrize(
    ("number", "of_machine", "options"),
    [
        (16, 8, "--nnodes 2 --nproc-per-node 8 --rdzv-backend c10d --rdzv-endpoint first-machine:29500"),
        (2, 1, "--nnodes 2 --nproc-per-node 1 --rdzv-backend c10d --rdzv-endpoint first-machine:29500"),
        (2, None, "--standalone --nproc-per-node 2"),
        (12, 8, "--standalone --nproc-per-node 12"),  # other machines had 4
        (2, "1; reboot", "--standalone --nproc-per-node 2"),
    ],
)
def test_a_command_starts_as_many_machines(number: int, of_machine: object, options: str) -> None:
    arguments = {"n_processes": number, "n_processes_per_machine": of_machine}
    assert program(arguments) == f"torchrun {options} -m sb3_clipvf"
    assert program({**arguments, "n_processes": 1}) == "sb3-clipvf"


@pytest.mark.parametrize("text", ["0", "-1", "12", f"3_{UUIDS[0]}"])
def test_run_ids_are_written_as_they_are_read(text: str) -> None:
    run_id = RunId.parse(text)
    assert f"{run_id}" == str(run_id) == text
    assert run_id == int(text.split("_")[0])


@pytest.mark.parametrize("text", ["", "a", "1_foo", "1.5"])
def test_an_invalid_run_id_is_refused(text: str) -> None:
    with pytest.raises(
        ArgumentTypeError, match=re.escape(f"must be the number of a run, or <number>_<uuid>, got {text!r}")
    ):
        RunId.parse(text)
