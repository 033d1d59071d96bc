"""Options of ``sb3-clipvf train`` that the RL Zoo does not have: what the experiment manager does by them."""

import difflib
import sys
from argparse import ArgumentTypeError
from collections.abc import Iterator
from contextlib import contextmanager

from sb3_clipvf.zoo.defaults import ALGORITHM
from sb3_clipvf.zoo.parsing import option_value, whole_number, without_option

CHECKPOINT_FREQ = 100_000
"""Environment steps between two checkpoints, where the command line says nothing."""


@contextmanager
def own_train_options(arguments: list[str]) -> Iterator[list[str] | None]:
    """
    Make the experiment manager follow the package's own options of ``train`` in the context.

    :param arguments: The whole command line.
    :return: Context manager giving the Zoo's part of it, or None where there is nothing to train.
    :raises ValueError: If a value is none of its option's.
    """
    from sb3_clipvf.zoo.experiment import ClipPPOExperimentManager

    run = None
    path = option_value(arguments, None, "--resume")
    if path is not None:
        from sb3_clipvf.zoo.resume import resumed_run

        run, arguments = resumed_run(path, without_option(arguments, "--resume", least=len("--r")))
        if run.is_complete:
            sys.stdout.write(
                f"{run.folder} is complete, with {run.num_timesteps} steps: nothing is left to train. `-n` with more "
                "steps would go on.\n"
            )
            yield None
            return
    manager = ClipPPOExperimentManager
    vec_env, arguments = _vec_env(arguments)
    freq, arguments = _checkpoint_freq(arguments)
    manager.vec_env, manager.checkpoint_freq, manager.resumed = vec_env, freq, run
    try:
        yield arguments
    finally:
        manager.vec_env, manager.checkpoint_freq, manager.resumed = None, -1, None


def _vec_env(arguments: list[str]) -> tuple[str | None, list[str]]:
    chosen = option_value(arguments, None, "--vec-env")
    if chosen is None or chosen in ("dummy", "subproc"):
        return None, arguments
    from sb3_clipvf.zoo.vec_env import VEC_ENVS

    if chosen not in VEC_ENVS:
        names = ", ".join(("dummy", "subproc", *VEC_ENVS))
        near = difflib.get_close_matches(chosen, names.split(", "), n=1)
        hint = f"Did you mean `{near[0]}`?" if near else "`dummy` is the default."
        raise ValueError(f"`--vec-env` must be one of {names}, got {chosen!r}. {hint}")
    # --v and --ve could be --verbose as well.
    return chosen, without_option(arguments, "--vec-env", least=len("--vec"))


def _checkpoint_freq(arguments: list[str]) -> tuple[int, list[str]]:
    least = len("--ch")  # --c could be --conf-file as well
    value = option_value(arguments, None, "--checkpoint-freq", least)
    if value is None:
        return CHECKPOINT_FREQ, arguments
    try:
        freq = whole_number(value)
    except ArgumentTypeError as error:
        raise ValueError(
            f"`--checkpoint-freq` {error}. It counts environment steps; -1 writes no checkpoints."
        ) from None
    algo = option_value(arguments, None, "--algo")
    searches = any(token == "-optimize" or token.startswith("--optimize") for token in arguments)
    if freq > 0 and (algo != ALGORITHM or searches):
        what = "a search of hyperparameters" if searches else f"--algo {algo}"
        raise ValueError(
            f"`--checkpoint-freq` must be left out with {what}, got {freq}: whole trainings of {ALGORITHM} are "
            "checkpointed. `--save-freq` saves models of every algorithm."
        )
    return freq, without_option(arguments, "--checkpoint-freq", least)
