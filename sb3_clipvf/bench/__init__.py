"""``sb3-clipvf bench``: the package's own measurements, each of which writes its numbers and a table of them."""

import importlib
import sys
from collections.abc import Sequence

# Name, module with ``main(argv) -> int``, one line for the overview.
BENCHMARKS = (
    ("learning", "sb3_clipvf.bench.learning", "returns that ClipPPO reaches with the settings shipped"),
    ("curves", "sb3_clipvf.bench.curves", "training curves of the native engine and of the reference"),
    ("speed", "sb3_clipvf.bench.speed", "steps a second of ClipPPO, SB3 and SBX on this machine"),
    ("faults", "sb3_clipvf.bench.faults", "kills, damaged files and unusual arguments, and what survives them"),
)


def overview() -> str:
    """
    Describe the sub-command.

    :return: text of ``--help``
    """
    lines = [f"  {name:<10}{summary}" for name, _, summary in BENCHMARKS]
    return "\n".join(
        (
            "usage: sb3-clipvf bench <benchmark> [options]",
            "",
            *lines,
            "",
            "Options of a benchmark: `sb3-clipvf bench <benchmark> --help`.",
            "",
        )
    )


def main(argv: Sequence[str] | None = None) -> int:
    """
    Run one benchmark.

    :param argv: its name and options; None takes the process's own
    :return: exit code: the benchmark's own
    :raises ValueError: where there is no benchmark of that name
    """
    arguments = list(sys.argv[1:] if argv is None else argv)
    if not arguments or arguments[0] in ("-h", "--help"):
        sys.stdout.write(overview())
        return 0
    name, *options = arguments
    modules = {benchmark: module for benchmark, module, _ in BENCHMARKS}
    if name not in modules:
        raise ValueError(
            f"`benchmark` must be one of {', '.join(modules)}, got {name!r}. See `sb3-clipvf bench --help`."
        )
    code: int = importlib.import_module(modules[name]).main(options)
    return code
