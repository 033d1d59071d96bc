"""``python -m tests.bench growth``: its axes, its tables and its figure."""

import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import psutil
import pytest

from tests.bench import growth, growth_report, speed, speed_child
from tests.bench.growth_report import bound_of, write_figure
from tests.bench.growth_rows import AXES, Axis
from tests.bench.results import Results
from tests.bench.speed_rows import SpeedRow
from tests.bench.speed_table import KEY, entries_of

# A stand-in for the measured process. SB3 takes 100 µs a transition, ClipPPO 20, and the bounds are 100,000 steps/s.
CHILD = """
import json, sys
task = json.loads(sys.argv[-1])
us = {"clipppo": (4, 6, 10), "sb3": (10, 40, 50)}.get(task["peer"], (10, 0, 0))
split = {f"{name}_seconds": part / 1000 for name, part in zip(("environment", "policy", "update"), us)}
more = {"steps": 1000, "steps_per_second": 1e6 / sum(us), "products_seconds": 0.005, "peak_megabytes": 1234.5}
print(json.dumps(split | more | {"engine": "e", "torch_threads": 1, "other_seconds": 0.0, "startup_seconds": 1.0}))
"""


@pytest.fixture
def in_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty working folder and the stand-in."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(psutil, "cpu_percent", lambda interval: 5.0)
    monkeypatch.setattr(speed, "CHILD_COMMAND", (sys.executable, "-c", CHILD))
    monkeypatch.setattr(speed, "COMPILE_COMMAND", (sys.executable, "-c", ""))
    return tmp_path


def axis(name: str) -> Axis:
    return next(axis for axis in AXES if axis.name == name)


def test_one_size_grows_on_each_axis() -> None:
    sizes = {
        "cartpole-envs": (1, 8, 64, 512),
        "halfcheetah-envs": (1, 8, 64, 512),
        "width": (64, 128, 256, 512, 1024),
        "batch": (64, 256, 1024, 4096, 16_384),
        "rollout": (2048, 16_384, 131_072, 1_048_576),
    }
    assert {axis.name: axis.values for axis in AXES} == sizes
    for name, of in {
        "cartpole-envs": lambda row: row.n_envs,
        "halfcheetah-envs": lambda row: row.n_envs,
        "width": lambda row: row.settings["policy_kwargs"]["net_arch"][0],
        "batch": lambda row: row.settings["batch_size"],
        "rollout": lambda row: row.n_steps * row.n_envs,
    }.items():
        rows = axis(name).rows()
        assert {size: of(row) for size, row in rows.items()} == {size: size for size in rows}
        # No last minibatch is smaller than the others.
        assert all(row.n_steps * row.n_envs % row.settings["batch_size"] == 0 for row in rows.values())
        if name != "rollout":
            assert len({row.n_steps * row.n_envs for row in rows.values()}) == 1
        if name != "batch":
            assert len({row.settings["batch_size"] for row in rows.values()}) == 1
        assert {(row.threads, row.peers) for row in rows.values()} == {(1, ("clipppo", "sb3"))}


@pytest.mark.slow
@pytest.mark.parametrize("axis", AXES, ids=lambda axis: axis.name)
def test_first_point_of_each_axis_runs(axis: Axis) -> None:
    row = axis.rows()[axis.values[0]]
    if (reason := row.missing()) is not None:
        pytest.skip(reason)
    for peer in ("clipppo", "sb3"):
        quick = row.quick()
        assert speed_child.measure_peer(quick, peer, 1)["steps"] == 2 * quick.n_steps * quick.n_envs


def test_tables_and_figure(in_folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert growth.main(["--rows", "cartpole-envs-8", "width-64"]) == 0
    text = Path("docs/results/growth.md").read_text()
    assert text.startswith("Made by `python -m tests.bench growth`.\n\n**Environments, CartPole-v1 in ")
    lines = [line for line in text.splitlines() if line.startswith(("| 1 |", "| 8 |", "| 64 |"))]
    measured = "50,000 | 10,000 | 5.0 |"
    parts = "4 + 6 + 10 | 10 + 40 + 50 | 1,234 | 1,234 |"
    assert lines == [
        "| 1 | not run |  |  |  |  |  |  |  |  |",
        f"| 8 | {measured} 66,667 | 75% | {parts}",  # 1 s for 100,000 environment steps, and 0.5 for the products
        "| 64 | not run |  |  |  |  |  |  |  |  |",
        *["| 1 | not run |  |  |  |  |  |  |  |  |", "| 8 | not run |  |  |  |  |  |  |  |  |"],
        "| 64 | not run |  |  |  |  |  |  |  |  |",
        f"| 64 | {measured} 200,000 | 25% | {parts}",  # the products alone
        "| 64 | not run |  |  |  |  |  |  |  |  |",
    ]
    assert "- " in text.partition("Machines and versions:")[2]
    assert Path("docs/results/growth.png").read_bytes().startswith(b"\x89PNG")
    assert "2 rounds to measure" in capsys.readouterr().out


def test_quick_points_are_tabulated_by_their_sizes(in_folder: Path) -> None:
    assert growth.main(["--rows", "rollout-1048576", "--quick"]) == 0
    assert "| 1,048,576 | 50,000 |" in Path("logs/bench/growth-quick.md").read_text()
    assert not Path("docs").exists()


@pytest.mark.parametrize("device", ["auto", "cuda"])
def test_results_of_other_devices_have_files_of_their_own(
    in_folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], device: str
) -> None:
    monkeypatch.setattr(speed, "_gpu_name", lambda: "a GPU")
    on_gpu = CHILD.replace('"products_seconds": 0.005, ', "").replace('"engine"', '"device": "cuda", "engine"')
    monkeypatch.setattr(speed, "CHILD_COMMAND", (sys.executable, "-c", on_gpu))
    assert growth.main(["--device", device, "--list"]) == 0
    assert len(capsys.readouterr().out.splitlines()) == sum(len(axis.values) for axis in AXES)
    assert growth.main(["--device", device, "--only", "width-64"]) == 0
    files = ("json", "md", "png")
    assert sorted(path.name for path in Path("docs/results").iterdir()) == [f"growth-{device}.{end}" for end in files]
    assert "| 64 | 50,000 | 10,000 | 5.0 |  |  |" in Path(f"docs/results/growth-{device}.md").read_text()


def test_row_without_results_says_why(in_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(SpeedRow, "missing", lambda row: "needs it" if row.name == "halfcheetah-envs-1" else None)
    monkeypatch.setattr(speed, "CHILD_COMMAND", (sys.executable, "-c", "raise SystemExit('it broke')"))
    assert growth.main(["--rows", "halfcheetah-envs-1", "width-64"]) == 1
    text = Path("docs/results/growth.md").read_text()
    assert "| 1 | needs it |" in text
    assert "| 64 | failed |" in text


def stored(row: SpeedRow, peer: str, **values: Any) -> dict[str, Any]:
    where = {"cpu": "C", "cores": 2, "versions": {"python": "3"}}
    split = {"environment_seconds": 0.1, "policy_seconds": 0.2, "update_seconds": 0.3, "peak_megabytes": 100.0}
    return entries_of(row, peer, "1") | where | split | {"steps": 1000} | values


def test_bound_needs_the_environments_unless_they_are_free(tmp_path: Path) -> None:
    row = axis("cartpole-envs").rows()[8]
    results = Results(tmp_path / "r.json", KEY)
    assert bound_of(results, row, 1) is None
    results.add(stored(row, "clipppo", steps_per_second=10.0, products_seconds=0.25))
    assert bound_of(results, row, 1) is None
    free = replace(row, env="free", peer_env="free")
    results.add(stored(free, "clipppo", steps_per_second=10.0, products_seconds=0.25))
    assert bound_of(results, free, 1) == 4000.0
    results.add(stored(row, "clipppo", steps_per_second=10.0, products_seconds=0.25))
    results.add(stored(row, "bound_clipppo", steps_per_second=4000.0))
    assert bound_of(results, row, 1) == 2000.0


def test_figure_draws_cost_above_memory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    drawn: list[tuple[str, dict[str, dict[int, float]], bool]] = []
    draw = growth_report._draw

    def note(panel: Any, axis: Axis, curves: Any, labelled: bool) -> None:
        drawn.append((axis.name, curves, labelled))
        draw(panel, axis, curves, labelled)

    monkeypatch.setattr(growth_report, "_draw", note)
    width, batch = axis("width"), axis("batch")
    results = Results(tmp_path / "r.json", KEY)
    for size, speed_ in ((64, 50_000.0), (128, 20_000.0)):
        row = width.rows()[size]
        results.add(stored(row, "clipppo", steps_per_second=speed_, products_seconds=0.008))
        results.add(stored(row, "sb3", steps_per_second=10_000.0, peak_megabytes=50.0))
    write_figure(results, {axis: axis.rows() for axis in (width, batch)}, 1, tmp_path / "figure.png")
    nothing: dict[int, float] = {}
    costs = {"SB3": {64: 100.0, 128: 100.0}, "ClipPPO": {64: 20.0, 128: 50.0}, "bound": {64: 8.0, 128: 8.0}}
    assert drawn == [
        ("width", costs, True),
        ("width", {"SB3": {64: 50.0, 128: 50.0}, "ClipPPO": {64: 100.0, 128: 100.0}}, True),
        ("batch", {"SB3": nothing, "ClipPPO": nothing, "bound": nothing}, False),
        ("batch", {"SB3": nothing, "ClipPPO": nothing}, False),
    ]
    assert (tmp_path / "figure.png").read_bytes().startswith(b"\x89PNG")
