"""
``python -m tests.bench faults``: kill trainings, damage files, pass unusual arguments, and count what happens.

The parts of a row are counted in the JSON file as they are done: the command can be stopped at any time, and goes on.
"""

from __future__ import annotations

import argparse
import importlib.util
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol, TextIO

from sb3_clipvf.common.validation import check_int
from tests.bench.faults_table import render_table
from tests.bench.results import Results, check_row_names, machine, sigterm_interrupts, write_text

if TYPE_CHECKING:
    from tests.bench.faults_children import Tally

COMMAND = "python -m tests.bench faults"
DEFAULTS = {"kills": 100, "corruptions": 1000, "examples": 3000}
"""Attempts of a row, by the option that sets them."""


@dataclass(frozen=True)
class Row:
    """
    One line of the table.

    :param part: "kills", "corruptions" or "examples".
    :param what: What is tried, for the table.
    :param env_id: The environment, or None where it does not matter.
    :param kind: Of a file, or of what is fuzzed.
    """

    part: str
    what: str
    env_id: str | None
    kind: str

    @property
    def name(self) -> str:
        """Name for ``--only`` and the results."""
        return self.kind if self.env_id is None else f"{self.kind}-{self.env_id}"


_CLASSIC, _MUJOCO = "CartPole-v1", "HalfCheetah-v5"
ROWS: tuple[Row, ...] = (
    Row("kills", "a training is killed and resumed", _CLASSIC, "kills"),
    Row("kills", "a training is killed and resumed", _MUJOCO, "kills"),
    Row("corruptions", "a checkpoint is damaged and read", _CLASSIC, "checkpoint"),
    Row("corruptions", "a checkpoint is damaged and read", _MUJOCO, "checkpoint"),
    Row("corruptions", "a saved model is damaged and read", _CLASSIC, "model"),
    Row("corruptions", "a saved model is damaged and read", _MUJOCO, "model"),
    Row("corruptions", "a `vecnormalize.pkl` is damaged and read", _MUJOCO, "statistics"),
    Row("examples", "arguments of `ClipPPO`", None, "arguments"),
    Row("examples", "entries of a settings file", None, "settings"),
)

_NEEDS = {"kills-HalfCheetah-v5": "mujoco", "checkpoint-HalfCheetah-v5": "mujoco", "model-HalfCheetah-v5": "mujoco"}
_NEEDS |= {"statistics-HalfCheetah-v5": "mujoco", "arguments": "hypothesis", "settings": "hypothesis"}
_EXTRAS = {"mujoco": "mujoco", "hypothesis": "dev"}


class _Campaign(Protocol):
    """What a row is made of."""

    def run(self, index: int, wanted: int) -> Tally:
        """
        Do a part of the row.

        :param index: Number of this part.
        :param wanted: No more than so many attempts.
        :return: What came of them.
        """


def _campaign(row: Row, folder: Path, seed: int) -> _Campaign:
    from tests.bench.faults_files import FileCampaign
    from tests.bench.faults_fuzz import FuzzCampaign
    from tests.bench.faults_kills import KillCampaign
    from tests.bench.faults_training import Training

    native, autograd = {"engine": "native"}, {"engine": "autograd"}
    trainings = {
        _CLASSIC: (
            Training("CartPole-v1, native engine, DummyVecEnv", _CLASSIC, 10_240, native, n_envs=4),
            Training("CartPole-v1, autograd engine, SubprocVecEnv", _CLASSIC, 3_200, autograd, in_processes=True),
        ),
        _MUJOCO: (
            Training("HalfCheetah-v5, native engine, normalised", _MUJOCO, 5_120, native, normalized=True),
            Training("HalfCheetah-v5, autograd engine, normalised", _MUJOCO, 2_560, autograd, normalized=True),
        ),
    }
    if row.env_id is None:
        return FuzzCampaign(row.kind, folder / "fuzz", seed)
    if row.part == "kills":
        return KillCampaign(trainings[row.env_id], folder / row.name, seed)
    return FileCampaign(trainings[row.env_id][0], row.kind, folder / row.env_id, seed)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog=COMMAND,
        description="Kill trainings, damage files, pass unusual arguments, and count what happens. Stop it with "
        "Ctrl-C; it goes on later.",
    )
    kills, corruptions, examples = DEFAULTS.values()
    about = "kills of trainings in each environment (default: %(default)s)"
    parser.add_argument("--kills", type=int, metavar="N", default=kills, help=about)
    about = "damaged files of each kind and environment (default: %(default)s)"
    parser.add_argument("--corruptions", type=int, metavar="N", default=corruptions, help=about)
    about = "unusual arguments, and as many unusual settings (default: %(default)s)"
    parser.add_argument("--examples", type=int, metavar="N", default=examples, help=about)
    parser.add_argument("--only", nargs="+", metavar="NAME", help="these rows only, see --list (default: all)")
    parser.add_argument("--seed", type=int, default=0, help="of all that is random (default: %(default)s)")
    out = Path("docs/results/faults.json")
    parser.add_argument("--out", type=Path, default=out, help="(default: %(default)s)")
    parser.add_argument("--table", type=Path, help="(default: the results' name with .md)")
    parser.add_argument("--log-folder", type=Path, default=Path("logs/faults"), help="(default: %(default)s)")
    parser.add_argument("--list", action="store_true", help="list the rows and what is done, and run nothing")
    parser.add_argument("--rerun", action="store_true", help="count anew what is done already")
    return parser


class Benchmark:
    """
    The rows that are still to be done.

    :param args: What the parser gave.
    :param out: Where progress is told.
    :raises ValueError: For unknown rows, numbers out of range, or a results file that is none.
    :raises ImportError: Where a row needs a package that is not installed.
    """

    def __init__(self, args: argparse.Namespace, out: TextIO) -> None:
        self.args, self._out = args, out
        for part in DEFAULTS:
            check_int(f"--{part}", getattr(args, part), 1, "Leave rows out by `--only`.")
        check_int("--seed", args.seed, 0, "Pass a number from 0.", maximum=2**32 - 1)
        check_row_names("--only", args.only or (), (row.name for row in ROWS), COMMAND)
        self._rows = [row for row in ROWS if args.only is None or row.name in args.only]
        self.results = Results(args.out)
        if args.list:
            return
        for row in self._rows:
            package = _NEEDS.get(row.name)
            if package is not None and importlib.util.find_spec(package) is None:
                raise ImportError(
                    f"The row {row.name} needs {package}. Run `pip install 'sb3_clipvf[{_EXTRAS[package]}]'`, or leave "
                    "the row out by `--only`."
                )

    def main(self) -> int:
        """
        Do what is missing, or list it.

        :return: exit code: 0; 1 where something was lost, wrong or unclear; 130 where it was interrupted
        """
        if self.args.list:
            for row in self._rows:
                done = (self._done(row) or {"attempts": 0})["attempts"]
                self._say(f"{row.name:<26} {row.what:<42} {done} of {self._wanted(row)} done")
            return 0
        from tests.bench.faults_children import start_server

        start_server()
        try:
            with sigterm_interrupts():
                for row in self._rows:
                    self._run(row)
        except KeyboardInterrupt:
            self._say("\nInterrupted. The same command goes on with what is missing.")
            return 130
        finally:
            self._write()
        failed = [run["name"] for row in self._rows if (run := self._done(row)) and run["survived"] != run["attempts"]]
        if failed:
            self._say(f"Not all survived: {', '.join(failed)}.")
        return 1 if failed else 0

    def _wanted(self, row: Row) -> int:
        wanted: int = getattr(self.args, row.part)
        return wanted

    def _done(self, row: Row) -> dict[str, Any] | None:
        return self.results.find({"name": row.name, "seed": self.args.seed})

    def _run(self, row: Row) -> None:
        from tests.bench.faults_children import Tally

        earlier = None if self.args.rerun else self._done(row)
        tally = Tally() if earlier is None else Tally.from_json(earlier)
        index = 0 if earlier is None else earlier["parts"]
        if tally.attempts >= self._wanted(row):
            return
        campaign = _campaign(row, self.args.log_folder, self.args.seed)
        while (missing := self._wanted(row) - tally.attempts) > 0:
            tally.merge(campaign.run(index, missing))
            index += 1
            about = {"name": row.name, "seed": self.args.seed, "parts": index}
            self.results.add({**about, **tally.as_json(), **machine(("mujoco", "hypothesis"))})
            self._say(
                f"{row.name}: {tally.attempts} of {self._wanted(row)}, {tally.survived} survived, {tally.lost} lost, "
                f"{tally.wrong} wrong, {tally.unclear} unclear"
            )

    def _write(self) -> None:
        table = self.args.table or self.args.out.with_suffix(".md")
        given = vars(self.args)
        options = [f"--{name} {given[name]}" for name, usual in {**DEFAULTS, "seed": 0}.items() if given[name] != usual]
        write_text(table, render_table(self.results, ROWS, self.args.seed, " ".join([COMMAND, *options])))
        for what, path in (("Results", self.args.out), ("Table", table)):
            self._say(f"{what + ':':<9}{path}")

    def _say(self, text: str) -> None:
        self._out.write(text + "\n")
        self._out.flush()


def main(argv: Sequence[str] | None = None) -> int:
    """
    Run ``python -m tests.bench faults``.

    :param argv: its options; None takes the process's own
    :return: exit code: 0; 1 where something was lost, wrong or unclear; 130 where it was interrupted
    :raises ValueError: for unknown rows, numbers out of range, or a results file that is none
    :raises ImportError: where a row needs a package that is not installed
    """
    return Benchmark(_parser().parse_args(argv), sys.stdout).main()
