"""Returns and lengths of the episodes in a rollout of tensors, and the values of their final observations."""

from collections.abc import Mapping
from typing import Any

import numpy as np
import torch as th

from sb3_clipvf.common.observations import from_parts, parts_of
from sb3_clipvf.envs.tensor import host_copy

MAX_KEPT = 2**26
"""Largest number of bytes of final observations that are kept between two reads from the device."""


def finished_episodes(
    rewards: th.Tensor, dones: th.Tensor, returns: np.ndarray, lengths: np.ndarray
) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """
    Return returns and lengths of the episodes that ended, step by step, then those of the unfinished ones.

    :param rewards: Rewards of a rollout, shape ``(n_steps, n_envs)``.
    :param dones: Whether a step ended an episode, shape ``(n_steps, n_envs)``, bool.
    :param returns: Sums of the rewards of episodes that began before, shape ``(n_envs,)``, float64.
    :param lengths: Their steps so far, shape ``(n_envs,)``, int64.
    :return: Returns and lengths of ended episodes, shape ``(n_ended,)`` each, then of unfinished ones, ``(n_envs,)``.
    """
    if th.are_deterministic_algorithms_enabled():  # as CUDA's cumsum() of floats is not
        rewards, dones = rewards.cpu(), dones.cpu()
    n_steps, device = len(rewards), rewards.device
    before = th.as_tensor(np.stack([returns, lengths.astype(np.float64)]), device=device)
    numbers = th.arange(1, n_steps + 1, device=device)[:, None]
    ends = th.where(dones, numbers, 0)
    # Number of the last step before each one that ended an episode; 0 where the episode began before the rollout.
    last_end = th.cat([th.zeros_like(ends[:1]), ends]).cummax(0).values
    none = th.zeros_like(before[:1])
    sums = before[0] + rewards.double().cumsum(0)
    sums_at = th.cat([none, sums])
    steps_at = th.cat([none, numbers + before[1]])
    episodes = th.stack([sums - sums_at.gather(0, last_end[:-1]), steps_at[1:] - steps_at.gather(0, last_end[:-1])])
    left = last_end[-1:]
    unfinished = th.stack([sums_at[-1:] - sums_at.gather(0, left), steps_at[-1:] - steps_at.gather(0, left)])[:, 0]
    ended = episodes[:, dones]
    numbers_read = th.cat([ended, unfinished], dim=1).cpu().numpy()
    split = numbers_read.shape[1] - len(returns)
    whole = numbers_read[1].astype(np.int64)
    return numbers_read[0, :split], whole[:split], numbers_read[0, split:], whole[split:]


def successes_of(infos: Mapping[str, Any], n_envs: int, device: th.device) -> th.Tensor:
    """Return ``is_success`` of infos, ``(n_envs,)``: NaN where Gymnasium's mask ``_is_success`` marks no value."""
    successes = th.as_tensor(infos["is_success"], dtype=th.float32, device=device).expand(n_envs)
    if "_is_success" not in infos:
        return successes
    return th.where(th.as_tensor(infos["_is_success"], device=device), successes, th.nan)


def n_kept(parts: Mapping[str, th.Tensor], n_steps: int) -> int:
    """Return how many steps' final observations are kept: at most the rollout's, within ``MAX_KEPT`` bytes."""
    return min(n_steps, max(1, MAX_KEPT // sum(part.nbytes for part in parts.values())))


class FinalValues:
    """
    Values of the final observations of truncated episodes.

    The final observations of :func:`n_kept` steps are kept. Then those of truncated episodes are found by one read from
    the device, and their values predicted together. Whether these are finite is read once more.
    Values are NaN where the observation is not finite, unless it ``may_be_nonfinite``: the policy then decides.
    """

    def __init__(self, engine: Any, gamma: float, *, may_be_nonfinite: bool) -> None:
        self._engine, self._gamma, self._may_be_nonfinite = engine, gamma, may_be_nonfinite
        #: Final observations whose value is not finite, on the host, by step and environment.
        self.nonfinite: dict[tuple[int, int], Any] = {}
        #: Steps whose final observations are kept, each in its row of ``_finals``.
        self.steps: list[int] = []
        self._finals: dict[str, th.Tensor] = {}
        self._found: list[tuple[th.Tensor, th.Tensor]] = []

    def keep(self, t: int, observations: Any, timed_out: th.Tensor) -> None:
        """Keep the final observations of step ``t``; ``timed_out`` ``(n_steps, n_envs)`` marks truncated episodes."""
        parts = parts_of(observations)
        size = n_kept(parts, len(timed_out))
        if not self._finals:
            self._finals = {key: part.new_empty((size, *part.shape)) for key, part in parts.items()}
        for key, part in parts.items():
            self._finals[key][len(self.steps)].copy_(part)
        self.steps.append(t)
        if len(self.steps) == size:
            self.find(timed_out)

    def refer(self, t: int, finals: dict[str, th.Tensor]) -> None:
        """Note that the next row of ``finals`` has the final observations of step ``t``, until :meth:`find`."""
        self._finals = finals
        self.steps.append(t)

    def add_to(self, rewards: th.Tensor, timed_out: th.Tensor) -> None:
        """Add ``gamma * V(final observation)`` to the rewards ``(n_steps, n_envs)``, in-place."""
        self.find(timed_out)
        for cells, values in self._found:
            rewards.view(-1).index_add_(0, cells, values, alpha=self._gamma)
        self._found = []

    def predict(self, parts: dict[str, th.Tensor]) -> th.Tensor:
        """Return the values of observations, ``(k,)``."""
        values: th.Tensor = self._engine.predict_values(from_parts(parts)).flatten()
        if self._may_be_nonfinite:
            return values
        for part in parts.values():
            if part.is_floating_point():  # a network may turn them into finite numbers
                values = th.where(part.flatten(1).isfinite().all(1), values, th.nan)
        return values

    def find(self, timed_out: th.Tensor) -> None:
        """Predict the values of the truncated rows among those that are kept."""
        steps, self.steps = self.steps, []
        if not steps:
            return
        n_envs = timed_out.shape[1]
        slots, rows = timed_out[steps].nonzero(as_tuple=True)
        if not len(rows):
            return
        # In groups, which need no more memory than the policy's steps.
        groups = zip(th.split(slots, n_envs), th.split(rows, n_envs), strict=True)
        values = th.cat([self.predict({key: part[group] for key, part in self._finals.items()}) for group in groups])
        self._found.append((th.as_tensor(steps, device=rows.device)[slots] * n_envs + rows, values))
        for index in (~values.isfinite()).nonzero().flatten().tolist():
            slot, row = int(slots[index]), int(rows[index])
            final = {key: part[slot, row] for key, part in self._finals.items()}
            self.nonfinite[steps[slot], row] = from_parts(host_copy(final))
