"""Trainings on two processes of this machine: they compute what one process would, decide together and end together."""

import functools
import json
import multiprocessing
import os
import subprocess
import sys
import zipfile
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from datetime import timedelta
from multiprocessing.connection import Connection, Listener
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import distributed_cases as cases
import numpy as np
import pytest
import torch.distributed as dist
from stable_baselines3.common.env_util import make_vec_env
from stable_baselines3.common.running_mean_std import RunningMeanStd

from sb3_clipvf import ClipPPO, distributed
from sb3_clipvf.checkpoint import TrainingCheckpoint
from sb3_clipvf.checkpoint.file import newest_checkpoint
from sb3_clipvf.data_parallel import merge_running
from sb3_clipvf.distributed import ALONE, Group, LostProcessError, Moments, current_group, merged_moments
from sb3_clipvf.engines.selection import select_engine
from sb3_clipvf.zoo.checked_files import read_settings
from sb3_clipvf.zoo.comparison.records import read_record

SECONDS = 300  # a process starts in a few seconds on an idle machine


@functools.cache
def fork_servers() -> list[Connection]:
    """
    Connections to two processes that fork those of groups.

    The first two processes of each group iterate over sets in different orders, as any two interpreters do.
    """
    context, connections = multiprocessing.get_context("spawn"), []
    for _ in range(2):
        ours, theirs = context.Pipe()
        context.Process(target=cases.fork_server, args=(theirs,)).start()
        theirs.close()
        connections.append(ours)
    return connections


class Pair:
    """
    Two processes of one group, or more, which run functions of tests/distributed_cases.py.

    ``address`` is a folder or, for a group as under torchrun, the port of a store.
    """

    def __init__(self, address: Path | int, seconds: float = 600.0, size: int = 2) -> None:
        self.pipes, self.processes = [], []
        address = address if isinstance(address, int) else str(address / "group")
        with Listener(family="AF_UNIX") as listener:
            for rank in range(size):
                server = fork_servers()[rank % 2]
                server.send((rank, size, address, seconds, listener.address))
                self.processes.append((server, server.recv()))
                self.pipes.append(listener.accept())
        assert self.receive() == ["ready"] * size

    def receive(self) -> list[Any]:
        """What the processes send; None where one has ended."""
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
        self.send(name, *arguments)
        return self.receive()

    def send(self, name: str, *arguments: Any) -> None:
        """Start a function."""
        for pipe in self.pipes:
            pipe.send((name, arguments))

    def close(self) -> None:
        """End all processes."""
        for server, process in self.processes:
            server.send(process)
            server.recv()


@pytest.fixture(scope="module", autouse=True)
def _kernels() -> Iterator[None]:
    """Compile kernels before processes have to answer in time; end those that fork at the end."""
    for engine in ("fused", "native"):
        cases.whole_update(engine, (1,), 8, {})
    yield
    if fork_servers.cache_info().currsize:
        for connection in fork_servers():
            connection.close()
        fork_servers.cache_clear()


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


@pytest.fixture(scope="class")
def failing_pair(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Pair]:
    """Two processes for trainings that fail, each in a group of its own."""
    started = Pair(tmp_path_factory.mktemp("pair"))
    yield started
    started.close()


@pytest.fixture(scope="class")
def hanging(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[int | None, Pair]]:
    """Groups in which process 0 hangs, process 1, or all but the first one (None): their timeouts run side by side."""
    started = {
        rank: Pair(tmp_path_factory.mktemp("pair"), seconds=8.0, size=3 if rank is None else 2) for rank in (0, 1, None)
    }
    for rank, pair in started.items():
        pair.send(*(("gathering", None, 1000.0) if rank is None else ("failing_training", rank, "hang")))
    yield started
    for pair in started.values():
        pair.close()


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

    def test_gradients_of_one_process_count_in_both(self, pair: Pair) -> None:
        expected = [[0.25 * 4 + 0.75 * 5] * 2, [0.75 * 5] * 2, None]
        assert pair.run("partial_gradients") == [expected] * 2

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

    def test_the_progress_bar_counts_the_steps_of_both(self, pair: Pair) -> None:
        assert pair.run("training_with_progress_bar") == [(200, 200), None]

    def test_arguments_changed_by_a_callback_hold_in_both(self, pair: Pair) -> None:
        first, second = pair.run("changed_training")
        assert first == second and first[1:] == (6, 1e-4, 0.5)

    @pytest.mark.parametrize(
        ("event", "what", "engine"),
        [
            ("step", "weights", "native"),
            ("rollout_end", "weights", "native"),
            ("rollout_end", "moments", "native"),
            ("rollout_end", "moments", "autograd"),
            ("rollout_end", "options", "fused"),
            ("training_end", "weights", "autograd"),
        ],
    )
    def test_parameters_changed_by_a_callback_hold_in_both(
        self, pair: Pair, event: str, what: str, engine: str
    ) -> None:
        first, second = pair.run("parameters_changed_by_a_callback", event, what, engine)
        assert len(first[0]) == 3 and first == second

    @pytest.mark.parametrize("event", ["step", "training_end"])
    def test_controllers_that_a_callback_restarts_are_the_same_in_both(self, pair: Pair, event: str) -> None:
        first, second = pair.run("controllers_changed_by_a_callback", event)
        assert first == second and (first == (None, None)) is (event == "training_end")

    def test_a_function_set_by_a_callback_does_not_prevent_later_trainings(self, pair: Pair) -> None:
        first, second = pair.run("function_set_by_a_callback")
        assert first == second and first[0] == 384

    @pytest.mark.parametrize(
        ("event", "engine", "freezes"),
        [("training_start", "auto", True), ("rollout_end", "autograd", True), ("training_start", "autograd", False)],
    )
    def test_parameters_that_a_callback_freezes_are_frozen_in_both(
        self, pair: Pair, event: str, engine: str, freezes: bool
    ) -> None:
        (changes, first), (_, second) = pair.run("frozen_by_a_callback", event, engine, freezes)
        assert first == second and changes is not freezes and all(first[0]) is not freezes

    def test_statistics_that_the_first_process_freezes_stay_the_same_in_all(self, pair: Pair) -> None:
        first, second = pair.run("frozen_normaliser")
        assert first == second
        assert first[:2] == (False, pytest.approx(64 + 1e-4 + 4, abs=8))

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

    def test_each_process_saves_the_same_model(self, pair: Pair, tmp_path: Path) -> None:
        """Also where callbacks have changed arguments, and a checkpoint has named the training."""
        # 128 steps, then rollouts of 2 x 2 x 16 steps
        assert pair.run("saved_training", str(tmp_path)) == [(320, 4 * 3)] * 2
        of_process = {"_last_obs", "_last_episode_starts", "_last_original_obs", "start_time"}
        found = []
        for rank in range(2):
            model = ClipPPO.load(tmp_path / str(rank), device="cpu")
            attributes = model._saved_attributes()
            found.append({name: repr(value) for name, value in attributes.items() if name not in of_process})
            found[-1]["parameters"] = cases.parameters_of(model)
            with zipfile.ZipFile(tmp_path / f"{rank}.zip") as archive:
                found[-1]["training"] = str(json.loads(archive.read("data"))["_training_id"])
        assert found[0] == found[1] and found[0]["verbose"] == "1" and found[0]["training"] != "None"

    @pytest.mark.parametrize("normalizes", [False, True])
    def test_a_resumed_training_ends_with_the_same_bits(self, pair: Pair, tmp_path: Path, normalizes: bool) -> None:
        for whole, resumed, messages in pair.run("resumed_training", str(tmp_path), (0, 1), normalizes):
            assert whole == resumed and whole[0] == 512 and not messages

    @pytest.mark.parametrize("total", [0, 128])
    def test_a_checkpoint_before_the_first_rollout_holds_the_restored_random_states(
        self, pair: Pair, tmp_path: Path, total: int
    ) -> None:
        (before, after), _ = pair.run("copied_before_the_first_rollout", str(tmp_path), total)
        assert before == after

    @pytest.mark.parametrize("reader", [0, 1])
    def test_a_process_without_the_checkpoint_begins_new_episodes(
        self, pair: Pair, tmp_path: Path, reader: int
    ) -> None:
        (whole, first, _), (_, second, messages) = pair.run("resumed_training", str(tmp_path), (reader,), False)
        assert first[:2] == second[:2] and first[0] == (512 if reader == 0 else 256)
        assert first[1] != whole[1] and first[3] != second[3]
        assert len(messages) == 1 and "process 1 has not resumed from the checkpoint of the first one" in messages[0]

    def test_states_of_processes_reach_the_first_one_only(self, pair: Pair, tmp_path: Path) -> None:
        assert max(pair.run("largest_gathered", str(tmp_path))) < 5000  # a random state alone takes more

    def test_a_changed_number_of_processes_is_reported(self, pair: Pair, tmp_path: Path) -> None:
        cases.make_model().learn(64, callback=TrainingCheckpoint(64, tmp_path / "one"))
        first, second = pair.run("resumed_from_one", str(tmp_path / "one"))
        assert first[:2] == second[:2] and first[0] == 64 + 256 and first[2] != second[2]
        assert "the number of processes has changed from 1 to 2" in "".join(first[3])
        pair.run("resumed_training", str(tmp_path / "two"), (0, 1), False)
        with cases.logged() as messages:
            ClipPPO.resume(tmp_path / "two", make_vec_env("CartPole-v1", n_envs=2), device="cpu")
        assert "the number of processes has changed from 2 to 1" in "".join(messages)

    def test_more_processes_resume_with_the_environments_and_files_of_each(self, pair: Pair, tmp_path: Path) -> None:
        """Also with unequal numbers of environments, and a VecNormalize that the script builds unfrozen."""
        assert pair.run("monitored_training", str(tmp_path)) == [None, None]
        three = Pair(tmp_path, size=3)
        results = three.run("resumed_on_more_processes", str(tmp_path))
        three.close()
        assert [result[0] for result in results[:2]] == [True, True], results
        first, second, third = (result[1] for result in results)
        assert first == second == third and first[:2] == (96 + 6 * 32, None)

    def test_equal_rollouts_are_reported(self, pair: Pair) -> None:
        first, second = pair.run("copied_training")
        assert len(first) == len(second) == 1

    @pytest.mark.parametrize(("env_seed", "is_equal"), [(None, False), (5, True)])
    def test_without_a_seed_pools_differ_unless_they_are_seeded(
        self, pair: Pair, env_seed: int | None, is_equal: bool
    ) -> None:
        pytest.importorskip("envpool")
        first, second = pair.run("pools_without_a_seed", env_seed)
        assert len(first) == 2 and (first == second) is is_equal

    def test_seeds_that_are_too_large_in_another_process_are_refused(self, pair: Pair) -> None:
        for error in pair.run("training", {"seed": 2**32 - 2}, 64):
            assert isinstance(error, ValueError)
            assert "`seed` must be at most 4294967293 for 2 processes with 2 environments each, got 4294967294" in str(
                error
            )

    def test_an_engine_changed_in_a_rollout_is_that_of_both(self, pair: Pair) -> None:
        first, second = pair.run("engine_changed_in_a_rollout")
        assert first == second and first[0] == "fused"

    def test_checkpoints_hold_files_that_the_first_process_cannot_read(self, pair: Pair, tmp_path: Path) -> None:
        assert pair.run("files_elsewhere", str(tmp_path)) == [None, None]
        (state,) = newest_checkpoint(tmp_path / "checkpoints").tree["processes"]
        for index, environment in enumerate(state["environments"]["layers"][0]["environments"]):
            (file,) = (layer["file"] for layer in environment["layers"] if layer["file"] is not None)
            content = (tmp_path / "1" / f"{index}.monitor.csv").read_bytes()
            assert file["monitor_content"] == content and content.count(b"\n") > 2

    def test_a_resume_with_unequal_numbers_of_environments_warns_of_none(self, pair: Pair, tmp_path: Path) -> None:
        assert pair.run("resumed_with_unequal_numbers", str(tmp_path)) == [[], []]

    def test_the_rollout_of_all_processes_counts_for_schedules_that_end(self, pair: Pair) -> None:
        for messages in pair.run("short_training"):
            (message,) = messages
            assert message.startswith("learn() collects one rollout: `learning_rate` is 0 in its only update")

    def test_one_transition_in_each_process_is_normalised(self, pair: Pair) -> None:
        first, second = pair.run("smallest_training")
        assert first == second
        changed, _, (warning,) = first
        assert changed and "truncated mini-batch of size 1. We recommend" in warning

    def test_different_arguments_of_a_subclass_are_refused(self, pair: Pair) -> None:
        for error in pair.run("different_training", "gamma", [0.99, 0.9], True):
            assert isinstance(error, ValueError) and "must have the same `gamma`, got `gamma`: 0.99" in str(error)

    @pytest.mark.parametrize(
        ("name", "values"),
        [("batch_size", [16, 32]), ("gamma", [0.99, 0.9]), ("policy_kwargs", [{}, {"net_arch": [4]}])],
    )
    def test_different_arguments_are_refused_by_name(self, pair: Pair, name: str, values: list[Any]) -> None:
        shown = "policy" if name == "policy_kwargs" else f"`{name}`"
        for error in pair.run("different_training", name, values):
            assert isinstance(error, ValueError) and f"must have the same {shown}, got {shown}: " in str(error)


# Of the first 200 seeds of `random_training`: between them they draw each pair of two arguments' values, faults and
# callbacks that the 200 draw, and nine tenths of the triples.
SEEDS = """
0 1 11 12 13 16 17 18 20 21 24 29 31 33 34 36 37 39 40 43 47 48 53 54 58 61 66 67 68 69 70 75 79 88 92 98 99 100 103 105
108 111 116 117 119 123 124 131 134 137 141 145 153 155 156 162 167 174 176 177 178 186 189 199
"""


class TestRandomTrainings:
    """Whatever the processes decide, they end alike, and none waits for the other."""

    def test_processes_end_alike(self, own_pair: Pair, tmp_path: Path) -> None:
        ends: Counter[str] = Counter()
        for seed in map(int, SEEDS.split()):
            first, second = own_pair.run("random_training", str(tmp_path), seed)
            if isinstance(first, tuple):
                assert first == second, f"seed {seed}"
                ends["complete"] += 1
                continue
            assert isinstance(first, str) and isinstance(second, str), f"seed {seed}: {first}, {second}"
            kinds = {text.partition(":")[0] for text in (first, second)}
            if len(kinds) == 2:
                (lost,) = (text for text in (first, second) if text.startswith("LostProcessError"))
                (other,) = kinds - {"LostProcessError"}
                assert f"failed with {other}: " in lost, f"seed {seed}: {first}, {second}"
                ends["one error"] += 1
            else:
                assert kinds != {"LostProcessError"}, f"seed {seed}: {first}, {second}"
                ends["one error in both"] += 1
        assert len(ends) == 3 and min(ends.values()) > 3, ends


class TestErrors:
    """What the error says in each process."""

    def test_the_notes_name_the_checkpoints_of_the_first_process(self, failing_pair: Pair, tmp_path: Path) -> None:
        first, second = failing_pair.run("error_of", str(tmp_path), "failing_after_a_checkpoint")
        folder = tmp_path / "checkpoints"
        assert (first[0], second[0]) == ("LostProcessError", "ZeroDivisionError")
        assert f"Its last complete checkpoint is {folder}/checkpoint_" in first[3]
        assert second[3].endswith(
            f"Process 0 runs the callbacks. If it has written checkpoints to {folder}, resume from the newest one."
        )

    def test_the_others_repeat_that_a_worker_has_died(self, failing_pair: Pair, tmp_path: Path) -> None:
        first, second = failing_pair.run("error_of", str(tmp_path), "losing_a_worker")
        assert second[:2] == ("WorkerDiedError", "a worker has died")
        assert "process 1 failed with WorkerDiedError: a worker has died" in first[1]

    def test_the_process_with_nan_in_an_update_writes_the_file(self, failing_pair: Pair, tmp_path: Path) -> None:
        first, second = failing_pair.run("error_of", str(tmp_path), "nan_in_update", 1)
        assert first[:3] == second[:3] and first[0] == "NonFiniteError"
        assert "Its cause: `advantages` of environment 0 at step 0 of the rollout of process 1, got nan" in first[1]
        (path,) = (tmp_path / "checkpoints").glob("nonfinite_*")
        assert path == first[2] and path.name == "nonfinite_256_process1.npz"
        assert np.isnan(np.load(path)["advantages"]).sum() == 1

    def test_the_first_process_writes_the_file_of_an_overflow(self, failing_pair: Pair, tmp_path: Path) -> None:
        first, second = failing_pair.run("error_of", str(tmp_path), "nan_in_update", None)
        assert first[:3] == second[:3] and "No single transition is its cause" in first[1]
        assert [path.name for path in (tmp_path / "checkpoints").glob("nonfinite_*")] == ["nonfinite_128.npz"]

    def test_a_nan_in_a_step_is_written_to_the_folder_of_the_checkpoints(
        self, failing_pair: Pair, tmp_path: Path
    ) -> None:
        first, second = failing_pair.run("error_of", str(tmp_path), "nan_in_step")
        assert second[0] == "NonFiniteError" and second[2].parent == tmp_path / "checkpoints"
        assert np.isnan(np.load(second[2])["new_observations"]).any()
        assert f"process 1 failed with NonFiniteError: {second[1]}" in first[1]

    @pytest.mark.parametrize(("signals", "end"), [(False, "since process 1 failed with Non"), (True, "exit code 143")])
    def test_a_nan_in_another_process_writes_no_checkpoint(
        self, failing_pair: Pair, tmp_path: Path, signals: bool, end: str
    ) -> None:
        """Not even if a signal comes before the first process notices the error."""
        first, second = failing_pair.run("error_of", str(tmp_path), "nan_after_a_copy", signals)
        assert end in first[1] and second[0] == "NonFiniteError"
        assert not [*(tmp_path / "checkpoints").glob("checkpoint_*")]

    def test_resets_after_checkpoints_are_refused(self, failing_pair: Pair, tmp_path: Path) -> None:
        for error in failing_pair.run("error_of", str(tmp_path), "training_with_resets"):
            assert "`reset_envs` must be False in a run on several processes, got True" in error[1]

    def test_a_device_without_a_backend_is_refused(self, failing_pair: Pair, tmp_path: Path) -> None:
        for error in failing_pair.run("without_a_backend", str(tmp_path)):
            assert isinstance(error, ValueError)
            assert "has a backend, got cpu and the backends cuda:gloo" in str(error)


class TestFaults:
    @pytest.mark.parametrize("bad_rank", [0, 1])
    def test_an_error_ends_both(self, own_pair: Pair, bad_rank: int) -> None:
        results = own_pair.run("failing_training", bad_rank, "raise")
        assert isinstance(results[bad_rank], ZeroDivisionError)
        error = results[1 - bad_rank]
        assert isinstance(error, LostProcessError)
        assert f"since process {bad_rank} failed with ZeroDivisionError: a planted error" in str(error)

    def test_a_killed_process_ends_the_other(self, own_pair: Pair) -> None:
        first, second = own_pair.run("failing_training", 1, "exit")
        assert second is None
        assert isinstance(first, LostProcessError) and "since process 1 has ended or does not respond" in str(first)

    def test_an_error_is_not_that_of_an_earlier_training(self, own_pair: Pair) -> None:
        first, second = own_pair.run("failing_twice")
        assert isinstance(first, LostProcessError) and second is None
        assert "since process 1 has ended or does not respond" in str(first)

    @pytest.mark.parametrize("bad_rank", [0, 1])
    def test_a_process_that_hangs_ends_the_other(self, hanging: dict[int | None, Pair], bad_rank: int) -> None:
        pipe = hanging[bad_rank].pipes[1 - bad_rank]
        assert pipe.poll(SECONDS), "the process waits for the one that hangs"
        error = pipe.recv()
        assert isinstance(error, LostProcessError)
        assert f"since process {bad_rank} has ended or does not respond" in str(error)

    def test_only_the_process_that_has_ended_is_named(self) -> None:
        """Process 1 is connected to the ended one by processes 0 and 2, which stop waiting."""
        store = dist.TCPStore("localhost", 0, is_master=True, wait_for_workers=False)  # as torchrun has one
        started = Pair(store.port, size=4)
        for error in started.run("gathering", 3, 0.0)[:3]:
            assert "since process 3 has ended or does not respond" in str(error)
        started.close()

    def test_processes_that_may_have_ended_are_all_named(self, hanging: dict[int | None, Pair]) -> None:
        (pipe, *_) = hanging[None].pipes
        assert pipe.poll(SECONDS), "the process waits for those that sleep"
        assert "since at least one of the processes 1, 2 has ended or does" in str(pipe.recv())


SCRIPT = """
import atexit, contextlib, pathlib, sys, time
def count():
    names = []
    for path in pathlib.Path("/proc/self/task").glob("*/comm"):
        with contextlib.suppress(OSError):  # the thread ended meanwhile
            names.append(path.read_text())
    return sum("gloo" in name for name in names)
def report():
    until = time.monotonic() + 30
    while count() and time.monotonic() < until:  # the kernel removes a thread a moment after it has ended
        time.sleep(0.05)
    sys.stdout.write(f"{count()} threads of gloo\\n")
atexit.register(report)  # before the process joins the group, so that it runs after it has left the group
import os, subprocess, time
import distributed_cases as cases
from sb3_clipvf import ClipPPO
from sb3_clipvf.distributed import current_group
is_first = current_group().rank == 0
if is_first:  # while the other one waits for a file
    cases.make_model().save("first")
    ClipPPO.load("first")
    pathlib.Path("loaded").touch()
while not pathlib.Path("loaded").exists():
    time.sleep(0.05)
with cases.failing_env(current_group().rank, int(sys.argv[1]), "raise"):
    model = cases.make_model().learn(600)
if is_first:
    model.save("trained")
    subprocess.run([sys.executable, "child.py"], check=True, timeout=500)
# In one piece, since torchrun turns buffers off
sys.stdout.write(f"{current_group()} {model.num_timesteps}\\n")
"""

CHILD = """
import distributed_cases as cases
from sb3_clipvf import ClipPPO
model = ClipPPO.load("trained", env=cases.make_vec_env("CartPole-v1", n_envs=2)).learn(64)
sys.stdout.write(f"a child trained {model.num_timesteps} steps\\n")
"""

RESUMING_SCRIPT = """
import os, pathlib, sys
import distributed_cases as cases
from stable_baselines3.common.env_util import make_vec_env
from sb3_clipvf import ClipPPO, distributed
from sb3_clipvf.checkpoint import TrainingCheckpoint
from sb3_clipvf.distributed import current_group

rank, is_first = current_group().rank, os.environ["TORCHELASTIC_RESTART_COUNT"] == "0"
env = make_vec_env("CartPole-v1", n_envs=2)
if any(pathlib.Path("checkpoints").glob("checkpoint_*.zip")):
    model = ClipPPO.resume("checkpoints", env, device="cpu")
else:
    model = cases.make_model(env)
start = model.num_timesteps
checkpoint = TrainingCheckpoint(every_timesteps=128, path="checkpoints")
try:
    with cases.failing_env(rank, int(sys.argv[1]) if is_first else -1, sys.argv[2]):
        model.learn(640 - start, reset_num_timesteps=False, callback=checkpoint)
except BaseException as error:
    pathlib.Path(f"end_{rank}").write_text(repr(error))
    raise
pathlib.Path(f"weights_{rank}").write_bytes(cases.parameters_of(model))
sys.stdout.write(f"{start} to {model.num_timesteps}\\n")
"""

LAUNCHER = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]


def launched(folder: Path, *arguments: str, **variables: str) -> subprocess.CompletedProcess[str]:
    """Run a script or a module on two processes of torchrun, in a folder."""
    return subprocess.run(
        [*LAUNCHER, *arguments],
        capture_output=True,
        text=True,
        timeout=2 * SECONDS,
        cwd=folder,
        env={**os.environ, "PYTHONPATH": str(Path(__file__).resolve().parents[1]), **variables},
        check=False,
    )


class TestTorchrun:
    @pytest.mark.parametrize("bad_rank", [-1, 1])
    def test_a_script_needs_no_change(self, tmp_path: Path, bad_rank: int) -> None:
        script = tmp_path / "script.py"
        for path, text in ((script, SCRIPT), (tmp_path / "child.py", CHILD)):
            path.write_text(f"import sys\nsys.path.insert(0, {str(Path(__file__).parent)!r})\n{text}")
        done = launched(tmp_path, str(script), str(bad_rank))
        if bad_rank < 0:
            assert done.returncode == 0, done.stderr
            assert "Group(rank=0, size=2) 640" in done.stdout and "Group(rank=1, size=2) 640" in done.stdout
            assert "a child trained 64 steps" in done.stdout
            # Otherwise they may abort the process at its end.
            assert done.stdout.count("0 threads of gloo") == 2
        else:
            assert done.returncode != 0 and "ZeroDivisionError: a planted error" in done.stderr

    def test_a_restart_continues_after_a_process_was_lost(self, pair: Pair, tmp_path: Path) -> None:
        """The killed, the hanging and the uninterrupted training end with the same weights."""
        script = tmp_path / "script.py"
        script.write_text(f"import sys\nsys.path.insert(0, {str(Path(__file__).parent)!r})\n{RESUMING_SCRIPT}")

        def run(bad_rank: int, how: str) -> list[bytes]:
            folder = tmp_path / how
            folder.mkdir()
            variables = {"SB3_CLIPVF_TIMEOUT": "20"} if how == "hang" else {}
            done = launched(folder, "--max-restarts=1", str(script), str(bad_rank), how, **variables)
            assert done.returncode == 0, done.stderr
            assert done.stdout.count("128 to 640") == 2, done.stdout
            if how == "exit":
                # torchrun sends a signal as soon as the other process has ended.
                end = (folder / "end_0").read_text()
                assert end == "SystemExit(143)" or "process 1 has ended or does not respond" in end
            return [(folder / f"weights_{rank}").read_bytes() for rank in range(2)]

        with ThreadPoolExecutor(2) as pool:  # one waits for the process that hangs
            killed, hung = pool.map(run, (1, 0), ("exit", "hang"))
        assert len({*killed, *hung, *pair.run("checkpointed_training", str(tmp_path / "whole"))}) == 1

    def test_the_command_trains_one_model_and_resumes_it(self, tmp_path: Path) -> None:
        def train(*options: str) -> str:
            done = launched(tmp_path, "-m", "sb3_clipvf", "train", *options)
            assert done.returncode == 0, done.stderr
            return done.stdout

        evaluations = ["--eval-freq", "256", "--eval-episodes", "1"]
        out = train("--env", "CartPole-v1", "-n", "512", "--checkpoint-freq", "256", "-P", *evaluations)
        (run,) = (tmp_path / "logs" / "clipppo").iterdir()
        assert np.load(run / "evaluations.npz")["timesteps"].tolist() == [256, 512]
        assert out.count("Saving to") == 1
        options = read_settings(run / "CartPole-v1" / "args.yml")
        (state,) = newest_checkpoint(run / "checkpoints").tree["processes"]
        assert "monitor_content" not in repr(state)  # only the first process has files
        assert f"Seed: {options['seed']}\n" in out and options["n_processes"] == 2
        out = train("--resume", str(run), "-n", "1024")
        assert "The run now ends at step 1024" in out and out.count("Saving to") == 1
        assert [*(tmp_path / "logs" / "clipppo").iterdir()] == [run]
        assert np.load(run / "evaluations.npz")["timesteps"].tolist() == [256, 512, 768, 1024]
        # Files of the first process hold half of the steps.
        assert 512 < read_record(run)[0].episodes.steps[-1] <= 1024


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


def test_a_restart_ignores_entries_of_earlier_launches() -> None:
    store, names = dist.HashStore(), set()
    for _ in range(3):
        with ThreadPoolExecutor(3) as pool:
            joining = [
                pool.submit(distributed._name_of_this_launch, store, rank, 3, timedelta(seconds=SECONDS))
                for rank in (2, 1, 0)
            ]
            (name,) = {each.result() for each in joining}
        names.add(name)
    assert len(names) == 3


@pytest.mark.parametrize(
    ("gpus", "backend"),
    [
        (("a", "b", "c"), "cpu:gloo,cuda:nccl"),
        (("a", "b", "a"), "gloo"),
        (("a", "", "c"), "gloo"),
        (("", "", ""), "gloo"),
    ],
)
def test_all_processes_have_one_backend(gpus: tuple[str, ...], backend: str) -> None:
    """Machines may have different numbers of GPUs, of which each process may see its own only."""
    store = dist.HashStore()
    with ThreadPoolExecutor(3) as pool:
        chosen = pool.map(lambda rank: distributed._common_backend(store, rank, 3, gpus[rank]), range(3))
    assert set(chosen) == {backend}


@pytest.mark.parametrize("value", ["0", "-1", "soon", "inf"])
def test_a_timeout_must_be_positive(monkeypatch: pytest.MonkeyPatch, value: str) -> None:
    monkeypatch.setenv("SB3_CLIPVF_TIMEOUT", value)
    with pytest.raises(ValueError, match="`SB3_CLIPVF_TIMEOUT` must be a positive number of seconds, got "):
        distributed._timeout()


def test_processes_of_torchrun_have_ranks_before_they_connect_and_their_children_are_alone(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def set_launch(port: int) -> None:
        names = {"TORCHELASTIC_RUN_ID": "id", "MASTER_PORT": port, "RANK": 1, "WORLD_SIZE": 2, "LOCAL_RANK": 1}
        for name, value in names.items():
            monkeypatch.setenv(name, str(value))

    monkeypatch.setenv(distributed._OWNER, "")
    set_launch(1)
    assert current_group() == current_group() == Group(1, 2) and not dist.is_initialized()
    launch, _, pid = os.environ[distributed._OWNER].rpartition(" ")
    monkeypatch.setenv(distributed._OWNER, f"{launch} {int(pid) + 1}")  # the parent's
    assert current_group() is ALONE
    with cases.logged() as messages:
        cases.make_model().learn(64)
    assert "torchrun did not start it, but a parent process" in "".join(messages)
    monkeypatch.setenv(distributed._OWNER, "")
    with monkeypatch.context() as patch, cases.logged() as messages:
        patch.setattr(multiprocessing, "parent_process", lambda: SimpleNamespace(pid=1))  # as in its workers
        assert current_group() is ALONE
        distributed.warn_about_child()
    assert "torchrun did not start it, but a parent process" in "".join(messages)
    set_launch(2)  # by a torchrun that a process of another one has started
    assert current_group() == Group(1, 2)


def test_leaving_twice_masks_no_error(monkeypatch: pytest.MonkeyPatch) -> None:
    """A signal may interrupt the first time."""

    def fail() -> None:
        raise KeyError("half destroyed")

    for name, value in {"_has_joined": True, "_has_failed": False, "_Notes": lambda *_: None}.items():
        monkeypatch.setattr(distributed, name, value)
    monkeypatch.setattr(dist, "is_initialized", lambda: True)
    monkeypatch.setattr(dist, "destroy_process_group", fail)
    monkeypatch.setattr(dist.distributed_c10d, "_abort_process_group", fail)
    with pytest.raises(ZeroDivisionError), Group(0, 2).failing_together():
        raise ZeroDivisionError


def test_one_process_is_alone() -> None:
    assert current_group() is ALONE and ALONE.gather(3) == [3] and ALONE.broadcast("a") == "a"
