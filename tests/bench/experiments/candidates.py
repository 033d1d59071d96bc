"""
Changes of the algorithm that suites try: callbacks that change an update, and a buffer.

Each of them runs on any engine. A candidate that gains nothing needs no option in the package.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import torch as th
from stable_baselines3.common.callbacks import BaseCallback

from sb3_clipvf.engines.interface import Engine, UpdateCoefficients, UpdateStatistics
from sb3_clipvf.rollout import TensorRolloutBuffer

InnerUpdate = Callable[[Any, UpdateCoefficients], UpdateStatistics]

SMALLEST_SPREAD = 1e-3
"""Smallest standard deviation by which returns are divided, as a share of the largest absolute return."""


class UpdateCallback(BaseCallback):
    """
    A callback whose :meth:`update` runs in the place of the engine's. It has no state between updates.

    Of several ones in a list, the last is the outermost.
    """

    _wrapped: Engine | None = None

    @abstractmethod
    def update(self, inner: InnerUpdate, buffer: Any, coefficients: UpdateCoefficients) -> UpdateStatistics:
        """Run an update of a complete rollout, in which ``inner`` is the engine's."""

    @property
    def engine(self) -> Engine:
        """The engine of the present update."""
        engine: Engine = self.model._engine  # type: ignore[attr-defined]
        return engine

    def training_state(self) -> dict[str, Any]:
        """Return no state, so that a resumed training does not warn of one."""
        return {}

    def load_training_state(self, state: dict[str, Any]) -> None:
        """Restore nothing."""

    def _on_step(self) -> bool:
        return True

    def _on_rollout_end(self) -> None:
        engine = self.model._current_engine()  # type: ignore[attr-defined]
        if engine is not self._wrapped:
            self._wrapped, inner = engine, engine.update
            engine.update = lambda buffer, coefficients: self.update(inner, buffer, coefficients)


def run_by_epoch(
    engine: Engine,
    inner: InnerUpdate,
    buffer: Any,
    coefficients: UpdateCoefficients,
    after_epoch: Callable[[int], None],
) -> UpdateStatistics:
    """
    Run the epochs of an update one by one, with ``after_epoch(epoch)`` after each, and the same minibatches.

    The statistics are those of the last epoch.
    """
    settings = engine.settings
    engine.settings = replace(settings, n_epochs=1)
    try:
        for epoch in range(settings.n_epochs):
            statistics = inner(buffer, coefficients)
            after_epoch(epoch)
    finally:
        engine.settings = settings
    return replace(statistics, n_epochs=settings.n_epochs)


def predicted_values(engine: Engine, buffer: Any) -> np.ndarray:
    """Return the present values of a rollout's observations, shape ``(n_steps, n_envs)``, return units."""
    cells = buffer.values.shape
    rows = buffer.observations.reshape(-1, *buffer.observations.shape[2:])
    return engine.predict_values(th.from_numpy(rows)).numpy().reshape(cells)


class AdamRestart(UpdateCallback):
    """
    Set the number of Adam's steps to 0 before each update, and keep its moments.

    Step t of an update then has ``(1 - beta2**t)**0.5 / (1 - beta1**t)`` times the size that it has late in a training
    without restarts. By default that is 0.32 at first, 0.15 at the 12th step, and 0.52 at the 320th.

    Source: Ellis et al. 2024, "Adam on Local Time", arXiv 2412.17113 (Adam-Rel).
    """

    def update(self, inner: InnerUpdate, buffer: Any, coefficients: UpdateCoefficients) -> UpdateStatistics:
        """Restart the count, and update."""
        for state in self.model.policy.optimizer.state.values():
            state["step"].zero_()
        return inner(buffer, coefficients)


class ValueNormalization(UpdateCallback):
    """
    Train the critic on returns normalised by the rollout's mean and standard deviation.

    For each update, the last layer of the critic is rescaled so that its values are the same in normalised units, and
    after the update so that they are the same in return units. So Adam's moments stay in normalised units.

    Source: van Hasselt et al. 2016, arXiv 1602.07714 (PopArt). Departure: statistics are those of the rollout, without
        an average over earlier ones.
    """

    def update(self, inner: InnerUpdate, buffer: Any, coefficients: UpdateCoefficients) -> UpdateStatistics:
        """Update in normalised units."""
        mean, std = self._mean_std(buffer.returns)
        kept = [(array, array.copy()) for array in (buffer.returns, buffer.values)]
        for array, _ in kept:
            array[:] = (array - mean) / std
        if coefficients.clip_range_vf is not None:
            coefficients = replace(coefficients, clip_range_vf=coefficients.clip_range_vf / std)
        head: Any = self.model.policy.value_net
        with th.no_grad():
            head.bias.sub_(mean).div_(std)
            head.weight.div_(std)
        try:
            return inner(buffer, coefficients)
        finally:
            with th.no_grad():
                head.weight.mul_(std)
                head.bias.mul_(std).add_(mean)
            for array, before in kept:
                array[:] = before

    @staticmethod
    def _mean_std(returns: np.ndarray) -> tuple[float, float]:
        smallest = SMALLEST_SPREAD * float(np.max(np.abs(returns)))
        return float(np.mean(returns)), max(float(np.std(returns)), smallest) or 1.0


class RecomputedAdvantages(UpdateCallback):
    """
    Compute advantages and returns again before each epoch but the first, from the present values.

    Values of the final observations of truncated episodes remain those of the rollout.

    Source: Andrychowicz et al. 2020, arXiv 2006.05990, section 3.5.
    """

    def update(self, inner: InnerUpdate, buffer: Any, coefficients: UpdateCoefficients) -> UpdateStatistics:
        """Update epoch by epoch."""
        model: Any = self.model
        engine, old_values = self.engine, buffer.values.copy()
        last_observations = th.from_numpy(np.asarray(model._last_obs))
        kept = [(array, array.copy()) for array in (buffer.advantages, buffer.returns)]

        def recompute(epoch: int) -> None:
            if epoch + 1 == model.n_epochs:
                return
            buffer.values[:] = predicted_values(engine, buffer)
            last_values, dones = engine.predict_values(last_observations), model._last_episode_starts
            buffer.compute_returns_and_advantage(last_values=last_values, dones=dones)
            buffer.values[:] = old_values

        statistics = run_by_epoch(engine, inner, buffer, coefficients, recompute)
        for array, before in kept:
            array[:] = before
        return statistics


class OuterStep(UpdateCallback):
    """
    Multiply the change of the parameters in each update by ``rate``; 1 changes nothing.

    Source: Tan et al. 2024, "Beyond the Boundaries of Proximal Policy Optimization", arXiv 2411.00666 (outer-PPO).
    """

    def __init__(self, rate: float) -> None:
        super().__init__()
        self.rate = rate

    def update(self, inner: InnerUpdate, buffer: Any, coefficients: UpdateCoefficients) -> UpdateStatistics:
        """Update, and extend the change."""
        parameters = list(self.model.policy.parameters())
        before = [parameter.detach().clone() for parameter in parameters]
        statistics = inner(buffer, coefficients)
        with th.no_grad():
            for parameter, old in zip(parameters, before, strict=True):
                parameter.add_(parameter - old, alpha=self.rate - 1.0)
        return statistics


class CriticErrorRange(UpdateCallback):
    """
    Clip the value loss at ``factor`` times the root mean square of the critic's errors on the rollout.

    The error of a value is its return minus itself, which is the advantage. The form of the loss is that of the
    argument ``vf_clip``.
    """

    def __init__(self, factor: float) -> None:
        super().__init__()
        self.factor = factor

    def update(self, inner: InnerUpdate, buffer: Any, coefficients: UpdateCoefficients) -> UpdateStatistics:
        """Update with this range."""
        error = float(np.sqrt(np.mean(np.square(buffer.returns - buffer.values))))
        return inner(buffer, replace(coefficients, clip_range_vf=self.factor * error))


class CentredRange(UpdateCallback):
    """
    Centre the range of the clipped value loss at the rollout's values plus their mean error, not at these values.

    So the range limits no change that all values make together, as when all returns grow.
    """

    def update(self, inner: InnerUpdate, buffer: Any, coefficients: UpdateCoefficients) -> UpdateStatistics:
        """Update with shifted values, which only the clip reads."""
        values = buffer.values.copy()
        buffer.values += np.mean(buffer.returns - values)
        try:
            return inner(buffer, coefficients)
        finally:
            buffer.values[:] = values


class TwoLambdaBuffer(TensorRolloutBuffer):
    """
    A buffer whose returns have a lambda of their own, ``value_lambda``; that of the advantages is ``gae_lambda``.

    Source: Aitchison and Sweetser 2022, arXiv 2206.10027 (DNA); Yuan et al. 2025, arXiv 2503.01491 (VC-PPO).
    """

    def __init__(self, *args: Any, value_lambda: float, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.value_lambda = value_lambda

    def compute_returns_and_advantage(self, last_values: th.Tensor, dones: np.ndarray) -> None:
        """Compute returns with one lambda and advantages with the other."""
        advantage_lambda = self.gae_lambda
        self.gae_lambda = self.value_lambda
        super().compute_returns_and_advantage(last_values, dones)
        returns = self.returns.copy()
        self.gae_lambda = advantage_lambda
        super().compute_returns_and_advantage(last_values, dones)
        self.returns[:] = returns
