"""``python -m tests.bench scaling`` and ``processes``: the model, what is kept, and what is tabulated."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest

from tests.bench import processes, scaling
from tests.bench.experiments.episodes import N_POINTS
from tests.bench.scaling import WORKLOADS, Link, Model, launched

LINK = Link(latency=1e-4, bandwidth=1e9)


def test_a_ring_of_two_sends_all_bytes_once() -> None:
    # 2 steps of 0.1 ms, each with half of 4 MB at 1 GB/s
    assert LINK.all_reduce(2, 4_000_000) == pytest.approx(2 * 1e-4 + 4e-3)
    # 14 steps, each with an eighth
    assert LINK.all_reduce(8, 4_000_000) == pytest.approx(14 * 1e-4 + 7e-3)


def test_the_link_explains_the_messages_it_was_found_from() -> None:
    measured = {str(n_bytes): LINK.all_reduce(2, n_bytes) for n_bytes in (0, 1_000_000)}
    assert Link.of(measured) == Link(pytest.approx(1e-4), pytest.approx(1e9))


def test_the_model_repeats_the_pair_and_grows_with_processes_and_latency() -> None:
    one = {"rollout_seconds": 0.1, "update_seconds": 0.3, "parameters": 1_000_000}
    # 40 minibatches of 4.2 ms, and 0.05 s of 20 other messages
    seconds = {"rollout_seconds": 0.1, "update_seconds": 0.4, "message_seconds": 40 * 4.2e-3 + 0.05}
    pair = {**seconds, "messages": 60.0}
    model = Model(WORKLOADS["small"], one, pair, LINK)
    assert model.efficiency(2, LINK) == pytest.approx(0.4 / (0.5 + 40 * 4.2e-3 + 0.05))
    assert model.efficiency(8, LINK) == pytest.approx(0.4 / (0.5 + 40 * 8.4e-3 + 0.05 + 20 * 6e-4))
    slow = Link(latency=1e-3, bandwidth=1e9)
    assert model.efficiency(2, slow) == pytest.approx(0.4 / (0.5 + 40 * 6e-3 + 0.05 + 20 * 9e-4))


def quick_launch(n_processes: int, spec: Mapping[str, Any], *_: object, **__: object) -> dict[str, Any]:
    """Stand in for processes."""
    if "sizes" in spec:
        return {"seconds_by_bytes": {str(n_bytes): LINK.all_reduce(2, n_bytes) for n_bytes in spec["sizes"]}}
    if "arguments" in spec:
        if spec["env_id"] == "LunarLander-v3" and n_processes == 2:
            raise ValueError("no such environment")
        return {"curve": [None, *(float(n_processes * n) for n in range(1, N_POINTS))]}
    names = ("rollout_seconds", "update_seconds", "message_seconds", "messages", "message_bytes", "parameters")
    return {**dict.fromkeys(names, 1.0), "steps_per_second": 100.0 * n_processes}


@pytest.fixture
def in_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty working folder, no processes and no network."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(scaling, "launched", quick_launch)
    monkeypatch.setattr(processes, "launched", quick_launch)
    monkeypatch.setattr(scaling, "why_no_namespaces", lambda: "needs ip: install iproute2")
    return tmp_path


def test_scaling_keeps_and_tabulates_all_rows(in_folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert scaling.main([]) == 0
    runs = json.loads(Path("docs/results/scaling.json").read_text())["runs"]
    assert len(runs) == 1 + 3 * len(WORKLOADS)
    text = Path("docs/results/scaling.md").read_text()
    assert "| small | 2, half the environments each | 1.000 |" in text
    assert "Latency and bandwidth: this machine: 0.10 ms, 1,000 MB/s." in text
    assert "| wide | this machine | 100% | 66.7% |" in text  # 2 s alone; 2 s and 1 s of messages in a pair
    assert "messages-delayed: skipped, needs ip" in capsys.readouterr().out
    specs = {run["name"]: run["spec"] for run in runs}
    assert (specs["small-one"]["n_envs"], specs["small-strong"]["n_envs"]) == (8, 4)
    assert (specs["small-one"]["batch_size"], specs["small-strong"]["batch_size"]) == (256, 128)


def test_scaling_skips_what_is_done(in_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert scaling.main(["--only", "small-one"]) == 0
    monkeypatch.setattr(scaling, "launched", None)
    assert scaling.main(["--only", "small-one"]) == 0


def test_scaling_combines_no_runs_of_two_machines(in_folder: Path) -> None:
    assert scaling.main([]) == 0
    path = Path("docs/results/scaling.json")
    content = json.loads(path.read_text())
    for run in content["runs"]:
        if run["name"] in ("small-one", "large-weak"):
            run["versions"]["torch"] = "0"
    path.write_text(json.dumps(content))
    assert scaling.main(["--report"]) == 0
    predicted = Path("docs/results/scaling.md").read_text().partition("Latency and bandwidth")[2]
    assert "| wide | this machine | 100% |" in predicted
    assert "| small |" not in predicted and "| large |" not in predicted
    assert scaling.main(["--only", "small-one"]) == 0  # measured again, since it was made elsewhere
    assert "| small | this machine | 100% |" in Path("docs/results/scaling.md").read_text()


def test_processes_share_environments_and_minibatches(in_folder: Path) -> None:
    assert processes.main(["--seeds", "3", "4"]) == 1  # a row fails
    runs = json.loads(Path("docs/results/processes.json").read_text())["runs"]
    assert len(runs) == 5 * 2
    specs = {run["name"]: run["spec"] for run in runs}
    assert [specs[f"CartPole-v1-{n}"]["n_envs"] for n in (1, 2)] == [8, 4]
    assert [specs[f"CartPole-v1-{n}"]["arguments"]["batch_size"] for n in (1, 2)] == [256, 128]
    text = Path("docs/results/processes.md").read_text()
    assert "| CartPole-v1, 2 of 2 seeds | whole training | 20.0" in text and "LunarLander-v3, 0 of 2 seeds" in text
    assert Path("docs/results/processes.png").stat().st_size > 10_000


def test_processes_measure_messages(tmp_path: Path) -> None:
    found = launched(2, {"sizes": [1024, 4096]}, tmp_path / "log", seconds=600.0)
    assert found["seconds_by_bytes"].keys() == {"1024", "4096"} and min(found["seconds_by_bytes"].values()) > 0


def test_processes_that_fail_name_their_codes(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"the processes ended with codes \[1\]"):
        launched(1, {"sizes": ["many"]}, tmp_path / "log")
