"""What is wrong with a checkpoint file."""


class DamagedCheckpointError(ValueError):
    """A file is no whole checkpoint: parts of it are missing, or are not what was written."""


class NotACheckpointError(ValueError):
    """A file is a model without the state of its training."""


class EnvironmentMismatchError(ValueError):
    """The environments to go on in are built differently from those of the checkpoint."""
