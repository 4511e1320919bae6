"""Weights of 8 and 4 bits: products, models with every mixer, exported files and errors."""

import json
import re
from copy import deepcopy
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import nn
from torch.testing import assert_close

from seqmix import Paradigm, build_model, load_config
from seqmix.configs import PRESETS
from seqmix.models import generate_text
from seqmix.models.decoding import Decoder
from seqmix.models.quantization import WEIGHTS, QuantizedExperts, QuantizedLinear, quantize_model, weights_of
from seqmix.ops.kernels.native import build
from seqmix.registry import SeqmixError
from seqmix.training import export_run, load_run
from seqmix.training.checkpoint.saved_run import read_weights, write_run

FORMATS = sorted(WEIGHTS)
NAMES = sorted(file.stem for file in PRESETS.glob("*-tiny.yaml"))
TINY = [name for name in NAMES if load_config(name).data.kind == "text"]
CLOSE = {"rtol": 0, "atol": 2e-4}
"""Rows are rounded to 16 bits; values of order 1."""


def quantized(weights, width, outputs, *, bias=False, seed=0):
    torch.manual_seed(seed)
    layer = nn.Linear(width, outputs, bias=bias)
    result = WEIGHTS[weights](layer.weight, layer.bias)
    with torch.no_grad():
        result.encode(layer.weight)
    return result.requires_grad_(False), layer


@settings(deadline=None, max_examples=60)
@given(
    weights=st.sampled_from(FORMATS),
    rows=st.integers(1, 9) | st.sampled_from([257]),
    width=st.integers(1, 100) | st.sampled_from([2048, 2080, 4100]),
    outputs=st.integers(1, 70),
    bias=st.booleans(),
    scale=st.sampled_from([1e-20, 1.0, 1e20]),
)
def test_quantised_products_match_products_with_decoded_weights(weights, rows, width, outputs, bias, scale):
    layer, _ = quantized(weights, width, outputs, bias=bias)
    x = scale * torch.randn(rows, width)
    with torch.no_grad():
        expected = F.linear(x.double(), layer.weight.double(), None if layer.bias is None else layer.bias.double())
        size = F.linear(x.abs().double(), layer.weight.abs().double()).max() + 1
        assert_close(layer(x).double() / size, expected / size, **CLOSE)


@pytest.mark.skipif(build.failure("quantized") is not None, reason="no C++ compiler")
@pytest.mark.parametrize("weights", FORMATS)
@pytest.mark.parametrize("width", [70, 2500])
def test_product_of_row_does_not_depend_on_batch(weights, width):
    layer, _ = quantized(weights, width, 75, bias=True)
    x = torch.randn(31, width)
    whole = layer(x)
    for size in (1, 2, 3, 8, 9):
        assert torch.cat([layer(part) for part in x.split(size)]).equal(whole)


@pytest.mark.parametrize("weights", FORMATS)
def test_thread_count_does_not_change_product(weights):
    layer, _ = quantized(weights, 512, 1025)
    x = torch.randn(3, 512)
    threads = torch.get_num_threads()
    try:
        results = []
        for count in (1, 2, 3):
            torch.set_num_threads(count)
            results.append(layer(x))
    finally:
        torch.set_num_threads(threads)
    assert all(result.equal(results[0]) for result in results)


@pytest.mark.parametrize("weights", FORMATS)
@settings(deadline=None, max_examples=20)
@given(width=st.integers(1, 100), outputs=st.integers(1, 40), constant=st.booleans())
def test_decoded_weights_are_within_half_a_quantization_step(weights, width, outputs, constant):
    layer, plain = quantized(weights, width, outputs)
    if constant:
        with torch.no_grad():
            plain.weight.fill_(0.3)
            layer.encode(plain.weight)
    error = (layer.weight - plain.weight).abs().max()
    span = plain.weight.abs().max()
    assert error <= span / 254 * 1.01 if weights == "int8" else error <= 2 * span / 15


@pytest.mark.parametrize("weights", FORMATS)
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float16])
def test_layer_converted_to_other_dtype_keeps_scales_and_results(weights, dtype):
    layer, _ = quantized(weights, 64, 48, bias=True)
    scales = layer.scales.clone()
    expected = layer(x := torch.randn(3, 64))
    layer = layer.to(dtype)
    assert layer.weight.dtype == layer(x.to(dtype)).dtype == dtype
    assert layer.scales.dtype == scales.dtype
    assert layer.scales.equal(scales)
    assert_close(layer(x.to(dtype)).float(), expected, rtol=0.02, atol=0.02)


@pytest.mark.parametrize("weights", FORMATS)
@pytest.mark.parametrize("strange", [torch.inf, -torch.inf, torch.nan])
def test_nonfinite_inputs_affect_only_their_row(weights, strange):
    layer, _ = quantized(weights, 64, 48)
    x = torch.randn(3, 64)
    x[1, 5] = strange
    y = layer(x)
    assert not y[1].isfinite().any()
    assert y[[0, 2]].isfinite().all()


@pytest.mark.parametrize("weights", FORMATS)
def test_input_outlier_error_is_at_most_half_a_16_bit_step(weights):
    layer, _ = quantized(weights, 512, 64)
    x = torch.randn(4, 512)
    x[:, 5] = 1000
    error = (layer(x).double() - x.double() @ layer.weight.double().T).abs()
    half_step = 1000 / 32767 / 2
    assert (error < 1.01 * half_step * layer.weight.double().abs().sum(1)).all()


@pytest.mark.parametrize("weights", FORMATS)
def test_largest_sums_do_not_overflow(weights):
    layer = WEIGHTS[weights](torch.ones(3, 9000))
    layer.encode(torch.ones(3, 9000))
    assert_close(layer(torch.ones(9, 9000)), torch.full((9, 3), 9000.0), rtol=1e-3, atol=0)


@pytest.mark.parametrize("weights", FORMATS)
def test_results_match_without_native_kernels(weights, monkeypatch):
    layer, _ = quantized(weights, 100, 48, bias=True)
    x = torch.randn(2, 100)
    native = layer(x)
    monkeypatch.setattr(build, "is_off", lambda: True)
    assert_close(layer(x), native, **CLOSE)


@pytest.mark.parametrize("weights", FORMATS)
def test_input_gradients_match_decoded_weights(weights):
    layer, _ = quantized(weights, 64, 48)
    x = torch.randn(3, 64, requires_grad=True)
    layer(x).sum().backward()
    assert_close(x.grad, layer.weight.sum(0).expand(3, -1))


@pytest.mark.parametrize("preset", TINY)
def test_every_mixer_decodes_with_quantised_weights(preset):
    model = build_model(load_config(preset).model, seed=1).eval()
    small = quantize_model(deepcopy(model), "int8", on_note=lambda _: None)
    assert any(isinstance(module, QuantizedLinear) for module in small.modules())
    tokens = torch.randint(model.config.vocab_size, (2, 40), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        expected = model(tokens).logits
        whole = small(tokens).logits
        prefix = small(tokens[:, :34], return_state=True)
        decoder = Decoder(small, prefix.state)
        steps = torch.stack([prefix.logits[:, -1], *(decoder.step(tokens[:, t]) for t in range(34, 40))], 1)
    spread = expected.std()
    # by the median: where rounding changes which experts a token gets, all its logits differ
    assert (whole - expected).abs().median() < 0.04 * spread
    assert (steps - whole[:, 33:]).abs().max() < 2e-3 * spread


@pytest.mark.parametrize("weights", FORMATS)
def test_paradigms_agree_with_quantised_weights(weights, config_of):
    model = build_model(config_of("retention", "gated_delta_net", "attention", d_model=128), seed=1)
    quantize_model(model, weights, on_note=lambda _: None)
    tokens = torch.randint(257, (2, 50))
    with torch.no_grad():
        whole, *others = (model(tokens, paradigm=model.prefer(paradigm)).logits for paradigm in Paradigm)
    for other in others:
        assert_close(other, whole, rtol=0, atol=2e-3)


def test_parameter_roles_decide_which_layers_are_quantised(config_of):
    model = build_model(config_of("gla", "rwkv7", d_model=128, tie_embeddings=True), seed=1)
    embedding = model.embedding.weight.clone()
    notes = []
    quantize_model(model, "int4", on_note=notes.append)
    layers = {path for path, module in model.named_modules() if isinstance(module, QuantizedLinear)}
    assert {"blocks.0.mixer.in_proj", "blocks.1.ffn.down_proj", "head"} <= layers
    assert "blocks.0.mixer.decay_proj.up" not in layers  # a gate
    assert model.embedding.weight.equal(embedding)  # tied: the readout has its own codes
    assert "MiB of memory instead of" in notes[0]
    assert "cannot be quantised" not in notes[0]
    assert weights_of(model) == "int4"


@pytest.mark.parametrize("weights", FORMATS)
def test_quantised_experts_match_decoded_weights(weights):
    experts = "model.blocks.ret.ffn={kind: moe, n_experts: 6, top_k: 2, expansion: 1.0}"
    model = build_model(load_config("retnet-tiny", [experts, "model.n_layers=2"]).model, seed=1).eval()
    small = quantize_model(deepcopy(model), weights, on_note=lambda _: None)
    decoded = deepcopy(model)
    with torch.no_grad():
        for path, module in small.named_modules():
            if isinstance(module, QuantizedLinear | QuantizedExperts) and not path.endswith("matrix"):
                decoded.get_submodule(path).weight.copy_(module.weight)
        tokens = torch.randint(257, (1, 5))
        assert_close(small(tokens).logits, decoded(tokens).logits, rtol=0, atol=1e-3)
    assert "blocks.0.ffn.router.weight" in small.state_dict()
    assert "blocks.0.ffn.gate_proj.matrix.codes" in small.state_dict()


def test_note_names_matrices_that_cannot_be_quantised():
    model = build_model(load_config("retnet-tiny", ["model.n_layers=2"]).model)

    class Adapted(nn.Linear):
        pass

    model.blocks[1].ffn.up_proj.__class__ = Adapted
    notes = []
    quantize_model(model, "int8", on_note=notes.append)
    assert notes[0].endswith("; blocks.1.ffn.up_proj.weight cannot be quantised")


@pytest.fixture
def run(tmp_path, text):
    config = load_config("retnet-tiny", ["model.n_layers=2", f"data.paths=[{text}]"])
    model = build_model(config.model, seed=3)
    write_run(tmp_path / "run", config, {name: p.detach() for name, p in model.named_parameters()})
    return tmp_path / "run"


@pytest.mark.parametrize("weights", FORMATS)
def test_exported_file_loads_same_quantised_model(run, tmp_path, weights):
    notes = []
    model = load_run(run, weights=weights, on_note=notes.append)
    assert f"seqmix evaluate {run} --weights {weights}" in notes[0]
    file = tmp_path / "small.safetensors"
    export_run(run, file, weights=weights, on_note=notes.append)
    assert file.stat().st_size < 0.4 * sum(f.stat().st_size for f in run.rglob("model.safetensors"))
    for loaded in (load_run(file, on_note=pytest.fail), load_run(file, weights=weights, on_note=pytest.fail)):
        assert loaded.state_dict().keys() == model.state_dict().keys()
        for name, tensor in model.state_dict().items():
            assert loaded.state_dict()[name].equal(tensor), name
        assert generate_text(loaded, ["def "], max_new_tokens=5) == generate_text(model, ["def "], max_new_tokens=5)
    other = next(name for name in FORMATS if name != weights)
    with pytest.raises(SeqmixError, match=f"has {weights} weights: leave out --weights {other}"):
        load_run(file, weights=other)
    with pytest.raises(SeqmixError, match="export the run without --weights"):
        read_weights(file)


CODES = "blocks.0.mixer.in_proj.codes"
SCALES = "blocks.0.mixer.in_proj.scales"


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        (lambda tensors, _: tensors.pop(SCALES), f"it lacks {SCALES}"),
        (lambda tensors, _: tensors.update({CODES: tensors[CODES][:3].clone()}), "to have shape"),
        (lambda tensors, _: tensors.update({CODES: tensors[CODES].int()}), "to be torch.int8, got torch.int32"),
        (lambda tensors, _: tensors[SCALES].fill_(torch.nan), f"{SCALES} has values that are not finite"),
        (lambda _, metadata: metadata.update({"seqmix.weights": "int3"}), "expected int8 or int4, got 'int3'"),
        (lambda _, metadata: metadata.pop("seqmix.weights"), "belongs to another model: it lacks"),
        (lambda _, metadata: metadata.update({"seqmix.weights": "int4"}), "belongs to another model"),
    ],
)
def test_damaged_exported_file_raises(run, tmp_path, change, sentence):
    file = tmp_path / "small.safetensors"
    export_run(run, file, weights="int8", on_note=lambda _: None)
    tensors = load_file(file)
    with safe_open(file, "pt") as opened:
        metadata = dict(opened.metadata())
    del metadata["seqmix.sha256"]
    change(tensors, metadata)
    save_file(tensors, file, metadata)
    with pytest.raises(SeqmixError) as error:
        load_run(file)
    assert sentence in str(error.value)
    assert str(file) in str(error.value)


def test_unsupported_uses_of_quantised_weights_raise(run):
    with pytest.raises(SeqmixError, match=r'no weight format .int9.; did you mean "int8"'):
        load_run(run, weights="int9")
    model = load_run(run, weights="int8", on_note=lambda _: None)
    with pytest.raises(SeqmixError, match="cannot be trained: load the run without --weights"):
        model.train()
    with pytest.raises(SeqmixError, match="has int8 weights already"):
        quantize_model(model, "int4")
    with pytest.raises(SeqmixError, match="no matrix of at least 16,384 weights"):
        quantize_model(build_model(load_config("mqar-tiny").model), "int8")
    with pytest.raises(SeqmixError, match="cannot be initialised"):
        model.reset_parameters()
    model = load_run(run)
    with torch.no_grad():
        model.blocks[0].ffn.up_proj.weight[0, 0] = torch.inf
    with pytest.raises(SeqmixError, match=r"blocks.0.ffn.up_proj.weight has values that are not finite"):
        quantize_model(model, "int8")


def test_commands_export_generate_and_evaluate_with_int8_weights(seqmix, run):
    done = seqmix("export", run, "--weights", "int8", "--out", "small.safetensors")
    assert done.status == 0
    assert "small.safetensors has the int8 weights of step 0" in done.out
    assert re.search(r"note: int8 weights: [\d.]+ MiB of memory instead of [\d.]+; `seqmix evaluate ", done.err)
    texts = [
        seqmix("generate", *source, "--prompt", "a", "--max-new-tokens", "8")
        for source in ([run, "--weights", "int8"], ["small.safetensors"])
    ]
    assert texts[0].status == 0
    assert texts[0].out == texts[1].out
    done = seqmix("evaluate", run, "--weights", "int8", "--length", "32", "--context", "16", "--json", "losses.json")
    assert done.status == 0, done.err
    losses = json.loads(Path("losses.json").read_text())["runs"][str(run)]
    (before,), (after,) = losses["lengths"], losses["int8"]["lengths"]
    x, y = (next(iter(each["losses"].values())) for each in (before, after))
    assert 0 < abs(y / x - 1) < 0.01
    assert re.search(rf"32 +{x:.5f} +{y:.5f} +[+-]0\.\d\d\d%", done.out)
    assert len(losses["int8"]["contexts"]) == 1


def test_commands_reject_invalid_weight_formats(refused, run):
    for command in (["generate", "--prompt", "a"], ["evaluate"], ["export", "--out", "x.safetensors"]):
        sentence = refused(command[0], str(run), *command[1:], "--weights", "int16")
        assert "no weight format 'int16'" in sentence
    assert "--weights needs --to safetensors" in refused("export", str(run), "--to", "hf", "--weights", "int8", "x")
