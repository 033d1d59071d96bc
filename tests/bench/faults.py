"""
``python -m tests.bench faults``: kill trainings, damage files, pass unusual arguments, and count the outcomes.

A row consists of parts. The JSON file counts each part when it is done.
"""

from __future__ import annotations

import argparse
import importlib.util
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from tests.bench.command import Benchmark, at_least
from tests.bench.faults_processes import Tally, start_server
from tests.bench.results import Results, machine, machines_text, markdown_table

DEFAULTS = {"kills": 100, "corruptions": 1000, "examples": 3000}
"""Attempts of a row, by the option that sets them."""

_COLUMNS = ("attempts", "survived", "lost", "wrong", "unclear")


@dataclass(frozen=True)
class Row:
    """
    One line of the table.

    :param part: "kills", "corruptions" or "examples"
    :param what: what is attempted, for the table
    :param env_id: id of the environment, or None if any does
    :param kind: kind of file, or of what is fuzzed
    """

    part: str
    what: str
    env_id: str | None
    kind: str

    @property
    def name(self) -> str:
        """Name for ``--only`` and the results."""
        return self.kind if self.env_id is None else f"{self.kind}-{self.env_id}"

    @property
    def needs(self) -> tuple[str, str] | None:
        """The package that the row needs, and its extra."""
        if self.part == "examples":
            return "hypothesis", "dev"
        return ("mujoco", "mujoco") if self.env_id == _MUJOCO else None


_CLASSIC, _MUJOCO = "CartPole-v1", "HalfCheetah-v5"
ROWS: tuple[Row, ...] = (
    Row("kills", "a run is killed and resumed", _CLASSIC, "kills"),
    Row("kills", "a run is killed and resumed", _MUJOCO, "kills"),
    Row("corruptions", "a checkpoint is damaged and read", _CLASSIC, "checkpoint"),
    Row("corruptions", "a checkpoint is damaged and read", _MUJOCO, "checkpoint"),
    Row("corruptions", "a saved model is damaged and read", _CLASSIC, "model"),
    Row("corruptions", "a saved model is damaged and read", _MUJOCO, "model"),
    Row("corruptions", "a `vecnormalize.pkl` is damaged and read", _MUJOCO, "statistics"),
    Row("examples", "arguments of `ClipPPO`", None, "arguments"),
    Row("examples", "entries of a settings file", None, "settings"),
)


class Campaign(Protocol):
    """The attempts of a row."""

    def run(self, index: int, wanted: int) -> Tally:
        """Make part ``index`` of the row, with at most ``wanted`` attempts, and count their outcomes."""


def make_campaign(row: Row, folder: Path, seed: int) -> Campaign:
    """Build the campaign of a row."""
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


class FaultsBenchmark(Benchmark[Row]):
    """Makes the attempts that are missing."""

    name = "faults"
    description = "Kill training runs, damage files, pass unusual arguments, and count the outcomes."
    log_folder = "logs/faults"
    deciding = (*DEFAULTS, "seed")

    def __init__(self, rows: Sequence[Row], argv: Sequence[str] | None) -> None:
        super().__init__(rows, argv)
        for row in () if self.args.list else self.selected:
            if row.needs is not None and importlib.util.find_spec(row.needs[0]) is None:
                package, extra = row.needs
                self.parser.error(
                    f"The row {row.name} needs {package}. Run `pip install 'sb3_clipvf[{extra}]'`, or leave the row "
                    "out with `--only`."
                )

    def add_options(self, parser: argparse.ArgumentParser) -> None:
        """Add the numbers of attempts, and the seed."""
        for option, what in (
            ("--kills", "kills of training runs in each environment"),
            ("--corruptions", "damaged files of each kind and environment"),
            ("--examples", "unusual arguments, and as many unusual settings"),
        ):
            about, default = f"{what} (default: %(default)s)", DEFAULTS[option.removeprefix("--")]
            parser.add_argument(option, type=at_least(1), metavar="N", default=default, help=about)
        about = "seed of the moments, bytes and values (default: %(default)s)"
        parser.add_argument("--seed", type=at_least(0), default=0, help=about)

    def listed(self, row: Row) -> str:
        """Return what is attempted, and how many attempts are done."""
        done = (self._earlier(row) or {"attempts": 0})["attempts"]
        return f"{row.what:<42} {done} of {self._wanted(row)} done"

    def run(self) -> None:
        """Make the missing attempts of each row."""
        start_server()
        for row in self.selected:
            self._run(row)
            found = self._earlier(row)
            if found is not None and found["survived"] != found["attempts"]:
                self.failed[row.name] = f"{found['survived']} of {found['attempts']} survived"

    def remakes(self, run: Mapping[str, Any]) -> bool:
        """Return whether ``--rerun`` makes a stored result again."""
        return super().remakes(run) and run["seed"] == self.args.seed

    def render(self) -> str:
        """Return the table of outcomes."""
        return render_table(self.results, self.rows, self.args.seed)

    def _wanted(self, row: Row) -> int:
        wanted: int = getattr(self.args, row.part)
        return wanted

    def _earlier(self, row: Row) -> dict[str, Any] | None:
        return self.results.find({"name": row.name, "seed": self.args.seed})

    def _run(self, row: Row) -> None:
        earlier = self._earlier(row)
        tally, index = (Tally(), 0) if earlier is None else (Tally.from_json(earlier), earlier["parts"])
        if tally.attempts >= self._wanted(row):
            return
        campaign = make_campaign(row, self.args.log_folder, self.args.seed)
        while (missing := self._wanted(row) - tally.attempts) > 0:
            tally.merge(campaign.run(index, missing))
            index += 1
            about = {"name": row.name, "seed": self.args.seed, "parts": index}
            self.results.add({**about, **tally.as_json(), **machine(("mujoco", "hypothesis"))})
            outcomes = ", ".join(f"{getattr(tally, name)} {name}" for name in _COLUMNS[1:])
            print(f"{row.name}: {tally.attempts} of {self._wanted(row)}, {outcomes}", flush=True)


def render_table(results: Results, rows: Sequence[Row], seed: int) -> str:
    """Render the results of a seed as a Markdown table."""
    lines, failures = [], []
    found = [(row, results.find({"name": row.name, "seed": seed})) for row in rows]
    for row, run in found:
        cells = [f"{run[name]:,}" for name in _COLUMNS] if run else ["not run", "", "", "", ""]
        counts = "<br>".join(f"{name}: {count:,}" for name, count in run["counts"].items()) if run else ""
        lines.append([row.what, row.env_id or "", *cells, counts])
        failures += [f"- `{row.name}`: {_as_code(text)}\n" for text in run["failures"]] if run else []
    table = markdown_table(["what", "environment", *_COLUMNS, "details"], "ll" + "r" * 5 + "l", lines)
    described = f"The first that did not survive:\n\n{''.join(failures)}\n" if failures else ""
    how = "one process after the other, one thread"
    machines = machines_text([run for _, run in found if run], lambda run: how)
    return f"{table}\n\n{described}{machines}"


def _as_code(text: str) -> str:
    """Quote a message, which may hold backquotes, pipes and angle brackets."""
    return "`` " + " ".join(text.replace("``", "'").split()) + " ``"


def main(argv: Sequence[str] | None = None) -> int:
    """Run the benchmark with these options, and return its exit code."""
    return FaultsBenchmark(ROWS, argv).main()
