"""What a run leaves on disk: the run directory, checkpoints, the training state in them, and how they are loaded."""

from ..tensor_files import CheckpointError

__all__ = ["CheckpointError"]
