"""Trainings on two processes of this machine: they compute what one process would, decide together and end together."""

import multiprocessing
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import distributed_cases as cases
import numpy as np
import pytest
from stable_baselines3.common.running_mean_std import RunningMeanStd

from sb3_clipvf.data_parallel import check_same, merge_running
from sb3_clipvf.distributed import ALONE, Group, LostProcessError, Moments, current_group, merged_moments
from sb3_clipvf.engines.selection import select_engine

SECONDS = 60  # a process starts in a few seconds on an idle machine


class Pair:
    """Two processes of one group, which run functions of tests/distributed_cases.py."""

    def __init__(self, folder: Path) -> None:
        context = multiprocessing.get_context("spawn")
        self.pipes, self.processes = [], []
        for rank in range(2):
            ours, theirs = context.Pipe()
            process = context.Process(target=cases.serve, args=(rank, 2, str(folder / "group"), theirs), daemon=True)
            process.start()
            theirs.close()
            self.pipes.append(ours)
            self.processes.append(process)
        self.receive()

    def receive(self) -> list[Any]:
        """What the two processes send; None where one has ended."""
        results = []
        for pipe in self.pipes:
            assert pipe.poll(SECONDS), "a process does not answer"
            try:
                results.append(pipe.recv())
            except EOFError:
                results.append(None)
        return results

    def run(self, name: str, *arguments: Any) -> list[Any]:
        """The results of a function, or the errors that it raised."""
        for pipe in self.pipes:
            pipe.send((name, arguments))
        return self.receive()

    def close(self) -> None:
        """End both processes."""
        for process in self.processes:
            process.kill()
            process.join(SECONDS)


@pytest.fixture(scope="module")
def pair(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Pair]:
    """Two processes that all tests of this file share."""
    started = Pair(tmp_path_factory.mktemp("pair"))
    yield started
    started.close()


@pytest.fixture
def own_pair(tmp_path: Path) -> Iterator[Pair]:
    """Two processes that a test may end."""
    started = Pair(tmp_path)
    yield started
    started.close()


UPDATES: dict[str, tuple[tuple[int, ...], int, dict[str, Any]]] = {
    "plain": ((2, 2), 8, {"kl_coef": 0.0, "clip_range_vf": None}),
    "all_terms": ((2, 2), 8, {}),
    "truncated": ((2, 2), 6, {}),
    "unequal": ((3, 2), 12, {}),
    "rollout": ((3, 2), 12, {"advantage_scope": "rollout"}),
    "not_normalised": ((2, 2), 8, {"normalize_advantage": False, "vf_clip": "prediction"}),
    "target_kl": ((2, 2), 8, {"target_kl": 0.004}),
}


class TestUpdate:
    """Two processes with N environments each make the update of one process with 2 N environments."""

    @pytest.mark.parametrize("case", UPDATES)
    @pytest.mark.parametrize("engine", ["autograd", "fused", "native"])
    def test_equals_the_update_of_one_process(self, pair: Pair, engine: str, case: str) -> None:
        n_envs, batch_size, changes = UPDATES[case]
        first, second = pair.run("shared_update", engine, n_envs, batch_size, changes)
        parameters, statistics, counts = cases.whole_update(engine, n_envs, batch_size, changes)
        assert first[0].tobytes() == second[0].tobytes() and first[1:] == second[1:]
        assert first[2] == counts
        # Sums over parts are rounded differently, and Adam's first steps divide by small gradients.
        np.testing.assert_allclose(first[0], parameters, rtol=2e-4, atol=2e-5)
        assert first[1] == pytest.approx(statistics, rel=2e-4, abs=1e-5)

    def test_target_kl_stops_early(self) -> None:
        n_envs, batch_size, changes = UPDATES["target_kl"]
        _, _, (n_epochs, _, _, runs_to_its_end) = cases.whole_update("autograd", n_envs, batch_size, changes)
        assert not runs_to_its_end and n_epochs < cases.N_EPOCHS

    @pytest.mark.parametrize("engine", ["autograd", "fused", "native"])
    def test_nan_in_one_process_skips_the_minibatch_in_both(self, pair: Pair, engine: str) -> None:
        first, second = pair.run("update_with_nan", engine, "skip")
        assert first[0].tobytes() == second[0].tobytes() and np.isfinite(first[0]).all()
        assert first[2] == second[2] == (3, 3, {9}, True)  # one of four minibatches in each of three epochs

    def test_nan_in_one_process_raises_in_both(self, pair: Pair) -> None:
        first, second = pair.run("update_with_nan", "autograd", "raise")
        assert first == second and "must be finite" in first[2]

    def test_different_numbers_of_minibatches_are_refused(self, pair: Pair) -> None:
        for error in pair.run("shared_update", "autograd", (3, 1), 8, {}):
            assert isinstance(error, ValueError) and "equally many minibatches in all processes, got [3, 1]" in str(
                error
            )

    @pytest.mark.parametrize("engine", ["cuda_graph", "cuda_graph_bf16"])
    def test_graphs_are_refused(self, engine: str) -> None:
        policy = cases.make_policy()
        buffer = cases.make_buffer(policy, 1)

        class Settings:
            group = Group(0, 2)

        with pytest.raises(ValueError, match=f"{engine!r}, which cannot: it trains in a single process only"):
            select_engine(engine, policy, Settings(), buffer)  # type: ignore[arg-type]


class TestTraining:
    @pytest.mark.parametrize(
        "changes",
        [
            {},
            {"engine": "native", "adaptive_kl_target": 0.01, "kl_coef": 1.0, "lr_kl_target": 0.01},
            {"clip_range_vf": 1.0, "advantage_scope": "rollout", "policy_kwargs": {"net_arch": [8]}},
        ],
    )
    def test_all_processes_have_one_policy(self, pair: Pair, changes: dict[str, Any]) -> None:
        first, second = pair.run("training", changes, 300)
        assert first["parameters"] == second["parameters"] != first["initial"] != second["initial"]
        assert first["controllers"] == second["controllers"]
        assert first["num_timesteps"] == second["num_timesteps"] == 384  # 3 rollouts of 2 x 2 x 32 steps
        assert (first["calls"], second["calls"]) == (96, 0)
        assert first["episodes"] == second["episodes"] and len(first["episodes"]) > 4

    def test_seeds_are_those_of_more_environments(self, pair: Pair) -> None:
        first, second = pair.run("training", {}, 1)
        env = cases.make_vec_env("CartPole-v1", n_envs=4, seed=3)
        np.testing.assert_array_equal(np.concatenate([first["starts"], second["starts"]]), env.reset())

    def test_a_callback_stops_both(self, pair: Pair) -> None:
        assert pair.run("stopped_training", 70) == [2, 2]  # in the third rollout of 32 steps

    def test_arguments_changed_by_a_callback_hold_in_both(self, pair: Pair) -> None:
        first, second = pair.run("changed_training")
        assert first == second and first[1:] == (6, 1e-4)

    def test_statistics_of_vec_normalize_are_those_of_all_data(self, pair: Pair) -> None:
        first, second = pair.run("normalised_training")
        for mine, others in zip(first[:5], second[:5], strict=True):
            np.testing.assert_array_equal(mine, others)
        whole = RunningMeanStd(shape=(4,))
        whole.update(np.concatenate([*first[5], *second[5]]))
        assert first[2] == first[4] + 4 == whole.count == 1e-4 + 128 + 4  # the observations of the first reset
        np.testing.assert_allclose(first[0], whole.mean, rtol=1e-5, atol=1e-7)
        np.testing.assert_allclose(first[1], whole.var, rtol=1e-5)

    def test_a_loaded_training_continues_in_both(self, pair: Pair, tmp_path: Path) -> None:
        first, second = pair.run("loaded_training", str(tmp_path / "model.zip"))
        assert first == second and first[0] == 256

    def test_only_the_first_process_resumes_its_episodes(self, pair: Pair, tmp_path: Path) -> None:
        (first, first_obs), (second, second_obs) = pair.run("resumed_training", str(tmp_path))
        assert first == second and first[0] == 512
        assert (first_obs != second_obs).any()

    def test_equal_rollouts_are_reported(self, pair: Pair) -> None:
        first, second = pair.run("copied_training")
        assert len(first) == len(second) == 1

    @pytest.mark.parametrize(
        ("name", "values"),
        [("batch_size", [16, 32]), ("gamma", [0.99, 0.9]), ("policy_kwargs", [{}, {"net_arch": [4]}])],
    )
    def test_different_arguments_are_refused_by_name(self, pair: Pair, name: str, values: list[Any]) -> None:
        shown = "policy" if name == "policy_kwargs" else f"`{name}`"
        for error in pair.run("different_training", name, values):
            assert isinstance(error, ValueError) and f"must have the same {shown}, got {shown}: " in str(error)


class TestFaults:
    @pytest.mark.parametrize("bad_rank", [0, 1])
    def test_an_error_ends_both(self, own_pair: Pair, bad_rank: int) -> None:
        started = time.monotonic()
        results = own_pair.run("failing_training", bad_rank, "raise")
        assert time.monotonic() - started < 30
        assert isinstance(results[bad_rank], ZeroDivisionError)
        error = results[1 - bad_rank]
        assert isinstance(error, LostProcessError)
        assert f"since process {bad_rank} failed with ZeroDivisionError: a planted error" in str(error)

    def test_a_killed_process_ends_the_other(self, own_pair: Pair) -> None:
        started = time.monotonic()
        first, second = own_pair.run("failing_training", 1, "exit")
        assert time.monotonic() - started < 30 and second is None
        assert isinstance(first, LostProcessError) and "a process has ended or does not respond" in str(first)


SCRIPT = """
import atexit, pathlib, sys
def report():
    names = [path.read_text().strip() for path in pathlib.Path("/proc/self/task").glob("*/comm")]
    sys.stdout.write(f"{sum('gloo' in name for name in names)} threads of gloo\\n")
atexit.register(report)  # before the process joins the group, so that it runs after it has left the group
import distributed_cases as cases
from sb3_clipvf.distributed import current_group
with cases.failing_env(current_group().rank, int(sys.argv[1]), "raise"):
    model = cases.make_model().learn(600)
# In one piece, since torchrun turns buffers off
sys.stdout.write(f"{current_group()} {model.num_timesteps}\\n")
"""

LAUNCHER = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]


class TestTorchrun:
    @pytest.mark.parametrize("bad_rank", [-1, 1])
    def test_a_script_needs_no_change(self, tmp_path: Path, bad_rank: int) -> None:
        script = tmp_path / "script.py"
        script.write_text(f"import sys\nsys.path.insert(0, {str(Path(__file__).parent)!r})\n{SCRIPT}")
        done = subprocess.run(
            [*LAUNCHER, str(script), str(bad_rank)], capture_output=True, text=True, timeout=2 * SECONDS, check=False
        )
        if bad_rank < 0:
            assert done.returncode == 0, done.stderr
            assert "Group(rank=0, size=2) 640" in done.stdout and "Group(rank=1, size=2) 640" in done.stdout
            # Otherwise they may abort the process at its end.
            assert done.stdout.count("0 threads of gloo") == 2
        else:
            assert done.returncode != 0 and "ZeroDivisionError: a planted error" in done.stderr

    def test_the_command_trains_one_model(self, tmp_path: Path) -> None:
        command = ["-m", "sb3_clipvf", "train", "--env", "CartPole-v1", "-n", "512", "--eval-freq", "256"]
        done = subprocess.run(
            [*LAUNCHER, *command, "--eval-episodes", "1"],
            capture_output=True,
            text=True,
            timeout=2 * SECONDS,
            cwd=tmp_path,
            env={**os.environ, "PYTHONPATH": str(Path(__file__).resolve().parents[1])},
            check=False,
        )
        assert done.returncode == 0, done.stderr
        (run,) = (tmp_path / "logs" / "clipppo").iterdir()
        assert np.load(run / "evaluations.npz")["timesteps"].tolist() == [256, 512]
        assert done.stdout.count("Saving to") == 1


class TestMoments:
    def test_merged_moments_are_those_of_all_numbers(self) -> None:
        numbers = np.array([1.0, 5.0, -2.0, 4.0, 4.0])
        merged = merged_moments([Moments.of(numbers[:2]), Moments.of(numbers[2:]), Moments.of(numbers[:0])])
        assert (merged.n, merged.mean) == (5, pytest.approx(2.4))
        assert merged.variance == pytest.approx(numbers.var()) and merged.sample_std == pytest.approx(
            numbers.std(ddof=1)
        )

    def test_running_statistics_are_those_of_all_data(self) -> None:
        rows = np.random.default_rng(0).normal(1000.0, 1.0, size=(90, 3))
        common, whole, parts = RunningMeanStd(shape=(3,)), RunningMeanStd(shape=(3,)), []
        common.update(rows[:30])
        for added in (rows[30:50], rows[50:]):
            part = common.copy()
            part.update(added)
            parts.append([(part.mean, part.var, part.count)])
        whole.update(rows[:30])
        whole.update(rows[30:])
        own = common.copy()
        merge_running([own], [(common.mean, common.var, common.count)], parts)
        assert own.count == pytest.approx(whole.count)
        np.testing.assert_allclose(own.mean, whole.mean, rtol=1e-12)
        np.testing.assert_allclose(own.var, whole.var, rtol=1e-9)

    def test_statistics_without_new_data_keep_their_bits(self) -> None:
        common = RunningMeanStd(shape=())
        common.update(np.array([0.1, 0.7]))
        own, moments = common.copy(), (common.mean, common.var, common.count)
        merge_running([own], [moments], [[moments], [moments]])
        assert (own.mean, own.var, own.count) == moments


def test_one_process_is_alone() -> None:
    assert current_group() is ALONE and ALONE.gather(3) == [3] and ALONE.broadcast("a") == "a"


def test_equal_descriptions_are_accepted() -> None:
    check_same([{"a": 1}, {"a": 1}])
    with pytest.raises(ValueError, match="Processes 0 and 1 must have the same a, b, got a: 1 and 2; b: None and 3"):
        check_same([{"a": 1}, {"a": 2, "b": 3}])
