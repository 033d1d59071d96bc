"""sb3_clipvf: Proximal Policy Optimization for Stable-Baselines3 and the RL Zoo."""

from sb3_clipvf.checkpoint import SaveBestTrainingReward
from sb3_clipvf.clip_ppo import SB3_EQUIVALENT, ClipPPO
from sb3_clipvf.rollout import TensorRolloutBuffer

__version__ = "0.1.0"

__all__ = ["SB3_EQUIVALENT", "ClipPPO", "SaveBestTrainingReward", "TensorRolloutBuffer", "__version__"]
