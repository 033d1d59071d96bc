"""Errors raised when a run cannot be saved in a folder, or resumed from a file or in its environments."""


class DamagedCheckpointError(ValueError):
    """A checkpoint's file is damaged: parts of it are missing or have changed."""


class NotACheckpointError(ValueError):
    """A file is a model without the training state, or a checkpoint of a different format."""


class FolderInUseError(FileExistsError, ValueError):
    """A folder holds checkpoints of another run."""


class UnsavableModelError(TypeError):
    """A model has an attribute that cannot be written to a file."""


class EnvironmentMismatchError(ValueError):
    """Environments are built differently from those of the checkpoint."""
