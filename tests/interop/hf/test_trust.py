"""Code named in config.json is imported only with trust_remote_code=True, or if it is already imported."""

import json
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch
from hf_models import tiny

if find_spec("transformers") is None:
    pytest.skip("needs pip install transformers", allow_module_level=True)

import transformers

from seqmix import SeqmixError
from seqmix.interop.hf import SeqmixConfig, SeqmixForCausalLM, SeqmixModel

CODE = """
open("ran", "w").close()
from seqmix.mixers.retention import RetentionConfig as Config
"""
CLASSES = (transformers.AutoModelForCausalLM, transformers.AutoModel, SeqmixForCausalLM, SeqmixModel)


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """A folder whose config.json names a module of the working directory, which leaves a file where it is imported."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    Path("strangers_hf.py").write_text(CODE)
    SeqmixForCausalLM.wrap(tiny("retnet-tiny", dtype=torch.float32)).save_pretrained("folder")
    change(lambda fields: fields["model"]["blocks"]["ret"]["mixer"].update(kind="strangers_hf:Config"))
    yield "folder"
    sys.modules.pop("strangers_hf", None)


def change(how):
    file = Path("folder/config.json")
    fields = json.loads(file.read_text())
    how(fields)
    file.write_text(json.dumps(fields))


@pytest.mark.parametrize("trust", [{}, {"trust_remote_code": False}, {"trust_remote_code": None}])
@pytest.mark.parametrize("cls", CLASSES)
def test_nothing_is_imported_without_trust(folder, cls, trust):
    with pytest.raises(SeqmixError, match=r"import code .*: strangers_hf:Config; .* trust_remote_code=True$"):
        cls.from_pretrained(folder, **trust)
    assert not Path("ran").exists()


@pytest.mark.parametrize("cls", CLASSES)
def test_code_named_in_config_is_imported_with_trust(folder, cls):
    model = cls.from_pretrained(folder, trust_remote_code=True)
    assert Path("ran").exists()
    assert model.model.config.blocks["ret"].mixer.__module__ == "seqmix.mixers.retention"
    assert model.config.model_config == model.model.config
    Path("ran").unlink()
    cls.from_pretrained(folder)  # the program has imported it
    assert not Path("ran").exists()


def test_config_is_read_and_saved_without_its_code(folder):
    for config in (transformers.AutoConfig.from_pretrained(folder), SeqmixConfig.from_pretrained(folder)):
        assert (config.hidden_size, config.num_hidden_layers, config.vocab_size) == (64, 4, 257)
        with pytest.raises(SeqmixError, match="strangers_hf:Config"):
            _ = config.model_config
        with pytest.raises(SeqmixError, match="strangers_hf:Config"):
            transformers.AutoModelForCausalLM.from_config(config)
        config.save_pretrained("again")
        assert json.loads(Path("again/config.json").read_text())["model"] == config.model
    assert not Path("ran").exists()


@pytest.mark.parametrize("value", ["x", {}, [], -1, 2**63, 1e308, None, [["x"]]])
@pytest.mark.parametrize("path", ["model", "model.d_model", "model.blocks", "model.blocks.ret.mixer", "model.pattern"])
def test_hostile_value_raises_a_seqmix_error_with_trust(folder, path, value):
    def put(fields):
        *keys, last = path.split(".")
        for key in keys:
            fields = fields[key]
        fields[last] = value

    change(put)
    if (path, value) == ("model.pattern", None):
        return  # the default
    with pytest.raises(SeqmixError):
        SeqmixForCausalLM.from_pretrained(folder, trust_remote_code=True)


FIELDS = {
    "dtype": ("x", "got 'x'"),
    "pad_token_id": ([], r"got \[\]"),
    "bos_token_id": ({}, "got {}"),
    "eos_token_id": ("1", "got"),
}
FIELDS |= {
    "model_type": ("other", "expected 'seqmix', got 'other'"),
    "vocab_size": ({}, "vocab_size must be .*, as in its section `model`"),
}


@pytest.mark.parametrize("name", FIELDS)
def test_wrong_types_in_transformers_fields_raise(folder, name):
    value, words = FIELDS[name]
    change(lambda fields: fields.update({name: value}))
    with pytest.raises(SeqmixError, match=words):
        SeqmixConfig.from_pretrained(folder)


def test_tensors_with_a_wrong_shape_are_rejected_by_name(folder):
    change(lambda fields: fields["model"]["blocks"]["ret"]["ffn"].update(expansion=0.5))
    change(lambda fields: fields["model"]["blocks"]["ret"]["mixer"].update(kind="retention"))
    with pytest.raises(SeqmixError, match=r"the weights do not fit the model of config.json: mismatched tensors .*ffn"):
        SeqmixForCausalLM.from_pretrained(folder)
