"""``python -m tests.bench <benchmark>``: run one benchmark, which writes its numbers and a table of them."""

import importlib
import sys
from collections.abc import Sequence

BENCHMARKS = {
    "learning": "returns that ClipPPO reaches with the settings shipped",
    "curves": "training curves of the native engine and of the reference",
    "experiments": "settings against each other in many environments, on many seeds",
    "speed": "steps a second of ClipPPO, SB3 and SBX on this machine",
    "minibatch": "time of a minibatch and of a policy's step, by engine and device",
    "scaling": "seconds of trainings on one and two processes, and a model of more",
    "processes": "what one process and two learn from the same number of steps",
    "growth": "how cost and memory grow with environments, networks, batches and rollouts",
    "starts": "seconds to the end of the first update, with and without compiled kernels",
    "pitfalls": "common faults of hand-written PPOs, and what they cost",
    "critic": "what clipping the value loss does to the critic, update by update",
    "faults": "kills, damaged files and unusual arguments, and what survives them",
}
"""Name, which is that of the module with ``main(argv) -> int``, and a line for the overview."""


def overview() -> str:
    """Return the text of ``--help``."""
    lines = "".join(f"  {name:<12}{summary}\n" for name, summary in BENCHMARKS.items())
    usage = "usage: python -m tests.bench <benchmark> [options]"
    return f"{usage}\n\n{lines}\nOptions of a benchmark: `python -m tests.bench <benchmark> --help`.\n"


def main(argv: Sequence[str]) -> int:
    """Run the benchmark that the first argument names, and return its exit code."""
    if not argv or argv[0] in ("-h", "--help"):
        sys.stdout.write(overview())
        return 0
    name, *options = argv
    if name not in BENCHMARKS:
        sys.stderr.write(f"`benchmark` must be one of {', '.join(BENCHMARKS)}, got {name!r}.\n")
        return 2
    code: int = importlib.import_module(f"tests.bench.{name}").main(options)
    return code


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
