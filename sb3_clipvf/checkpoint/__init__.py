"""
Checkpoints of the whole training state, and the best model of a run.

``TrainingCheckpoint`` writes checkpoints, ``ClipPPO.resume`` continues from them. ``SaveBestTrainingReward`` keeps the
model with the best mean return of the training episodes. All files are written atomically.

Writing:

- ``training_checkpoint``: the callback that writes checkpoints;
- ``rollout_callback``: the base class of callbacks that act between rollouts;
- ``signals``: the last checkpoint before a signal ends the process;
- ``file``: the file of a checkpoint and its manifest;
- ``best_training``: the callback for the best model;
- ``best_model``: the file of a best model;
- ``model_statistics``: statistics of ``VecNormalize`` in the file of a model.

Resuming:

- ``resume``: resuming a run;
- ``errors``: errors of checkpoints and of resuming;
- ``protocol``: the part of a model that checkpoints use.

The state:

- ``training_state``: the whole state, of the following parts;
- ``random_state``: random generators;
- ``callback_state``: callbacks;
- ``vec_env_state``: vectorised environments;
- ``env_state``: single environments;
- ``mujoco_state``: environments of MuJoCo;
- ``resumable``: environments in other processes;
- ``state_attributes``: the attributes that are state, by class;
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
