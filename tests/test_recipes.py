"""The recipes of docs/recipes: what they start, and that a Ray cluster of two nodes makes their work."""

import csv
import json
import os
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import yaml
from test_bench_experiments import suite_file

from tests.bench.results import ROOT, clone_environment

RECIPES = ROOT / "docs" / "recipes"


@pytest.mark.parametrize(
    ("script", "arguments", "command"),
    [
        (
            "slurm_experiments.sh",
            ["defaults", "--quick"],
            "python -m tests.bench experiments defaults --quick --envs Pendulum-v1 --jobs 4",
        ),
        (
            "slurm_search.sh",
            ["--env", "CartPole-v1"],
            "python -m sb3_clipvf train -optimize --max-total-trials 200 --study-name search --storage search.log "
            "--env CartPole-v1",
        ),
        (
            "slurm_torchrun.sh",
            ["train.py"],
            "srun --cpus-per-task 4 torchrun --nnodes 2 --nproc-per-node 4 --max-restarts 3 --rdzv-id 7 "
            "--rdzv-backend c10d --rdzv-endpoint node1:29500 train.py",
        ),
    ],
)
def test_slurm_scripts_start_their_commands(tmp_path: Path, script: str, arguments: list[str], command: str) -> None:
    for program, text in {
        "python": 'echo "python $*"',
        "srun": 'echo "srun $*"',
        "scontrol": "printf 'node1\\nnode2\\n'",
    }.items():
        (tmp_path / program).write_text(f"#!/bin/sh\n{text}\n")
        (tmp_path / program).chmod(0o755)
    variables = {
        "PATH": f"{tmp_path}:{os.environ['PATH']}",
        "SLURM_ARRAY_TASK_ID": "2",
        "SLURM_CPUS_PER_TASK": "4",
        "SLURM_JOB_ID": "7",
        "SLURM_JOB_NODELIST": "node[1-2]",
        "SLURM_NNODES": "2",
    }
    done = subprocess.run([RECIPES / script, *arguments], env=variables, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == command


def test_the_cluster_file_is_one_of_ray() -> None:
    pytest.importorskip("ray")
    from ray.autoscaler._private.util import prepare_config, validate_config

    config = yaml.safe_load((RECIPES / "ray_cluster.yml").read_text())
    validate_config(prepare_config(config))
    assert all("ray start" in config[f"{kind}_start_ray_commands"][-1] for kind in ("head", "worker"))


@contextmanager
def two_nodes(folder: Path) -> Iterator[str]:
    """Start a Ray cluster of two nodes with a core each on this machine; its address."""
    with socket.socket() as free:
        free.bind(("", 0))
        port = free.getsockname()[1]
    ray = str(Path(sys.executable).parent / "ray")
    start = [ray, "start", "--block", "--num-cpus=1", "--disable-usage-stats"]
    nodes, logs = [], [folder / "head.log", folder / "other.log"]

    def begin(*options: str) -> None:
        with logs[len(nodes)].open("w") as log:
            nodes.append(subprocess.Popen([*start, *options], stdout=log, stderr=log, env=ray_environment()))

    try:
        begin("--head", f"--port={port}", "--include-dashboard=false")
        wait_for(lambda: "--address='" in logs[0].read_text())
        address = logs[0].read_text().partition("--address='")[2].partition("'")[0]
        begin(f"--address={address}")
        wait_for(lambda: "Ray runtime started." in logs[1].read_text())  # printed once the cluster has the node
        yield address
    finally:
        for node in reversed(nodes):
            node.terminate()
            try:
                node.wait(60)
            except subprocess.TimeoutExpired:
                node.kill()
                node.wait()


def wait_for(condition: Callable[[], bool]) -> None:
    """Wait until a condition holds, for some time at most."""
    until = time.monotonic() + 300
    while not condition():
        assert time.monotonic() < until, "a node does not start"
        time.sleep(1)


def ray_environment() -> dict[str, str]:
    """Variables of all processes that use the cluster: `ray start` asks for a token."""
    return clone_environment() | {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": "5" * 64}


@pytest.mark.slow
def test_two_nodes_make_experiments_and_searches(tmp_path: Path) -> None:
    """Also where a run fails."""
    pytest.importorskip("ray")

    def change(content: dict[str, Any]) -> None:
        content["settings"] = {"good": {}, "bad": {"clip_range": -1.0}}
        content["environments"] = {"CartPole-v1": {**content["environments"]["CartPole-v1"], "seeds": 1}}

    suite = suite_file(tmp_path, change)
    with two_nodes(tmp_path) as address:
        options = ["--ray", address, "--jobs", "2", "--out", str(tmp_path), "--log-folder", str(tmp_path / "logs")]
        command = [sys.executable, "-m", "tests.bench", "experiments", suite, *options]
        done = subprocess.run(
            command, env=ray_environment(), cwd=tmp_path, timeout=600, check=False, stdout=subprocess.PIPE, text=True
        )
        search = [
            "--env",
            "CartPole-v1",
            "-n",
            "64",
            "--n-trials",
            "1",
            "--n-evaluations",
            "1",
            "--storage",
            "search.log",
        ]
        command = [sys.executable, str(RECIPES / "ray_search.py"), "2", *search, "--study-name", "search"]
        variables = ray_environment() | {"RAY_ADDRESS": address}
        subprocess.run(command, env=variables, cwd=tmp_path, timeout=600, check=True)
    assert done.returncode == 1, done.stdout
    with (tmp_path / "small.csv").open() as file:
        (row,) = csv.DictReader(file)
    assert (row["setting"], row["num_timesteps"], row["jobs"]) == ("good", "64", "2")
    assert "CartPole-v1, bad, seed 1000: FAILED, ValueError: `clip_range` must be" in done.stdout
    log = tmp_path / "logs" / "small" / "CartPole-v1" / "bad" / "seed_1000" / "train.log"
    assert "Traceback (most recent call last)" in log.read_text()
    entries = [json.loads(line) for line in (tmp_path / "search.log").read_text().splitlines()]
    assert len({entry["worker_id"] for entry in entries}) >= 2
