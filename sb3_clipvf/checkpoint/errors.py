"""Errors raised when a training cannot be saved in a folder, or resumed from a file or in its environments."""


class DamagedCheckpointError(ValueError):
    """A checkpoint's file is damaged: parts of it are missing or have changed."""


class NotACheckpointError(ValueError):
    """A file is a model without the state of its training, or a checkpoint of another format."""


class FolderInUseError(FileExistsError, ValueError):
    """A folder holds checkpoints of another training."""


class EnvironmentMismatchError(ValueError):
    """Environments are built differently from those of the checkpoint."""
