"""Batches and their rows: observations of nested spaces, and gymnasium's infos of a whole batch."""

from collections.abc import Mapping
from typing import Any

import numpy as np
from gymnasium import spaces

# What the adapters themselves put into the infos.
_OURS = frozenset({"TimeLimit.truncated", "terminal_observation"})


def own_batch(space: spaces.Space[Any], obs: Any) -> Any:
    """
    Copy a batch of observations, since environments write the next one into the same memory.

    :param space: Of one environment's observation.
    :param obs: Arrays ``(n_envs, ...)``, in a dict or tuple where the space is one.
    :return: The copy, C-contiguous, with the dtypes of the space.
    """
    if isinstance(space, spaces.Dict):
        return {key: own_batch(part, obs[key]) for key, part in space.spaces.items()}
    if isinstance(space, spaces.Tuple):
        return tuple(own_batch(part, obs[index]) for index, part in enumerate(space.spaces))
    return np.array(obs, dtype=space.dtype, order="C")


def own_row(obs: Any, index: int) -> Any:
    """
    Copy one environment's observation out of a batch.

    :param obs: Arrays ``(n_envs, ...)``, in a dict or tuple where the space is one.
    :param index: Which environment.
    :return: The observation.
    """
    if isinstance(obs, Mapping):
        return {key: own_row(part, index) for key, part in obs.items()}
    if isinstance(obs, tuple):
        return tuple(own_row(part, index) for part in obs)
    return obs[index].copy()


def put_rows(obs: Any, indices: np.ndarray, new: Any) -> None:
    """
    Replace some environments' observations in a batch.

    :param obs: Arrays ``(n_envs, ...)`` to write to, in a dict or tuple where the space is one.
    :param indices: Which environments, shape ``(k,)``.
    :param new: Arrays ``(k, ...)`` in the same structure.
    """
    if isinstance(obs, Mapping):
        for key, part in obs.items():
            put_rows(part, indices, new[key])
    elif isinstance(obs, tuple):
        for part, new_part in zip(obs, new, strict=True):
            put_rows(part, indices, new_part)
    else:
        obs[indices] = new


def take_rows(obs: Any, indices: np.ndarray | slice) -> Any:
    """
    Pick some environments' observations, or other values, out of a batch.

    :param obs: Arrays ``(n_envs, ...)``, in a dict or tuple where the space is one.
    :param indices: Which environments: shape ``(k,)``, a mask ``(n_envs,)``, or a slice, which copies nothing.
    :return: Arrays ``(k, ...)`` in the same structure.
    """
    if isinstance(obs, Mapping):
        return {key: take_rows(part, indices) for key, part in obs.items()}
    if isinstance(obs, tuple):
        return tuple(take_rows(part, indices) for part in obs)
    return np.asarray(obs)[indices]


def same(first: Any, second: Any) -> bool:
    """
    Compare batches of observations.

    :param first: Arrays, in a dict or tuple.
    :param second: The same structure.
    :return: Whether all elements are equal; NaN equals NaN.
    """
    if isinstance(first, Mapping):
        return all(same(part, second[key]) for key, part in first.items())
    if isinstance(first, tuple):
        return all(same(*parts) for parts in zip(first, second, strict=True))
    exact = not np.issubdtype(np.asarray(first).dtype, np.inexact)
    return bool(np.array_equal(first, second, equal_nan=not exact))


def fill_infos(rows: list[dict[str, Any]], infos: Mapping[str, Any], left_out: frozenset[str] = frozenset()) -> None:
    """
    Spread the infos of a batch over one dict an environment.

    An array under ``key`` holds one value an environment; a boolean array under ``_key`` says whose values are there
    (Gymnasium's convention). What is no array belongs to all environments. Numbers become Python numbers.

    :param rows: One dict an environment, to which the values are added.
    :param infos: Of the batch.
    :param left_out: Keys that are not wanted.
    """
    for key, values in infos.items():
        if key in left_out or key in _OURS or (key.startswith("_") and key[1:] in infos):
            continue
        column = _column(values, len(rows))
        mask = infos.get(f"_{key}")
        if mask is None:
            for row, value in zip(rows, column, strict=True):
                row[key] = value
        else:
            for index in np.flatnonzero(mask).tolist():
                rows[index][key] = column[index]


def _column(values: Any, n_envs: int) -> list[Any]:
    if isinstance(values, np.ndarray) and values.shape == (n_envs,):  # most are; the other questions take longer
        return values.tolist()  # type: ignore[no-any-return]
    if isinstance(values, Mapping):
        column: list[dict[str, Any]] = [{} for _ in range(n_envs)]
        fill_infos(column, values)
        return column
    if not isinstance(values, np.ndarray) or values.ndim == 0 or len(values) != n_envs:
        return [values] * n_envs
    return list(values.copy())
