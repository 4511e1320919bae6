"""Layers of other libraries through their adapters: what agrees, and what the kit finds in current releases."""

import sys
from importlib.util import find_spec

import pytest

from seqmix import SeqmixError
from seqmix.cli.commands.check import mixers_of
from seqmix.testing import check_mixer
from seqmix.testing.adapters.hf import HFConfig
from seqmix.testing.adapters.torchscale import TorchscaleConfig

MODELS = "transformers.models."
LLAMA, MAMBA2 = f"{MODELS}llama.modeling_llama:", f"{MODELS}mamba2.modeling_mamba2:"
DELTA_NET = f"{MODELS}qwen3_next.modeling_qwen3_next"
DECODING = ["paradigms_agree", "pieces_equal_the_whole", "steps_equal_the_whole", "the_future_changes_nothing"]

transformers = pytest.mark.skipif(find_spec("transformers") is None, reason="needs pip install transformers")
torchscale = pytest.mark.skipif(find_spec("torchscale") is None, reason="needs pip install --no-deps torchscale")


@pytest.fixture
def no_kernels(monkeypatch):
    """transformers takes fla's kernels where they are installed, and this machine may have no GPU to run them."""
    monkeypatch.setitem(sys.modules, "fla", None)
    monkeypatch.delitem(sys.modules, DELTA_NET, raising=False)


def failing(config, checks, examples=8):
    report = check_mixer(config, checks=checks, examples=examples, compiles=False, shrink=False)
    return {outcome.check.name for outcome in report.failures}


@transformers
@pytest.mark.usefixtures("no_kernels")
@pytest.mark.parametrize(
    "path",
    [MAMBA2 + "Mamba2Mixer", LLAMA + "LlamaAttention", LLAMA + "LlamaModel", DELTA_NET + ":Qwen3NextGatedDeltaNet"],
)
def test_transformers_layers_decode_as_they_train(path):
    assert failing(HFConfig(path=path, use="decoding"), [*DECODING, "a_state_survives_the_disk"]) == set()
    assert failing(HFConfig(path=path), ["the_future_changes_nothing", "gradients_are_derivatives"]) == set()


@transformers
@pytest.mark.parametrize(
    ("path", "fields", "check"),
    [
        (MAMBA2 + "Mamba2Mixer", {"use": "decoding", "config": {"time_step_limit": (0.1, 0.8)}}, DECODING[2]),
        (MAMBA2 + "Mamba2Mixer", {"use": "packed"}, "documents_are_sequences"),
        (f"{MODELS}mamba.modeling_mamba:MambaMixer", {"use": "decoding"}, DECODING[1]),
        (
            f"{MODELS}recurrent_gemma.modeling_recurrent_gemma:RecurrentGemmaModel",
            {"use": "decoding", "config": {"num_hidden_layers": 3}},
            "results_are_deterministic",
        ),
        # LlamaModel and long_segments_do_not_drift are left out: a case takes a minute
        (LLAMA + "LlamaAttention", {"mask": False, "config": {"attn_implementation": "eager"}}, DECODING[3]),
        (LLAMA + "LlamaAttention", {"mask": False, "use": "decoding"}, DECODING[1]),
    ],
)
def test_kit_finds_known_failures_in_transformers(path, fields, check):
    from transformers import __version__

    if not __version__.startswith("5.24"):
        pytest.skip("the findings are those of 5.24")
    assert failing(HFConfig(path=path, **fields), [check], examples=40) == {check}


@transformers
def test_llama_model_keeps_packed_documents_apart():
    assert failing(HFConfig(path=LLAMA + "LlamaModel", use="packed"), ["documents_are_sequences"]) == set()


@torchscale
def test_torchscale_chunks_compute_a_different_function():
    checks = [*DECODING[:3], "position_matters_only_where_declared"]
    # after tokens of zeros the eps of its norm counts, and the scale of a state from pieces is another
    zeros = {"pieces_equal_the_whole"}
    assert failing(TorchscaleConfig(), checks) == zeros
    assert failing(TorchscaleConfig(chunk=4), checks, examples=100) == zeros | {
        "paradigms_agree",
        "steps_equal_the_whole",
    }


@transformers
def test_hf_argument_selects_a_class_and_its_configuration(tmp_path):
    (tmp_path / "config.yaml").write_text("hidden_size: 32\ntime_step_limit: [0.1, 0.8]\n")
    configs, vary = mixers_of(f"hf:{MAMBA2}Mamba2Mixer", [], str(tmp_path / "config.yaml"))
    assert [(config.use, config.fixed_d_model, vary) for config in configs] == [
        ("training", 32, False),
        ("decoding", 32, False),
    ]
    (config,) = mixers_of(f"hf:{MAMBA2}Mamba2Mixer", ["use=packed"], '{"state_size": 8}')[0]
    assert config == HFConfig(path=f"{MAMBA2}Mamba2Mixer", config={"state_size": 8}, use="packed")


@transformers
@pytest.mark.parametrize(
    ("source", "fields", "words"),
    [
        (f"hf:{MAMBA2}Mamba2Mixr", "", 'has no nn.Module .Mamba2Mixr.*did you mean "Mamba2Mixer"'),
        ("hf:mamba2", "", "expected hf:MODULE:CLASS"),
        (f"hf:{MODELS}mamba3:Mixer", "", "cannot be imported"),
        (f"hf:{MAMBA2}Mamba2Mixer", "{hiden_size: 16}", 'has no field .hiden_size.*did you mean "hidden_size"'),
        (f"hf:{MAMBA2}Mamba2Mixer", "{hidden_size: x}", "refuses .*expected int"),
        (f"hf:{MAMBA2}Mamba2Mixer", "16", "must be fields of a configuration"),
        ("hf:torch.nn:Linear", "", "has no argument `config`"),
    ],
)
def test_wrong_name_or_field_reports_one_line_error(source, fields, words):
    with pytest.raises(SeqmixError, match=words) as found:
        mixers_of(source, [], fields)
    assert "\n" not in str(found.value)
