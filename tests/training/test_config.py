"""The configuration of a run."""

import pytest
from pydantic import ValidationError

from seqmix import ConfigError, load_config
from seqmix.data import TextConfig
from seqmix.training import TrainingConfig

TRAINING = {"steps": 10, "batch_size": 4, "learning_rate": 1e-3}


@pytest.mark.parametrize(
    ("fields", "sentence"),
    [
        ({"grad_accum_steps": 3}, "grad_accum_steps must divide batch_size, and 3 does not divide 4"),
        ({"warmup_steps": 11}, "warmup_steps must be at most steps, and 11 is above 10"),
        ({"betas": (0.9, 1.0)}, "betas.1\n  Input should be less than 1"),
        ({"betas": (-0.1, 0.9)}, "betas.0\n  Input should be greater than or equal to 0"),
        ({"steps": 0}, "steps"),
        ({"batch_size": 0}, "batch_size"),
        ({"learning_rate": 0.0}, "learning_rate"),
        ({"weight_decay": -0.1}, "weight_decay"),
        ({"clip_norm": 0.0}, "clip_norm"),
        ({"final_lr_ratio": 1.1}, "final_lr_ratio"),
        ({"precision": "float16"}, "precision"),
        ({"schedule": "exponential"}, "schedule"),
        ({"keep_checkpoints": 0}, "keep_checkpoints"),
        ({"log_every": 0}, "log_every"),
    ],
    ids=str,
)
def test_training_that_cannot_be_is_refused(fields, sentence):
    with pytest.raises(ValidationError) as raised:
        TrainingConfig(**TRAINING | fields)
    assert sentence in str(raised.value)


def test_a_warm_up_may_be_the_whole_run():
    assert TrainingConfig(**TRAINING, warmup_steps=10).warmup_steps == 10


@pytest.mark.parametrize(
    "fields",
    [
        {"validation_fraction": 0.0},
        {"validation_fraction": 1.0},
        {"sequence_length": 0},
        {"split": "random"},
        {"paths": ()},
        {"paths": "text.txt"},
        {"paths": ("",)},
        {"glob": ""},
        {"glob": "/etc/*"},
    ],
    ids=str,
)
def test_data_that_cannot_be_is_refused(fields):
    with pytest.raises(ValidationError, match=next(iter(fields))):
        TextConfig(**fields)


def test_a_vocabulary_smaller_than_the_bytes_is_refused_in_one_sentence():
    with pytest.raises(ConfigError) as raised:
        load_config("retnet-tiny", ["model.vocab_size=256"])
    assert "text as bytes has 257 tokens (256 bytes and the begin token), and model.vocab_size is 256" in str(
        raised.value
    )


def test_a_larger_vocabulary_is_allowed():
    assert load_config("retnet-tiny", ["model.vocab_size=300"]).model.vocab_size == 300


@pytest.mark.parametrize("seed", ["-1", "1.5", "true", "2147483648"])
def test_a_seed_is_a_number_from_0(seed):
    with pytest.raises(ConfigError, match="seed"):
        load_config("retnet-tiny", [f"seed={seed}"])
