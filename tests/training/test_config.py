"""The configuration of a run."""

import pytest
from pydantic import ValidationError

from seqmix import ConfigError, load_config
from seqmix.data import TextConfig
from seqmix.training import TrainingConfig

TRAINING = {"steps": 100, "batch_size": 4, "learning_rate": 1e-3}


@pytest.mark.parametrize(
    ("fields", "named"),
    [
        ({"grad_accum_steps": 3}, "grad_accum_steps.* 3 .* 4"),
        ({"warmup_steps": 101}, "warmup_steps.* 101 .* 100"),
        ({"schedule": "wsd"}, "decay_steps"),
        ({"schedule": "cosine", "decay_steps": 5}, "decay_steps .*wsd.*cosine"),
        ({"schedule": "wsd", "decay_steps": 95, "warmup_steps": 10}, "decay_steps .*10 \\+ 95 .*100"),
    ],
    ids=str,
)
def test_invalid_training_is_refused(fields, named):
    with pytest.raises(ValidationError, match=named):
        TrainingConfig(**TRAINING | fields)


@pytest.mark.parametrize("fields", [{"paths": "a"}, {"glob": "/etc/*"}], ids=str)
def test_invalid_data_is_refused(fields):
    with pytest.raises(ValidationError, match=next(iter(fields))):
        TextConfig(**fields)


def test_the_vocabulary_holds_all_bytes():
    with pytest.raises(ConfigError, match=r"257.*model\.vocab_size .*256"):
        load_config("retnet-tiny", ["model.vocab_size=256"])
    assert load_config("retnet-tiny", ["model.vocab_size=300"]).model.vocab_size == 300
