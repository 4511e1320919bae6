"""Untrusted config.json and tokenizer.json files: every field value is used or rejected with a clear error."""

import json
import random
from functools import partial

import pytest
from abuse.folders import TREES, changed, keys, make, whole
from abuse.tally import Case, fault_of
from hypothesis import settings

from seqmix import SeqmixError
from seqmix.interop.convert import ARCHITECTURES, import_from
from seqmix.interop.convert.rwkv import RWKV7
from seqmix.interop.convert.source_config import Rotation, Theirs, validate_types
from seqmix.models import build_meta

SAMPLE = 60
"""Cases of an architecture in every run; all, more than 6,000, with --hypothesis-profile nightly."""
COMPUTED = {"scaling", "positions", "networks", "embedding_scale", "embedding_norm"}
"""Fields of tables that are none of config.json: `expand_fields` makes them of others."""


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_any_field_value_is_used_or_rejected_with_a_clear_error(name):
    _laid_out(name, whole(name))
    cases = list(changed(name))
    if settings().max_examples < 1000:
        cases = random.Random(name).sample(cases, SAMPLE)
    for what, fields in cases:
        case = Case(what, partial(_laid_out, name, fields), refused=False)
        assert fault_of(case) is None, what


def _laid_out(name, fields):
    architecture = ARCHITECTURES[name]
    list(architecture.rules(build_meta(architecture.config(fields, "config.json"))))


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_every_field_used_in_computation_has_a_type(name):
    architecture = ARCHITECTURES[name]
    tables = [architecture.common, *(table for kinds in architecture.kinds.values() for table in kinds.values())]
    fields = {field: spec for table in tables for field, spec in table.fields.items()}
    computed = {field for field, spec in fields.items() if spec.allowed is None} - COMPUTED
    assert computed <= Theirs.model_fields.keys()
    assert set(keys(name)) >= computed


FAULTS = {
    "hidden_size": ("x", "config.json: hidden_size: expected an integer, got 'x'"),
    "intermediate_size": ({}, "config.json: intermediate_size: expected an integer, got {}"),
    "num_attention_heads": (2**63, "config.json: num_attention_heads: expected a number <= 65536, got 92233720"),
    "head_dim": (2**63, "config.json: head_dim: expected a number <= 1048576, got 9223372036854775808"),
    "rope_parameters": ("x", "config.json: rope_parameters: expected a mapping, got 'x'"),
    "rope_scaling": (
        {"rope_type": "linear", "factor": "x"},
        "config.json: rope: factor: expected a number, got 'x'",
    ),
    "num_hidden_layers": (None, "config.json lacks num_hidden_layers"),
    "eos_token_id": ({}, "config.json: eos_token_id: expected "),
}


@pytest.mark.parametrize("key", FAULTS)
def test_convert_error_names_the_file_key_and_value(key, refused, tmp_path):
    make(folder := tmp_path / "theirs", "llama")
    value, sentence = FAULTS[key]
    fields = {name: x for name, x in whole("llama").items() if not name.startswith("rope")}
    (folder / "config.json").write_text(json.dumps(fields | {key: value}))
    message = refused("convert", folder, "--out", "ours")
    assert message.startswith(f"{folder}/{sentence}"), message
    assert not (tmp_path / "ours").exists()


def test_null_field_counts_as_missing():
    assert validate_types({"hidden_size": None, "attn": None, "other": 1}, "here") == {"other": 1}
    assert validate_types({"factor": 2.0, "beta": "x"}, "here", Rotation) == {"factor": 2.0, "beta": "x"}
    fields = whole("rwkv7")
    assert RWKV7().config(fields | {"hidden_ratio": None}, "here") == RWKV7().config(fields, "here")


def test_config_with_far_too_many_parameters_is_rejected(tmp_path):
    make(folder := tmp_path / "theirs", "qwen3-next")
    (folder / "config.json").write_text(json.dumps(whole("qwen3-next") | {"head_dim": 2**20}))
    with pytest.raises(
        SeqmixError, match=r"describes another model: expected at most [\d,]+ parameters.*, got [\d,]+$"
    ):
        import_from(folder, None)


@pytest.mark.parametrize("number", range(len(TREES)))
def test_convert_rejects_an_invalid_tokenizer_json(number, refused, tmp_path):
    make(folder := tmp_path / "theirs", "llama")
    (folder / "tokenizer.json").write_text(json.dumps(TREES[number]))
    message = refused("convert", folder, "--out", "ours", status=3)
    assert message.startswith(f"the tokenizer {folder}/tokenizer.json is not a tokenizer.json: ")
    assert not (tmp_path / "ours").exists()


@pytest.mark.parametrize("target", ["config.json", "model.safetensors", "nowhere", "/dev/zero", "."])
def test_convert_rejects_a_tokenizer_symlink_to_a_non_tokenizer(target, refused, tmp_path):
    make(folder := tmp_path / "theirs", "llama")
    (folder / "tokenizer.json").unlink()
    (folder / "tokenizer.json").symlink_to(target)
    is_file = (folder / target).is_file()  # else there is no tokenizer, and an option is missing
    message = refused("convert", folder, "--out", "ours", status=3 if is_file else 2)
    assert "tokenizer" in message
    assert str(folder) in message
    assert not (tmp_path / "ours").exists()


def test_tokenizer_symlink_to_a_tokenizer_is_read(tmp_path):
    """The Hugging Face cache contains only symlinks."""
    make(folder := tmp_path / "theirs", "llama")
    (folder / "tokenizer.json").rename(tmp_path / "blob")
    (folder / "tokenizer.json").symlink_to("../blob")
    import_from(folder, tmp_path / "ours")
    assert (tmp_path / "ours/tokenizer.json").read_bytes() == (tmp_path / "blob").read_bytes()
    assert not (tmp_path / "ours/tokenizer.json").is_symlink()
