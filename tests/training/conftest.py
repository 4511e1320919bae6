"""A small text, and runs that learn it in a moment."""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from seqmix import RunConfig, load_config

SMALL = (
    "model.d_model=16",
    "model.n_layers=2",
    "data.sequence_length=16",
    "training.steps=6",
    "training.batch_size=4",
    "training.warmup_steps=2",
    "training.evaluate_every=2",
    "training.evaluation_batches=2",
    "training.final_evaluation_batches=null",
    "training.checkpoint_every=2",
    "training.log_every=1",
)
"""A preset made so small that a run takes a fraction of a second."""


@pytest.fixture
def text(tmp_path: Path) -> Path:
    """A file of 3000 bytes."""
    words = np.array(["the", "mixer", "reads", "a", "token", "and", "writes", "its", "state"])
    chosen = words[np.random.default_rng(0).integers(len(words), size=1000)]
    file = tmp_path / "text.txt"
    file.write_text(" ".join(chosen)[:3000])
    return file


@pytest.fixture
def config_of(text: Path) -> Callable[..., RunConfig]:
    """A small run with changes, of a preset's blocks."""

    def make(*overrides: str, preset: str = "retnet-tiny") -> RunConfig:
        return load_config(preset, [*SMALL, f"data.paths=[{text}]", *overrides])

    return make
