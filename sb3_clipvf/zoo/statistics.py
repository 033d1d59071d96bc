"""Which statistics of ``VecNormalize`` belong to a model's file."""

import re
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from stable_baselines3.common.vec_env import VecEnv, VecNormalize

from sb3_clipvf.callbacks import BEST_MODEL, STATISTICS_ENTRY
from sb3_clipvf.checkpoint.resume import has_statistics, load_statistics
from sb3_clipvf.files.archive import entries_of, read_bytes
from sb3_clipvf.files.statistics import load_vec_normalize
from sb3_clipvf.zoo.run_files import replaced

STATISTICS = "vecnormalize.pkl"
"""The RL Zoo's file of a run's last statistics."""

EARLIER = re.compile(rf"rl_model_\d+_steps\.zip|{re.escape(BEST_MODEL)}")
"""Names of models from within a training, to which the RL Zoo's file of statistics does not belong."""


def has_own_statistics(path: Path) -> bool:
    """
    Return whether a model's file holds statistics, as checkpoints and best models do.

    :param path: Zip file.
    :return: Whether :func:`own_statistics` has something to load.
    """
    return has_statistics(path) or STATISTICS_ENTRY in dict(entries_of(*read_bytes(path, "zip")))


def own_statistics(path: Path, venv: VecEnv) -> VecNormalize:
    """
    Wrap environments in the ``VecNormalize`` that a model's file holds.

    :param path: Zip file; see :func:`has_own_statistics`.
    :param venv: Environments to wrap.
    :return: With the file's statistics and settings.
    """
    if has_statistics(path):
        return load_statistics(path, venv)
    with tempfile.TemporaryDirectory() as folder:
        copy = Path(folder, STATISTICS)
        copy.write_bytes(dict(entries_of(*read_bytes(path, "zip")))[STATISTICS_ENTRY])
        return load_vec_normalize(str(copy), venv)


@contextmanager
def own_statistics_loaded(model: Path, stats_path: str | None) -> Iterator[str | None]:
    """
    Make ``VecNormalize.load`` return the statistics of a model's file in the context, if it holds some.

    :param model: Zip file.
    :param stats_path: Folder of the run's last statistics, or None.
    :return: Context manager with the folder to name to the RL Zoo.
    """
    if stats_path is None or not has_own_statistics(model):
        yield stats_path
        return
    with tempfile.TemporaryDirectory() as folder:
        Path(folder, STATISTICS).touch()  # the RL Zoo asks whether there is a file
        with replaced(VecNormalize, "load", staticmethod(lambda load_path, venv: own_statistics(model, venv))):
            yield folder


def load(path: Path, venv: VecEnv) -> VecNormalize:
    """
    Wrap environments in the ``VecNormalize`` of a file.

    :param path: What :func:`find_statistics` found.
    :param venv: Environments to wrap.
    :return: With the file's statistics and settings.
    """
    return VecNormalize.load(str(path), venv) if path.name == STATISTICS else own_statistics(path, venv)


def find_statistics(model: Path, env_name: str, *, normalizes: bool) -> Path | None:
    """
    Find the statistics of a model that a training goes on from.

    :param model: Zip file given to ``--trained-agent``.
    :param env_name: Name of the environment in the RL Zoo's files.
    :param normalizes: Whether the settings of the training normalise.
    :return: File that holds them: the model's own, or the RL Zoo's beside it. None: the model has none.
    :raises ValueError: If they are not known, or the settings do not fit.
    """
    beside = model.parent / env_name / STATISTICS
    found = None
    if has_own_statistics(model):
        found = model
    elif beside.is_file():
        found = beside
        if EARLIER.fullmatch(model.name):
            raise ValueError(
                f"`--trained-agent` must be a model whose statistics of VecNormalize are known, got {model}, which has "
                f"none of its own: {beside} holds those of another step. Take the run's last model, or one of its "
                "`checkpoints/`."
            )
    if found is None and normalizes:
        raise ValueError(
            f"`--trained-agent` must be a model with statistics of VecNormalize, since the settings normalise, got "
            f"{model} without any. Copy them to {beside}, or pass `-params normalize:False`."
        )
    if found is not None and not normalizes:
        raise ValueError(
            f"`normalize` must be set for {model}, which was trained in normalised environments, got none in the "
            "settings. Pass `-params normalize:True`: statistics and their settings are the model's."
        )
    return found
