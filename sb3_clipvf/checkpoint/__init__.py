"""
Checkpoints of the whole training state, and the best model of a run.

``TrainingCheckpoint`` writes checkpoints, ``ClipPPO.resume`` continues from them. ``SaveBestTrainingReward`` keeps the
model with the best mean return of the training episodes. All files are written atomically.

The modules:

- ``training_checkpoint``, ``signals``: the callback that writes checkpoints; the last one before the process ends;
- ``resume``, ``errors``, ``protocol``: resuming a run; its errors; the part of a model that checkpoints use;
- ``file``: the file of a checkpoint and its manifest;
- ``best_training``, ``best_model``, ``model_statistics``: the callback for the best model; its file; its statistics;
- ``training_state``, ``random_state``, ``callback_state``: the whole state; random generators; callbacks;
- ``vec_env_state``, ``env_state``, ``mujoco_state``: vectorised environments; single ones; those of MuJoCo;
- ``resumable``, ``state_attributes``: environments in other processes; the attributes that are state, by class;
- ``monitor_files``: rows that ``Monitor`` wrote after the checkpoint.
"""

from sb3_clipvf.checkpoint.best_training import SaveBestTrainingReward, load_best_training
from sb3_clipvf.checkpoint.errors import (
    DamagedCheckpointError,
    EnvironmentMismatchError,
    FolderInUseError,
    NotACheckpointError,
)
from sb3_clipvf.checkpoint.file import Checkpoint, CheckpointManifest, newest_checkpoint, read_checkpoint, read_manifest
from sb3_clipvf.checkpoint.resumable import ResumableEnv
from sb3_clipvf.checkpoint.training_checkpoint import TrainingCheckpoint

__all__ = [
    "Checkpoint",
    "CheckpointManifest",
    "DamagedCheckpointError",
    "EnvironmentMismatchError",
    "FolderInUseError",
    "NotACheckpointError",
    "ResumableEnv",
    "SaveBestTrainingReward",
    "TrainingCheckpoint",
    "load_best_training",
    "newest_checkpoint",
    "read_checkpoint",
    "read_manifest",
]
