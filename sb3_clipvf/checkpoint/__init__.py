"""
Files that survive a crash: checkpoints of a whole training, going on from them, and the best model of a training.

``atomic_write`` writes a file at once or not at all. ``TrainingCheckpoint`` writes checkpoints by it, and
``ClipPPO.resume`` goes on from them. ``SaveBestTrainingReward`` keeps the best model by the training's own returns.
"""

from sb3_clipvf.checkpoint.best_training import SaveBestTrainingReward, load_best_training
from sb3_clipvf.checkpoint.errors import DamagedCheckpointError, EnvironmentMismatchError, NotACheckpointError
from sb3_clipvf.checkpoint.file import Checkpoint, CheckpointManifest, newest_checkpoint, read_checkpoint, read_manifest
from sb3_clipvf.checkpoint.resumable import ResumableEnv
from sb3_clipvf.checkpoint.training_checkpoint import TrainingCheckpoint
from sb3_clipvf.files.atomic import atomic_write

__all__ = [
    "Checkpoint",
    "CheckpointManifest",
    "DamagedCheckpointError",
    "EnvironmentMismatchError",
    "NotACheckpointError",
    "ResumableEnv",
    "SaveBestTrainingReward",
    "TrainingCheckpoint",
    "atomic_write",
    "load_best_training",
    "newest_checkpoint",
    "read_checkpoint",
    "read_manifest",
]
