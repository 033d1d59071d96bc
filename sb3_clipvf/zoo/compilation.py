"""The sub-command ``compile``: compile all kernels ahead of training, for example in a container image."""

import importlib
import sys
from argparse import ArgumentParser
from collections.abc import Sequence
from pathlib import Path


def main(argv: Sequence[str] | None = None) -> int:
    """
    Run ``sb3-clipvf compile``.

    :param argv: Options, of which there are none; None uses those of the process.
    :return: Exit code: 0, or 1 if the kernels cannot be kept on disk, in ``NUMBA_CACHE_DIR`` if it is set.
    """
    description = "Compile all kernels ahead of training, for example in a container image or on a cluster."
    ArgumentParser(description=description).parse_args(argv)
    from numba import config

    from sb3_clipvf.engines.kernels.warmup import GROUPS, warm_up  # imports numba

    importlib.import_module("sb3_clipvf.envs.normalize")  # compiles its own
    seconds = sum(warm_up(group) for group in GROUPS)
    stats = [kernel.stats for kernels, _ in GROUPS.values() for kernel in kernels]
    if not all(each.cache_path for each in stats):  # there was a warning with the reason
        return 1
    named: str = config.CACHE_DIR  # type: ignore[attr-defined]
    elsewhere = [each.cache_path for each in stats if not Path(each.cache_path).is_relative_to(named)]
    if named and elsewhere:
        sys.stderr.write(
            f"sb3-clipvf compile: `NUMBA_CACHE_DIR` must be a writable folder, got {named!r}. Kernels were "
            f"kept in {elsewhere[0]} instead. Set NUMBA_CACHE_DIR to a different folder, or make this one writable.\n"
        )
        return 1
    action = "compiled" if any(each.cache_misses for each in stats) else "read"
    sys.stdout.write(f"The kernels were {action} in {seconds:.1f} s. They are in {stats[0].cache_path}\n")
    return 0
