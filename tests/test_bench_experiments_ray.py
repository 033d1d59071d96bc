"""``python -m tests.bench experiments --ray``: runs as tasks of a Ray cluster."""

import signal
import subprocess
import sys
import time
from dataclasses import replace
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from test_bench_experiments import suite_file
from test_bench_experiments_runs import MAKE, record_of, run_with, spec_of

from tests.bench.experiments import main
from tests.bench.experiments.executors import Finished
from tests.bench.experiments.ray_executor import RayExecutor, make_on_node
from tests.bench.experiments.runs import IN_PROGRESS_CODE, Record, this_machine
from tests.bench.results import clone_environment


def test_missing_ray_is_reported(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(sys.modules, "ray", None)
    with pytest.raises(SystemExit):
        main([suite_file(tmp_path), "--ray", "--log-folder", str(tmp_path), "--out", str(tmp_path)])
    assert "`--ray` needs Ray: " in capsys.readouterr().err


@pytest.mark.parametrize("address", ["127.0.0.1:1", "127.0.0.1:99999"])
def test_address_without_a_cluster_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str], address: str) -> None:
    pytest.importorskip("ray")
    with pytest.raises(SystemExit):
        main([suite_file(tmp_path), "--ray", address, "--log-folder", str(tmp_path), "--out", str(tmp_path)])
    assert f"`--ray` must be the address of a running Ray cluster, got '{address}' (" in capsys.readouterr().err


def test_node_of_other_versions_makes_no_run(tmp_path: Path) -> None:
    versions = {**this_machine()["versions"], "numpy": "0.1"}
    with pytest.raises(ValueError, match=r"node .* has numpy '.*' \(now '0.1'\): install the same versions there"):
        make_on_node(spec_of(tmp_path / "run"), versions)
    assert not (tmp_path / "run").exists()


def test_node_leaves_out_a_run_that_another_command_makes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run_with(monkeypatch, f"raise SystemExit({IN_PROGRESS_CODE})")
    assert make_on_node(spec_of(tmp_path / "run"), this_machine()["versions"]) is None


class FakeRay(SimpleNamespace):
    """What the executor uses of Ray, with tasks that are made one after the other, on a node with other folders."""

    class RayError(Exception):
        """An error of a task."""

    def __init__(self, node: Path) -> None:
        self.exceptions = SimpleNamespace(RayError=self.RayError)
        self.side_by_side: list[int] = []
        self.was_shut_down = False
        self._node = node

    def init(self, **options: Any) -> None:
        self.options = options

    def remote(self, **options: Any) -> Any:
        return lambda make: SimpleNamespace(remote=partial(partial, make))

    def wait(self, references: list[Any]) -> tuple[list[Any], list[Any]]:
        self.side_by_side.append(len(references))
        return references[:1], references[1:]

    def get(self, reference: Any) -> Finished:
        make, (spec, versions) = reference.func, reference.args
        if spec.seed == 1001:
            raise self.RayError("its node\ndied")
        finished: Finished = make(replace(spec, folder=self._node / spec.folder.name), versions)
        return finished

    def shutdown(self) -> None:
        self.was_shut_down = True


def test_runs_of_nodes_with_folders_of_their_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    record_of().write(tmp_path / "made.json")
    run_with(monkeypatch, MAKE, str(tmp_path / "made.json"))
    fake = FakeRay(tmp_path / "node")
    monkeypatch.setitem(sys.modules, "ray", fake)
    specs = [spec_of(tmp_path / "here" / str(seed), seed=seed) for seed in (1000, 1001, 1002)]
    lost, *made = sorted(RayExecutor("", 2).run(specs), key=lambda one: one.spec.seed != 1001)
    of_two = replace(record_of(), jobs=2)  # in the whole cluster
    assert fake.options["num_cpus"] == 2
    assert (lost.spec, lost.record, lost.error) == (specs[1], None, "died")
    assert [(one.spec.seed, one.record) for one in made] == [(1000, of_two), (1002, of_two)]
    assert Record.read(tmp_path / "here" / "1000" / "record.json") == of_two  # the next command skips it
    assert (tmp_path / "node" / "1000" / "starts").exists()
    assert fake.side_by_side == [2, 2, 1] and fake.was_shut_down


@pytest.mark.slow
def test_interrupted_runs_of_a_cluster_write_a_checkpoint(tmp_path: Path) -> None:
    """On a cluster of this machine; tests/test_recipes.py has one of two nodes."""
    pytest.importorskip("ray")

    def change(content: dict[str, Any]) -> None:
        content["settings"] = {"good": {}}
        environment = content["environments"]["CartPole-v1"]
        content["environments"] = {"CartPole-v1": {**environment, "seeds": 1, "steps": 100_000_000}}

    command = [sys.executable, "-m", "tests.bench", "experiments", suite_file(tmp_path, change), "--ray"]
    process = subprocess.Popen(
        [*command, "--out", str(tmp_path), "--log-folder", str(tmp_path / "logs")],
        env=clone_environment(),
        cwd=tmp_path,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    folder = tmp_path / "logs" / "small" / "CartPole-v1" / "good" / "seed_1000" / "clipppo" / "CartPole-v1_1"
    try:
        until = time.monotonic() + 240  # a cluster starts, and kernels may have to be compiled, on a busy machine
        monitor = folder / "0.monitor.csv"
        while not (monitor.exists() and monitor.stat().st_size > 1000):
            assert time.monotonic() < until, "the training has made no episodes"
            time.sleep(0.1)
        process.send_signal(signal.SIGTERM)
        printed = process.communicate(timeout=300)[0]
    finally:
        process.kill()
    assert process.returncode == 130, printed
    assert len(list((folder / "checkpoints").glob("checkpoint_*.zip"))) == 1
