"""Numbers that are not finite: finding them at little cost, and the errors that tell of them."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

FLOAT32_MAX = float(np.finfo(np.float32).max)
"""Beyond this a number is infinite for the policy."""

MAX_UPDATES_WITH_SKIPS = 10
"""Updates in a row that may skip minibatches with ``on_nonfinite="skip"``; the next one ends the training."""

# Of so few numbers Python makes the sum in a fraction of NumPy's time; one below this limit holds no larger number.
_FEW, _SURELY_FINITE = 32, 1e38


class NonFiniteError(ValueError):
    """
    A number of the training is NaN or infinite.

    :param message: What it is, where, and what to do.
    :param what: "observation", "reward", "value", "log_prob", "terminal_observation", "terminal_value" or "parameter"
        in a step; "policy_loss", "value_loss", "entropy_loss", "kl", "loss" or "grad_norm" in an update.
    :param num_timesteps: Environment steps so far.
    :param step: Step of the rollout, from 0, if one is known.
    :param env_index: Environment, if one is known.
    :param key: Of a dict observation; the parameter's name; in an update what of the transition is not finite.
    :param epoch: Of the update, from 0.
    :param minibatch: Of the epoch, from 0.
    :param path: The file with the step or the minibatch, if one was written.
    """

    def __init__(
        self,
        message: str,
        *,
        what: str = "",
        num_timesteps: int = 0,
        step: int | None = None,
        env_index: int | None = None,
        key: str | None = None,
        epoch: int | None = None,
        minibatch: int | None = None,
        path: Path | None = None,
    ) -> None:
        super().__init__(message)
        self.what = what
        self.num_timesteps = num_timesteps
        self.step = step
        self.env_index = env_index
        self.key = key
        self.epoch = epoch
        self.minibatch = minibatch
        self.path = path


class BadMinibatchError(Exception):
    """
    A minibatch that makes no step, on its way from an engine to :func:`.nonfinite_causes.update_error`.

    :param terms: Its loss's terms, the loss and the gradient norm.
    :param epoch: Of the update, from 0.
    :param minibatch: Of the epoch, from 0.
    :param batch: Its transitions.
    :param indices: Where they stand in the rollout, in SB3's numbering, environment by environment; None: not known.
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
    """
    Tell whether an array holds numbers alone that float32 can hold, in less than a microsecond for short ones.

    :param array: Of any type and shape; integers always are.
    :return: False for NaN, infinities and larger numbers.
    """
    if array.dtype.kind != "f":
        return True
    if array.size <= _FEW:
        flat = array if array.ndim == 1 else array.reshape(-1)
        if sum(map(abs, flat.tolist())) < _SURELY_FINITE:
            return True
    return not which_are_not(array).any()


def which_are_not(array: np.ndarray) -> np.ndarray:
    """
    Tell which numbers of an array are not finite.

    :param array: Floats.
    :return: bool, of the same shape.
    """
    fits = np.isfinite(array) if array.dtype.itemsize <= 4 else np.abs(array) <= FLOAT32_MAX
    return np.asarray(~fits)


def by_key(observations: Any) -> dict[str, np.ndarray]:
    """
    Give observations the form of a dict.

    :param observations: An array, or a dict of such.
    :return: Arrays by key; "" where there are no keys.
    """
    return dict(observations) if isinstance(observations, Mapping) else {"": np.asarray(observations)}


def observations_are_finite(observations: Any) -> bool:
    """
    Tell whether observations hold numbers alone.

    :param observations: An array, or a dict of such.
    :return: See :func:`is_finite`.
    """
    if type(observations) is np.ndarray:
        return is_finite(observations)
    return all(is_finite(array) for array in by_key(observations).values())


def drawn_indices(state: Any, buffer: Any, epoch: int, start: int, batch: Any) -> np.ndarray | None:
    """
    Draw an update's permutations once more, to tell where a minibatch stands in the rollout.

    :param state: Of NumPy's generator at the start of the update.
    :param buffer: The rollout buffer.
    :param epoch: Of the minibatch.
    :param start: Transitions of the epoch before it.
    :param batch: The minibatch.
    :return: In SB3's numbering, environment by environment; None where the buffer draws in another way.
    """
    generator = np.random.RandomState()
    generator.set_state(state)
    n = buffer.buffer_size * buffer.n_envs
    drawn = np.concatenate([generator.permutation(n) for _ in range(epoch + 1)])[epoch * n :]
    indices = drawn[start : start + len(batch.returns)]
    returns = np.asarray(buffer.returns)
    # SB3's buffer has turned its arrays into one column by now.
    by_env = returns.swapaxes(0, 1) if returns.shape == (buffer.buffer_size, buffer.n_envs) else returns
    same = np.array_equal(by_env.reshape(-1)[indices], batch.returns.cpu().numpy().reshape(-1), equal_nan=True)
    return indices if same else None
