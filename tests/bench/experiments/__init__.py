"""``python -m tests.bench experiments SUITE``: train all settings of a suite in all its environments, on many seeds."""

from collections.abc import Sequence


def main(argv: Sequence[str] | None = None) -> int:
    """Run a suite with these options, and return the exit code."""
    # Imported here, since each run is a process of a module of this package and needs no command.
    from tests.bench.experiments.command import main as run_command

    return run_command(argv)
