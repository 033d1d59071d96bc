"""The ``VecNormalize`` statistics in the zip of a model, which is a checkpoint or a best model."""

from pathlib import Path
from typing import Any, cast

from stable_baselines3.common.vec_env import VecEnv, VecNormalize

from sb3_clipvf.checkpoint.best_model import read_statistics
from sb3_clipvf.checkpoint.errors import DamagedCheckpointError, NotACheckpointError
from sb3_clipvf.checkpoint.file import read_checkpoint, read_manifest
from sb3_clipvf.checkpoint.state_attributes import ATTRIBUTES
from sb3_clipvf.checkpoint.vec_env_state import describe_vec_env, restore_vec_env
from sb3_clipvf.files.statistics import STATISTICS_FILE, vec_normalize_from

# Names of the classes with these statistics, SB3's and this package's
_NORMALIZERS = frozenset(name.rpartition(".")[2] for name in ATTRIBUTES if name.endswith("VecNormalize"))
# One row per environment, whose number may differ.
_PER_ENV = ("returns", "old_obs", "old_reward")


def has_statistics(path: Path) -> bool:
    """Return whether the zip of a model holds statistics."""
    return _is_normalized_checkpoint(path) or read_statistics(path) is not None


def load_statistics(path: Path, venv: VecEnv) -> VecNormalize:
    """Wrap any number of environments in the ``VecNormalize`` of a model; see :func:`has_statistics`."""
    if _is_normalized_checkpoint(path):
        return _of_checkpoint(path, venv)
    return vec_normalize_from(f"{STATISTICS_FILE} in {path}", cast(bytes, read_statistics(path)), venv)


def _is_normalized_checkpoint(path: Path) -> bool:
    try:
        return not _NORMALIZERS.isdisjoint(read_manifest(path).build["layers"])
    except (DamagedCheckpointError, NotACheckpointError):
        return False


def _of_checkpoint(path: Path, venv: VecEnv) -> VecNormalize:
    checkpoint = read_checkpoint(path)
    layers = zip(checkpoint.manifest.build["layers"], checkpoint.tree["environments"]["layers"], strict=True)
    state = next(state for name, state in layers if name in _NORMALIZERS)
    attributes = {name: value for name, value in state["attributes"].items() if name not in _PER_ENV}
    normalizer = VecNormalize(venv, norm_obs=attributes["norm_obs"], norm_obs_keys=attributes.get("norm_obs_keys"))
    untouched: dict[str, Any] = {**dict.fromkeys(state), "attributes": {}}
    inner = [untouched] * (len(describe_vec_env(normalizer)["layers"]) - 1)
    restore_vec_env(normalizer, {"layers": [{**state, "attributes": attributes}, *inner]})
    return normalizer
