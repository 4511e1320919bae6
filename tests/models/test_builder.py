"""Building models: allocation on meta, initialisation from the seed, and errors."""

import pytest
import torch
from recorded_operations import Watched
from torch import nn

from seqmix import ContractError, SeqmixError, account, build_model, load_config
from seqmix.mixers.attention import Attention
from seqmix.models import build_meta


def parameters(model: nn.Module) -> dict[str, torch.Tensor]:
    return dict(model.named_parameters())


def same(a: nn.Module, b: nn.Module) -> bool:
    return all(torch.equal(p, q) for p, q in zip(a.parameters(), b.parameters(), strict=True))


def test_build_meta_allocates_only_meta_tensors(config_of, each_mixer):
    with Watched() as watched:
        model = build_meta(config_of(*each_mixer))
    assert {x.device.type for _, results in watched.seen for x in results} == {"meta"}
    assert all(parameter.is_meta for parameter in model.parameters())

    def shapes(model):
        return {name: (parameter.shape, parameter.dtype) for name, parameter in model.named_parameters()}

    assert shapes(model) == shapes(build_model(config_of(*each_mixer)))


def test_parameters_depend_only_on_seed(config_of, each_mixer):
    config = config_of(*each_mixer)
    torch.manual_seed(1)
    before = torch.get_rng_state()
    first = build_model(config, seed=5)
    assert torch.equal(torch.get_rng_state(), before)
    torch.manual_seed(2)
    assert same(first, build_model(config, seed=5))
    assert not torch.equal(first.embedding.weight, build_model(config, seed=6).embedding.weight)
    one, other, *_ = build_model(config_of(each_mixer[0], n_layers=2)).blocks
    assert not torch.equal(*(max(mixer.parameters(), key=torch.numel) for mixer in (one.mixer, other.mixer)))


def test_uninitialised_parameter_is_named_in_error(config_of, monkeypatch):
    monkeypatch.setattr(Attention, "reset_parameters", lambda mixer: None)
    with pytest.raises(ContractError, match=r"blocks\.1\.mixer\.in_proj\.weight .*reset_parameters"):
        build_model(config_of("retention", "attention"))


def test_building_from_wrong_config_type_raises():
    for given in ("retnet-tiny", load_config("retnet-tiny")):
        with pytest.raises(SeqmixError, match=r"expects a ModelConfig, got a (str|RunConfig): pass load_config"):
            build_model(given)


@pytest.mark.parametrize("build", [build_meta, build_model, account])
def test_indivisible_head_count_error_names_block_and_alternatives(config_of, build):
    block = {"mixer": {"kind": "retention", "n_heads": 3}, "ffn": None, "norm": {"kind": "layernorm"}}
    with pytest.raises(SeqmixError, match=r"mine.*3 heads.*n_heads = 2 or 4"):
        build(config_of("retention", blocks={"mine": block}, pattern=None))


@pytest.mark.parametrize(
    ("error", "out_of_memory"),
    [
        (RuntimeError("DefaultCPUAllocator: can't allocate memory"), True),
        (MemoryError(), True),
        (RuntimeError("no such device"), False),
    ],
)
def test_out_of_memory_error_names_sizes_and_other_errors_pass_through(config_of, monkeypatch, error, out_of_memory):
    def fail(self, *, device):
        raise error

    model = build_meta(config := config_of("retention", tie_embeddings=True))
    count = sum(parameter.numel() for parameter in model.parameters())
    monkeypatch.setattr(nn.Module, "to_empty", fail)
    words = rf"cpu.*{count:,}.*{8 * count:,}.*seqmix show" if out_of_memory else "no such device"
    with pytest.raises(SeqmixError if out_of_memory else RuntimeError, match=words):
        build_model(config, dtype=torch.float64)


def test_tied_embeddings_share_one_tensor(config_of):
    for build in (build_meta, build_model):
        model = build(config_of("retention", tie_embeddings=True))
        assert model.head.weight is model.embedding.weight
        assert "head.weight" not in parameters(model)
    model(torch.tensor([[1, 2]])).logits.sum().backward()
    assert model.embedding.weight.grad is model.head.weight.grad
    free = build_model(config_of("retention"))
    assert not torch.equal(free.head.weight, free.embedding.weight)


@pytest.mark.parametrize("tied", [False, True])
def test_embedding_and_output_projection_start_with_paper_scale(config_of, tied):
    model = build_model(config_of("retention", d_model=64, vocab_size=2000, tie_embeddings=tied))
    for matrix in (model.embedding.weight, model.head.weight):
        assert matrix.std().item() == pytest.approx(64**-0.5, rel=0.02)
        assert matrix.mean().item() == pytest.approx(0, abs=0.002)


def test_normal_init_draws_all_matrices_with_same_std(config_of):
    model = build_model(config_of("learnable retention", d_model=64, init={"kind": "normal", "std": 0.3}))
    matrices = {name: p for name, p in parameters(model).items() if p.ndim == 2}
    assert len(matrices) == 2 + 2 * 4
    for matrix in matrices.values():
        assert matrix.std().item() == pytest.approx(0.3, rel=0.03)
        assert matrix.abs().max() > 0.9  # no uniform law of that width reaches three deviations
    vectors = {name: p for name, p in parameters(model).items() if p.ndim == 1}
    assert len(vectors) == 2 * 3 + 1
    for name, vector in vectors.items():
        if "norm" in name:
            assert torch.equal(vector, torch.ones(64))
        else:
            assert torch.equal(vector, build_model(config_of("learnable retention", d_model=64)).get_parameter(name))
