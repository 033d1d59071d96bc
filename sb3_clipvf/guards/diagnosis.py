"""
Diagnosis of non-finite numbers: which number and why, the error that reports it, and the file with its arrays.

The finders return a :class:`Fault` or None; ``step_error`` and ``update_error`` turn one into a ``NonFiniteError``.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch as th
from gymnasium import spaces
from stable_baselines3.common.policies import ActorCriticPolicy
from stable_baselines3.common.vec_env import VecNormalize

from sb3_clipvf.common.nonfinite import BadMinibatchError, NonFiniteError, is_finite, nonfinite_mask
from sb3_clipvf.common.observations import parts_of
from sb3_clipvf.distributed import ALONE, Group
from sb3_clipvf.distributions import dist_params
from sb3_clipvf.engines.autograd import unvalidated_distributions
from sb3_clipvf.engines.interface import Acted
from sb3_clipvf.engines.recognition import has_hooks, replaced_method
from sb3_clipvf.files.atomic import atomic_write
from sb3_clipvf.rollout import on_host


@dataclass(frozen=True)
class FaultContext:
    """The state of training at a fault."""

    policy: ActorCriticPolicy
    num_timesteps: int  # environment steps so far
    folder: Path | None  # folder for the file with the arrays; None: no file is written
    normalizes: bool  # whether the environments have a `VecNormalize`, whose statistics may contain the fault
    group: Group = ALONE  # processes of the run


@dataclass(frozen=True)
class Fault:
    """The first non-finite number of an array; ``what`` and ``key`` are those of :class:`NonFiniteError`."""

    what: str
    key: str | None
    row: int | None  # environment or transition; None if rows are neither
    text: str  # its value, its position in the row, and how many numbers are not finite


# ------------------------------------------------------------------ finding


def find_fault(what: str, key: str | None, array: np.ndarray, *, has_rows: bool = True) -> Fault | None:
    """Return the first non-finite number of an array, whose first axis counts rows unless ``has_rows`` is False."""
    if is_finite(array):
        return None
    bad = nonfinite_mask(array)
    place = tuple(np.argwhere(bad)[0].tolist())
    within, row = (place[1:], array[place[0]]) if has_rows else (place, array)
    element = f" at element [{', '.join(map(str, within))}]" if row.size > 1 else ""
    text = f"got {array[place]}{element} ({int(bad.sum())} of {bad.size} numbers)"
    return Fault(what, key or None, place[0] if has_rows else None, text)


def observation_fault(observations: Any) -> Fault | None:
    """Return the first non-finite number of the observations of all environments: an array, or a dict of arrays."""
    faults = (find_fault("observation", key, np.asarray(part)) for key, part in parts_of(observations).items())
    return next((fault for fault in faults if fault is not None), None)


def reads_by_own_code(policy: Any) -> bool:
    """
    Return whether the user's own code reads observations, so that it may handle non-finite ones.

    SB3's networks turn a NaN into NaN, but tanh turns an infinite observation into a finite number.
    """
    parts = [policy, *(getattr(policy, name, None) for name in ("pi_features_extractor", "vf_features_extractor"))]
    return any(
        not type(part).__module__.startswith(("stable_baselines3.", "sb3_clipvf."))
        or replaced_method(part) is not None
        or has_hooks(part)
        for part in [*parts, getattr(policy, "mlp_extractor", None)]
    )


def has_finite_statistics(normalizer: VecNormalize | None) -> bool:
    """Return whether the statistics of observations, if any, are finite. Non-finite ones make every observation NaN."""
    if normalizer is None or not normalizer.norm_obs:
        return True
    rms = normalizer.obs_rms
    return all(
        is_finite(each.mean) and is_finite(each.var) for each in (rms.values() if isinstance(rms, dict) else [rms])
    )


def _parameter_fault(policy: th.nn.Module) -> Fault | None:
    for name, parameter in policy.named_parameters():
        fault = find_fault("parameter", name, parameter.detach().cpu().float().numpy(), has_rows=False)
        if fault is not None:
            return fault
    return None


def act_fault(policy: ActorCriticPolicy, observations: Any, obs_tensor: Any, acted: Acted | None) -> Fault | None:
    """
    Return the non-finite number where the policy acts: a parameter, an observation, or what it computed.

    ``acted`` is None if torch refused to draw an action; the policy is then evaluated again.
    """
    # The user's code may handle a non-finite observation, but not a non-finite weight.
    fault = _parameter_fault(policy) or observation_fault(observations)
    if fault is not None:
        return fault
    values: Any
    rows: Any
    if acted is not None:
        values, rows = acted.values, acted.log_prob
    else:
        try:
            with th.no_grad(), unvalidated_distributions:
                values, rows = policy.predict_values(obs_tensor), dist_params(policy.get_distribution(obs_tensor))
        except Exception:  # this second error must not mask the first one
            return None
    fault = find_fault("value", None, on_host(values).reshape(-1))
    return fault or find_fault("log_prob", None, on_host(rows))


def reward_fault(rewards: np.ndarray, bootstrapped: np.ndarray, infos: Sequence[Mapping[str, Any]]) -> Fault:
    """Return why bootstrapped rewards are not finite: the reward, the final observation, or its value."""
    fault = find_fault("reward", None, rewards)
    if fault is not None:
        return fault
    for row in np.flatnonzero(nonfinite_mask(bootstrapped)).tolist():
        for key, part in parts_of(infos[row].get("terminal_observation", {})).items():
            fault = find_fault("terminal_observation", key, np.asarray(part), has_rows=False)
            if fault is not None:
                return replace(fault, row=row)
    return cast(Fault, find_fault("terminal_value", None, bootstrapped))


# ------------------------------------------------------------------ errors

_STEP_ARRAYS = ("observations", "actions", "values", "log_probs", "rewards", "dones", "new_observations")
_CORRECT_ENVIRONMENT = "Correct the environment, or catch this in a wrapper."
_RESUME_EARLIER = (
    "Resume from the last checkpoint or saved model with a lower learning_rate, and look for huge observations."
)
_HINTS = {
    "observation": _CORRECT_ENVIRONMENT,
    "reward": _CORRECT_ENVIRONMENT,
    "terminal_observation": _CORRECT_ENVIRONMENT,
    "terminal_value": _RESUME_EARLIER,
    "value": _RESUME_EARLIER,
    "log_prob": _RESUME_EARLIER,
    "parameter": "Resume from the last checkpoint or saved model. If a callback changes weights, correct it.",
}
_SKIP = "on_nonfinite='skip' skips such minibatches."


def step_error(context: FaultContext, fault: Fault, step: int, known: dict[str, Any]) -> NonFiniteError:
    """Return the error for a fault in a step of the rollout, and write the step's known arrays to a file."""
    name = f"`{fault.what}`" if fault.key is None else f"`{fault.what}` {fault.key!r}"
    where = "" if fault.row is None else f" of environment {fault.row}"
    spoilt = ""
    if context.normalizes and fault.what != "parameter":
        spoilt = " The statistics of VecNormalize may contain it: resume from the last checkpoint or saved model."
    path, evidence = _write(context, {name: known.get(name) for name in _STEP_ARRAYS})
    return NonFiniteError(
        f"{name}{where} must be finite, {fault.text}, at step {step} of the rollout, num_timesteps="
        f"{context.num_timesteps}. {_HINTS[fault.what]}{spoilt} {evidence}",
        what=fault.what,
        num_timesteps=context.num_timesteps,
        step=step,
        env_index=fault.row,
        key=fault.key,
        path=path,
    )


@dataclass(frozen=True)
class _Cause:
    """Why a minibatch is not finite."""

    fault: Fault | None  # None if no single number is the cause
    env_index: int | None  # place in the rollout, if known
    step: int | None
    path: Path | None  # file with the minibatch, if one was written
    evidence: str  # a sentence about this file


def update_error(context: FaultContext, bad: BadMinibatchError, buffer: Any, reason: str = "") -> NonFiniteError:
    """
    Return the error for an update, and write its first non-finite minibatch to a file.

    If several processes share the minibatch, the first one that has a cause writes its part, and all return its error.
    The policy is as it was before that minibatch or, with ``on_nonfinite="skip"``, as it is after the update.
    ``reason`` states why no more minibatches are skipped.
    """
    cause, process = _shared_cause(context, bad, buffer)
    fault, place = cause.fault, ""
    if cause.env_index is not None:
        place = f" of environment {cause.env_index} at step {cause.step} of the rollout"
    if context.group.size > 1 and fault is not None and fault.what != "parameter":
        place += f" of process {process}"
    text = "No single transition is its cause: sums or products of finite numbers are too large."
    if fault is not None:
        text = f"Its cause: `{fault.key}`{place}, {fault.text}."
    if fault is not None and fault.what == "parameter":
        hint = f"{_HINTS['parameter']} {reason.capitalize()}".rstrip()
    else:
        hint = (
            "No step was taken for it, so the policy is intact. Lower `learning_rate` or `max_grad_norm`, and look for "
            f"huge rewards and observations; {reason or _SKIP}"
        )
    return NonFiniteError(
        f"{bad} in minibatch {bad.minibatch} of epoch {bad.epoch} of the update at num_timesteps="
        f"{context.num_timesteps}. {text} {hint} {cause.evidence}",
        what=bad.what,
        num_timesteps=context.num_timesteps,
        step=cause.step,
        env_index=cause.env_index,
        key=None if fault is None else fault.key,
        epoch=bad.epoch,
        minibatch=bad.minibatch,
        path=cause.path,
    )


def _shared_cause(context: FaultContext, bad: BadMinibatchError, buffer: Any) -> tuple[_Cause, int]:
    """Return the cause that all processes report, with the process that has it: the first one that has any."""
    group, fault = context.group, _cause_in_update(context.policy, bad, buffer)
    have_causes = group.gather(fault is not None)
    process = have_causes.index(True) if any(have_causes) else 0
    own = None
    if group.rank == process:
        env_index = step = None
        if fault is not None and fault.row is not None and bad.indices is not None:
            env_index, step = (int(number) for number in divmod(int(bad.indices[fault.row]), buffer.buffer_size))
        own = _Cause(fault, env_index, step, *_write(context, {**_arrays_of(bad.batch), "indices": bad.indices}))
    return cast(_Cause, group.gather(own)[process]), process


def _cause_in_update(policy: ActorCriticPolicy, bad: BadMinibatchError, buffer: Any) -> Fault | None:
    """Return why a minibatch's loss or gradient is not finite; None if no single number is the cause."""
    arrays = _arrays_of(bad.batch)
    observations = {"observations": arrays.pop("observations", None)}  # the policy may handle non-finite ones
    for name, value in _flat(arrays).items():
        fault = find_fault(bad.what, name, value, has_rows=value.ndim > 0)
        if fault is not None:
            return fault
    fault = _parameter_fault(policy)
    if fault is not None:
        return fault
    for name, value in _flat(observations).items():
        fault = find_fault(bad.what, name, value)
        if fault is not None:
            return fault
    for name, value in _evaluated(policy, bad.batch).items():
        fault = find_fault(bad.what, name, value)
        if fault is not None:
            return fault
    # With advantage_scope="rollout", advantages of other minibatches count too.
    advantages = on_host(getattr(buffer, "advantages", np.empty(0)))  # a user's buffer may have others
    return find_fault(bad.what, "advantages of the rollout", advantages, has_rows=False)


def _arrays_of(batch: Any) -> dict[str, Any]:
    # A user's buffer may yield minibatches of any type.
    return dict(batch._asdict() if hasattr(batch, "_asdict") else getattr(batch, "__dict__", {}))


def _evaluated(policy: Any, batch: Any) -> dict[str, np.ndarray]:
    """Return what the policy computes for a minibatch, by name; nothing if it fails."""
    policy.set_training_mode(False)
    discrete = isinstance(policy.action_space, spaces.Discrete)
    try:
        with th.no_grad(), unvalidated_distributions:
            actions = batch.actions.long().flatten() if discrete else batch.actions
            values, log_prob, _ = policy.evaluate_actions(batch.observations, actions)
            ratio = th.exp(log_prob - batch.old_log_prob)
    except (ValueError, RuntimeError):
        return {}
    found = {"values": values.flatten(), "log_prob": log_prob, "ratio": ratio}
    return {name: tensor.cpu().numpy() for name, tensor in found.items()}


# ------------------------------------------------------------------ files


def _flat(arrays: dict[str, Any]) -> dict[str, np.ndarray]:
    """Return arrays by name, ``name.key`` if there are keys, without absent ones and arrays of objects."""
    flat: dict[str, np.ndarray] = {}
    for name, value in arrays.items():
        if value is None:
            continue
        for key, item in (value if isinstance(value, Mapping) else {"": value}).items():
            array = item.detach().cpu().numpy() if isinstance(item, th.Tensor) else np.asarray(item)
            if array.dtype.kind != "O":
                flat[f"{name}.{key}" if key else name] = array
    return flat


def _write(context: FaultContext, arrays: dict[str, Any]) -> tuple[Path | None, str]:
    """Write arrays to a file; return the file, if any, and a sentence about it."""
    if context.folder is None:
        return None, "To have these arrays written to a file, use a TrainingCheckpoint or set `tensorboard_log`."
    process = f"_process{context.group.rank}" if context.group.rank else ""
    path = context.folder / f"nonfinite_{context.num_timesteps}{process}.npz"
    try:
        if context.group.rank:  # on another machine, the first process's folder may not exist yet
            context.folder.mkdir(parents=True, exist_ok=True)
        with atomic_write(path) as file:
            np.savez(file, **_flat(arrays))  # type: ignore[arg-type]
    except Exception as error:  # a failed file must not mask the original error
        return None, f"The arrays that led to this error could not be written to a file: {error}"
    return path, f"The arrays that led to this error are in {path}."
