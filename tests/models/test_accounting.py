"""Estimated model costs match models that are built, run and measured."""

from dataclasses import fields
from weakref import WeakSet

import pytest
import torch

from seqmix import MIXERS, SequenceMixer, account, build_model, load_config
from seqmix.mixers.base.state import nbytes, to_dict
from seqmix.mixers.parts import ShortConvolution
from seqmix.testing.counting import count_flops

LENGTH = 24
DTYPES = [torch.float32, torch.float64, torch.bfloat16]


def count(module) -> int:
    return sum(parameter.numel() for parameter in module.parameters())


def test_parameter_counts_match_built_model(config_of, each_mixer):
    config = config_of(*each_mixer)
    cost, model = account(config, length=LENGTH), build_model(config)
    assert cost.parameters == count(model)
    assert cost.embedding_parameters == count(model.embedding) + count(model.head)
    assert cost.body_parameters == sum(map(count, model.blocks)) + count(model.norm)
    assert len(cost.layers) == config.n_layers
    for layer, block in zip(cost.layers, model.blocks, strict=True):
        assert layer.parameters == count(block)
        assert layer.mixer_parameters == count(block.mixer)
        assert layer.ffn_parameters == count(block.ffn)
        assert layer.mixer == block.mixer.kind
    assert [layer.block for layer in cost.layers] == list(config.layers)


def test_tied_matrix_counts_once(config_of):
    tied, free = (account(config_of("retention", tie_embeddings=tie), length=LENGTH) for tie in (True, False))
    matrix = 257 * 16
    assert tied.embedding_parameters == matrix
    assert free.embedding_parameters == 2 * matrix
    assert free.parameters - tied.parameters == matrix
    assert tied.body_parameters == free.body_parameters
    assert tied.flops_per_token == free.flops_per_token


def test_accounting_supports_block_without_ffn_in_any_dtype(config_of):
    blocks = {"a": config_of("retention").blocks["block0"].model_copy(update={"ffn": None})}
    for dtype in DTYPES:
        cost = account(config_of("retention", blocks=blocks, pattern=None), length=LENGTH, dtype=dtype)
        assert cost.layers[0].ffn_parameters == 0
        assert cost.layers[0].parameters == cost.layers[0].mixer_parameters + 16
        assert cost.parameter_bytes == cost.parameters * dtype.itemsize
        for record in (cost, *cost.layers):
            assert all(type(getattr(record, f.name)) is int for f in fields(record) if f.type is int)


@pytest.mark.slow
@pytest.mark.parametrize("mixer", [*MIXERS.kinds(), "windowed attention", "xpos attention"])
def test_flops_match_torch_flop_counter(config_of, mixer):
    config = config_of(mixer)
    model = of_references(build_model(config))
    for length in (32, 64):  # which divide the operations of these models
        with torch.no_grad():
            counted = count_flops(lambda length=length: model(torch.zeros(1, length, dtype=torch.int64)))
        cost = account(config, length=length)
        assert cost.length == length
        assert cost.flops_per_token * length == counted > 0
        assert cost.flops_per_token == sum(layer.flops_per_token for layer in cost.layers) + 2 * 257 * 16


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_state_size_matches_real_state(config_of, each_mixer, dtype):
    config = config_of(*each_mixer)
    cost, model = account(config, length=LENGTH, dtype=dtype), build_model(config, dtype=dtype)
    with torch.no_grad():
        tokens = torch.zeros(1, LENGTH, dtype=torch.int64)
        state = model(tokens, model.init_state(1, max_length=LENGTH), return_state=True).state
    assert cost.state_bytes == nbytes(state)
    assert [layer.state_bytes for layer in cost.layers] == [nbytes(entry) for entry in state]
    assert cost.state_elements == sum(leaf.numel() for leaf in to_dict(state).values() if leaf.is_floating_point())


def of_references(model):
    """The model with the reference kernels: costs are theirs, and torch sees no products inside native ones."""
    for module in model.modules():
        if isinstance(module, ShortConvolution):
            module.backend = "reference"
        elif isinstance(module, SequenceMixer):
            module.backends.clear()
    return model


def saved_bytes(block, length, d_model, dtype) -> int:
    """Bytes of all storages that a real block saves for its backward pass, without parameters."""
    own = {parameter.untyped_storage().data_ptr() for parameter in block.parameters()}
    saved = WeakSet()  # without what belongs to results that nothing reads

    class Saved:
        def __init__(self, x):
            self.storage = x.untyped_storage()
            saved.add(self)

    x = torch.randn(1, length, d_model, dtype=dtype, requires_grad=True)
    with torch.autograd.graph.saved_tensors_hooks(Saved, lambda saved: saved):
        y = block(x)
    storages = {each.storage.data_ptr(): each.storage for each in saved}
    del y
    return sum(storage.nbytes() for at, storage in storages.items() if at not in own)


@pytest.mark.slow
@pytest.mark.parametrize(("dtype", "dropout"), [(torch.float32, 0.1), (torch.float64, 0.0), (torch.bfloat16, 0.1)])
@pytest.mark.parametrize("mixer", MIXERS.kinds())
def test_activation_bytes_match_what_autograd_saves(config_of, mixer, dtype, dropout):
    config = config_of(mixer, d_model=64)
    block = config.blocks["block0"].model_copy(update={"dropout": dropout})
    config = config_of(mixer, d_model=64, blocks={"block0": block})
    estimate = account(config, length=100, dtype=dtype).layers[0].activation_bytes
    measured = saved_bytes(of_references(build_model(config, dtype=dtype)).blocks[0], 100, 64, dtype)
    assert estimate == pytest.approx(measured, rel=0.01)


def test_model_activations_are_sum_of_layers_and_head(config_of):
    cost = account(config_of("retention", "linear_attention", n_layers=5), length=LENGTH)
    head = LENGTH * 257 * 4 * 2 + LENGTH * 16 * 4 * 2  # logits and their gradient; input and output of the norm
    assert cost.activation_bytes == sum(layer.activation_bytes for layer in cost.layers) + head
    assert cost.layers[0].activation_bytes == cost.layers[2].activation_bytes != cost.layers[1].activation_bytes


@pytest.mark.parametrize(
    ("name", "billions"),
    [("retnet-1.3b", 1.208), ("retnet-2.7b", 2.517), ("retnet-6.7b", 6.442), ("transformer-1.3b", 1.208)],
)
def test_paper_models_are_counted_without_building_them(monkeypatch, name, billions):
    monkeypatch.setattr(torch.nn.Module, "to_empty", None)
    config = load_config(name).model
    cost = account(config, length=256)
    assert cost.body_parameters == pytest.approx(billions * 1e9, rel=0.01 if "transformer" in name else 0.005)
    # as large as a Transformer's KV cache of 256 tokens
    assert cost.state_elements == 2 * 256 * config.d_model * config.n_layers
