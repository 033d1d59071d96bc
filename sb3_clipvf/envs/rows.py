"""Rows of batches: observations ``(n_envs, ...)``, in dicts and tuples where spaces nest, and infos of a batch."""

import copy
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from gymnasium import spaces

#: Key of the infos at the end of an episode whose final observation is not known.
UNKNOWN_FINAL = "terminal_observation_unknown"

# Keys that the adapters themselves put into the infos.
_OURS = frozenset({"TimeLimit.truncated", "terminal_observation", UNKNOWN_FINAL})


def copy_batch(space: spaces.Space[Any], obs: Any) -> Any:
    """Return a C-contiguous copy with the space's dtypes: environments write the next batch into the same memory."""
    if isinstance(space, spaces.Dict):
        return {key: copy_batch(part, obs[key]) for key, part in space.spaces.items()}
    if isinstance(space, spaces.Tuple):
        return tuple(copy_batch(part, obs[index]) for index, part in enumerate(space.spaces))
    return np.array(obs, dtype=space.dtype, order="C")


def copy_of(observations: Any) -> Any:
    """Return a copy of observations, since some VecEnvs write the next step into the same arrays."""
    # In the same memory layout: sums in a different order round differently.
    return observations.copy("K") if isinstance(observations, np.ndarray) else copy.deepcopy(observations)


def copy_row(obs: Any, index: int) -> Any:
    """Return a copy of one environment's observation."""
    if isinstance(obs, Mapping):
        return {key: copy_row(part, index) for key, part in obs.items()}
    if isinstance(obs, tuple):
        return tuple(copy_row(part, index) for part in obs)
    return obs[index].copy()


def put_rows(obs: Any, indices: np.ndarray, new: Any) -> None:
    """Write ``new`` rows ``(k, ...)`` to the places ``indices`` of a batch."""
    if isinstance(obs, Mapping):
        for key, part in obs.items():
            put_rows(part, indices, new[key])
    elif isinstance(obs, tuple):
        for part, new_part in zip(obs, new, strict=True):
            put_rows(part, indices, new_part)
    else:
        obs[indices] = new


def take_rows(obs: Any, indices: np.ndarray | slice) -> Any:
    """Return some rows of a batch: indices ``(k,)``, a mask ``(n_envs,)``, or a slice, which copies nothing."""
    if isinstance(obs, Mapping):
        return {key: take_rows(part, indices) for key, part in obs.items()}
    if isinstance(obs, tuple):
        return tuple(take_rows(part, indices) for part in obs)
    return np.asarray(obs)[indices]


def stack_rows(space: spaces.Space[Any], rows: list[Any]) -> Any:
    """Return observations of single environments, which may have leading axes of length 1, as a batch."""
    if isinstance(space, spaces.Dict):
        return {key: stack_rows(part, [row[key] for row in rows]) for key, part in space.spaces.items()}
    return np.stack([np.reshape(row, space.shape or ()) for row in rows])


def same(first: Any, second: Any) -> bool:
    """Return whether all elements of two batches are equal; NaN equals NaN."""
    if isinstance(first, Mapping):
        return all(same(part, second[key]) for key, part in first.items())
    if isinstance(first, tuple):
        return all(same(*parts) for parts in zip(first, second, strict=True))
    exact = not np.issubdtype(np.asarray(first).dtype, np.inexact)
    return bool(np.array_equal(first, second, equal_nan=not exact))


def fill_infos(rows: list[dict[str, Any]], infos: Mapping[str, Any], left_out: frozenset[str] = frozenset()) -> None:
    """
    Add the infos of a batch to one dict per environment, except the keys ``left_out``.

    An array under ``key`` holds one value per environment. A boolean array under ``_key`` marks those that have one
    (Gymnasium's convention). Other values belong to all environments. Numbers become Python numbers, and objects are
    copied, since environments may change them later.
    """
    masks = {f"_{key}" for key in infos}  # a key may be of any type
    for key, values in infos.items():
        if key in left_out or key in _OURS or key in masks:
            continue
        column = _column(values, len(rows))
        mask = infos.get(f"_{key}")
        if mask is None:
            for row, value in zip(rows, column, strict=True):
                row[key] = value
        else:
            for index in np.flatnonzero(mask).tolist():
                rows[index][key] = column[index]


def truncated_rows(dones: np.ndarray, infos: Sequence[Mapping[str, Any]]) -> tuple[list[int], list[int]]:
    """Return the rows of truncated episodes: those with a final observation, and those where it is not known."""
    rows = [row for row in np.flatnonzero(dones).tolist() if infos[row].get("TimeLimit.truncated", False)]
    known = [row for row in rows if infos[row].get("terminal_observation") is not None]
    return known, [row for row in rows if infos[row].get(UNKNOWN_FINAL) and "terminal_observation" not in infos[row]]


def _column(values: Any, n_envs: int) -> list[Any]:
    if isinstance(values, np.ndarray) and values.dtype.hasobject:
        values = copy.deepcopy(values)
    if isinstance(values, np.ndarray) and values.shape == (n_envs,):  # most are; the other checks are slower
        return values.tolist()  # type: ignore[no-any-return]
    if isinstance(values, Mapping):
        column: list[dict[str, Any]] = [{} for _ in range(n_envs)]
        fill_infos(column, values)
        return column
    if not isinstance(values, np.ndarray) or values.ndim == 0 or len(values) != n_envs:
        return [values] * n_envs
    return list(values.copy())
