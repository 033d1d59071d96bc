"""``benchmark``: what it evaluates, what it overwrites, and the run that a row of its table is about."""

import subprocess
from pathlib import Path

import pytest
import yaml

from sb3_clipvf import ClipPPO
from sb3_clipvf.zoo import main

TABLE = Path("logs", "benchmark", "benchmark.md")
MONITOR = Path("logs", "benchmark", "clipppo-NS-E-v0", "0.monitor.csv")


@pytest.fixture
def evaluated(in_empty_folder: Path, monkeypatch: pytest.MonkeyPatch) -> list[list[str]]:
    """The options of the commands that evaluate an agent; each has one episode more than the one before."""
    commands: list[list[str]] = []

    def evaluate(command: list[str]) -> int:
        commands.append(command)
        log = Path(command[command.index("--reward-log") + 1])
        log.mkdir(parents=True, exist_ok=True)
        rows = "".join(f"{len(commands)}.0,10,{i}.5\n" for i in range(len(commands)))
        (log / "0.monitor.csv").write_text(f'#{{"t_start": 0.0, "env_id": "NS/E-v0"}}\nr,l,t\n{rows}')
        return 0

    monkeypatch.setattr(subprocess, "call", evaluate)
    return commands


def _train(number: str, steps: int) -> None:
    """Write a run of ``steps`` steps, whose settings have 100,000."""
    run = Path("logs", "clipppo", f"NS-E-v0_{number}")
    (run / "NS-E-v0").mkdir(parents=True)
    (run / "NS-E-v0" / "args.yml").write_text(yaml.safe_dump({"env": "NS/E-v0"}))
    (run / "NS-E-v0" / "config.yml").write_text(yaml.safe_dump({"n_timesteps": 1e5}))
    model = ClipPPO("MlpPolicy", "CartPole-v1", device="cpu")
    model.num_timesteps = steps
    model.save(run / "NS-E-v0.zip")


def _rows() -> list[list[str]]:
    lines = [line for line in TABLE.read_text().splitlines() if line.startswith("|clipppo")]
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in lines]


def _refused(options: str, capsys: pytest.CaptureFixture[str]) -> str:
    assert main(["benchmark", *options.split()]) == 2
    return capsys.readouterr().err.splitlines()[0]


def test_a_row_is_about_the_newest_run_and_each_call_evaluates(evaluated: list[list[str]]) -> None:
    _train("1", 4096)
    assert main("benchmark -n 400".split()) == 0
    assert _rows() == [["clipppo", "NS/E-v0", "1", "0", "4k", "10", "1"]]
    (MONITOR.parent / "1.monitor.csv").write_bytes(MONITOR.read_bytes())  # as by `--n-envs 2`
    _train("2_0b0c7c1e-5a52-4a51-8c3e-111111111111", 8192)
    Path("logs/clipppo/NS-E-v0_3").mkdir()
    assert main("benchmark -n 400 --seed 3".split()) == 0
    assert _rows() == [["clipppo", "NS/E-v0", "2", "0", "8k", "20", "2"]]
    assert len(evaluated) == 2
    assert Path("benchmark.md").read_text() == TABLE.read_text()


def test_other_files_are_kept(evaluated: list[list[str]], capsys: pytest.CaptureFixture[str]) -> None:
    _train("1", 4096)
    training = Path("logs/clipppo/NS-E-v0_1/0.monitor.csv")
    training.touch()
    assert main("benchmark --benchmark-dir logs/clipppo".split()) == 0
    assert training.is_file()
    Path("benchmark.md").write_text("# My results")
    assert "`benchmark.md` must be a table of this command" in _refused("", capsys)
    assert Path("benchmark.md").read_text() == "# My results"
    assert main("benchmark --test-mode".split()) == 0
    Path("docs").mkdir()
    Path("benchmark.md").rename("docs/benchmark.md")
    for options in ("", "--test-mode"):
        assert "`docs/benchmark.md` must be a table" in _refused(f"--benchmark-dir docs {options}", capsys)
    assert Path("docs/benchmark.md").read_text() == "# My results"
    notes = MONITOR.with_name("notes.txt")
    notes.parent.mkdir(exist_ok=True)
    notes.touch()
    MONITOR.write_text("kept")
    assert f"must hold evaluations of this command, got {notes}" in _refused("", capsys)
    assert MONITOR.read_text() == "kept"


def test_evaluations_that_are_not_repeated_are_kept(
    evaluated: list[list[str]], capsys: pytest.CaptureFixture[str]
) -> None:
    _train("1", 4096)
    assert main(["benchmark"]) == 0
    before = MONITOR.read_text()
    assert "`--seed` must be" in _refused("--seed -1", capsys)
    assert MONITOR.read_text() == before
    (MONITOR.parent.parent / "clipppo-Other-v0").mkdir()
    other = MONITOR.parent.parent / "clipppo-Other-v0" / "0.monitor.csv"
    other.write_text(before)
    Path("logs", "clipppo", "Other-v0_1").mkdir()
    assert main(["benchmark", "--test-mode"]) == 0
    assert [path.read_text() == before for path in (MONITOR, other)].count(True) == 1


def test_the_working_folder_is_refused_for_the_table(
    evaluated: list[list[str]], capsys: pytest.CaptureFixture[str]
) -> None:
    _train("1", 4096)
    assert "`--benchmark-dir` must not be the working folder" in _refused("--benchmark-dir .", capsys)
    assert main("benchmark --benchmark-dir . --test-mode".split()) == 0


def test_the_hub_is_read_only_for_the_folder_of_downloads(
    in_empty_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    listed: list[None] = []
    monkeypatch.setattr("rl_zoo3.utils.get_hf_trained_models", lambda: listed.append(None) or {})
    Path("logs").mkdir()
    for folder, calls in (("logs", 0), ("rl-trained-agents/", 1)):  # the latter is made for the downloads
        assert main(["benchmark", "--log-dir", folder]) == 0
        assert len(listed) == calls
