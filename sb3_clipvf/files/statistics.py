"""Read files of ``VecNormalize`` statistics, each one pickle, without running code."""

import hashlib
import os
import pathlib
import pickle
import tempfile
from typing import Any

import numpy as np
from gymnasium import Space
from stable_baselines3.common.running_mean_std import RunningMeanStd
from stable_baselines3.common.vec_env import VecEnv, VecNormalize

from sb3_clipvf.files.archive import read_bytes
from sb3_clipvf.files.trust import TrustPickle, trust_of
from sb3_clipvf.files.unpickle import named_errors, unpickle

STATISTICS_FILE = "vecnormalize.pkl"
"""Name of the file of statistics in a run's folder, the RL Zoo's name."""

_NUMBERS = (int, float, np.number, np.ndarray)
_DIGEST_MARK = b"# SHA-256 of the pickle: "


def load_vec_normalize(load_path: Any, venv: VecEnv, trust_pickle: TrustPickle = None) -> VecNormalize:
    """
    Load a file that ``VecNormalize.save`` wrote, without running code.

    :param load_path: File.
    :param venv: Environments to wrap.
    :param trust_pickle: As in :meth:`sb3_clipvf.ClipPPO.load`.
    :return: An object of the class that the file names, usually SB3's, with the file's settings and statistics.
    :raises UnsafeFileError: If it needs something that is neither on the list nor trusted.
    :raises ValueError: If it holds something else, or is damaged.
    """
    return vec_normalize_from(*read_bytes(pathlib.Path(load_path), None), venv, trust_pickle)


def vec_normalize_from(name: str, content: bytes, venv: VecEnv, trust_pickle: TrustPickle = None) -> VecNormalize:
    """Wrap environments in a pickled ``VecNormalize``, without running code; errors call the pickle ``name``."""
    vec_normalize = _unpickled(name, content, trust_pickle)
    if not isinstance(vec_normalize, VecNormalize):
        found = type(vec_normalize).__name__
        raise ValueError(f"{name} must hold a VecNormalize, got {found}. Pass what `VecNormalize.save` wrote.")
    if type(vec_normalize) is VecNormalize:
        _check_statistics(name, vec_normalize)
    vec_normalize.set_venv(venv)
    return vec_normalize


def statistics_bytes(normalizer: VecNormalize) -> bytes:
    """Return the bytes that ``normalizer.save`` writes, whatever its class."""
    with tempfile.TemporaryDirectory() as folder:
        path = pathlib.Path(folder, STATISTICS_FILE)
        normalizer.save(str(path))
        return path.read_bytes()


def read_pickle(path: str | os.PathLike[str], trust_pickle: TrustPickle = None) -> Any:
    """
    Return the object of a file that holds one pickle, without running code.

    :param path: File.
    :param trust_pickle: As in :meth:`sb3_clipvf.ClipPPO.load`.
    :raises UnsafeFileError: If it needs something that is neither on the list nor trusted.
    :raises ValueError: If it is no pickle, damaged, or too large for the memory.
    """
    return _unpickled(*read_bytes(pathlib.Path(path), None), trust_pickle)


def digest_of_pickle(pickled: bytes) -> bytes:
    """Return bytes to append to a pickle, so that :func:`read_pickle` finds damage. Unpicklers stop before them."""
    return _DIGEST_MARK + hashlib.sha256(pickled).hexdigest().encode()


def _unpickled(name: str, content: bytes, trust_pickle: TrustPickle) -> Any:
    trust = trust_of(trust_pickle)
    if content[:1] != b"\x80":  # protocols 0 and 1 start otherwise, but no file of SB3 is as old
        what = f"holds {len(content)} bytes of something else" if content else "is empty"
        raise ValueError(f"{name} must be a pickle, but {what}. Pass what `VecNormalize.save` wrote.")
    with named_errors(name):
        return unpickle(_without_digest(content), trust)


def _without_digest(content: bytes) -> bytes:
    pickled, mark, digest = content.rpartition(_DIGEST_MARK)
    if mark and mark + digest != digest_of_pickle(pickled):
        raise ValueError("its digest does not match its bytes")
    # If the mark itself is damaged, it is not found, and the file does not end as a pickle does.
    if not (mark or content.endswith(pickle.STOP)):
        raise ValueError("it does not end where a pickle ends")
    return pickled if mark else content


def _check_statistics(name: str, vec_normalize: VecNormalize) -> None:
    attributes = vars(vec_normalize)
    moments = [attributes.get("ret_rms")]
    if attributes.get("norm_obs"):
        obs_rms = attributes.get("obs_rms")
        moments += obs_rms.values() if isinstance(obs_rms, dict) else [obs_rms]
    numbers = [attributes.get(key) for key in ("gamma", "epsilon", "clip_obs", "clip_reward")]
    spaces = [attributes.get(key) for key in ("observation_space", "action_space")]
    for rms in moments:
        numbers += [getattr(rms, key, None) for key in ("mean", "var", "count")]
    complete = {"training", "norm_reward"} <= attributes.keys() and all(isinstance(space, Space) for space in spaces)
    are_moments = all(type(rms) is RunningMeanStd for rms in moments)
    if not (complete and are_moments and all(isinstance(number, _NUMBERS) for number in numbers)):
        raise ValueError(f"{name} must hold complete statistics, but some are missing. Save them again.")
