"""``VecNormalize`` for tensor environments: its statistics stay on the device."""

import os
from typing import Any, Self, cast

import numpy as np
import torch as th
from stable_baselines3.common.running_mean_std import RunningMeanStd
from stable_baselines3.common.vec_env import VecEnv, VecNormalize
from stable_baselines3.common.vec_env.base_vec_env import VecEnvStepReturn

from sb3_clipvf.envs.normalize import FastVecNormalize, Observations
from sb3_clipvf.envs.tensor import TensorEnvAdapter, TensorObs, TensorStep, TensorVecEnv, as_sb3_env, host_copy
from sb3_clipvf.files.trust import TrustPickle


class _ReadOnHost:
    """An attribute of ``VecNormalize`` that moves to the host when it is read or set there."""

    def __set_name__(self, owner: type, name: str) -> None:
        self._name = name

    def __get__(self, instance: Any, owner: type | None = None) -> Any:
        if instance is None:
            return self
        instance.to_host()
        try:
            return instance.__dict__[self._name]
        except KeyError:
            raise AttributeError(self._name) from None

    def __set__(self, instance: Any, value: Any) -> None:
        instance.to_host()
        instance.__dict__[self._name] = value


class TensorVecNormalize(FastVecNormalize):
    """
    Normalise the tensors of an environment by running statistics, by the formulas of SB3's ``VecNormalize``.

    All moments are computed in float64 on the environments' device. SB3's attributes, such as ``obs_rms``, are read
    from there when they are used. Files are those of ``VecNormalize``, and can be loaded by it.

    :param venv: Tensor environment, or the ``VecEnv`` that ``as_vec_env`` returns for one.
    :param args: Further arguments of ``VecNormalize``.
    :param kwargs: Keyword arguments of ``VecNormalize``.
    :raises TypeError: If ``venv`` is something else.
    """

    #: Normalised observations after the latest step of tensors; None before it, and after steps on the host.
    observations: TensorObs | None = None
    _on_device: "_DeviceState | None" = None

    obs_rms: Any = _ReadOnHost()
    ret_rms: Any = _ReadOnHost()
    returns: Any = _ReadOnHost()
    old_obs: Any = _ReadOnHost()
    old_reward: Any = _ReadOnHost()

    def __init__(self, venv: VecEnv | TensorVecEnv, *args: Any, **kwargs: Any) -> None:
        super().__init__(_adapter(venv), *args, **kwargs)

    def __getattr__(self, name: str) -> Any:
        # SB3 takes the descriptors for attributes that exist, and would look them up again without end.
        if isinstance(vars(TensorVecNormalize).get(name), _ReadOnHost):
            raise AttributeError(f"{type(self).__name__!r} object has no attribute {name!r}")
        return super().__getattr__(name)

    @classmethod
    def load(
        cls, load_path: str | os.PathLike[str], venv: VecEnv | TensorVecEnv, trust_pickle: TrustPickle = None
    ) -> Self:
        """
        Load a file that ``save`` of this class or of SB3's ``VecNormalize`` wrote, without running code.

        :param load_path: File.
        :param venv: As in the constructor.
        :param trust_pickle: As in :meth:`sb3_clipvf.ClipPPO.load`.
        :return: Wrapper with the file's settings and statistics; sums of rewards start at 0.
        """
        return super().load(load_path, _adapter(venv), trust_pickle)

    def save(self, save_path: str) -> None:
        """
        Save settings and statistics as ``FastVecNormalize.save`` does.

        :param save_path: File to write.
        """
        self.to_host()
        of_device: dict[str, Any] = {
            name: self.__dict__.pop(name) for name in ("observations", "_on_device") if name in self.__dict__
        }
        try:
            super().save(save_path)
        finally:
            self.__dict__.update(of_device)

    def reset(self) -> Observations:
        """Reset all environments, and return normalised observations on the host."""
        self.observations = None
        return super().reset()

    def step_wait(self) -> VecEnvStepReturn:
        """Step on the host."""
        self.observations = None
        return super().step_wait()

    def reset_tensors(self, seed: int | None = None) -> TensorObs:
        """Reset all environments, update the statistics if ``training``, and return normalised observations."""
        state = self._state()
        observations = self._inner.reset_tensors(seed)
        state.old_obs = observations
        state.returns.zero_()
        self.observations = self._normalized(state, observations, update=self.training)
        return self.observations

    def step_tensors(self, actions: th.Tensor) -> TensorStep:
        """Step all environments, update the statistics if ``training``, and normalise."""
        state = self._state()
        step = self._inner.step_tensors(actions)
        state.old_obs, state.old_reward = step.observations, step.rewards
        observations = self._normalized(state, step.observations, update=self.training)
        rewards = self._scaled(state, step.rewards)
        state.returns.masked_fill_(step.terminated | step.truncated, 0.0)
        final = step.final_observations
        if final is not None:
            final = self._normalized(state, final, update=False)
        self.observations = observations
        return step._replace(observations=observations, rewards=rewards, final_observations=final)

    @property
    def _inner(self) -> TensorEnvAdapter:
        return cast(TensorEnvAdapter, self.venv)

    def _normalized(self, state: "_DeviceState", observations: TensorObs, *, update: bool) -> TensorObs:
        if isinstance(observations, dict):
            return {key: self._part(state, key, part, update) for key, part in observations.items()}
        return self._part(state, "", observations, update)

    def _part(self, state: "_DeviceState", key: str, values: th.Tensor, update: bool) -> th.Tensor:
        if not (self.norm_obs and (key == "" or key in (self.norm_obs_keys or []))):
            return values
        moments = state.obs.get(key)
        if moments is None:
            raise ValueError(
                f"`obs_rms` must have statistics of all observations to normalise, got {sorted(state.obs)}. Pass "
                "`norm_obs` and `norm_obs_keys` to the constructor."
            )
        if update:
            moments.update(values)
        return moments.scaled(values, self.epsilon, self.clip_obs, moments.mean)

    def _scaled(self, state: "_DeviceState", rewards: th.Tensor) -> th.Tensor:
        if self.training:
            state.returns.mul_(self.gamma).add_(rewards)
            state.ret.update(state.returns)
        return state.ret.scaled(rewards, self.epsilon, self.clip_reward) if self.norm_reward else rewards.float()

    def _state(self) -> "_DeviceState":
        """Return the statistics on the device, with the numbers of the attributes if these were used since."""
        state = self._on_device
        if state is None or not state.is_current:
            own = self.__dict__
            rms = own.get("obs_rms", {})  # also if `norm_obs` is False now
            read = _DeviceState(
                rms if isinstance(rms, dict) else {"": rms}, own["ret_rms"], own["returns"], self._inner.device
            )
            self._on_device = state = read if state is None else state.with_numbers_of(read)
        return state

    def to_host(self) -> None:
        """Copy the state to the attributes of ``VecNormalize``, where they may change."""
        state, own = self._on_device, self.__dict__
        if state is None or not state.is_current:
            return
        state.is_current = False
        rms: Any = own.get("obs_rms")
        for key, moments in state.obs.items():
            moments.write(rms[key] if isinstance(rms, dict) else rms)
        state.ret.write(own["ret_rms"])
        own["returns"] = host_copy(state.returns)
        for name in ("old_obs", "old_reward"):
            if getattr(state, name) is not None:
                own[name] = host_copy(getattr(state, name))

    def to_device(self) -> None:
        """Copy the state to the device if the attributes may have different numbers."""
        self._state()

    def tensors(self) -> list[th.Tensor]:
        """Return the tensors of the statistics, which steps on the device write in-place."""
        return self._state().tensors()

    def options(self) -> tuple[object, ...]:
        """Return what the operations of a step depend on, besides numbers on the device."""
        numbers = (self.clip_obs, self.clip_reward, self.gamma, self.epsilon)
        keys = tuple(self.norm_obs_keys or ())
        return (id(self._on_device), self.training, self.norm_obs, self.norm_reward, keys, *numbers)

    def shown(self) -> list[tuple[Any, dict[str, Any]]]:
        """Return the objects that have tensors of the latest step, and these by attribute."""
        state = self._state()
        return [
            (self, {"observations": self.observations}),
            (state, {"old_obs": state.old_obs, "old_reward": state.old_reward}),
        ]


class _DeviceState:
    """
    The statistics on the device, which change in-place, and the latest step before normalisation.

    ``is_current`` is False while the attributes on the host may have different numbers.
    """

    def __init__(self, obs: dict[str, RunningMeanStd], ret: RunningMeanStd, returns: Any, device: th.device) -> None:
        self.obs = {key: _Moments(part, device) for key, part in obs.items()}
        self.ret = _Moments(ret, device)
        self.returns = th.tensor(returns, dtype=th.float64, device=device)
        self.old_obs: Any = None
        self.old_reward: Any = None
        self.is_current = True

    def tensors(self) -> list[th.Tensor]:
        """Return all tensors of the statistics."""
        return [*(tensor for part in (*self.obs.values(), self.ret) for tensor in part.tensors()), self.returns]

    def with_numbers_of(self, other: "_DeviceState") -> "_DeviceState":
        """Return this state with the numbers of another one, or the other one if its tensors are of different kinds."""
        pairs = list(zip(self.tensors(), other.tensors(), strict=False))
        if self.obs.keys() != other.obs.keys() or any(
            (ours.shape, ours.device) != (theirs.shape, theirs.device) for ours, theirs in pairs
        ):
            return other
        for ours, theirs in pairs:
            ours.copy_(theirs)
        self.is_current = True
        return self


class _Moments:
    """Running mean and variance, float64 tensors; SB3's ``RunningMeanStd`` has the same formulas."""

    def __init__(self, rms: RunningMeanStd, device: th.device) -> None:
        self.mean, self.var, self.count = (
            th.tensor(each, dtype=th.float64, device=device) for each in (rms.mean, rms.var, float(rms.count))
        )

    def tensors(self) -> list[th.Tensor]:
        """Return mean, variance and number of values."""
        return [self.mean, self.var, self.count]

    def update(self, values: th.Tensor) -> None:
        """Join the moments of values ``(n, ...)`` to the running ones (Chan, Golub and LeVeque 1979, equation 2.1)."""
        var, mean = th.var_mean(values.double(), 0, correction=0)
        n, total = len(values), self.count + len(values)
        delta = mean - self.mean
        between = delta.square().mul_(self.count).mul_(n).div_(total)
        self.var.mul_(self.count).add_(var, alpha=n).add_(between).div_(total)
        self.mean.add_(delta.mul_(n).div_(total))
        self.count.copy_(total)

    def scaled(self, values: th.Tensor, epsilon: float, clip: float, mean: th.Tensor | None = None) -> th.Tensor:
        """Return values, less the mean if one is given, divided by the standard deviation and clipped, float32."""
        centred = values.double() if mean is None else values - mean
        return (centred / (self.var + epsilon).sqrt()).clamp(-clip, clip).float()

    def write(self, rms: RunningMeanStd) -> None:
        """Set the moments of SB3's object."""
        rms.mean, rms.var = np.asarray(host_copy(self.mean)), np.asarray(host_copy(self.var))
        rms.count = float(self.count)


def _adapter(venv: Any) -> TensorEnvAdapter:
    adapted = as_sb3_env(venv)
    if type(adapted) is not TensorEnvAdapter:
        raise TypeError(
            f"`venv` must be a tensor environment, or what as_vec_env returns for one, got {type(venv).__name__}. Use "
            f"FastVecNormalize, or SB3's {VecNormalize.__name__}."
        )
    return adapted
