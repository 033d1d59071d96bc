"""Torch's counterparts of NumPy's dtypes."""

from typing import Any

import numpy as np
import torch as th


def torch_dtype(dtype: Any) -> th.dtype:
    """Return torch's counterpart of a NumPy dtype."""
    return th.from_numpy(np.empty(0, dtype)).dtype
