"""
Checkpoints of a whole training, and the best model of a training.

``TrainingCheckpoint`` writes checkpoints, ``ClipPPO.resume`` continues from them. ``SaveBestTrainingReward`` keeps the
model with the best mean return of the training episodes. All files are written atomically.
"""

from sb3_clipvf.checkpoint.best_training import SaveBestTrainingReward, load_best_training
from sb3_clipvf.checkpoint.errors import DamagedCheckpointError, EnvironmentMismatchError, NotACheckpointError
from sb3_clipvf.checkpoint.file import Checkpoint, CheckpointManifest, newest_checkpoint, read_checkpoint, read_manifest
from sb3_clipvf.checkpoint.resumable import ResumableEnv
from sb3_clipvf.checkpoint.training_checkpoint import TrainingCheckpoint

__all__ = [
    "Checkpoint",
    "CheckpointManifest",
    "DamagedCheckpointError",
    "EnvironmentMismatchError",
    "NotACheckpointError",
    "ResumableEnv",
    "SaveBestTrainingReward",
    "TrainingCheckpoint",
    "load_best_training",
    "newest_checkpoint",
    "read_checkpoint",
    "read_manifest",
]
