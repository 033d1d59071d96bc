"""Non-finite values: fast checks, and the errors raised for them."""

from dataclasses import KW_ONLY, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from sb3_clipvf.common.observations import parts_of

FLOAT32_MAX = float(np.finfo(np.float32).max)
"""Largest finite float32; larger numbers are infinite for the policy."""

MAX_UPDATES_WITH_SKIPS = 10
"""Consecutive updates that may skip minibatches with ``on_nonfinite="skip"``; the next one ends training."""

# Python sums up to `_FEW` numbers faster than NumPy. If the sum of their magnitudes is below the limit, all are finite.
_FEW, _SURELY_FINITE = 32, 1e38


@dataclass(eq=False, repr=False)
class NonFiniteError(ValueError):
    """
    A value is NaN or infinite during training.

    :param message: The value, where it was found, and what to do.
    :param what: "observation", "reward", "value", "log_prob", "terminal_observation", "terminal_value" or "parameter"
        in a step; "policy_loss", "value_loss", "entropy_loss", "kl", "loss" or "grad_norm" in an update.
    :param num_timesteps: Environment steps so far.
    :param step: Step in the rollout, from 0, if known.
    :param env_index: Index of the environment, if known.
    :param key: Key of a dict observation, name of a parameter, or (in an update) the non-finite field of a transition.
    :param epoch: Epoch of the update, from 0.
    :param minibatch: Minibatch of the epoch, from 0.
    :param path: File that holds the step or the minibatch, if one was written.
    """

    message: str
    _: KW_ONLY
    what: str = ""
    num_timesteps: int = 0
    step: int | None = None
    env_index: int | None = None
    key: str | None = None
    epoch: int | None = None
    minibatch: int | None = None
    path: Path | None = None

    def __post_init__(self) -> None:
        super().__init__(self.message)


class BadMinibatchError(Exception):
    """
    A minibatch has a non-finite loss or gradient, so no step is taken for it.

    :param terms: Terms of the loss, the loss itself and the gradient norm.
    :param epoch: Epoch of the update, from 0.
    :param minibatch: Minibatch of the epoch, from 0.
    :param batch: Transitions.
    :param indices: Indices of the transitions in the rollout, in SB3's order: environment by environment. None if
        unknown.
    """

    def __init__(
        self, terms: dict[str, float], epoch: int, minibatch: int, batch: Any, indices: np.ndarray | None
    ) -> None:
        self.what = next((name for name, value in terms.items() if not abs(value) <= FLOAT32_MAX), "loss")
        super().__init__(f"`{self.what}` must be finite, got {terms[self.what]}")
        self.terms = terms
        self.epoch = epoch
        self.minibatch = minibatch
        self.batch = batch
        self.indices = indices


def is_finite(array: np.ndarray) -> bool:
    """Return whether all numbers of an array are finite as float32; integers are. Fast for few numbers."""
    if array.dtype.kind != "f":
        return True
    if array.size <= _FEW:
        flat = array if array.ndim == 1 else array.reshape(-1)
        if sum(map(abs, flat.tolist())) < _SURELY_FINITE:
            return True
    return not nonfinite_mask(array).any()


def nonfinite_mask(array: np.ndarray) -> np.ndarray:
    """Return a mask of the numbers of a float array that are not finite as float32."""
    fits = np.isfinite(array) if array.dtype.itemsize <= 4 else np.abs(array) <= FLOAT32_MAX
    return np.asarray(~fits)


def observations_are_finite(observations: Any) -> bool:
    """Return whether all numbers of an array, or of a dict of arrays, are finite as float32."""
    if type(observations) is np.ndarray:
        return is_finite(observations)
    return all(is_finite(np.asarray(part)) for part in parts_of(observations).values())


def drawn_indices(state: Any, buffer: Any, epoch: int, start: int, batch: Any) -> np.ndarray | None:
    """
    Find the indices of a minibatch in the rollout, by drawing the permutations of its update again.

    ``state`` is NumPy's random state before the update, and the minibatch begins at ``start`` in its epoch. The result
    is None if the buffer draws minibatches in a different way.
    """
    generator = np.random.RandomState()
    generator.set_state(state)
    n = buffer.buffer_size * buffer.n_envs
    for _ in range(epoch + 1):
        permutation = generator.permutation(n)
    indices = permutation[start : start + len(batch.returns)]
    returns = np.asarray(buffer.returns.cpu() if hasattr(buffer.returns, "cpu") else buffer.returns)
    # SB3's buffer has flattened its arrays by now.
    by_env = returns.swapaxes(0, 1) if returns.shape == (buffer.buffer_size, buffer.n_envs) else returns
    same = np.array_equal(by_env.reshape(-1)[indices], batch.returns.cpu().numpy().reshape(-1), equal_nan=True)
    return indices if same else None
