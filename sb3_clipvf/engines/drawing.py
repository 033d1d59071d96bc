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
    :param n_envs: Rows.
    :param action_dim: Numbers of an action.
    :param widths: Actions of each categorical distribution, if it is of that kind.
    """

    def __init__(self, kind: int, n_envs: int, action_dim: int, widths: list[int]) -> None:
        self._kind = kind
        # Kernels only read them, so that each step's numbers may take the place of the last one's.
        self._parts = [th.empty(n_envs, width) for width in (widths or [action_dim])]
        self._arrays = [part.numpy() for part in self._parts]

    def next(self) -> np.ndarray:
        """
        Draw the numbers of the next step.

        :return: Shape ``(n_envs, k)``; good until the next call.
        """
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
