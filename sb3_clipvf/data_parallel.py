"""
Training on several processes: what they agree on at the start, and exchange before and after each rollout.

``DataParallelCollector`` is the base of ``ClipPPO``. In a single process it behaves like ``TensorRolloutCollector``.
``engines/reduction.py`` has the minibatches that processes share.
"""

import math
import os
import secrets
import zlib
from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import zip_longest
from pathlib import Path
from typing import Any, Self, cast

import numpy as np
import torch as th
from stable_baselines3.common.callbacks import BaseCallback, ConvertCallback
from stable_baselines3.common.logger import Logger
from stable_baselines3.common.running_mean_std import RunningMeanStd
from stable_baselines3.common.utils import update_learning_rate
from stable_baselines3.common.vec_env import VecEnv, VecNormalize

from sb3_clipvf.callbacks import count_all_steps
from sb3_clipvf.checkpoint.monitor_files import with_contents
from sb3_clipvf.checkpoint.protocol import ResumableModel
from sb3_clipvf.checkpoint.resume import finish_resume, reset_environments
from sb3_clipvf.checkpoint.training_state import process_state
from sb3_clipvf.checkpoint.vec_env_state import describe_vec_env
from sb3_clipvf.common.messages import log
from sb3_clipvf.common.tensors import checksum, map_tree
from sb3_clipvf.common.validation import MAX_SEED
from sb3_clipvf.distributed import ALONE, Group, Moments, check_backend, current_group, merged_moments, warn_about_child
from sb3_clipvf.engines.device_buffer import explained_variance_of
from sb3_clipvf.engines.interface import Engine, UpdateCoefficients
from sb3_clipvf.envs.layers import vec_env_layers
from sb3_clipvf.envs.vector import BatchedVecEnv
from sb3_clipvf.guards.agreement import check_same, common_arguments, description_of, plain_values, replaced_arguments
from sb3_clipvf.guards.diagnosis import FaultContext
from sb3_clipvf.guards.failures import guarded
from sb3_clipvf.rollout import on_host
from sb3_clipvf.tensor_collection import TensorRolloutCollector

# Attributes that all processes copy from the first one at the start of training and of rollouts, and at the end
_COMMON = ("num_timesteps", "_n_updates", "_schedule_timesteps", "_updates_with_skips", "adaptive_kl", "adaptive_lr")


@dataclass(frozen=True)
class _RolloutEnd:
    """What a process sends to the others after a rollout."""

    continues: bool  # whether no callback has asked to stop
    num_timesteps: int  # of all processes; fewer in one that has stopped
    moments: list[tuple[Any, Any, float]]  # of VecNormalize
    updates_moments: bool  # whether VecNormalize updates them, which callbacks may change
    episodes: list[dict[str, Any]]  # those that ended in the rollout
    actions: int  # checksum of all actions
    engine: str  # the argument, which callbacks may change
    parameters: int  # checksum of weights and of the optimizer, which callbacks may change
    trainable: list[bool]  # which weights require gradients, which callbacks may change


@dataclass(frozen=True)
class _FromFirst:
    """What the first process, which runs callbacks, sends to those that wait for it."""

    asks_for_states: bool  # of the others, for a checkpoint
    training_id: str | None
    folder: Path | None  # for arrays that led to a non-finite number
    attributes: dict[str, Any]  # _COMMON, and arguments that are plain values, which callbacks may have changed
    trainable: list[bool]  # which weights require gradients
    controlled: dict[str, Any]  # plain values of arguments from which controllers have started
    n_rollout_steps: int | None  # steps of each environment in the rollout that begins, if one does


class DataParallelCollector(TensorRolloutCollector):
    """Collects rollouts in each of several processes, and keeps policy, statistics and arguments the same in all."""

    engine: str
    _controlled: dict[str, Any]
    _n_updates: int
    _resumed: Any = None
    _training_id: str | None
    # Moments of VecNormalize that all processes had at the start of the rollout
    _common_moments: Sequence[tuple[Any, Any, float]] = ()
    # What the processes compared in the model's first training
    _first_description: dict[str, Any] | None = None
    # Folder of the first process for arrays that led to a non-finite number
    _first_folder: Path | None = None
    _warned_of_copies = False

    def set_random_seed(self, seed: int | None = None) -> None:
        """
        Seed all random states. Processes after the first use different seeds, as additional environments would.

        :param seed: Seed of the first process; its environments use this and the following numbers. None: no seed.
        :raises ValueError: If the seed of a process is too large.
        """
        group = current_group()  # also without a seed: this selects this process's GPU
        largest = MAX_SEED - (group.size - 1) * self.n_envs
        if group.size > 1 and seed is not None and seed > largest:
            raise ValueError(
                f"`seed` must be at most {largest} for {group.size} processes with {self.n_envs} environments each, "
                f"got {seed}. Choose a smaller one."
            )
        super().set_random_seed(None if seed is None else seed + group.rank * self.n_envs)

    def learn(self, *args: Any, **kwargs: Any) -> Self:
        """Train as SB3's ``learn``, together with the other processes."""
        verbose = self.verbose
        try:
            super().learn(*args, **kwargs)
            if (group := current_group()).size > 1:
                self._sync_with_first(group)
                self._share_parameters(group, group.gather(checksum(self.get_parameters())))
        finally:
            self.verbose = verbose  # `_setup_learn` silences all processes but the first
        return self

    def _setup_learn(
        self,
        total_timesteps: int,
        callback: Any = None,
        reset_num_timesteps: bool = True,
        tb_log_name: str = "run",
        progress_bar: bool = False,
    ) -> tuple[int, BaseCallback]:
        group = current_group()
        if reset_num_timesteps:
            self._training_id = None  # another training
        self._n_envs_elsewhere = 0
        if group.size > 1:
            check_backend(self.device)
            of_call = {"total_timesteps": total_timesteps, "reset_num_timesteps": reset_num_timesteps}
            n_envs = self._agreed_n_envs(group, of_call)
            self._n_envs_elsewhere = sum(n_envs) - self.n_envs
            self._take_state(group)
            if self.seed is None and self._last_obs is None:
                seed_differently(cast(VecEnv, self.env))
            if group.rank:
                callback, progress_bar, self.verbose = None, False, 0
                self.set_logger(Logger(None, []))
        else:
            warn_about_child()
        with guarded(cast(VecEnv, self.env)):  # since they are reset
            total, root = super()._setup_learn(
                total_timesteps, callback, reset_num_timesteps, tb_log_name, progress_bar
            )
        count_all_steps(root)
        return total, root

    def collect_rollouts(self, env: VecEnv, callback: BaseCallback, rollout_buffer: Any, n_rollout_steps: int) -> bool:
        """
        Fill the buffer with steps of the current policy, as :meth:`TensorRolloutCollector.collect_rollouts` does.

        The policy is that of the first process after ``on_rollout_start``. At the end, all processes copy what its
        callbacks have changed of policy and optimizer, merge the statistics of ``VecNormalize``, and stop if one of
        them has been asked to.

        :param env: The training environments.
        :param callback: Callback, called at each step and at both ends of the rollout.
        :param rollout_buffer: Buffer to fill.
        :param n_rollout_steps: Steps of each environment.
        :return: False if a callback asked to stop.
        :raises NonFiniteError: If observations, rewards, values or log-probabilities are not finite.
        """
        group = current_group()
        if group.size == 1:
            with guarded(env):
                return super().collect_rollouts(env, callback, rollout_buffer, n_rollout_steps)
        episodes: Any = self.ep_info_buffer
        earlier = list(episodes)
        earlier_ids = {id(episode) for episode in earlier}
        if group.rank > 0:
            n_rollout_steps = cast(int, self._sync_with_first(group, n_rollout_steps).n_rollout_steps)
            self._share_policy(group)
        with guarded(env):
            continues = super().collect_rollouts(env, callback, rollout_buffer, n_rollout_steps)
        normalizer = self.get_vec_normalize_env()
        running = _running_moments(normalizer)
        end = _RolloutEnd(
            continues=continues,
            num_timesteps=self.num_timesteps,
            moments=_values_of(running),
            updates_moments=normalizer is not None and normalizer.training,
            # Equal dicts may be of different episodes.
            episodes=[episode for episode in episodes if id(episode) not in earlier_ids],
            actions=zlib.crc32(on_host(rollout_buffer.actions).tobytes()),
            engine=self.engine,
            parameters=checksum(self.get_parameters()),
            trainable=self._trainable(),
        )
        ends = group.gather(end)
        self._share_parameters(group, [end.parameters for end in ends])
        self._set_trainable(ends[0].trainable)
        merge_running(running, self._common_moments, [end.moments for end in ends])
        self._common_moments = _values_of(running)
        if normalizer is not None:
            normalizer.training = ends[0].updates_moments
        # Merge the episodes of all processes.
        rows = zip_longest(*(end.episodes for end in ends))
        episodes.clear()
        episodes.extend([*earlier, *(episode for row in rows for episode in row if episode is not None)])
        self._warn_if_identical(ends)
        self.num_timesteps, self.engine = ends[0].num_timesteps, ends[0].engine
        return all(end.continues for end in ends)

    def _begin_rollout(self, env: VecEnv, callback: BaseCallback, rollout_buffer: Any, n_rollout_steps: int) -> Engine:
        finish_resume(cast(ResumableModel, self), callback)
        engine = super()._begin_rollout(env, callback, rollout_buffer, n_rollout_steps)
        group = current_group()
        if group.size > 1 and group.rank == 0:  # after callbacks, which may change the policy or save the training
            self._sync_with_first(group, n_rollout_steps)
            self._share_policy(group)
        return engine

    def _share_policy(self, group: Group) -> None:
        """Overwrite weights with those of the first process."""
        for tensor in (*self.policy.parameters(), *self.policy.buffers()):
            group.broadcast_tensor(tensor.data)

    def _trainable(self) -> list[bool]:
        """Return which parameters of the policy require gradients."""
        return [parameter.requires_grad for parameter in self.policy.parameters()]

    def _set_trainable(self, flags: list[bool]) -> None:
        for parameter, flag in zip(self.policy.parameters(), flags, strict=True):
            parameter.requires_grad = flag

    def _share_parameters(self, group: Group, checksums: list[int]) -> None:
        """Copy weights, moments and options of the optimizer from the first process if a process has different ones."""
        if len(set(checksums)) > 1:
            parameters = group.broadcast(map_tree(_on_cpu, self.get_parameters()))
            if group.rank:
                self.set_parameters(parameters, exact_match=True)

    def _sync_with_first(self, group: Group, n_rollout_steps: int | None = None) -> _FromFirst:
        """
        Copy what the first process has changed to the others, which wait for it here.

        If it asks for their states instead, they send these and wait again.
        """
        own = self._from_first(n_rollout_steps=n_rollout_steps)
        while (first := group.broadcast(own)).asks_for_states:
            model = cast(ResumableModel, self)
            finish_resume(model, ConvertCallback(None))  # as the first process has done
            tree, reasons = process_state(model, ConvertCallback(None), describe_vec_env(cast(VecEnv, self.env)), None)
            if os.environ.get("GROUP_RANK") != "0":  # the first process, on another machine, cannot read these files
                tree = with_contents(tree)
            group.gather_in_first((tree, reasons))
        if group.rank:
            self._training_id, self._first_folder = first.training_id, first.folder
            vars(self).update(first.attributes)
            self._set_trainable(first.trainable)
            self._controlled.update(first.controlled)
        return first

    def _from_first(self, *, asks_for_states: bool = False, n_rollout_steps: int | None = None) -> _FromFirst:
        arguments = {name: getattr(self, name) for name in common_arguments(self)}
        return _FromFirst(
            asks_for_states=asks_for_states,
            training_id=self._training_id,
            folder=self._fault_context().folder,
            attributes={**plain_values(arguments), **{name: getattr(self, name) for name in _COMMON}},
            trainable=self._trainable(),
            controlled=plain_values(self._controlled),
            n_rollout_steps=n_rollout_steps,
        )

    def _states_of_other_processes(self) -> list[tuple[dict[str, Any], list[str]]]:
        """Ask the other processes for their states, which :meth:`_sync_with_first` sends."""
        group = current_group()
        if group.size == 1:
            return []
        group.broadcast(self._from_first(asks_for_states=True))
        own: tuple[dict[str, Any], list[str]] = ({}, [])
        return group.gather_in_first(own)[1:]

    def _fault_context(self) -> FaultContext:
        context, group = super()._fault_context(), current_group()
        return replace(context, group=group, folder=self._first_folder if group.rank else context.folder)

    def _excluded_save_params(self) -> list[str]:
        of_group = ("_common_moments", "_first_description", "_first_folder", "_n_envs_elsewhere", "_warned_of_copies")
        return [*super()._excluded_save_params(), *of_group]

    def _warn_if_identical(self, ends: list["_RolloutEnd"]) -> None:
        """Warn once if processes collect the same rollouts, whose gradients are those of one process."""
        if not self._warned_of_copies and len({end.actions for end in ends}) == 1:
            self._warned_of_copies = True
            log.warning(
                "All processes collected the same actions, so the additional processes have no benefit. Do not seed "
                "them alike; pass `seed` to ClipPPO, which gives each process a different seed."
            )

    # ------------------------------------------------------------------ start of training

    def _agreed_n_envs(self, group: Group, of_call: dict[str, Any]) -> list[int]:
        """Return the processes' numbers of environments; raise ValueError if they differ in what must be equal."""
        own = {**description_of(self), **of_call}
        if self.seed is not None:
            own["number of environments, since `seed` is set"] = self.n_envs
        earlier = self._first_description or own
        found = group.gather((own, self.n_envs, replaced_arguments(self, earlier, own)))
        not_sent = found[0][2]
        check_same([{name: each[name] for name in each if name not in not_sent} for each, *_ in found])
        self._first_description = earlier
        return [n_envs for _, n_envs, _ in found]

    def _take_state(self, group: Group) -> None:
        """Copy policy, optimizer, controllers, counters and statistics of VecNormalize from the first process."""
        normalizer = self.get_vec_normalize_env()
        running = _running_moments(normalizer)
        checkpoint = None if self._resumed is None else (self._training_id, self.num_timesteps)
        first = group.broadcast(
            {
                "parameters": map_tree(_on_cpu, self.get_parameters()),
                "attributes": {name: getattr(self, name) for name in _COMMON},
                "moments": _values_of(running),
                "updates_moments": normalizer is not None and normalizer.training,
                "checkpoint": checkpoint,
            }
        )
        self._common_moments = first["moments"]
        if group.rank == 0:
            return
        self.set_parameters(first["parameters"], exact_match=True)
        for name, value in first["attributes"].items():
            setattr(self, name, value)
        for rms, (mean, var, count) in zip(running, first["moments"], strict=True):
            rms.mean, rms.var, rms.count = mean, var, count
        if normalizer is not None:
            normalizer.training = first["updates_moments"]
        if checkpoint != first["checkpoint"]:
            log.warning(
                "The training is not resumed exactly: process %d has not resumed from the checkpoint of the first one. "
                "Its environments begin new episodes.",
                group.rank,
            )
        if checkpoint != first["checkpoint"] or (self._resumed is not None and self._resumed.n_processes != group.size):
            self._begin_new_episodes(group)

    def _begin_new_episodes(self, group: Group) -> None:
        """Begin new episodes with different random states from those of the first process, whose checkpoint resumes."""
        self._resumed = None
        entropy = (0 if self.seed is None else self.seed, self.num_timesteps, group.rank)
        generator = np.random.default_rng(np.random.SeedSequence(entropy))
        seed = int(generator.integers(2**30))
        super().set_random_seed(seed)
        reset_environments(self, self.env, generator)  # type: ignore[arg-type]

    # ------------------------------------------------------------------ updates

    def _use_first_settings(self, engine: Engine, coefficients: UpdateCoefficients) -> UpdateCoefficients:
        """
        Overwrite the engine's settings and the learning rate with those of the first process, whose callbacks may have
        changed them, and return its coefficients.

        :raises ValueError: If the processes run different engines.
        """
        group = engine.settings.group
        if group.size == 1:
            return coefficients
        rates = [float(param_group["lr"]) for param_group in self.policy.optimizer.param_groups]
        own = (engine.name, replace(engine.settings, group=ALONE), coefficients, rates)
        found = group.gather(own)
        names = [name for name, *_ in found]
        if len(set(names)) > 1:
            raise ValueError(
                f"`engine` must be the same in all processes, got {names}. Choose one of them by its name."
            )
        _, settings, coefficients, rates = found[0]
        engine.settings = replace(settings, group=group)
        update_learning_rate(self.policy.optimizer, rates[0])
        return coefficients

    def _spread_of_returns(self) -> tuple[float, float]:
        """Return the standard deviation and the largest magnitude of the returns, in all processes."""
        returns = on_host(self.rollout_buffer.returns)
        group = current_group()
        largest = float(np.max(np.abs(returns)))
        if group.size == 1:
            return float(np.std(returns)), largest
        moments, magnitudes = zip(*group.gather((Moments.of(returns), largest)), strict=True)
        return math.sqrt(merged_moments(list(moments)).variance), max(magnitudes)

    def _explained_variance(self) -> float:
        """Return 1 - Var(returns - values) / Var(returns) over the rollouts of all processes; NaN for equal returns."""
        buffer, group = self.rollout_buffer, current_group()
        if group.size == 1:
            return explained_variance_of(buffer)
        returns, values = (th.as_tensor(each).double() for each in (buffer.returns, buffer.values))
        parts = group.gather((Moments.of(returns), Moments.of(returns - values)))
        total, rest = (merged_moments(list(each)).variance for each in zip(*parts, strict=True))
        return math.nan if total == 0 else 1.0 - rest / total


def seed_differently(venv: VecEnv) -> None:
    """Seed vectorised environments, unless they have seeds: pools and simulators have default ones."""
    base = vec_env_layers(venv)[-1]
    if isinstance(base, BatchedVecEnv) and None in base._seeds:
        seed = secrets.randbelow(2**30)
        log.info("Without `seed`, the environments of this process get the random seed %d", seed)
        base.seed(seed)


def merge_running(
    running: list[RunningMeanStd], common: Sequence[tuple[Any, Any, float]], parts: list[list[tuple[Any, Any, float]]]
) -> None:
    """
    Overwrite running statistics with those of the data of all processes.

    :param running: Statistics to overwrite.
    :param common: Mean, variance and count that all processes had before.
    :param parts: Those that each process has now, since it added its own data.
    Source: Chan, Golub and LeVeque 1979, Stanford STAN-CS-79-773, equation 2.1, for sums about the common mean.
    """
    for k, rms in enumerate(running):
        mean, var, count = common[k]
        now = [part[k] for part in parts]
        others = len(now) - 1
        total = sum(part[2] for part in now) - others * count
        if total == count:  # nothing was added
            continue
        shift = sum((part[0] - mean) * part[2] for part in now) / total
        squares = sum((part[1] + (part[0] - mean) ** 2) * part[2] for part in now) - others * var * count
        rms.mean, rms.var, rms.count = mean + shift, squares / total - shift**2, total


def _running_moments(normalizer: VecNormalize | None) -> list[RunningMeanStd]:
    if normalizer is None:
        return []
    obs: Any = normalizer.obs_rms if normalizer.norm_obs else []
    if isinstance(obs, dict):
        obs = [obs[key] for key in sorted(obs)]
    return [*(obs if isinstance(obs, list) else [obs]), normalizer.ret_rms]


def _values_of(running: list[RunningMeanStd]) -> list[tuple[Any, Any, float]]:
    return [(rms.mean, rms.var, rms.count) for rms in running]


def _on_cpu(value: Any) -> Any:
    return value.cpu() if isinstance(value, th.Tensor) else value
