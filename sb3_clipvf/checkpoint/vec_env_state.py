"""The state of vectorised environments: layer by layer, from the outermost wrapper to the single environments."""

import os
from typing import Any

import numpy as np
from gymnasium.vector import SyncVectorEnv
from stable_baselines3.common.running_mean_std import RunningMeanStd
from stable_baselines3.common.vec_env import DummyVecEnv, SubprocVecEnv, VecEnv, VecFrameStack, VecNormalize
from stable_baselines3.common.vec_env.base_vec_env import VecEnvWrapper
from stable_baselines3.common.vec_env.stacked_observations import StackedObservations

from sb3_clipvf.checkpoint.env_state import (
    allow_reset,
    describe_env,
    env_state,
    has_own_state,
    own_state,
    restore_env,
)
from sb3_clipvf.checkpoint.errors import EnvironmentMismatchError
from sb3_clipvf.checkpoint.monitor_files import file_state, restore_file
from sb3_clipvf.checkpoint.random_state import generator_from, generator_state
from sb3_clipvf.checkpoint.state_attributes import ATTRIBUTES, read_attributes, write_attributes
from sb3_clipvf.envs.gymnasium_vector import CartPoleVecEnv
from sb3_clipvf.envs.layers import simulator_of, vec_env_layers
from sb3_clipvf.envs.vector import BatchedVecEnv
from sb3_clipvf.files.allowlist import full_name
from sb3_clipvf.files.codec import frozen

# They step like SB3's classes; FastSubprocVecEnv also rounds rewards to float32, as DummyVecEnv does.
_SAME = {
    "sb3_clipvf.envs.dummy.FastDummyVecEnv": "DummyVecEnv",
    "sb3_clipvf.envs.subproc.FastSubprocVecEnv": "SubprocVecEnv",
}

_BASES = (DummyVecEnv, SubprocVecEnv, BatchedVecEnv)
"""Innermost layers in which environments are known, also those of derived classes."""

# Attributes of the adapter's statistics, and of Gymnasium's vectorised CartPole
_STATISTICS = "started_at returns lengths total_timesteps"
_CARTPOLE = "state steps prev_done steps_beyond_terminated _np_random_seed"

_RESET_TEXT = "begin new episodes at a resume, with different random numbers"
_RESET_HINT = "In a script, TrainingCheckpoint(..., reset_envs=True) makes a resumed run exact."
_METHODS_HINT = f"Define get_training_state() and set_training_state() in the class. {_RESET_HINT}"


def vec_env_state(venv: VecEnv) -> tuple[dict[str, Any], list[str]]:
    """Return the state of environments and all their wrappers, and a text for each class whose state is not known."""
    layers, differences = [], []
    for layer in _layers(venv):
        _move_to_host(layer)
        state, reasons = _layer_state(layer)
        layers.append(state)
        differences += [reason for reason in reasons if reason not in differences]
    return {"layers": layers, "exact": not differences}, differences


def restore_vec_env(venv: VecEnv, state: dict[str, Any]) -> None:
    """
    Restore the state from :func:`vec_env_state` in environments with the same wrappers, which have been reset once.

    If the state is not exact, they must be reset afterwards.
    """
    for layer, own in reversed(list(zip(_layers(venv), state["layers"], strict=True))):
        if isinstance(layer, VecEnv):
            _restore_layer(layer, own)
        if own["given"] is not None:
            layer.set_training_state(own["given"]["state"])
    if not state.get("exact", True):
        _allow_resets(venv)


def _restore_layer(layer: VecEnv, own: dict[str, Any]) -> None:
    """Restore the state of a layer, and of environments in it, that its own method does not return."""
    _move_to_host(layer)
    write_attributes(layer, own["attributes"], _attribute_names(layer))
    if own["obs_rms"] is not None and isinstance(layer, VecNormalize):
        layer.obs_rms = _moments_from(own["obs_rms"])
    if own["stacks"] is not None and isinstance(layer, VecFrameStack):
        for stack, values in zip(_stacks(layer.stacked_obs), own["stacks"], strict=True):
            stack.stacked_obs = values
    restore_file(vars(layer).get("results_writer"), own["file"])
    for index, environment in enumerate(own["environments"] or ()):
        if isinstance(layer, DummyVecEnv):
            restore_env(layer.envs[index], environment)
        else:
            layer.env_method("set_whole_state", environment, os.getpid(), indices=[index])
    if own["adapter"] is not None and isinstance(layer, BatchedVecEnv):
        _restore_adapter(layer, own["adapter"])


def describe_vec_env(venv: VecEnv) -> dict[str, Any]:
    """Return the number of environments and the classes of all layers; in other processes, if they are resumable."""
    layers = _layers(venv)
    base = layers[-1]
    environments = None
    if isinstance(base, DummyVecEnv):
        environments = [describe_env(env) for env in base.envs]
    elif _is_resumable(base):
        environments = base.env_method("whole_description")
    return {
        "n_envs": venv.num_envs,
        "layers": [_SAME.get(full_name(type(layer)), type(layer).__qualname__) for layer in layers],
        "environments": environments,
        "inner": type(_core(base)).__qualname__ if isinstance(base, BatchedVecEnv) else None,
    }


def check_same_build(saved: dict[str, Any], found: dict[str, Any]) -> None:
    """Raise if the description of environments differs from that in a checkpoint; see :func:`describe_vec_env`."""
    for name, what in {"n_envs": "number of environments", "layers": "layers", "inner": "inner environment"}.items():
        _check_same(what, saved[name], found[name])
    if None in (saved["environments"], found["environments"]):
        if saved["environments"] is not None:
            raise EnvironmentMismatchError(
                "`env` must be wrapped in ResumableEnv, as in the checkpoint, got environments in other processes "
                "without it. Build them with make_vec_env(..., wrapper_class=ResumableEnv)."
            )
        return
    for index, (before, now) in enumerate(zip(saved["environments"], found["environments"], strict=True)):
        _check_same("wrappers and environments", before, now, f" as number {index}")


def _check_same(what: str, saved: Any, found: Any, where: str = "") -> None:
    if saved != found:
        texts = [" > ".join(map(str, value)) if isinstance(value, list) else str(value) for value in (saved, found)]
        raise EnvironmentMismatchError(
            f"`env` must have the {what} of the checkpoint, {texts[0]}, got {texts[1]}{where}. Build them as they were "
            "built for the training."
        )


def _move_to_host(layer: Any) -> None:
    """Move the state of a layer that keeps it on a device, as TensorVecNormalize does, to its attributes."""
    if hasattr(type(layer), "to_host"):
        layer.to_host()


def _layers(venv: VecEnv) -> list[Any]:
    """Return the layers, then a simulator inside the innermost one, unless that layer saves its state."""
    layers, simulator = vec_env_layers(venv), simulator_of(venv)
    return layers if simulator is None or has_own_state(layers[-1]) else [*layers, simulator]


def _layer_state(layer: Any) -> tuple[dict[str, Any], list[str]]:
    name = full_name(type(layer))
    state: dict[str, Any] = dict.fromkeys(("given", "obs_rms", "stacks", "file", "environments", "adapter"))
    state["attributes"] = {}
    reasons = []
    if has_own_state(layer):
        state["given"], wrong = own_state(layer)
        reasons = [] if wrong is None else [f"{wrong} starts again at a resume."]
    elif not isinstance(layer, VecEnv):
        reasons = [_inaccessible(layer)]
    elif name not in ATTRIBUTES and isinstance(layer, (VecEnvWrapper, *_BASES)):
        reasons = [f"{name} does not provide its state, and starts again at a resume. {_METHODS_HINT}"]
    elif isinstance(layer, VecEnvWrapper):
        state["attributes"] = frozen(read_attributes(layer, _attribute_names(layer)), name)
        state["file"] = file_state(vars(layer).get("results_writer"))
        if isinstance(layer, VecNormalize) and layer.norm_obs:
            state["obs_rms"] = _moments(layer.obs_rms)
        if isinstance(layer, VecFrameStack):
            state["stacks"] = [stack.stacked_obs.copy() for stack in _stacks(layer.stacked_obs)]
    if isinstance(layer, VecEnv) and not isinstance(layer, VecEnvWrapper):
        # What a class adds to one of these is its own; the environments in it are known all the same.
        reasons += _add_environments(state, layer)
    return state, reasons


def _add_environments(state: dict[str, Any], layer: VecEnv) -> list[str]:
    """Add the states of the environments in the innermost layer; return a text for each class without a known state."""
    state["attributes"] = frozen(read_attributes(layer, _attribute_names(layer)))
    if isinstance(layer, BatchedVecEnv):
        state["adapter"], reasons = _adapter_state(layer)
        return reasons
    if isinstance(layer, DummyVecEnv):
        state["environments"] = [env_state(env) for env in layer.envs]
    elif _is_resumable(layer):
        state["environments"] = _once_per_process(layer.env_method("whole_state"))
    else:
        is_whole = has_own_state(layer) and not isinstance(layer, SubprocVecEnv)
        return [] if is_whole else [_inaccessible(layer)]
    return _unknown(state["environments"])


def _attribute_names(layer: VecEnv) -> str:
    # Innermost, seeds of the next reset: new environments still have those of their first reset.
    return ATTRIBUTES.get(full_name(type(layer)), "") if isinstance(layer, VecEnvWrapper) else "_seeds"


def _allow_resets(venv: VecEnv) -> None:
    """Let all ``Monitor`` wrappers accept the reset that follows; with ``allow_early_resets=False`` they refuse it."""
    base = vec_env_layers(venv)[-1]
    if isinstance(base, SubprocVecEnv):
        if base.has_attr("needs_reset"):
            base.env_method("set_wrapper_attr", "needs_reset", True)
        return
    owner = base.env if isinstance(base, BatchedVecEnv) else base
    if isinstance(owner, DummyVecEnv | SyncVectorEnv):
        for env in owner.envs:
            allow_reset(env)


def _inaccessible(layer: Any) -> str:
    hint = _METHODS_HINT
    if isinstance(layer, SubprocVecEnv):
        hint = f"Wrap them in ResumableEnv, as make_vec_env(..., wrapper_class=ResumableEnv) does. {_RESET_HINT}"
    return f"Environments of {full_name(type(layer))} {_RESET_TEXT}. {hint}"


def _unknown(environments: list[dict[str, Any]]) -> list[str]:
    names = sorted({name for environment in environments for name in environment["unknown"]})
    return [f"{name} does not provide its state: the environments {_RESET_TEXT}. {_METHODS_HINT}" for name in names]


def _is_resumable(layer: VecEnv) -> bool:
    """Return whether environments in other processes are wrapped in ResumableEnv; raise if another one is around it."""
    # Not getattr: in SB3's class, reading a missing attribute ends the environment's process.
    if not (isinstance(layer, SubprocVecEnv) and layer.has_attr("whole_state")):
        return False
    # A method that each object has is the outermost wrapper's. Its class may not be picklable, names are.
    inside = [index for index, names in enumerate(layer.env_method("__dir__")) if "whole_state" not in names]
    if inside:
        raise EnvironmentMismatchError(
            "`env` must have ResumableEnv as the outermost wrapper in each process, got other wrappers around it in "
            f"{'environment' if len(inside) == 1 else 'environments'} {', '.join(map(str, inside))}: their state would "
            "be lost. Apply it last, as make_vec_env(..., wrapper_class=ResumableEnv) does."
        )
    return True


def _once_per_process(environments: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Keep the shared generators of a process with the last of its environments only, and drop this process's."""
    known = {os.getpid()}
    for environment in reversed(environments):
        process = environment["process"]["id"]
        if process in known:
            environment["process"] = None
        known.add(process)
    return environments


def _moments(rms: Any) -> dict[str, Any]:
    if isinstance(rms, dict):
        return {key: _moments(part) for key, part in rms.items()}
    return {"": (np.array(rms.mean), np.array(rms.var), float(rms.count))}


def _moments_from(state: dict[str, Any]) -> Any:
    if "" not in state:
        return {key: _moments_from(part) for key, part in state.items()}
    rms = RunningMeanStd()
    rms.mean, rms.var, rms.count = state[""]
    return rms


def _stacks(stack: StackedObservations[Any]) -> list[StackedObservations[Any]]:
    inner = vars(stack).get("sub_stacked_observations")
    return [stack] if inner is None else [part for key in inner for part in _stacks(inner[key])]


def _adapter_state(layer: BatchedVecEnv) -> tuple[dict[str, Any], list[str]]:
    env = layer.env
    state: dict[str, Any] = {
        "statistics": frozen(read_attributes(layer.statistics, _STATISTICS)),
        "file": file_state(layer._writer),
        "cartpole": None,
        "sync": None,
    }
    if isinstance(layer, CartPoleVecEnv):
        state["cartpole"] = frozen(read_attributes(env, _CARTPOLE))
        state["generator"] = generator_state(env._np_random)
        return state, []
    if type(env) is SyncVectorEnv:
        environments = [env_state(part) for part in env.envs]
        state["sync"] = {"environments": environments, "autoreset": env._autoreset_envs.copy()}
        return state, _unknown(environments)
    if has_own_state(layer):
        return state, []
    return state, [f"Environments of {full_name(type(_core(layer)))} {_RESET_TEXT}. {_RESET_HINT}"]


def _core(layer: BatchedVecEnv) -> Any:
    return getattr(layer.env, "unwrapped", layer.env)  # tensor environments have no layers


def _restore_adapter(layer: BatchedVecEnv, state: dict[str, Any]) -> None:
    env = layer.env
    write_attributes(layer.statistics, state["statistics"], _STATISTICS)
    restore_file(layer._writer, state["file"])
    if state["cartpole"] is not None:
        write_attributes(env, state["cartpole"], _CARTPOLE)
        env._np_random = generator_from(state["generator"])
    if state["sync"] is not None:
        env._autoreset_envs[:] = state["sync"]["autoreset"]
        for part, own in zip(env.envs, state["sync"]["environments"], strict=True):
            restore_env(part, own)
