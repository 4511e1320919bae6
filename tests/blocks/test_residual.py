"""Residual connections: which of them are the plain one at the start, and what all of them keep of a model."""

from functools import partial
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from nightly import NIGHTLY
from torch.testing import assert_close

from seqmix import SeqmixError, account, build_model, load_config
from seqmix.blocks import RESIDUALS, Residual, ResidualConfig, ResidualEnds
from seqmix.blocks.residual.attention import AttentionResidualConfig
from seqmix.blocks.residual.hyper import HyperConfig, sinkhorn
from seqmix.mixers import Paradigm
from seqmix.mixers.roles import Role, roles_of
from seqmix.models import compile_blocks
from seqmix.models.config import ModelConfig
from seqmix.testing.counting import count_flops

PLAIN: dict[str, Any] = {"kind": "plain"}
KINDS: dict[str, dict[str, Any]] = {
    "scalars": {"kind": "scalars"},
    "attention": {"kind": "attention", "eps": 0.0},
    "attention in blocks": {"kind": "attention", "eps": 0.0, "block_size": 3},
    "hyper": {"kind": "hyper", "n_streams": 3},
    "manifold": {"kind": "hyper", "manifold": True},
}
kinds = pytest.mark.parametrize("residual", KINDS.values(), ids=KINDS)
D = 8


def config_of(residual: dict[str, Any], mixer: dict[str, Any] | None = None, **block: Any) -> ModelConfig:
    norm = {"kind": "rmsnorm", "eps": 0.0}
    mixer = mixer or {"kind": "attention", "n_heads": 2, "positions": "rope"}
    layer = {"mixer": mixer, "ffn": {"kind": "mlp", "expansion": 2.0}, "norm": norm} | block
    return ModelConfig(d_model=D, n_layers=3, vocab_size=17, blocks={"layer": layer}, norm=norm, residual=residual)


def build(residual: dict[str, Any], *, spread: float = 0.0, **fields: Any):
    """A float64 model; `spread` moves the parameters away from their initial values."""
    model = build_model(config_of(residual, **fields), dtype=torch.float64)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "residual" in name:
                parameter.add_(spread * torch.randn(parameter.shape, generator=generator, dtype=torch.float64))
    return model


def tokens(length: int = 7, rows: int = 2) -> torch.Tensor:
    return torch.randint(0, 17, (rows, length), generator=torch.Generator().manual_seed(2))


def gradients(model) -> dict[str, torch.Tensor]:
    model.zero_grad()
    model(tokens(), targets=tokens(7).roll(-1, 1)).loss.backward()
    return {name: parameter.grad for name, parameter in model.named_parameters()}


def test_the_plain_connection_is_the_default_and_has_no_parameters():
    assert config_of(PLAIN).residual == load_config("retnet-tiny").model.residual
    model = build(PLAIN)
    assert not any("residual" in name for name in model.state_dict())
    x = model.embed(tokens())
    expected = x
    for block in model.blocks:
        expected = expected + block.mixer(block.mixer_norm(expected))[0]
        expected = expected + block.ffn(block.ffn_norm(expected))
    assert torch.equal(model.run_blocks(x)[0], expected)


@kinds
def test_a_model_starts_as_with_plain_connections(residual):
    plain, model = build(PLAIN), build(residual)
    model.load_state_dict(plain.state_dict(), strict=False)
    expected = plain(tokens()).logits
    if residual["kind"] == "scalars":
        assert torch.equal(model(tokens()).logits, expected)
    assert_close(model(tokens()).logits, expected, rtol=1e-6 if residual.get("manifold") else 1e-12, atol=1e-7)


@kinds
def test_no_part_of_a_connection_is_frozen_at_the_start(residual):
    model = build(residual)
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    moved: dict[str, bool] = {}
    for _ in range(4):
        for name, gradient in gradients(model).items():
            moved[name] = moved.get(name, False) or gradient.abs().max() > 1e-12
        optimizer.step()
    # the first branch has only the embedding to read, in one source or in equal streams
    assert not {name for name, has_moved in moved.items() if not has_moved and "blocks.0.mixer_residual" not in name}
    assert any(has_moved for name, has_moved in moved.items() if "residual" in name)


@kinds
@pytest.mark.parametrize("saved", [True, "matmuls"])
def test_checkpointing_changes_nothing(residual, saved):
    model = build(residual, spread=0.3)
    expected = gradients(model)
    model.activation_checkpointing = saved
    assert_close(gradients(model), expected, rtol=0, atol=0)


@kinds
@pytest.mark.parametrize("kind", ["retention", "attention"])
def test_tokens_one_by_one_are_the_whole(residual, kind):
    model = build(residual, spread=0.3, mixer={"kind": kind, "n_heads": 2})
    expected = model(tokens(6)).logits
    state = None
    for i in range(6):
        paradigms = model.prefer(Paradigm.RECURRENT, Paradigm.CHUNKWISE, from_state=True)
        output = model(tokens(6)[:, i : i + 1], state, paradigm=paradigms, return_state=True)
        state = output.state
        assert_close(output.logits[:, 0], expected[:, i])


@kinds
def test_the_past_alone_decides(residual):
    model = build(residual, spread=0.3)
    changed = tokens().clone()
    changed[:, 4:] += 1
    assert torch.equal(model(changed % 17).logits[:, :4], model(tokens()).logits[:, :4])


@pytest.mark.slow
@kinds
@pytest.mark.parametrize("shared", [False, pytest.param(True, marks=NIGHTLY)])
def test_a_compiled_model_is_the_model(residual, shared, monkeypatch):
    model = build(residual, spread=0.3, shared=shared)
    expected, gradient = model(tokens()).logits, gradients(model)
    # the graphs of inductor, without its slow code generation
    monkeypatch.setattr("torch.compile", partial(torch.compile, backend="aot_eager"))
    grows = residual["kind"] == "attention"
    assert compile_blocks(model) == (len(model.distinct_blocks) if grows else 1)
    assert_close(model(tokens()).logits, expected)
    assert_close(gradients(model), gradient)


@kinds
def test_parameters_and_operations_are_counted(residual):
    model = build(residual)
    cost, plain = account(model.config, length=16), account(config_of(PLAIN), length=16)
    assert cost.parameters == sum(parameter.numel() for parameter in model.parameters())
    assert [layer.parameters for layer in cost.layers] == [sum(p.numel() for p in b.parameters()) for b in model.blocks]
    more = sum(p.numel() for name, p in model.named_parameters() if "residual" in name)
    assert cost.parameters == plain.parameters + more
    assert (cost.flops_per_token > plain.flops_per_token) == (residual["kind"] != "scalars")
    if residual["kind"] == "hyper":  # the others add up sources, which is no product of matrices to torch
        with torch.no_grad():
            counted, before = (
                count_flops(lambda m=m: m(torch.zeros(1, 16, dtype=torch.int64))) for m in (model, build(PLAIN))
            )
        assert (cost.flops_per_token - plain.flops_per_token) * 16 == counted - before


@kinds
def test_activations_are_those_that_a_real_model_saves(residual):
    model = build(residual)
    own = {parameter.untyped_storage().data_ptr() for parameter in model.parameters()}
    storages: dict[int, int] = {}

    def pack(x: torch.Tensor) -> torch.Tensor:
        if x.untyped_storage().data_ptr() not in own:
            storages[x.untyped_storage().data_ptr()] = x.untyped_storage().nbytes()
        return x

    x = torch.randn(1, 16, D, dtype=torch.float64, requires_grad=True)
    stream = model.residual.start(x)
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
        for block in model.blocks:
            stream, _ = block(stream)
    cost = account(model.config, length=16, dtype=torch.float64)
    assert sum(layer.activation_bytes for layer in cost.layers) == sum(storages.values())
    assert sum(layer.input_bytes for layer in cost.layers) < sum(storages.values())


@kinds
def test_every_parameter_has_a_role(residual):
    roles = {name: role.role for name, role in roles_of(build(residual)).items() if "residual" in name}
    assert roles
    assert all((role is Role.GATE) == name.endswith("weight") for name, role in roles.items())


def test_scalars_scale_and_inject_once_per_layer():
    model = build({"kind": "scalars", "stream": 1.1, "embedding": 0.2})
    x = model.embed(tokens())
    x0 = x / x.square().mean(-1, keepdim=True).add(1e-6).sqrt()
    expected = x
    for block in model.blocks:
        expected = 1.1 * expected + 0.2 * x0
        expected = expected + block.mixer(block.mixer_norm(expected))[0]
        expected = expected + block.ffn(block.ffn_norm(expected))
    assert_close(model.run_blocks(x)[0], expected)


def sources_of(count: int) -> tuple[torch.Tensor, ...]:
    generator = torch.Generator().manual_seed(3)
    return tuple(torch.randn(2, 5, D, generator=generator, dtype=torch.float64) for _ in range(count))


def test_attention_residuals_choose_by_the_normed_source():
    connection = AttentionResidualConfig(eps=0.0).build(D, index=3, place=1).double()
    torch.nn.init.normal_(connection.choice.weight)
    sources = sources_of(4)
    stacked = torch.stack(sources)
    normed = stacked / stacked.square().mean(-1, keepdim=True).sqrt()
    weights = (normed @ connection.choice.weight[0]).softmax(0)
    assert_close(connection.choice(sources), (weights[..., None] * stacked).sum(0))
    assert_close(connection.choice.weights(sources).sum(0), torch.ones(2, 5, 1, dtype=torch.float64))
    assert torch.equal(connection.choice(sources[:1]), sources[0])


@given(size=st.integers(1, 5), n_branches=st.integers(0, 7))
def test_blocks_of_branches_are_sums_of_their_outputs(size, n_branches):
    config = AttentionResidualConfig(block_size=size)
    outputs = sources_of(n_branches + 1)
    ends, connection = (part.double() for part in (config.build_ends(D), config.build(D, index=0, place=0)))
    for part in (ends, connection):
        part.reset_parameters()
    stream = ends.start(outputs[0])
    for y in outputs[1:]:
        stream = connection(stream, lambda x, y=y: y)
    expected = [outputs[0], *(sum(outputs[i : min(i + size, n_branches + 1)]) for i in range(1, n_branches + 1, size))]
    assert_close(list(stream.values), expected)
    assert len(stream.values) == config.n_sources(n_branches)
    assert_close(ends(stream), sum(outputs) / len(expected))


def hyper(n: int = 4, **fields: Any):
    connection = HyperConfig(n_streams=n, **fields).build(D, index=1, place=1).double()
    connection.reset_parameters()
    return connection


@given(n=st.integers(2, 5), seed=st.integers(0, 100))
def test_equal_streams_are_the_plain_connection_for_any_doubly_stochastic_mixture(n, seed):
    connection = hyper(n, manifold=True)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        connection.mixture += torch.randn(n, n, generator=generator)
        connection.weight[2:] += torch.randn(connection.weight[2:].shape, generator=generator)
        connection.weight.unflatten(0, (n, n + 2))[:, :2] = 0
    (x,) = sources_of(1)
    after = connection(x[..., None, :].expand(2, 5, n, D), lambda x: x.tanh())
    expected = (x + x.tanh())[..., None, :].expand_as(after)
    assert_close(after, expected, rtol=1e-6, atol=1e-6)


@settings(max_examples=20)
@given(n=st.integers(2, 6), seed=st.integers(0, 100), size=st.sampled_from([0.1, 1.0, 2.0]))
def test_sinkhorn_gives_doubly_stochastic_matrices(n, seed, size):
    logits = size * torch.randn(3, n, n, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    mixtures = sinkhorn(logits, 300)
    assert_close(mixtures.sum(-2), torch.ones(3, n, dtype=torch.float64))
    assert_close(mixtures.sum(-1), torch.ones(3, n, dtype=torch.float64), rtol=0, atol=1e-3)
    product = mixtures[0] @ mixtures[1] @ mixtures[2]
    assert torch.linalg.matrix_norm(product, 2) <= 1 + 1e-3
    assert_close(sinkhorn(torch.tensor([[300.0, -300.0], [-300.0, 300.0]]), 20), torch.eye(2))


@pytest.mark.parametrize("manifold", [False, True])
def test_permuted_streams_give_permuted_streams(manifold):
    n = 4
    connection, permuted = (hyper(n, manifold=manifold) for _ in range(2))
    generator = torch.Generator().manual_seed(5)
    order = torch.tensor([2, 0, 3, 1])
    with torch.no_grad():
        for parameter in connection.parameters():
            parameter.add_(0.5 * torch.randn(parameter.shape, generator=generator, dtype=torch.float64))
        permuted.load_state_dict(connection.state_dict())
        permuted.read.copy_(connection.read[order])
        permuted.write.copy_(connection.write[order])
        permuted.mixture.copy_(connection.mixture[order][:, order])
        if manifold:
            maps = connection.weight.unflatten(0, (n, n + 2)).unflatten(-1, (n, D))[order][:, :, order]
            permuted.weight.copy_(torch.cat((maps[:, :2], maps[:, 2:][:, order]), 1).flatten(-2).flatten(0, 1))
        else:
            permuted.weight.copy_(torch.cat((connection.weight[:2], connection.weight[2:][order])))
    x = torch.stack(sources_of(n), -2)
    assert_close(permuted(x[..., order, :], torch.sin), connection(x, torch.sin)[..., order, :])


def test_the_stream_placement_of_norms_is_refused_where_it_has_no_meaning():
    with pytest.raises(Exception, match="norm_placement = stream needs the residual connection plain, got hyper"):
        config_of(KINDS["hyper"], norm_placement="stream")


def test_a_plug_in_is_one_file(tmp_path, monkeypatch):
    (tmp_path / "halves.py").write_text(
        "from typing import Literal\n"
        "from seqmix.blocks import Residual, ResidualConfig\n\n"
        "class HalvesConfig(ResidualConfig):\n"
        "    kind: Literal['halves'] = 'halves'\n\n"
        "    def build(self, d_model, *, index, place):\n"
        "        return Halves()\n\n"
        "class Halves(Residual):\n"
        "    def forward(self, stream, branch):\n"
        "        return (stream + branch(stream)) / 2\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    model = build({"kind": "halves:HalvesConfig"})
    assert isinstance(model.residual, ResidualEnds)
    assert isinstance(model.blocks[0].mixer_residual, Residual)
    assert_close(model(tokens()).logits, build(PLAIN)(tokens()).logits, rtol=10, atol=10)
    x = model.embed(tokens())
    expected = x
    for block in model.blocks:
        expected = (expected + block.mixer(block.mixer_norm(expected))[0]) / 2
        expected = (expected + block.ffn(block.ffn_norm(expected))) / 2
    assert torch.equal(model.run_blocks(x)[0], expected)


def test_the_registry_lists_the_kinds():
    assert RESIDUALS.kinds() == ["attention", "hyper", "plain", "scalars"]
    assert issubclass(RESIDUALS.resolve("hyper"), ResidualConfig)
    with pytest.raises(SeqmixError, match="hyper"):
        load_config("retnet-tiny", ["model.residual={kind: hypr}"])


OPTIONS = [{"parallel": True}, {"norm_placement": "both"}, {"layer_scale": 0.5}]


@pytest.mark.parametrize("block", OPTIONS, ids=lambda block: next(iter(block)))
def test_options_of_blocks_go_with_every_connection(block):
    for residual in KINDS.values():
        plain, model = build(PLAIN, **block), build(residual, **block)
        model.load_state_dict(plain.state_dict(), strict=False)
        assert_close(model(tokens()).logits, plain(tokens()).logits, rtol=1e-5, atol=1e-6)
        cost = account(model.config, length=16)
        assert cost.parameters == sum(parameter.numel() for parameter in model.parameters())
        assert roles_of(model)
