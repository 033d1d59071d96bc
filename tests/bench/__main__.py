"""``python -m tests.bench <benchmark>``: run one benchmark, which writes its numbers and a table of them."""

import importlib
import sys
from collections.abc import Sequence

BENCHMARKS = {
    "learning": "returns that ClipPPO reaches with the settings shipped",
    "curves": "training curves of the engines native and autograd",
    "experiments": "settings against each other in many environments, on many seeds",
    "speed": "steps per second of ClipPPO, SB3 and SBX on this machine",
    "minibatch": "time per minibatch and per policy step, by engine and device",
    "scaling": "speed in one and two processes, and a model of more",
    "processes": "returns in one process and in two, with the same steps",
    "growth": "scaling of time and memory with environments, networks, batches and rollouts",
    "starts": "seconds to the end of the first update, with and without compiled kernels",
    "pitfalls": "effect of common PPO bugs",
    "critic": "effect of value clipping on the critic",
    "faults": "fault injection: kills, damaged files and unusual arguments",
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
