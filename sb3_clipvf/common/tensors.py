"""Observations as tensors by key, and torch's dtypes."""

from typing import Any

import numpy as np
import torch as th


def observation_parts(observations: Any) -> dict[str, th.Tensor]:
    """Return the tensors of observations by key; a single one has the key ""."""
    return observations if isinstance(observations, dict) else {"": observations}


def from_parts(parts: dict[str, Any]) -> Any:
    """Return observations from their :func:`observation_parts`."""
    return parts[""] if parts.keys() == {""} else parts


def torch_dtype(dtype: Any) -> th.dtype:
    """Return torch's counterpart of a NumPy dtype."""
    return th.from_numpy(np.empty(0, dtype)).dtype
