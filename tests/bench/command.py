"""The command line of a benchmark: common options, and a run that can be stopped and resumed."""

from __future__ import annotations

import argparse
import contextlib
import signal
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar, Generic, Protocol, TypeVar

from tests.bench.results import Results, machine, write_text

MIN_ROUNDS = 3
"""Rounds that a final verdict needs."""


class Row(Protocol):
    """One line of a benchmark's table."""

    @property
    def name(self) -> str:
        """Name for ``--only`` and the results file."""


class SeededRow(Row, Protocol):
    """A line of a table of trainings with several seeds."""

    def run(self, seed: int) -> dict[str, Any]:
        """Return the entries that a seed's result is found by."""


RowT = TypeVar("RowT", bound=Row)
SeededRowT = TypeVar("SeededRowT", bound=SeededRow)


class Benchmark(ABC, Generic[RowT]):
    """
    A benchmark that stores each result at once, so that the same command resumes with what is missing.

    :param rows: all rows
    :param argv: options of the command; None: those of the process
    """

    name: ClassVar[str]
    description: ClassVar[str]
    log_folder: ClassVar[str]
    key: ClassVar[tuple[str, ...]] = ("name", "seed")
    # Options that affect the table, so the command that reproduces it has them.
    deciding: ClassVar[tuple[str, ...]]

    def __init__(self, rows: Sequence[RowT], argv: Sequence[str] | None) -> None:
        self.rows = rows
        self.parser = self._common_parser([row.name for row in rows])
        self.add_options(self.parser)
        self.args = self.parser.parse_args(argv)
        self.rows = self.prepare(rows)
        self.selected = [row for row in self.rows if self.args.only is None or row.name in self.args.only]
        self.table: Path = self.args.table or self.args.out.with_suffix(".md")
        if self.table == self.args.out:
            self.parser.error(f"`--table` must be another file than `--out`, got {self.table} for both. Leave it out.")
        self.figure = self.table.with_suffix(".png")
        try:
            self.results = Results(self.args.out, self.key)
        except ValueError as error:
            self.parser.error(str(error))
        self.failed: dict[str, str] = {}  # label -> reason

    def _common_parser(self, names: Sequence[str]) -> argparse.ArgumentParser:
        about = f"{self.description} Stop it with Ctrl-C; the same command resumes with what is missing."
        parser = argparse.ArgumentParser(prog=f"python -m tests.bench {self.name}", description=about)
        about = "these rows only, see --list (default: all)"
        parser.add_argument("--only", "--rows", nargs="+", choices=names, metavar="NAME", help=about)
        parser.add_argument("--list", action="store_true", help="list the rows and what is done, and run nothing")
        about = "write the table and the figure of the results so far, and run nothing"
        parser.add_argument("--report", action="store_true", help=about)
        parser.add_argument("--rerun", action="store_true", help="remove existing results, and make them again")
        out = Path(f"docs/results/{self.name}.json")
        parser.add_argument("--out", type=Path, default=out, help="results file (default: %(default)s)")
        parser.add_argument("--table", type=Path, help="Markdown file (default: the results file's name with .md)")
        parser.add_argument("--log-folder", type=Path, default=Path(self.log_folder), help="(default: %(default)s)")
        return parser

    def prepare(self, rows: Sequence[RowT]) -> Sequence[RowT]:
        """Check and complete the options, and return the rows that result from them."""
        return rows

    @abstractmethod
    def add_options(self, parser: argparse.ArgumentParser) -> None:
        """Add the benchmark's own options."""

    @abstractmethod
    def listed(self, row: RowT) -> str:
        """Return what ``--list`` prints of a row after its name."""

    @abstractmethod
    def run(self) -> None:
        """Measure what is missing, and add it to the results."""

    @abstractmethod
    def render(self) -> str:
        """Return the Markdown table of all rows, so that ``--only`` keeps earlier results in it."""

    def remakes(self, run: Mapping[str, Any]) -> bool:
        """Return whether ``--rerun`` makes a stored result again."""
        return any(row.name == run["name"] for row in self.selected)

    def remove_old(self) -> None:
        """Remove the results that ``--rerun`` makes again, so that they are missing."""
        self.results.remove(self.remakes)

    def draw(self, path: Path) -> bool:
        """Draw the figure of all rows, and return whether the benchmark has one."""
        return False

    def command(self) -> str:
        """Return the command that makes the table again."""
        words = [self.parser.prog]
        for name in self.deciding:
            value = getattr(self.args, name)
            if value != self.parser.get_default(name):
                values = value if isinstance(value, list) else [] if value is True else [value]
                words += [f"--{name}", *map(str, values)]
        return " ".join(words)

    def main(self) -> int:
        """Run or list the rows, and return the exit code: 0, 1 after failures, 130 after an interruption."""
        if self.args.list:
            width = max(len(row.name) for row in self.selected)
            for row in self.selected:
                print(f"{row.name:<{width}}  {self.listed(row)}".rstrip(), flush=True)
            return 0
        again = "The same command without --rerun" if self.args.rerun else "The same command"
        try:
            if not self.args.report:
                if self.args.rerun:
                    self.remove_old()
                with sigterm_interrupts():  # otherwise the processes that it started would outlive it
                    self.run()
        except KeyboardInterrupt:
            print(f"\nInterrupted. {again} resumes with what is missing.", flush=True)
            return 130
        finally:
            text = f"Made by `{self.command()}`.\n\n{self.render()}"
            write_text(self.table, text)
            print(f"\n{text}\nResults: {self.results.path}\nTable:   {self.table}", flush=True)
            if self.draw(self.figure):
                print(f"Figure:  {self.figure}", flush=True)
        if self.failed:
            reasons = "".join(f"\n  {label}: {reason}" for label, reason in self.failed.items())
            print(f"Failed:{reasons}\n{again} tries again.", flush=True)
        return 1 if self.failed else 0


class RoundsBenchmark(Benchmark[RowT]):
    """A benchmark whose rows have rounds, in which all peers are measured one after the other."""

    n_rounds: ClassVar[int] = MIN_ROUNDS

    def add_options(self, parser: argparse.ArgumentParser) -> None:
        """Add the number of rounds."""
        about = "measurements of each peer (default: %(default)s)"
        parser.add_argument("--rounds", type=at_least(1), default=self.n_rounds, help=about)

    @abstractmethod
    def is_done(self, row: RowT, number: int) -> bool:
        """Return whether a round has all peers: only what is measured together can be compared."""

    def numbers(self) -> range:
        """Return the numbers of the rounds."""
        return range(1, self.args.rounds + 1)

    def done(self, row: RowT) -> str:
        """Return the rounds of a row that are done, as text."""
        return "done: " + (" ".join(str(number) for number in self.numbers() if self.is_done(row, number)) or "none")

    def to_measure(self, rows: Sequence[RowT]) -> list[tuple[RowT, int]]:
        """Return rows and numbers of the rounds to measure, each row once before any row comes twice."""
        return [(row, number) for number in self.numbers() for row in rows if not self.is_done(row, number)]

    def remakes(self, run: Mapping[str, Any]) -> bool:
        """Return whether ``--rerun`` makes a stored result again."""
        return super().remakes(run) and run["part"] in map(str, self.numbers())


class SeedsBenchmark(Benchmark[SeededRowT]):
    """A benchmark whose rows are trained with each seed."""

    default_seeds: ClassVar[tuple[int, ...]]
    first_seed: ClassVar[int] = 0
    deciding = ("seeds",)

    def __init__(self, rows: Sequence[SeededRowT], argv: Sequence[str] | None) -> None:
        super().__init__(rows, argv)
        self.seeds: list[int] = list(dict.fromkeys(self.args.seeds))

    def add_options(self, parser: argparse.ArgumentParser) -> None:
        """Add the seeds."""
        seeds, about = list(self.default_seeds), f"(default: {' '.join(map(str, self.default_seeds))})"
        parser.add_argument("--seeds", type=at_least(self.first_seed), nargs="+", default=seeds, help=about)

    def runs_of(self, row: SeededRowT) -> list[dict[str, Any]]:
        """Return the results of a row, by seed."""
        return [found for seed in self.seeds if (found := self.results.find(row.run(seed))) is not None]

    def done(self, row: SeededRowT) -> str:
        """Return the seeds of a row that are done, as text."""
        return "done: " + (" ".join(str(found["seed"]) for found in self.runs_of(row)) or "none")

    def to_train(self) -> list[tuple[SeededRowT, int]]:
        """Return rows and seeds to train, each row once before any row comes twice."""
        return [(row, seed) for seed in self.seeds for row in self.selected if self.results.find(row.run(seed)) is None]

    def remakes(self, run: Mapping[str, Any]) -> bool:
        """Return whether ``--rerun`` makes a stored result again."""
        return super().remakes(run) and run["seed"] in self.seeds


class InProcessBenchmark(SeedsBenchmark[SeededRowT]):
    """A benchmark that trains in this process, on one thread."""

    @abstractmethod
    def train(self, row: SeededRowT, seed: int) -> dict[str, Any]:
        """Train a row with a seed, and return its result."""

    def summary(self, result: dict[str, Any]) -> str:
        """Return a result in a few words, for the progress."""
        return ""

    def run(self) -> None:
        """Make the missing trainings, seed by seed."""
        import torch as th  # other benchmarks do not need it in this process

        th.set_num_threads(1)
        for row, seed in self.to_train():
            started = time.perf_counter()
            result = {**row.run(seed), **self.train(row, seed)}
            self.results.add({**result, **machine()})
            words = [self.summary(result), f"{time.perf_counter() - started:.0f} s"]
            print(f"{row.name}, seed {seed}: {', '.join(filter(None, words))}", flush=True)


@contextlib.contextmanager
def sigterm_interrupts() -> Iterator[None]:
    """Raise KeyboardInterrupt on SIGTERM too."""
    before = signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def at_least(minimum: int) -> Callable[[str], int]:
    """Return a type for argparse: whole numbers from ``minimum``."""

    def parse(text: str) -> int:
        if not text.isdecimal() or int(text) < minimum:
            raise argparse.ArgumentTypeError(f"must be a whole number of at least {minimum}, got {text}")
        return int(text)

    return parse
