"""Drawing actions where kernels do it: the random numbers that they need, and what they give as the policy gives it."""

from typing import Any, cast

import numpy as np
import torch as th
from gymnasium import spaces

from sb3_clipvf.engines.kernels import memory


class Noise:
    """
    Random numbers for the actions of a step, drawn as torch's own distributions draw theirs.

    So a seed gives the same actions on every engine, as long as the policies agree to rounding.

    :param kind: Of the distribution, as kernels call it.
    :param action_dim: Numbers of an action.
    :param widths: Actions of each categorical distribution, if it is of that kind.
    """

    def __init__(self, kind: int, action_dim: int, widths: list[int]) -> None:
        self._kind = kind
        self._widths = widths or [action_dim]
        self._n_rows = -1

    def next(self, n_rows: int) -> np.ndarray:
        """
        Draw the numbers of the next step.

        :param n_rows: Number of environments that act.
        :return: Shape ``(n_rows, k)``; good until the next call.
        """
        if n_rows != self._n_rows:
            # Kernels only read them, so that each step's numbers may overwrite the last one's.
            self._parts = [th.empty(n_rows, width) for width in self._widths]
            self._arrays = [part.numpy() for part in self._parts]
            self._n_rows = n_rows
        for part in self._parts:
            if self._kind == memory.GAUSSIAN:
                part.normal_()
            elif self._kind == memory.BERNOULLI:
                part.uniform_()
            else:
                part.exponential_()
        return self._arrays[0] if len(self._arrays) == 1 else np.concatenate(self._arrays, axis=1)


def as_policy_gives(actions: np.ndarray, space: spaces.Space[Any]) -> np.ndarray:
    """
    Give actions the type and the shape that SB3's policies give them.

    :param actions: float32, shape ``(n, action_dim)``.
    :param space: Of the policy's actions.
    :return: Shape ``(n, ...)``.
    """
    if isinstance(space, spaces.Discrete):
        return actions.reshape(-1).astype(np.int64)
    if isinstance(space, spaces.MultiDiscrete):
        return actions.astype(np.int64)
    return np.asarray(actions.reshape(-1, *cast(tuple[int, ...], space.shape)))
