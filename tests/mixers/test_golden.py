"""RetNet against golden values from its authors' code (torchscale 0.3.0, float64, eps 0): one layer, and a model.

Its norms cast to float32 internally, so the tolerance is 1e-5.
"""

from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file
from torch.testing import assert_close

from seqmix.mixers import Paradigm
from seqmix.mixers.retention import RetentionConfig
from seqmix.models.builder import build_model
from seqmix.models.config import ModelConfig

FILE = Path(__file__).parents[1] / "data" / "retnet-torchscale.safetensors"
GOLDEN = load_file(FILE)
PARADIGMS = list(Paradigm)
MIXER = {"kind": "retention", "n_heads": 2, "head_norm": "rms", "norm_eps": 0.0, "chunk_size": 16}


def agree(actual, expected):
    assert_close(actual, expected, rtol=1e-5, atol=1e-5)


def retention_weights(prefix):
    """Their separate projections, fused as here."""
    projections = [GOLDEN[f"{prefix}.{name}_proj.weight"] for name in "qkvg"]
    return {"in_proj.weight": torch.cat(projections), "out_proj.weight": GOLDEN[f"{prefix}.out_proj.weight"]}


def model_weights():
    weights = {
        "embedding.weight": GOLDEN["model.embed_tokens.weight"],
        "norm.weight": GOLDEN["model.layer_norm.weight"],
        "head.weight": GOLDEN["model.output_projection.weight"],
    }
    for i in range(2):
        ours, theirs = f"blocks.{i}", f"model.layers.{i}"
        weights |= {f"{ours}.mixer.{name}": x for name, x in retention_weights(f"{theirs}.retention").items()}
        for name, their_name in {
            "mixer_norm": "retention_layer_norm",
            "ffn_norm": "final_layer_norm",
            "ffn.gate_proj": "ffn.fc1",
            "ffn.up_proj": "ffn.gate",
            "ffn.down_proj": "ffn.fc2",
        }.items():
            weights[f"{ours}.{name}.weight"] = GOLDEN[f"{theirs}.{their_name}.weight"]
    return weights


def layer(**change):
    mixer = RetentionConfig(**MIXER | change).build(64, layer_idx=0, n_layers=2).double()
    mixer.load_state_dict(retention_weights("model.layers.0.retention"))
    return mixer


def model():
    norm = {"kind": "rmsnorm", "eps": 0.0}
    ffn = {"kind": "swiglu", "expansion": 1.5, "activation": "silu"}
    config = ModelConfig(
        d_model=64, n_layers=2, vocab_size=50, blocks={"ret": {"mixer": MIXER, "ffn": ffn, "norm": norm}}, norm=norm
    )
    built = build_model(config, dtype=torch.float64)
    built.load_state_dict(model_weights())
    return built


def test_golden_file_has_the_expected_source_and_dtypes():
    with safe_open(FILE, "pt") as file:
        assert file.metadata()["source"] == "torchscale 0.3.0, float64, eps 0"
    assert {x.dtype for x in GOLDEN.values()} == {torch.float64, torch.int64}
    agree(layer().decay(torch.device("cpu")), GOLDEN["model.retnet_rel_pos.decay"])


@pytest.mark.parametrize("paradigm", PARADIGMS)
def test_layer_output_and_gradient_match_golden_values(paradigm):
    x = GOLDEN["layer.x"].clone().requires_grad_()
    y, _ = layer()(x, paradigm=paradigm)
    y.backward(GOLDEN["layer.dy"])
    agree(y, GOLDEN["layer.y"])
    agree(x.grad, GOLDEN["layer.dx"])


@pytest.mark.parametrize("paradigm", PARADIGMS)
@torch.no_grad()
def test_model_logits_match_golden_values(paradigm):
    agree(model()(GOLDEN["tokens"], paradigm=paradigm).logits, GOLDEN["logits"])


@torch.no_grad()
def test_decoding_after_a_prompt_matches_golden_logits():
    ours, state, logits = model(), None, []
    pieces = [(slice(0, 21), Paradigm.CHUNKWISE), (slice(21, 40), Paradigm.PARALLEL)]
    for piece, paradigm in [*pieces, *((slice(t, t + 1), Paradigm.RECURRENT) for t in range(40, 48))]:
        output = ours(GOLDEN["tokens"][:, piece], state, paradigm=paradigm, return_state=True)
        state = output.state
        logits.append(output.logits)
    agree(torch.cat(logits, dim=1), GOLDEN["logits"])


@pytest.mark.parametrize(
    "change",
    [
        *({"decay": decay} for decay in ("log_uniform", "none")),
        *({"rotation": rotation} for rotation in ("rope", "none")),
        {"head_norm": "group"},
        {"norm_eps": 1e-3},
    ],
    ids=str,
)
@torch.no_grad()
def test_changed_option_does_not_match_golden_output(change):
    y, _ = layer(**change)(GOLDEN["layer.x"])
    with pytest.raises(AssertionError, match="not close"):
        agree(y, GOLDEN["layer.y"])


@torch.no_grad()
def test_row_normaliser_does_not_change_the_output():
    agree(layer(row_norm=False)(GOLDEN["layer.x"])[0], GOLDEN["layer.y"])
