"""The command of experiments: its options, the runs that are missing, and the progress."""

from __future__ import annotations

import argparse
import contextlib
import shlex
import time
from collections.abc import Mapping, Sequence
from pathlib import Path

from tests.bench.command import at_least, sigterm_interrupts
from tests.bench.experiments.executors import Executor, Finished, LocalExecutor
from tests.bench.experiments.finished import SuiteRuns
from tests.bench.experiments.report import write_report
from tests.bench.experiments.runs import LOG_FILE, check_folder
from tests.bench.experiments.suite import Suite
from tests.bench.experiments.suite_file import read_suite, suite_names
from tests.bench.experiments.tables import SuiteTable
from tests.bench.time_left import time_left

LOG_FOLDER = Path("logs/bench/experiments")
RESULTS = Path("docs/results/experiments")
_SCORES = {"last 100 episodes": "last_return", "training": "mean_return", "evaluation": "evaluation_mean"}
_ABOUT = (
    "Train all settings of a suite in all its environments, with many seeds. Stop it with Ctrl-C; the same command "
    "resumes with what is missing, and with the checkpoints of interrupted runs."
)


class Campaign:
    """
    The runs of a suite that are missing, and the table that they are added to.

    :param suite: the suite
    :param table: results of the suite
    :param log_folder: folder of the runs' own files
    :param jobs: number of parallel runs, for the table and the time left
    :raises ValueError: if the table or a run's folder holds something else, before anything runs
    """

    def __init__(self, suite: Suite, table: SuiteTable, log_folder: Path, jobs: int) -> None:
        self._suite, self._table, self._jobs = suite, table, jobs
        self.runs = suite.runs(log_folder)
        table.check(self.runs)
        self.todo = [(setting, spec) for setting, spec in self.runs if not table.is_done(setting, spec)]
        for _, spec in self.todo:
            check_folder(spec)
        self.failed: dict[str, str] = {}  # label -> reason

    def run(self, executor: Executor) -> None:
        """Make the missing runs, and print a line for each."""
        n_done = len(self.runs) - len(self.todo)
        print(f"{len(self.todo)} runs to make, {n_done} are done already; {self._time_left()}", flush=True)
        setting_of = {spec.folder: setting for setting, spec in self.todo}
        started, n_steps, n_ended = time.perf_counter(), 0, 0
        with contextlib.closing(executor.run([spec for _, spec in self.todo])) as ended:
            for finished in ended:
                spec, n_ended = finished.spec, n_ended + 1
                self.todo = [(setting, other) for setting, other in self.todo if other.folder != spec.folder]
                setting = setting_of[spec.folder]
                if finished.record is None:
                    self.failed[spec.label] = finished.error
                    # The place of the log is this machine's own.
                    error = finished.error.removesuffix(f", see {spec.folder / LOG_FILE}")
                    self._table.add_failure(setting, spec, error)
                else:
                    self._table.add(setting, spec, finished.record, finished.record.jobs or self._jobs)
                    n_steps += spec.n_timesteps if finished.is_whole else 0
                speed = n_steps / max(time.perf_counter() - started, 1e-9)
                place = f"[{n_done + n_ended:>{len(str(len(self.runs)))}}/{len(self.runs)}]"
                print(f"{place} {_summary(finished)} | {speed:,.0f} steps/s, {self._time_left()}", flush=True)
        if self.todo:
            print(f"{len(self.todo)} runs are left out, since another command makes them.", flush=True)

    def listed(self) -> str:
        """Return a line for each environment and setting: the steps, how many seeds are done, and their scores."""
        lines = []
        # A score between random actions and the best result is a mean over all environments.
        where = " over all environments" if self._suite.best_result_score else ""
        for environment in self._suite.environments:
            for setting in self._suite.settings_of(environment):
                specs = [s for name, s in self.runs if name == setting and s.env_id == environment.env_id]
                rows = [row for s in specs if (row := self._table.find(setting, s)) is not None]
                n_done = sum(self._table.is_done(setting, spec) for spec in specs)
                steps = f"{environment.n_timesteps:>10,} steps"
                scores = "".join(f", {text}" for text in _mean_scores(rows))
                expected = self._suite.settings[setting].expected
                source = f" (expected{where}: {expected})" if expected else ""
                end = f"{n_done} of {len(specs)} seeds done{scores}{source}"
                lines.append(f"{environment.env_id:<26} {setting:<22} {steps}  {end}\n")
        return "".join(lines) + f"{len(self.todo)} of {len(self.runs)} runs to make; {self._time_left()}"

    def _time_left(self) -> str:
        todo = [(spec.env_id, spec.n_timesteps) for _, spec in self.todo]
        rows = [row for row in self._table.rows if row["run_seconds"]]  # of a resumed run, it is not known
        done = [(row["env"], float(row["steps"]), float(row["run_seconds"])) for row in rows]
        return time_left(todo, done, self._jobs)


def main(argv: Sequence[str] | None = None) -> int:
    """Run a suite, and return the exit code: 0, 1 after failures, 130 after an interruption."""
    parser = _parser()
    args = parser.parse_args(argv)
    try:
        whole = read_suite(args.suite)
        suite = whole.only(args.envs, args.settings)
        if args.quick:
            whole = suite = suite.quick()
        suite.check_settings()
        table = SuiteTable(args.out or (args.log_folder / "results" if args.quick else RESULTS), suite.name)
        if args.report:
            # The score of the paper needs the best run of all settings.
            runs = SuiteRuns(suite, table, whole if whole.best_result_score else None)
        else:
            campaign = Campaign(suite, table, args.log_folder.absolute(), args.jobs)
    except (ImportError, TypeError, ValueError) as error:
        parser.error(str(error))
    if args.report:
        # A report of a part must not replace that of all runs.
        name = f"{suite.name}-part" if args.envs or args.settings else suite.name
        files = write_report(runs, f"{parser.prog} {shlex.join(argv or ())}", name)
        print("Report: " + "\n        ".join(map(str, files)), flush=True)
        return 0
    if args.list:
        print(campaign.listed(), flush=True)
        return 0
    try:
        executor = _executor(args.ray, args.jobs)
    except (ImportError, ValueError) as error:
        parser.error(str(error))
    try:
        with sigterm_interrupts():  # otherwise the processes that it started would outlive it
            campaign.run(executor)
    except KeyboardInterrupt:
        print("\nInterrupted. The same command resumes with what is missing.", flush=True)
        return 130
    print(f"Results: {table.path}", flush=True)
    if campaign.failed:
        reasons = "".join(f"\n  {label}: {reason}" for label, reason in campaign.failed.items())
        print(
            f"Failed:{reasons}\nThe tracebacks are in {LOG_FILE} of each run. The same command tries again.", flush=True
        )
    return 1 if campaign.failed else 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m tests.bench experiments", description=_ABOUT)
    about = f"{', '.join(suite_names())}, or a .yml file of your own"
    parser.add_argument("suite", help=about)
    parser.add_argument(
        "--quick", action="store_true", help="a minute of the suite, to try it; results in --log-folder"
    )
    parser.add_argument("--envs", nargs="+", metavar="ENV", help="these environments only (default: all)")
    parser.add_argument("--settings", nargs="+", metavar="NAME", help="these settings only (default: all)")
    about = "write the tables and figures of the finished runs, and run nothing; of a part, into <suite>-part.md"
    parser.add_argument("--report", action="store_true", help=about)
    parser.add_argument("--list", action="store_true", help="list what is done and what is to make, and run nothing")
    about = "parallel runs, at most the number of cores (default: %(default)s)"
    parser.add_argument("--jobs", type=at_least(1), default=1, help=about)
    about = "make the runs on the Ray cluster of this address, without one on a new cluster of this machine"
    parser.add_argument("--ray", nargs="?", const="", metavar="ADDRESS", help=about)
    parser.add_argument("--out", type=Path, help=f"folder of results (default: {RESULTS})")
    parser.add_argument("--log-folder", type=Path, default=LOG_FOLDER, help="(default: %(default)s)")
    return parser


def _executor(address: str | None, jobs: int) -> Executor:
    """Return the executor of this machine, or that of the Ray cluster at an address ("": a new one)."""
    if address is None:
        return LocalExecutor(jobs)
    from tests.bench.experiments.ray_executor import RayExecutor

    return RayExecutor(address, jobs)


def _mean_scores(rows: Sequence[Mapping[str, str]]) -> list[str]:
    """Return the means of the scores over runs, in words."""
    known = ((name, [float(row[key]) for row in rows if row[key]]) for name, key in _SCORES.items())
    return [f"{name} {sum(values) / len(values):.1f}" for name, values in known if values]


def _summary(finished: Finished) -> str:
    label, seconds = finished.spec.label, finished.time_text()
    if finished.record is None:
        return f"{label}: FAILED, {finished.error}; {seconds}"
    scores = finished.record.scores
    known = [f"{name} {scores[key]:.1f}" for name, key in _SCORES.items() if scores.get(key) is not None]
    return f"{label}: {', '.join(known) or 'no episode ended'}; {seconds}"
