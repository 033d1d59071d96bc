"""``python -m tests.bench starts``: what it measures, keeps, skips and tabulates."""

import json
from pathlib import Path
from typing import Any

import psutil
import pytest

from tests.bench import starts
from tests.bench.starts import PEERS, ROWS, main

# A quick stand-in for the measured program: it records its names, and the files in its folder of kernels, and adds one.
PROGRAM = """
import os
from pathlib import Path
kernels = Path(os.environ["NUMBA_CACHE_DIR"])
with open("started.txt", "a") as file:
    print("{module} {algorithm} {env_id}", len(list(kernels.iterdir())), "OMP_NUM_THREADS" in os.environ, file=file)
(kernels / "{algorithm}").touch()
print("not the end")
print("updated", flush=True)
"""


@pytest.fixture
def in_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty working folder, the quick program, and SBX not installed."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    monkeypatch.setattr(starts, "PROGRAM", PROGRAM)
    monkeypatch.setattr(starts, "find_spec", lambda name: None if name == "sbx" else object())
    monkeypatch.setattr(psutil, "cpu_percent", lambda interval: 5.0)
    return tmp_path


def started() -> list[str]:
    """Return what the programs recorded since the last call."""
    path = Path("started.txt")
    lines = path.read_text().splitlines() if path.exists() else []
    path.unlink(missing_ok=True)
    return lines


def one_round(env_id: str) -> list[str]:
    return [
        f"sb3_clipvf ClipPPO {env_id} 0 False",
        f"sb3_clipvf ClipPPO {env_id} 1 False",
        f"stable_baselines3 PPO {env_id} 1 False",
    ]


def runs_in(path: Path = Path("docs/results/starts.json")) -> list[dict[str, Any]]:
    return list(json.loads(path.read_text())["runs"])


def test_round_starts_without_kernels_and_then_with_those_left(in_folder: Path) -> None:
    assert main(["--rounds", "1"]) == 0
    assert started() == one_round("CartPole-v1") + one_round("HalfCheetah-v5")
    assert {(run["name"], run["peer"], run["part"]) for run in runs_in()} == {
        (row.name, peer, "1") for row in ROWS for peer in ("cold", "clipppo", "sb3")
    }
    assert all(0 < run["seconds"] < 60 for run in runs_in())


def test_same_command_measures_only_what_is_missing(in_folder: Path) -> None:
    assert main(["--only", "CartPole-v1", "--rounds", "1"]) == 0
    assert main(["--only", "CartPole-v1", "--rounds", "1"]) == 0
    assert started() == one_round("CartPole-v1")
    assert main(["--rounds", "2"]) == 0
    assert started() == [line for row in (ROWS[1], *ROWS) for line in one_round(row.name)]
    assert main(["--rerun", "--only", "CartPole-v1", "--rounds", "1"]) == 0
    assert started() == one_round("CartPole-v1")


@pytest.mark.parametrize("change", [{"peer": "other"}, {"cores": 0}, {"versions": {"torch": "0"}}])
def test_round_that_lacks_a_peer_or_is_stale_is_measured_as_a_whole(in_folder: Path, change: dict[str, Any]) -> None:
    arguments = ["--only", "CartPole-v1", "--rounds", "1"]
    assert main(arguments) == 0
    started()
    path = Path("docs/results/starts.json")
    content = json.loads(path.read_text())
    content["runs"][0] |= change
    path.write_text(json.dumps(content))
    assert main(arguments) == 0
    assert started() == one_round("CartPole-v1")


def test_table_has_medians_with_spread(in_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seconds = iter([17.0, 3.0, 7.0, 18.5, 3.25, 7.1, 16.0, 3.5, 7.2])
    monkeypatch.setattr(starts, "_seconds_to_update", lambda *arguments: next(seconds))
    assert main(["--only", "CartPole-v1"]) == 0
    table = Path("docs/results/starts.md").read_text()
    assert "Made by `python -m tests.bench starts`." in table
    assert "| seconds | ClipPPO, no kernels on disk | ClipPPO | SB3 |\n" in table
    row = "| CartPole-v1 | 17.0<br>(16.0 to 18.5) | 3.2<br>(3.0 to 3.5) | 7.1<br>(7.0 to 7.2) |"
    assert row in table
    assert "up to 5 %" in table


def test_table_combines_no_runs_of_two_machines(in_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seconds = iter([17.0, 3.0, 7.0])
    monkeypatch.setattr(starts, "_seconds_to_update", lambda *arguments: next(seconds))
    assert main(["--only", "CartPole-v1", "--rounds", "1"]) == 0
    path = Path("docs/results/starts.json")
    content = json.loads(path.read_text())
    (sb3,) = (run for run in content["runs"] if run["peer"] == "sb3")
    sb3["cpu"] = "another"  # as after an interruption on this machine
    path.write_text(json.dumps(content))
    assert main(["--report", "--rounds", "1"]) == 0
    assert (
        "| CartPole-v1 | 17.0<br>(17.0 to 17.0) | 3.0<br>(3.0 to 3.0) |\n" in Path("docs/results/starts.md").read_text()
    )


def test_process_that_fails_is_reported_and_tried_again(
    in_folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = ["--only", "CartPole-v1", "--rounds", "1"]
    monkeypatch.setattr(starts, "PROGRAM", "raise SystemExit('no {algorithm}')")
    assert main(arguments) == 1
    log = Path("logs/bench/starts/CartPole-v1-cold-1.log")
    assert f"the process ended before its update, see {log}" in capsys.readouterr().out
    assert log.read_text() == "no ClipPPO\n"
    monkeypatch.setattr(starts, "PROGRAM", PROGRAM)
    assert main(arguments) == 0


def test_row_without_its_package_is_skipped(
    in_folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(starts, "find_spec", lambda name: None if name in ("sbx", "mujoco") else object())
    assert main(["--rounds", "1"]) == 0
    assert started() == one_round("CartPole-v1")
    assert main(["--list"]) == 0
    output = capsys.readouterr().out
    assert "HalfCheetah-v5: skipped, needs mujoco: pip install 'sb3_clipvf[mujoco]'" in output
    assert "CartPole-v1     done: 1" in output


def test_the_measured_program_makes_one_rollout_and_one_update(capfd: pytest.CaptureFixture[str]) -> None:
    _, module, algorithm = PEERS["clipppo"]
    namespace: dict[str, Any] = {}
    exec(starts.PROGRAM.format(module=module, algorithm=algorithm, env_id="CartPole-v1"), namespace)
    model = namespace["model"]
    assert (model.num_timesteps, model._n_updates) == (model.n_steps, model.n_epochs)
    assert capfd.readouterr().out == "updated\n"
