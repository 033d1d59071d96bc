"""
Files of models and statistics, read without running code and without taking more memory than there is.

A file is read once, checked as these bytes, and handed on as the same bytes: nothing can change in between. What it has
pickled is rebuilt by ``safe_pickle``; Stable-Baselines3 (SB3) gets the objects in the place of the pickles.
"""

import base64
import hashlib
import io
import json
import os
import pathlib
import pickle
import re
from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch as th
from gymnasium import Space
from stable_baselines3.common.running_mean_std import RunningMeanStd
from stable_baselines3.common.vec_env import VecEnv, VecNormalize

from sb3_clipvf.safe_json import ENCODED, NOTE, decoded
from sb3_clipvf.safe_makers import NotAllowedError
from sb3_clipvf.safe_pickle import TRUST_VARIABLE, Trust, TrustPickle, UnsafeFileError, trust_of, unpickle
from sb3_clipvf.safe_zip import ModelPath, check_inner_zip, check_json, entries_of, read_bytes, reason_of

_DIGEST_MARK = b"# SHA-256 of the pickle: "

_REFUSED_BY_TORCH = re.compile(r"GLOBAL (\S+)")
_NUMBERS = (int, float, np.number, np.ndarray)
_TRUST_ADVICE = (
    f"If you trust where it comes from, pass trust_pickle=True or set {TRUST_VARIABLE}=1 (`--trust-pickle` on the "
    "command line); trust_pickle=[...] allows single classes and functions"
)


class CheckedStream(io.BytesIO):
    """The bytes of a model's zip that were checked."""


@dataclass(frozen=True)
class ModelFile:
    """
    A model's zip, checked but for what it has pickled.

    :param name: Of the file, for messages.
    :param content: Its bytes.
    :param data: The attributes of the model as JSON has them; None where the zip holds none.
    :param weights: Names of what it has tensors of.
    """

    name: str
    content: bytes
    data: Mapping[str, Any] | None
    weights: tuple[str, ...]

    def stream(self) -> CheckedStream:
        """:return: The bytes, for SB3's own functions"""
        return CheckedStream(self.content)

    def unpickled(self, trust: Trust, replaced: Collection[str]) -> dict[str, Any]:
        """
        Rebuild the attributes that are more than plain JSON.

        :param trust: How far the file is trusted.
        :param replaced: Attributes that will have other values; theirs are not looked at.
        :return: The objects, by attribute, and None for :data:`NOTE`.
        :raises UnsafeFileError: If one needs what is neither on the list nor trusted.
        :raises ValueError: If one cannot be read, being damaged or made for other versions.
        """
        fields: dict[str, Any] = {NOTE: None}
        for key, item in (self.data or {}).items():
            if isinstance(item, dict) and key not in replaced:
                if ":serialized:" in item:
                    fields[key] = self._unpickled(key, item[":serialized:"], trust)
                elif ENCODED in item:
                    fields[key] = self._decoded(key, item)
        return fields

    def _unpickled(self, key: str, text: Any, trust: Trust) -> Any:
        way_out = f"pass a value of your own: custom_objects={{{key!r}: ...}}."
        with _named_errors(f"`{key}` in {self.name}", f"{_TRUST_ADVICE}. Or {way_out}", f" To go on, {way_out}"):
            return _rebuilt(base64.b64decode(text, validate=True), trust)

    def _decoded(self, key: str, item: dict[str, Any]) -> Any:
        way_out = f"To go on, pass a value of your own: custom_objects={{{key!r}: ...}}."
        with _named_errors(f"`{key}` in {self.name}", f"`save` writes nothing like it. {way_out}", f" {way_out}"):
            return decoded(item)


def read_model(path: ModelPath, *, needs_data: bool = True) -> ModelFile:
    """
    Read a model's zip and check all but what it has pickled.

    :param path: The file, with or without ".zip", or an open binary file, whose position stays.
    :param needs_data: Whether it must hold the model's attributes, not only weights.
    :return: The file.
    :raises FileNotFoundError: If there is none.
    :raises UnsafeFileError: If its weights ask for more than tensors.
    :raises ValueError: If it is no model, damaged, or too large for the memory.
    """
    name, content = read_bytes(path, "zip")
    data = None
    weights = []
    for entry, raw in entries_of(name, content):
        if entry == "data":
            data = _parsed(name, raw)
        elif os.path.splitext(entry)[1] == ".pth":
            _check_weights(name, entry, raw)
            weights.append(entry.removesuffix(".pth"))
    if "policy" not in weights or (needs_data and data is None):
        missing = "`data`" if "policy" in weights else "`policy.pth`"
        raise ValueError(f"{name} must be what `save` wrote, but holds no {missing}. Pass the zip of a model.")
    return ModelFile(name, content, data, tuple(weights))


def check_model(file: ModelFile, cls: type[Any], trust: Trust, replaced: Collection[str]) -> None:
    """
    Refuse what would do more than describe a model, or less.

    :param file: The file.
    :param cls: The class that is loaded.
    :param trust: How far the file is trusted.
    :param replaced: Attributes that will have other values.
    :raises UnsafeFileError: If it brings an environment, whose name can have any module imported.
    :raises ValueError: If an attribute would hide a method, or something is missing.
    """
    data = file.data or {}
    if "policy.optimizer" not in file.weights:
        raise ValueError(f"{file.name} must be what `save` wrote, but holds no `policy.optimizer.pth`.")
    if data.get("env") is not None and "env" not in replaced and not trust.everything:
        raise UnsafeFileError(
            f"`env` in {file.name} must not be there: making an environment can import any module. {_TRUST_ADVICE}."
        )
    missing = [key for key in ("policy_class", "observation_space", "action_space") if key not in data]
    if missing:
        raise ValueError(f"{file.name} must be what `save` wrote, but `data` in it holds no {', '.join(missing)}.")
    for key in data:
        if key.startswith("__") or callable(getattr(cls, key, None)):
            raise ValueError(f"`{key}` in {file.name} must not be there: {cls.__name__} has a method of this name.")


def load_vec_normalize(load_path: Any, venv: VecEnv, trust_pickle: TrustPickle = None) -> VecNormalize:
    """
    Load what ``VecNormalize.save`` wrote, without running code.

    :param load_path: File.
    :param venv: Environments to wrap.
    :param trust_pickle: As in :meth:`sb3_clipvf.ClipPPO.load`.
    :return: Of the class that the file names, usually SB3's; settings and statistics are the file's.
    :raises UnsafeFileError: If it needs what is neither on the list nor trusted.
    :raises ValueError: If it holds something else, or is damaged.
    """
    vec_normalize = read_pickle(load_path, trust_pickle)
    name = os.fspath(load_path)
    if not isinstance(vec_normalize, VecNormalize):
        kind = type(vec_normalize).__name__
        raise ValueError(f"{name} must hold a VecNormalize, got {kind}. Pass what `VecNormalize.save` wrote.")
    if type(vec_normalize) is VecNormalize:
        _check_statistics(name, vec_normalize)
    vec_normalize.set_venv(venv)
    return vec_normalize


def digest_of_pickle(pickled: bytes) -> bytes:
    """
    Make what may stand behind a pickle, so that :func:`read_pickle` tells damage. Pickle's own readers stop before it.

    :param pickled: A pickle.
    :return: Bytes to append.
    """
    return _DIGEST_MARK + hashlib.sha256(pickled).hexdigest().encode()


def read_pickle(path: str | os.PathLike[str], trust_pickle: TrustPickle = None) -> Any:
    """
    Read a file that holds one pickle, without running code.

    :param path: File.
    :param trust_pickle: As in :meth:`sb3_clipvf.ClipPPO.load`.
    :return: The object.
    :raises UnsafeFileError: If it needs what is neither on the list nor trusted.
    :raises ValueError: If it is no pickle, damaged, or too large for the memory.
    """
    trust = trust_of(trust_pickle)
    name, content = read_bytes(pathlib.Path(path), None)
    if content[:1] != b"\x80":  # older protocols have no such start, and none of SB3's files is as old
        what = f"{len(content)} bytes of something else" if content else "is empty"
        raise ValueError(f"{name} must be a pickle, but {what}. Pass what `VecNormalize.save` wrote.")
    with _named_errors(name):
        return _rebuilt(_without_digest(content), trust)


def _without_digest(content: bytes) -> bytes:
    pickled, mark, digest = content.rpartition(_DIGEST_MARK)
    if mark and mark + digest != digest_of_pickle(pickled):
        raise ValueError("its digest is that of other bytes")
    # Where damage hit the mark, it is not found, but something stands behind the pickle.
    if not (mark or content.endswith(pickle.STOP)):
        raise ValueError("it does not end where a pickle ends")
    return pickled if mark else content


def _rebuilt(raw: bytes, trust: Trust) -> Any:
    return pickle.loads(raw) if trust.everything else unpickle(raw, trust)


@contextmanager
def _named_errors(what: str, refused_advice: str = f"{_TRUST_ADVICE}.", damaged_advice: str = "") -> Iterator[None]:
    """Say what could not be rebuilt, and the ways out: of a refusal, and of damage."""
    try:
        yield
    except NotAllowedError as refused:
        raise UnsafeFileError(
            f"{what} must be of classes that are known to be safe, got {_described(refused.what)}, which could run any "
            f"code. {refused_advice}"
        ) from None
    except Exception as error:  # damaged bytes, and classes of other versions, fail in any way
        raise ValueError(
            f"{what} could not be read: {reason_of(error)}. The file is damaged, or was saved with other versions of "
            f"its packages.{damaged_advice}"
        ) from error


# ---------------------------------------------------------------------- contents


def _parsed(name: str, raw: bytes) -> dict[str, Any]:
    check_json(f"`data` in {name}", raw)
    try:
        data = json.loads(raw)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"`data` in {name} must be JSON, but {reason_of(error)}. Save the model again.") from error
    if not isinstance(data, dict):
        raise ValueError(f"`data` in {name} must be a JSON object, got {type(data).__name__}. Save the model again.")
    data.pop(NOTE, None)  # it is for SB3's reader
    for key, item in data.items():
        if isinstance(item, dict) and not isinstance(item.get(":serialized:", ""), str):
            raise ValueError(f"`{key}` in {name} must be pickled as text, got another type. Save the model again.")
    return data


def _check_weights(name: str, entry: str, raw: bytes) -> None:
    """Read weights as SB3 will, which takes tensors and plain containers of them only."""
    what = f"{entry!r} in {name}"
    check_inner_zip(what, raw)
    try:
        weights = th.load(io.BytesIO(raw), map_location="cpu", weights_only=True)
    except Exception as error:  # torch fails in many ways on damaged bytes
        refused = _REFUSED_BY_TORCH.search(str(error))
        if refused is None:
            raise ValueError(f"{what} could not be read: {reason_of(error)}. Save the model again.") from error
        # Not torch's own words, which advise to load it without the check.
        raise UnsafeFileError(
            f"{what} must hold tensors only, got {refused[1]}. SB3 reads no other weights, trusted or not."
        ) from None
    if not (isinstance(weights, dict) or weights is None):
        raise ValueError(f"{what} must hold a dict of tensors, got {type(weights).__name__}. Save the model again.")
    if entry.endswith("optimizer.pth") and not {"state", "param_groups"} <= (weights or {}).keys():
        raise ValueError(f"{what} must hold the state of an optimizer, got something else. Save the model again.")


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


def _described(what: str) -> str:
    if what.startswith("cloudpickle."):
        return f"code of its own (by {what}; lambdas, and classes of scripts, are saved so)"
    return what
