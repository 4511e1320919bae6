"""The configuration of training and data."""

import pytest

from seqmix import ConfigError, load_config
from seqmix.data import TextConfig
from seqmix.training import TrainingConfig

TRAINING = {"steps": 100, "batch_size": 4, "learning_rate": 1e-3}


@pytest.mark.parametrize(
    ("fields", "named"),
    [
        ({"grad_accum_steps": 3}, "grad_accum_steps.* 4, got 3"),
        ({"schedule": "wsd"}, "decay_steps"),
        ({"schedule": "cosine", "decay_steps": 5}, "decay_steps .*wsd.*cosine"),
        ({"schedule": "cosin"}, 'a path such as.*did you mean "cosine"'),
        ({"optimizer": "my_module:"}, "adamw, muon, normuon, or a path such as"),
        ({"optimizer_options": {"momentum": 0.9}}, "given by path, got adamw"),
        ({"ema": 1.0}, "a number < 1"),
    ],
    ids=str,
)
def test_invalid_training_config_is_refused(fields, named):
    with pytest.raises(ConfigError, match=named):
        TrainingConfig(**TRAINING | fields)


@pytest.mark.parametrize(
    ("fields", "phases", "said"),
    [
        ({"warmup_steps": 100}, (100, 0), []),
        ({"warmup_steps": 101}, (100, 0), ["training.warmup_steps = 101 is shortened to 100"]),
        ({"schedule": "wsd", "decay_steps": 95, "warmup_steps": 10}, (5, 95), ["warmup_steps = 10 is shortened to 5"]),
        ({"schedule": "wsd", "decay_steps": 200}, (0, 100), ["training.decay_steps = 200 is shortened to 100"]),
    ],
    ids=str,
)
def test_phases_longer_than_the_run_are_shortened(fields, phases, said):
    settings = TrainingConfig(**TRAINING | fields)
    assert settings.phases == phases
    assert len(settings.shortening_notes) == len(said)
    assert all(part in sentence for part, sentence in zip(said, settings.shortening_notes, strict=True))


@pytest.mark.parametrize("name", ["steps", "batch_size"])
def test_too_large_number_is_refused_with_file_and_line(tmp_path, name):
    (tmp_path / "run.yaml").write_text(f"extends: retnet-tiny\ntraining:\n  {name}: {10**23}\n")
    with pytest.raises(ConfigError, match=rf"run\.yaml:3: training\.{name}: expected a number <= .*, got {10**23}"):
        load_config(str(tmp_path / "run.yaml"))


@pytest.mark.parametrize("fields", [{"paths": "a"}, {"glob": "/etc/*"}], ids=str)
def test_invalid_data_config_is_refused(fields):
    with pytest.raises(ConfigError, match=next(iter(fields))):
        TextConfig(**fields)


def test_vocab_size_too_small_for_all_bytes_is_refused():
    with pytest.raises(ConfigError, match=r"257.*model\.vocab_size .*256"):
        load_config("retnet-tiny", ["model.vocab_size=256"])
    assert load_config("retnet-tiny", ["model.vocab_size=300"]).model.vocab_size == 300
