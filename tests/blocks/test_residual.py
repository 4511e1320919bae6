"""Residual connections: formulas, behaviour at initialisation, costs, and the plug-in check."""

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
from seqmix.mixers.base.roles import Role, roles_of
from seqmix.models import compile_blocks
from seqmix.models.config import ModelConfig
from seqmix.testing import CheckFailure, check_residual
from seqmix.testing.counting import count_flops

PLAIN: dict[str, Any] = {"kind": "plain"}
KINDS: dict[str, dict[str, Any]] = {
    "scalars": {"kind": "scalars"},
    "attention": {"kind": "attention", "eps": 0.0},
    "attention in blocks": {"kind": "attention", "eps": 0.0, "block_size": 3},
    "hyper": {"kind": "hyper", "n_streams": 3},
    "manifold": {"kind": "hyper", "manifold": True},
    "mudd": {"kind": "mudd"},
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


def test_plain_connection_is_default_without_parameters():
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
def test_model_starts_like_plain_connections(residual):
    plain, model = build(PLAIN), build(residual)
    model.load_state_dict(plain.state_dict(), strict=False)
    expected = plain(tokens()).logits
    if residual["kind"] in ("scalars", "mudd"):
        assert torch.equal(model(tokens()).logits, expected)
    assert_close(model(tokens()).logits, expected, rtol=1e-6 if residual.get("manifold") else 1e-12, atol=1e-7)


@kinds
def test_connection_parameters_receive_gradients_within_four_steps(residual):
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
@pytest.mark.parametrize("kind", ["retention", "attention"])
def test_every_kind_passes_plugin_check(residual, kind):
    check_residual(build(residual, mixer={"kind": kind, "n_heads": 2}))


@kinds
def test_later_tokens_do_not_change_earlier_logits(residual):
    model = build(residual, spread=0.3)
    changed = tokens().clone()
    changed[:, 4:] += 1
    assert torch.equal(model(changed % 17).logits[:, :4], model(tokens()).logits[:, :4])


@pytest.mark.slow
@kinds
@pytest.mark.parametrize("shared", [False, pytest.param(True, marks=NIGHTLY)])
def test_compiled_model_matches_eager_model(residual, shared, monkeypatch):
    if shared and not RESIDUALS.resolve(residual["kind"]).fits_shared_blocks:
        pytest.skip("weights for each layer")
    model = build(residual, spread=0.3, shared=shared)
    expected, gradient = model(tokens()).logits, gradients(model)
    # the graphs of inductor, without its slow code generation
    monkeypatch.setattr("torch.compile", partial(torch.compile, backend="aot_eager"))
    grows = RESIDUALS.resolve(residual["kind"]).grows
    assert compile_blocks(model) == (len(model.distinct_blocks) if grows else 1)
    assert_close(model(tokens()).logits, expected)
    assert_close(gradients(model), gradient)


@kinds
def test_parameters_and_flops_are_counted(residual):
    model = build(residual)
    cost, plain = account(model.config, length=16), account(config_of(PLAIN), length=16)
    assert cost.parameters == sum(parameter.numel() for parameter in model.parameters())
    assert [layer.parameters for layer in cost.layers] == [sum(p.numel() for p in b.parameters()) for b in model.blocks]
    more = sum(p.numel() for name, p in model.named_parameters() if "residual" in name)
    assert cost.parameters == plain.parameters + more
    assert (cost.flops_per_token > plain.flops_per_token) == (residual["kind"] != "scalars")
    if residual["kind"] == "mudd":  # maps and sums of 2 and 3 outputs before layers, of 4 at the end
        assert cost.flops_per_token - plain.flops_per_token == sum(4 * n * D + 2 * n * n for n in (2, 3, 4))
    if residual["kind"] == "hyper":  # the others add up sources, which is no product of matrices to torch
        with torch.no_grad():
            counted, before = (
                count_flops(lambda m=m: m(torch.zeros(1, 16, dtype=torch.int64))) for m in (model, build(PLAIN))
            )
        assert (cost.flops_per_token - plain.flops_per_token) * 16 == counted - before


@kinds
def test_activation_estimate_matches_what_model_saves(residual):
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
            stream = block(stream).y
    cost = account(model.config, length=16, dtype=torch.float64)
    assert sum(layer.activation_bytes for layer in cost.layers) == sum(storages.values())
    assert sum(layer.input_bytes for layer in cost.layers) < sum(storages.values())


@kinds
def test_every_parameter_has_a_role(residual):
    roles = {name: role.role for name, role in roles_of(build(residual)).items() if "residual" in name}
    assert roles
    gates = ("weight", "down", "up")
    assert all((role is Role.GATE) == name.endswith(gates) for name, role in roles.items())


def test_scalar_residuals_scale_the_stream_and_add_the_embedding_once_per_layer():
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


def test_attention_residual_weights_depend_on_normalised_sources():
    connection = AttentionResidualConfig(eps=0.0).build(D, index=3, place=1, layer=1).double()
    torch.nn.init.normal_(connection.choice.weight)
    sources = sources_of(4)
    stacked = torch.stack(sources)
    normed = stacked / stacked.square().mean(-1, keepdim=True).sqrt()
    weights = (normed @ connection.choice.weight[0]).softmax(0)
    assert_close(connection.choice(sources), (weights[..., None] * stacked).sum(0))
    assert_close(connection.choice.weights(sources).sum(0), torch.ones(2, 5, 1, dtype=torch.float64))
    assert torch.equal(connection.choice(sources[:1]), sources[0])


@given(size=st.integers(1, 5), n_branches=st.integers(0, 7))
def test_block_sources_are_sums_of_branch_outputs(size, n_branches):
    config = AttentionResidualConfig(block_size=size)
    outputs = sources_of(n_branches + 1)
    ends, connection = (
        part.double() for part in (config.build_ends(D, n_layers=4), config.build(D, index=0, place=0, layer=0))
    )
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
    connection = HyperConfig(n_streams=n, **fields).build(D, index=1, place=1, layer=0).double()
    connection.reset_parameters()
    return connection


@given(n=st.integers(2, 5), seed=st.integers(0, 100))
def test_equal_streams_match_plain_connection_for_doubly_stochastic_mixtures(n, seed):
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
def test_permuting_input_streams_permutes_output_streams(manifold):
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


def test_stream_norm_placement_with_hyper_connections_raises():
    with pytest.raises(Exception, match="norm_placement = stream needs the residual connection plain, got hyper"):
        config_of(KINDS["hyper"], norm_placement="stream")


def test_plugin_connection_needs_only_one_file(tmp_path, monkeypatch):
    (tmp_path / "halves.py").write_text(
        "from typing import Literal\n"
        "from seqmix.blocks import Residual, ResidualConfig\n\n"
        "class HalvesConfig(ResidualConfig):\n"
        "    kind: Literal['halves'] = 'halves'\n\n"
        "    def build(self, d_model, *, index, place, layer):\n"
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


def test_registry_lists_residual_kinds():
    assert RESIDUALS.kinds() == ["attention", "hyper", "mudd", "plain", "scalars"]
    assert issubclass(RESIDUALS.resolve("hyper"), ResidualConfig)
    with pytest.raises(SeqmixError, match="hyper"):
        load_config("retnet-tiny", ["model.residual={kind: hypr}"])


OPTIONS = [{"parallel": True}, {"norm_placement": "both"}, {"layer_scale": 0.5}]


@pytest.mark.parametrize("block", OPTIONS, ids=lambda block: next(iter(block)))
def test_block_options_work_with_every_connection(block):
    for residual in KINDS.values():
        plain, model = build(PLAIN, **block), build(residual, **block)
        model.load_state_dict(plain.state_dict(), strict=False)
        assert_close(model(tokens()).logits, plain(tokens()).logits, rtol=1e-5, atol=1e-6)
        cost = account(model.config, length=16)
        assert cost.parameters == sum(parameter.numel() for parameter in model.parameters())
        assert roles_of(model)


CHECKED = """
from typing import Literal
import torch
from torch import nn
from seqmix.blocks import Residual, ResidualConfig

class WrongConfig(ResidualConfig):
    kind: Literal["wrong"] = "wrong"
    def build(self, d_model, *, index, place, layer):
        return Wrong(d_model)

class Wrong(Residual):
    def __init__(self, d_model):
        super().__init__()
        self.gain = nn.Parameter(torch.empty(d_model))
    def reset_parameters(self):
        nn.init.ones_(self.gain)
    def forward(self, stream, branch):
        return BODY
"""


@pytest.mark.parametrize(
    ("body", "message"),
    [
        ("2 * stream + self.gain * branch(stream)", "at the start, against plain connections"),
        ("stream + branch(stream) + (self.gain - 1) * stream.cumsum(1)", "tokens one by one against the whole"),
        ("stream + self.gain.detach() * branch(stream)", "gain has no gradient"),
        ("torch.lerp(stream, branch(stream), self.gain)", "a training step under autocast fails"),
        ("stream + self.gain.square() * branch(stream)", None),
    ],
)
def test_plugin_check_reports_faults(body, message, tmp_path, monkeypatch):
    name = f"wrong_{abs(hash(body))}"
    (tmp_path / f"{name}.py").write_text(CHECKED.replace("BODY", body))
    monkeypatch.syspath_prepend(tmp_path)
    model = build({"kind": f"{name}:WrongConfig"})
    if message is None:
        check_residual(model)
    else:
        with pytest.raises(CheckFailure, match=message):
            check_residual(model)


def shares(x: torch.Tensor, eps: float) -> torch.Tensor:
    return x / (x.square().mean(-1, keepdim=True) + eps).sqrt()


def branches_of(model) -> list[Any]:
    """Functions of the branches with their norms, and the connection of each, in order."""
    found = []
    for block in model.blocks:
        found.append((lambda x, b=block: b.mixer(b.mixer_norm(x))[0], block.mixer_residual))
        found.append((lambda x, b=block: b.ffn(b.ffn_norm(x)), block.ffn_residual))
    return found


def agrees(model, expected: torch.Tensor) -> None:
    """Logits and gradients of all parameters are those of a formula."""
    actual = model(tokens()).logits
    assert_close(actual, expected)
    above = torch.randn(expected.shape, generator=torch.Generator().manual_seed(4), dtype=torch.float64)
    leaves = list(model.parameters())
    theirs, ours = (torch.autograd.grad(y, leaves, above, allow_unused=True) for y in (expected, actual))
    for mine, other in zip(ours, theirs, strict=True):
        assert_close(*(torch.zeros(()) if each is None else each for each in (mine, other)), rtol=1e-6, atol=1e-9)


@pytest.mark.parametrize("size", [1, 2, 3, 6])
def test_attention_residuals_match_paper_formula(size):
    """Eq. 2 and 5 of arXiv 2603.15031 for blocks of `size` branches; the sum of the open block is the last source."""
    model = build({"kind": "attention", "eps": 0.0, "block_size": size}, spread=0.5)

    def attend(w, sources):
        values = torch.stack(sources)
        scores = torch.exp((shares(values, 0.0) * w).sum(-1))
        return ((scores / scores.sum(0))[..., None] * values).sum(0)

    hidden = model.embedding.weight[tokens()]
    outputs, complete = [], [hidden]
    for branch, connection in branches_of(model):
        partial_sum = [sum(outputs)] if outputs else []
        outputs.append(branch(attend(connection.choice.weight[0], complete + partial_sum)))
        if len(outputs) == size:
            complete.append(sum(outputs))
            outputs = []
    last = attend(model.residual.choice.weight[0], complete + ([sum(outputs)] if outputs else []))
    agrees(model, model.norm(last) @ model.head.weight.T)


def sinkhorn_knopp(matrix: torch.Tensor, iterations: int) -> torch.Tensor:
    for _ in range(iterations):
        matrix = matrix / matrix.sum(-1, keepdim=True)
        matrix = matrix / matrix.sum(-2, keepdim=True)
    return matrix


@pytest.mark.parametrize("manifold", [False, True])
def test_hyper_connections_match_paper_formulas(manifold):
    """Eq. 5 to 9 of arXiv 2409.19606 and Eq. 7 to 9 of 2512.24880, computed stream by stream."""
    n = 3
    model = build({"kind": "hyper", "n_streams": n, "manifold": manifold, "eps": 1e-3}, spread=0.3)
    streams = [model.embedding.weight[tokens()]] * n
    for branch, connection in branches_of(model):
        u = connection.weight
        s = connection.scale
        a, b, h = [None] * n, [None] * n, [[None] * n for _ in range(n)]
        every = shares(torch.cat(streams, -1), 1e-3)
        for i, x in enumerate(streams):
            rows = u[i * (n + 2) : (i + 1) * (n + 2)] if manifold else u
            dynamic = (every if manifold else shares(x, 1e-3)) @ rows.T
            dynamic = dynamic if manifold else torch.tanh(dynamic)
            a[i] = s[0] * dynamic[..., 0] + connection.read[i]
            b[i] = s[1] * dynamic[..., 1] + connection.write[i]
            for j in range(n):
                h[i][j] = s[2] * dynamic[..., 2 + j] + connection.mixture[i, j]
        mixture = torch.stack([torch.stack(row, -1) for row in h], -2)
        if manifold:
            a = [1 / (1 + torch.exp(-x)) for x in a]
            b = [2 / (1 + torch.exp(-x)) for x in b]
            mixture = sinkhorn_knopp(torch.exp(mixture), 20)
        y = branch(sum(a[i][..., None] * streams[i] for i in range(n)))
        mixed = (sum(mixture[..., i, j, None] * streams[i] for i in range(n)) for j in range(n))
        streams = [x + b[j][..., None] * y for j, x in enumerate(mixed)]
    agrees(model, model.norm(sum(streams) / n) @ model.head.weight.T)


def test_dynamic_dense_connections_match_paper_formula():
    """Eq. 4 to 6 of arXiv 2502.12170, only for way R: sums before every layer except the first, and at the end."""
    model = build({"kind": "mudd", "eps": 0.0}, spread=0.5)

    def mixed(part, outputs):
        hidden = shares(outputs[-1], 0.0) @ part.down.T
        hidden = hidden * (1 + torch.erf(hidden / 2**0.5)) / 2
        weights = hidden @ part.up.T + part.bias
        return sum(weights[..., j, None] * x for j, x in enumerate(outputs))

    outputs = [model.embedding.weight[tokens()]]
    for layer, block in enumerate(model.blocks):
        x = mixed(block.mixer_residual.dense, outputs) if layer else outputs[0]
        assert layer or block.mixer_residual.dense is None
        x = x + block.mixer(block.mixer_norm(x))[0]
        outputs.append(x + block.ffn(block.ffn_norm(x)))
    agrees(model, model.norm(mixed(model.residual.dense, outputs)) @ model.head.weight.T)


def test_mudd_with_shared_blocks_raises():
    with pytest.raises(Exception, match="mudd has weights for each layer, got shared = true in block layer"):
        config_of(KINDS["mudd"], shared=True)


def test_hyper_connection_with_one_stream_raises():
    with pytest.raises(Exception, match="n_streams"):
        config_of({"kind": "hyper", "n_streams": 1})


def test_product_of_mixtures_over_depth_keeps_norm_at_most_one():
    """For every token, the columns of the product over all branches sum to 1, and its norm is at most 1."""
    model = build({"kind": "hyper", "manifold": True, "iterations": 200}, spread=0.5)
    product = torch.eye(4, dtype=torch.float64).expand(2, 7, 4, 4)
    stream = model.residual.start(model.embed(tokens()))
    for branch, connection in branches_of(model):
        mixture = connection.weights(stream)[2]
        assert_close(mixture.sum(-2), torch.ones(2, 7, 4, dtype=torch.float64))
        assert_close(mixture.sum(-1), torch.ones(2, 7, 4, dtype=torch.float64), rtol=0, atol=1e-4)
        product = product @ mixture
        stream = connection(stream, branch)
    assert_close(product.sum(-2), torch.ones(2, 7, 4, dtype=torch.float64))
    assert torch.linalg.matrix_norm(product, 2).max() <= 1 + 1e-4
