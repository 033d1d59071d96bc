"""Where a number that is not finite comes from, the error that says so, and the file that holds what led to it."""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import numpy as np
import torch as th
from gymnasium import spaces
from stable_baselines3.common.policies import ActorCriticPolicy
from stable_baselines3.common.vec_env import VecNormalize

from sb3_clipvf.common.nonfinite import BadMinibatchError, NonFiniteError, by_key, is_finite, which_are_not
from sb3_clipvf.distributions import dist_params
from sb3_clipvf.engines.autograd import unvalidated_distributions
from sb3_clipvf.engines.recognition import has_hooks, replaced_method

if TYPE_CHECKING:
    from sb3_clipvf.clip_ppo import ClipPPO
    from sb3_clipvf.collection import RolloutCollector
    from sb3_clipvf.engines.interface import Acted


@dataclass(frozen=True)
class Fault:
    """
    The first number of an array that is not finite.

    :param what: See :class:`NonFiniteError`.
    :param key: See :class:`NonFiniteError`.
    :param row: Its row; None where rows are no environments or transitions.
    :param text: Where in the row it stands, its value, and how many there are.
    """

    what: str
    key: str | None
    row: int | None
    text: str


def find_fault(what: str, key: str | None, array: np.ndarray, *, has_rows: bool = True) -> Fault | None:
    """
    Look for the first number that is not finite.

    :param what: See :class:`NonFiniteError`.
    :param key: See :class:`NonFiniteError`.
    :param array: Any; its first axis counts environments or transitions where it has rows.
    :param has_rows: Whether it has.
    :return: None where all are finite.
    """
    if is_finite(array):
        return None
    bad = which_are_not(array)
    place = tuple(np.argwhere(bad)[0].tolist())
    within = place[1:] if has_rows else place
    element = f" at element [{', '.join(map(str, within))}]" if array[place[:has_rows]].size > 1 else ""
    count = int(bad.sum())
    return Fault(
        what,
        key or None,
        place[0] if has_rows else None,
        f"got {array[place]}{element} ({count} of {bad.size} numbers)",
    )


def observation_fault(observations: Any) -> Fault | None:
    """
    Look for the first number of observations that is not finite.

    :param observations: Of all environments, on the host: an array, or a dict of such.
    :return: None where all are finite.
    """
    faults = (find_fault("observation", key, array) for key, array in by_key(observations).items())
    return next((fault for fault in faults if fault is not None), None)


def reads_by_own_code(policy: Any) -> bool:
    """
    Return whether code of the user's reads observations, which may know what to do with missing ones.

    Networks of SB3 make NaN of an observation that is NaN, but of an infinite one tanh makes a number.

    :param policy: Any policy.
    :return: False where all that stands between observations and networks is SB3's or this package's.
    """
    parts = [policy, *(getattr(policy, name, None) for name in ("pi_features_extractor", "vf_features_extractor"))]
    return any(
        not type(part).__module__.startswith(("stable_baselines3.", "sb3_clipvf."))
        or replaced_method(part) is not None
        or has_hooks(part)
        for part in [*parts, getattr(policy, "mlp_extractor", None)]
    )


def has_finite_statistics(normalizer: VecNormalize | None) -> bool:
    """
    Return whether statistics of observations are finite; others turn all later observations into NaN.

    :param normalizer: Of the environments, if any.
    :return: Whether they are, or there are none.
    """
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


def act_fault(policy: ActorCriticPolicy, observations: Any, obs_tensor: Any, acted: "Acted | None") -> Fault | None:
    """
    Look for what is not finite where the policy acts.

    :param policy: The policy.
    :param observations: That it acted on, on the host.
    :param obs_tensor: The same on its device.
    :param acted: What it gave; None where torch has refused to draw an action.
    :return: None where nothing is found.
    """
    # A policy may handle a missing observation, but not a missing weight.
    fault = _parameter_fault(policy) or observation_fault(observations)
    if fault is not None:
        return fault
    values: Any
    rows: Any
    if acted is not None:
        values, rows = acted.values, acted.log_prob
    else:
        try:
            with th.no_grad(), unvalidated_distributions():
                values, rows = policy.predict_values(obs_tensor), dist_params(policy.get_distribution(obs_tensor))
        except Exception:  # whatever the policy fails at now, the error that it has raised before is the one to tell
            return None
    fault = find_fault("value", None, _on_host(values).reshape(-1))
    return fault or find_fault("log_prob", None, _on_host(rows))


def _known_of_step(model: "RolloutCollector", buffer: Any) -> dict[str, Any]:
    """What is known where the policy is to act: the observations, and the step that has led to them."""
    known: dict[str, Any] = {"new_observations": model._last_obs, "dones": model._last_episode_starts}
    if buffer.pos:
        for name in ("observations", "actions", "values", "log_probs", "rewards"):
            rows = getattr(buffer, name)
            last = buffer.pos - 1
            known[name] = {key: array[last] for key, array in rows.items()} if isinstance(rows, dict) else rows[last]
    return known


def _on_host(values: np.ndarray | th.Tensor) -> np.ndarray:
    return values if isinstance(values, np.ndarray) else np.asarray(values.detach().cpu().numpy())


# ------------------------------------------------------------------ errors


def _step_error(model: "RolloutCollector", fault: Fault, step: int, known: dict[str, Any]) -> NonFiniteError:
    """
    Make the error of a step, and write the step to a file.

    :param model: Collecting a rollout.
    :param fault: What is not finite.
    :param step: Of the rollout, from 0.
    :param known: What is known of the step, by name, among other things: arrays, or dicts of arrays.
    :return: The error, to be raised.
    """
    name = f"`{fault.what}`" if fault.key is None else f"`{fault.what}` {fault.key!r}"
    where = "" if fault.row is None else f" of environment {fault.row}"
    poisoned = ""
    if fault.what != "parameter" and model.get_vec_normalize_env() is not None:
        poisoned = " VecNormalize may have taken it into its statistics: go on from the last checkpoint or saved model."
    path, told = _write(model, {name: known.get(name) for name in _STEP_ARRAYS})
    return NonFiniteError(
        f"{name}{where} must be finite, {fault.text}, at step {step} of the rollout, num_timesteps="
        f"{model.num_timesteps}. {_WAYS_OUT[fault.what]}{poisoned} {told}",
        what=fault.what,
        num_timesteps=model.num_timesteps,
        step=step,
        env_index=fault.row,
        key=fault.key,
        path=path,
    )


def act_error(model: "RolloutCollector", fault: Fault, buffer: Any) -> NonFiniteError:
    """
    Make the error of a policy that is to act, or to value the last observations.

    :param model: Collecting a rollout.
    :param fault: What is not finite.
    :param buffer: Its rollout buffer.
    :return: The error, to be raised.
    """
    return _step_error(model, fault, buffer.pos, _known_of_step(model, buffer))


def reward_error(model: "RolloutCollector", bootstrapped: np.ndarray, here: dict[str, Any]) -> NonFiniteError:
    """
    Make the error of a step with rewards, or values of final observations added to them, that are not finite.

    :param model: Collecting a rollout.
    :param bootstrapped: Rewards with those values, shape ``(n_envs,)``, at least one of them not finite.
    :param here: Local variables of ``collect_rollouts``, its steps counted already.
    :return: The error, to be raised.
    """
    fault = _reward_fault(here["rewards"], bootstrapped, here["infos"])
    known = {**here, "observations": model._last_obs, "new_observations": here["new_obs"]}
    return _step_error(model, fault, here["n_steps"] - 1, known)


def _reward_fault(rewards: np.ndarray, bootstrapped: np.ndarray, infos: list[dict[str, Any]]) -> Fault:
    fault = find_fault("reward", None, rewards)
    if fault is not None:
        return fault
    for row in np.flatnonzero(which_are_not(bootstrapped)).tolist():
        for key, array in by_key(infos[row]["terminal_observation"]).items():
            fault = find_fault("terminal_observation", key, array, has_rows=False)
            if fault is not None:
                return replace(fault, row=row)
    return cast(Fault, find_fault("terminal_value", None, bootstrapped))


_STEP_ARRAYS = ("observations", "actions", "values", "log_probs", "rewards", "dones", "new_observations")
_OF_ENVIRONMENT = "Correct the environment, or catch this in a wrapper."
_OF_POLICY = "Go on from the last checkpoint or saved model with a lower learning_rate, and look for huge observations."
_WAYS_OUT = {
    "observation": _OF_ENVIRONMENT,
    "reward": _OF_ENVIRONMENT,
    "terminal_observation": _OF_ENVIRONMENT,
    "terminal_value": _OF_POLICY,
    "value": _OF_POLICY,
    "log_prob": _OF_POLICY,
    "parameter": "Go on from the last checkpoint or saved model. If a callback changes weights, correct it.",
}
_SKIP = "on_nonfinite='skip' leaves such minibatches out."


def update_error(model: "ClipPPO", bad: BadMinibatchError, reason: str = "") -> NonFiniteError:
    """
    Make the error of an update, and write its first bad minibatch to a file.

    :param model: With the policy as it was before that minibatch, or, where minibatches were skipped, as it is now.
    :param bad: The minibatch.
    :param reason: Why no more are skipped, where they were, half a sentence.
    :return: The error, to be raised.
    """
    indices, n_steps = bad.indices, model.rollout_buffer.buffer_size
    fault = _cause_in_update(model, bad)
    env_index = step = None
    cause = "No single transition is its cause: sums or products of finite numbers are too large."
    if fault is not None:
        place = ""
        if fault.row is not None and indices is not None:
            env_index, step = (int(number) for number in divmod(int(indices[fault.row]), n_steps))
            place = f" of environment {env_index} at step {step} of the rollout"
        cause = f"Its cause: `{fault.key}`{place}, {fault.text}."
    path, told = _write(model, {**_arrays_of(bad.batch), "indices": indices})
    if fault is not None and fault.what == "parameter":
        way_out = f"{_WAYS_OUT['parameter']} {reason.capitalize()}".rstrip()
    else:
        way_out = (
            "It made no step, so the policy is whole. Lower `learning_rate` or `max_grad_norm`, and look for rewards "
            f"and observations that are huge; {reason or _SKIP}"
        )
    return NonFiniteError(
        f"{bad} in minibatch {bad.minibatch} of epoch {bad.epoch} of the update at num_timesteps="
        f"{model.num_timesteps}. {cause} {way_out} {told}",
        what=bad.what,
        num_timesteps=model.num_timesteps,
        step=step,
        env_index=env_index,
        key=None if fault is None else fault.key,
        epoch=bad.epoch,
        minibatch=bad.minibatch,
        path=path,
    )


def _cause_in_update(model: "ClipPPO", bad: BadMinibatchError) -> Fault | None:
    """What makes a minibatch's loss or gradient not finite; None where no single number does."""
    arrays = _arrays_of(bad.batch)
    observations = {"observations": arrays.pop("observations", None)}  # which the policy may know how to treat
    for name, value in _flat(arrays).items():
        fault = find_fault(bad.what, name, value, has_rows=value.ndim > 0)
        if fault is not None:
            return fault
    fault = _parameter_fault(model.policy)
    if fault is not None:
        return fault
    for name, value in _flat(observations).items():
        fault = find_fault(bad.what, name, value)
        if fault is not None:
            return fault
    for name, value in _evaluated(model.policy, bad.batch).items():
        fault = find_fault(bad.what, name, value)
        if fault is not None:
            return fault
    # Those of other minibatches count where advantages are normalised over the rollout.
    return find_fault(
        bad.what, "advantages of the rollout", np.asarray(model.rollout_buffer.advantages), has_rows=False
    )


def _arrays_of(batch: Any) -> dict[str, Any]:
    # Buffers of others may give minibatches of any kind.
    return dict(batch._asdict() if hasattr(batch, "_asdict") else getattr(batch, "__dict__", {}))


def _evaluated(policy: Any, batch: Any) -> dict[str, np.ndarray]:
    """What the policy says of a minibatch, by name; empty where it fails."""
    policy.set_training_mode(False)
    discrete = isinstance(policy.action_space, spaces.Discrete)
    try:
        with th.no_grad(), unvalidated_distributions():
            actions = batch.actions.long().flatten() if discrete else batch.actions
            values, log_prob, _ = policy.evaluate_actions(batch.observations, actions)
            ratio = th.exp(log_prob - batch.old_log_prob)
    except (ValueError, RuntimeError):
        return {}
    found = {"values": values.flatten(), "log_prob": log_prob, "ratio": ratio}
    return {name: tensor.cpu().numpy() for name, tensor in found.items()}


# ------------------------------------------------------------------ files


def _flat(arrays: dict[str, Any]) -> dict[str, np.ndarray]:
    """Arrays by name, ``name.key`` where there are keys; what is absent or no plain array is left out."""
    flat: dict[str, np.ndarray] = {}
    for name, value in arrays.items():
        if value is None:
            continue
        for key, item in (value if isinstance(value, Mapping) else {"": value}).items():
            array = item.detach().cpu().numpy() if isinstance(item, th.Tensor) else np.asarray(item)
            if array.dtype.kind != "O":
                flat[f"{name}.{key}" if key else name] = array
    return flat


def _write(model: "RolloutCollector", arrays: dict[str, Any]) -> tuple[Path | None, str]:
    """:return: The file that was written, if any, and a sentence about it."""
    from sb3_clipvf.files.atomic import atomic_write

    folder = _folder(model)
    if folder is None:
        return None, "Train with a TrainingCheckpoint, or with `tensorboard_log`, to have it written to a file."
    path = folder / f"nonfinite_{model.num_timesteps}.npz"
    try:
        with atomic_write(path) as file:
            np.savez(file, **_flat(arrays))  # type: ignore[arg-type]
    except Exception as error:  # whatever it is, it must not take the place of the error that is to be told
        return None, f"It could not be written to a file: {error}"
    return path, f"It was written to {path}."


def _folder(model: Any) -> Path | None:
    """That of the training's checkpoints, or that of its log where the user has chosen one."""
    if model._checkpoint_folder is not None:
        return Path(model._checkpoint_folder)
    has_own = model._custom_logger or model.tensorboard_log is not None
    return Path(model.logger.dir) if has_own and model.logger.dir is not None else None
