"""Torch's counterparts of NumPy's arrays and dtypes."""

from typing import Any

import numpy as np
import torch as th
from stable_baselines3.common.utils import obs_as_tensor


def to_tensor(observations: Any, device: th.device) -> Any:
    """Return observations, an array or a dict of arrays, as tensors on a device; on the host they share memory."""
    if device.type == "cpu" and type(observations) is np.ndarray:
        return th.from_numpy(observations)  # a third of the time of SB3's way
    return obs_as_tensor(observations, device)


def torch_dtype(dtype: Any) -> th.dtype:
    """Return torch's counterpart of a NumPy dtype."""
    return th.from_numpy(np.empty(0, dtype)).dtype
