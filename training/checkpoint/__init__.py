"""Files of a run: the run directory, checkpoints with the training state, provenance, and saved prompt caches."""

from ..tensor_files import CheckpointError

__all__ = ["CheckpointError"]
