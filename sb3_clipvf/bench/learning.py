"""
``sb3-clipvf bench learning``: train with the shipped settings, evaluate, and keep a table of the returns.

Each run is one process of the train command. Its result goes into a JSON file when it is there, so that the benchmark
can be stopped at any time; the same command goes on with what is missing.
"""

from __future__ import annotations

import argparse
import os
import shlex
import subprocess
import sys
import threading
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from pathlib import Path
from typing import Any, TextIO

from sb3_clipvf.bench.learning_table import Row, render_table, run_of
from sb3_clipvf.bench.results import Results, check_row_names, machine, sigterm_interrupts, write_text
from sb3_clipvf.validation import check_int

# Replaced in tests, which need a train command of a second.
TRAIN_COMMAND: tuple[str, ...] = (sys.executable, "-m", "sb3_clipvf", "train")
_SEEDS = [1, 2, 3]
_FIXED_KL = ("clip_range:None", "kl_coef:1.0")
# Seed 1 ended at 149, 148, 225 and -95 with a coefficient of 0.3, 1, 3 and 10 and the shipped 4 epochs, and at 254 with
# 3 and 10 epochs, seed 3 at 183: without a clip a larger penalty holds the policy back over more epochs. A rate that
# falls to 0 from 5e-4 gave 238 (mean of three seeds), minibatches of 128 and a rate from 1e-3 gave 242.
_FIXED_KL_LANDER = ("clip_range:None", "kl_coef:3.0", "n_epochs:10", "batch_size:128", "learning_rate:'lin_1e-3'")
_ADAPTIVE_KL = (*_FIXED_KL, "adaptive_kl_target:0.01")
# The settings of the squashed policy on MountainCarContinuous-v0 stand here and nowhere else.
# log_std_init 2 makes first forces near the bounds, which swing the car up the hill often enough to learn from.
_SQUASHED_MOUNTAIN_CAR: tuple[str, ...] = (
    "policy:'SquashedMlpPolicy'",
    "use_sde:False",
    "policy_kwargs:dict(log_std_init=2.0)",
)


# Comparisons: best on-policy entry of the RL Zoo's benchmark.md, one run each.
ROWS: tuple[Row, ...] = (
    Row("CartPole-v1", "CartPole-v1", 100_000, 500, "500"),
    Row("MountainCarContinuous-v0", "MountainCarContinuous-v0", 50_000, 92, "92.5 (trpo), 88.3 (ppo at 20k)"),
    Row("Pendulum-v1", "Pendulum-v1", 100_000, -170, "-163", n_episodes=100),
    Row("Acrobot-v1", "Acrobot-v1", 500_000, -80, "-73.5", n_episodes=100),
    Row("LunarLander-v3", "LunarLander-v3", 1_000_000, 240, "242", n_episodes=100),
    Row("BipedalWalker-v3", "BipedalWalker-v3", 5_000_000, 290, "300 (a2c), 288 (ppo)", n_episodes=100),
    Row("CartPole-v1-fixed-kl", "CartPole-v1", 100_000, 500, "", _FIXED_KL),
    Row("CartPole-v1-adaptive-kl", "CartPole-v1", 100_000, 500, "", _ADAPTIVE_KL),
    Row("LunarLander-v3-fixed-kl", "LunarLander-v3", 1_000_000, 240, "", _FIXED_KL_LANDER, n_episodes=100),
    Row("LunarLander-v3-adaptive-kl", "LunarLander-v3", 1_000_000, 240, "", _ADAPTIVE_KL, n_episodes=100),
    Row("MountainCarContinuous-v0-squashed", "MountainCarContinuous-v0", 50_000, 92, "", _SQUASHED_MOUNTAIN_CAR),
)


def train_arguments(row: Row, seed: int, log_folder: Path) -> list[str]:
    """
    Make the options of one run's train command.

    :param row: the row
    :param seed: the run's seed
    :param log_folder: where this run alone writes
    :return: the options; one thread and the CPU, so that runs side by side do not slow each other
    """
    options = ["--algo", row.algo, "--env", row.env_id, "--seed", str(seed), "-n", str(row.n_timesteps)]
    options += ["-f", str(log_folder), "--eval-freq", "-1", "--num-threads", "1", "--device", "cpu", "--verbose", "0"]
    return [*options, "-params", *row.params] if row.params else options


class Benchmark:
    """
    Runs that are still to be made, and how they are made.

    :param results: where results are kept
    :param log_folder: folder of the runs and of what their processes print
    :param jobs: number of runs side by side
    :param out: where progress is told
    """

    def __init__(self, results: Results, log_folder: Path, jobs: int, out: TextIO) -> None:
        self.results, self.log_folder, self.jobs, self._out = results, log_folder, jobs, out
        self.failed: list[str] = []
        self._stop = threading.Event()
        self._lock = threading.Lock()  # one evaluation at a time: it sets the process's random states
        self._processes: set[subprocess.Popen[bytes]] = set()

    def say(self, text: str) -> None:
        """
        Tell of progress, at once.

        :param text: one line
        """
        self._out.write(text + "\n")
        self._out.flush()

    def run(self, todo: Sequence[tuple[Row, int]]) -> None:
        """
        Make the runs, ``jobs`` at a time.

        :param todo: rows and seeds
        :raises KeyboardInterrupt: when it was interrupted, after ending the processes it started
        """
        with ThreadPoolExecutor(self.jobs) as pool:
            futures = [pool.submit(self._run_one, row, seed) for row, seed in todo]
            try:
                for future in as_completed(futures):
                    future.result()
            except BaseException:
                self._stop.set()
                for process in list(self._processes):
                    process.terminate()
                pool.shutdown(cancel_futures=True)
                raise

    def _run_one(self, row: Row, seed: int) -> None:
        if self._stop.is_set():
            return
        folder = self.log_folder / row.name / f"seed_{seed}"
        folder.mkdir(parents=True, exist_ok=True)
        self.say(f"{row.name}, seed {seed}: training {row.n_timesteps:,} steps, log in {folder / 'train.log'}")
        options = train_arguments(row, seed, folder)
        start = time.perf_counter()
        code = self._train(options, folder / "train.log")
        wall_seconds = time.perf_counter() - start
        if self._stop.is_set():
            return
        if code != 0:
            self._fail(row, seed, f"the train command ended with code {code}, see {folder / 'train.log'}")
            return
        with self._lock:
            try:
                result = self._evaluate(row, seed, folder)
            except ValueError as error:  # no model, or one that is not whole: no reason to stop the other rows
                self._fail(row, seed, str(error))
                return
            command = "sb3-clipvf train " + shlex.join(options)
            result |= {"wall_seconds": round(wall_seconds, 3), "jobs": self.jobs, "command": command, **machine()}
            self.results.add(result)
        self.say(
            f"{row.name}, seed {seed}: {result['mean_return']:.2f} +/- {result['std_return']:.2f} "
            f"(goal {row.goal:g}), {wall_seconds:,.0f} s"
        )

    def _train(self, options: list[str], log_path: Path) -> int:
        # One thread for numerical libraries: two runs of several threads each would fight for the cores.
        environment = os.environ | {"OMP_NUM_THREADS": "1"}
        with log_path.open("wb") as log:
            process = subprocess.Popen(
                [*TRAIN_COMMAND, *options], stdin=subprocess.DEVNULL, stdout=log, stderr=log, env=environment
            )
            self._processes.add(process)
            try:
                if self._stop.is_set():  # it was set between the check before and the process's start
                    process.terminate()
                return process.wait()
            finally:
                self._processes.discard(process)

    def _evaluate(self, row: Row, seed: int, folder: Path) -> dict[str, Any]:
        import torch as th

        from sb3_clipvf.runs import evaluate_run, find_run, read_hyperparams, read_training_curve

        threads = th.get_num_threads()
        th.set_num_threads(1)  # other runs are training beside it
        try:
            run = find_run(folder, row.env_id, row.algo)
            evaluation = evaluate_run(run, row.n_episodes, device="cpu")
        finally:
            th.set_num_threads(threads)
        if evaluation.num_timesteps < row.n_timesteps:
            # The Zoo saves the model and ends with code 0 when it is interrupted.
            raise ValueError(f"the training was interrupted at step {evaluation.num_timesteps:,}")
        curve = read_training_curve(run.folder, evaluation.num_timesteps)
        speed = curve.steps_per_second
        return {
            **run_of(row, seed),
            "goal": row.goal,
            "comparison": row.comparison,
            "mean_return": evaluation.mean,
            "std_return": evaluation.std,
            "returns": evaluation.returns,
            "deterministic": evaluation.deterministic,
            "evaluation_seed": evaluation.seed,
            "num_timesteps": evaluation.num_timesteps,
            "steps_per_second": None if speed is None else round(speed, 1),
            "hyperparams": read_hyperparams(run),
        }

    def _fail(self, row: Row, seed: int, reason: str) -> None:
        self.failed.append(f"{row.name}, seed {seed}")
        self.say(f"{row.name}, seed {seed}: FAILED, {reason}")


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="sb3-clipvf bench learning",
        description="Train with the shipped settings and table the returns. Stop it with Ctrl-C; it goes on later.",
    )
    parser.add_argument("--jobs", type=int, default=1, help="runs side by side (default: %(default)s)")
    parser.add_argument("--only", nargs="+", metavar="NAME", help="these rows only, see --list (default: all)")
    parser.add_argument("--seeds", type=int, nargs="+", default=_SEEDS, help="(default: 1 2 3)")
    parser.add_argument("--out", type=Path, default=Path("docs/results/learning.json"), help="(default: %(default)s)")
    parser.add_argument("--table", type=Path, default=Path("docs/results/learning.md"), help="(default: %(default)s)")
    parser.add_argument("--log-folder", type=Path, default=Path("logs/bench"), help="(default: %(default)s)")
    parser.add_argument("--list", action="store_true", help="list the rows and what is done, and run nothing")
    parser.add_argument("--rerun", action="store_true", help="make runs again whose results are there")
    return parser


def _select(names: Sequence[str] | None) -> list[Row]:
    if names is None:
        return list(ROWS)
    check_row_names("--only", names, (row.name for row in ROWS), "sb3-clipvf bench learning")
    return [row for row in ROWS if row.name in names]


def _write_table(results: Results, seeds: Sequence[int], path: Path) -> None:
    command = "sb3-clipvf bench learning"
    if list(seeds) != _SEEDS:
        command += f" --seeds {' '.join(map(str, seeds))}"
    # Of all rows, so that --only leaves those of before in the table.
    write_text(path, render_table(results, ROWS, seeds, command))


def _list(rows: Sequence[Row], seeds: Sequence[int], results: Results) -> None:
    width = max(len(row.name) for row in rows)
    for row in rows:
        done = [seed for seed in seeds if results.find(run_of(row, seed))]
        sys.stdout.write(
            f"{row.name:<{width}}  {row.n_timesteps:>9,} steps  goal {row.goal:>4g}  done: "
            f"{' '.join(map(str, done)) or 'none'}  {' '.join(row.params)}".rstrip()
            + "\n"
        )


def main(argv: Sequence[str] | None = None) -> int:
    """
    Run ``sb3-clipvf bench learning``.

    :param argv: its options; None takes the process's own
    :return: exit code: 0, 1 where a run failed, 130 where it was interrupted
    :raises ValueError: for unknown rows, numbers out of range, or a results file that is none
    """
    args = _parser().parse_args(argv)
    check_int("--jobs", args.jobs, 1, "Pass the number of runs side by side, at most the number of cores.")
    seeds = [check_int("--seeds", seed, 0, "Pass numbers from 0.") for seed in dict.fromkeys(args.seeds)]
    rows, results = _select(args.only), Results(args.out)
    if args.list:
        _list(rows, seeds, results)
        return 0
    # Seeds outermost: a benchmark stopped early has each row once before any row has two.
    todo = [(row, seed) for seed in seeds for row in rows if args.rerun or results.find(run_of(row, seed)) is None]
    n_done = len(rows) * len(seeds) - len(todo)
    sys.stdout.write(f"{len(todo)} runs to make, {n_done} are done already (--rerun makes them again).\n")
    benchmark = Benchmark(results, args.log_folder, args.jobs, sys.stdout)
    try:
        with sigterm_interrupts():  # else the training processes would go on alone
            benchmark.run(todo)
    except KeyboardInterrupt:
        sys.stdout.write("\nInterrupted. The same command goes on with what is missing.\n")
        return 130
    finally:
        _write_table(results, seeds, args.table)
        sys.stdout.write(f"Results: {args.out}\nTable:   {args.table}\n")
    if benchmark.failed:
        sys.stdout.write(f"Failed: {'; '.join(benchmark.failed)}. The same command tries them again.\n")
        return 1
    return 0
