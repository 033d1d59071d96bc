"""sb3_clipvf: Proximal Policy Optimization for Stable-Baselines3 and the RL Zoo."""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from sb3_clipvf.callbacks import IsolatedEvalCallback
    from sb3_clipvf.checkpoint import SaveBestTrainingReward, TrainingCheckpoint
    from sb3_clipvf.clip_ppo import SB3_EQUIVALENT, ClipPPO
    from sb3_clipvf.common.nonfinite import NonFiniteError
    from sb3_clipvf.files.trust import UnsafeFileError
    from sb3_clipvf.rollout import TensorRolloutBuffer

__version__ = "0.1.0"

__all__ = [
    "SB3_EQUIVALENT",
    "ClipPPO",
    "IsolatedEvalCallback",
    "NonFiniteError",
    "SaveBestTrainingReward",
    "TensorRolloutBuffer",
    "TrainingCheckpoint",
    "UnsafeFileError",
    "__version__",
]

# Imported at first use, so that commands that only read results start without PyTorch.
_HOMES = {
    "SB3_EQUIVALENT": "sb3_clipvf.clip_ppo",
    "ClipPPO": "sb3_clipvf.clip_ppo",
    "IsolatedEvalCallback": "sb3_clipvf.callbacks",
    "NonFiniteError": "sb3_clipvf.common.nonfinite",
    "SaveBestTrainingReward": "sb3_clipvf.checkpoint",
    "TensorRolloutBuffer": "sb3_clipvf.rollout",
    "TrainingCheckpoint": "sb3_clipvf.checkpoint",
    "UnsafeFileError": "sb3_clipvf.files.trust",
}


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'sb3_clipvf' has no attribute {name!r}")
    return getattr(import_module(_HOMES[name]), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *_HOMES})
