"""Settings for benchmarks of a small model, with rates that take no time to measure."""

import pytest
import torch

from seqmix import load_config
from seqmix.lab.bench.benchmark import Settings
from seqmix.lab.bench.machine import Rates


@pytest.fixture
def model():
    changes = ["model.d_model=32", "model.n_layers=2", "model.blocks.ret.mixer={n_heads: 2, chunk_size: 16}"]
    return load_config("retnet-tiny", changes).model


@pytest.fixture
def settings(model):
    def make(**changes):
        given = {"lengths": (32,), "model": model, "device": torch.device("cpu"), "rates": Rates(32, 2**12)}
        return Settings(**(given | {"tokens": 64} | changes))

    return make
