"""The builder: nothing is allocated before it must be, everything is initialised, and only from the seed."""

from typing import Any, Literal

import pytest
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from seqmix import (
    ContractError,
    MixerConfig,
    Paradigm,
    SeqmixError,
    SequenceMixer,
    Traits,
    build_model,
)
from seqmix.blocks import BlockConfig
from seqmix.models import build_meta


class Devices(TorchDispatchMode):
    """Collects the devices of all tensors that any operation returns."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: set[str] = set()

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        out = function(*args, **(kwargs or {}))
        self.seen |= {leaf.device.type for leaf in tree_leaves(out) if isinstance(leaf, torch.Tensor)}
        return out


def parameters(model: nn.Module) -> dict[str, torch.Tensor]:
    return dict(model.named_parameters())


def same(a: nn.Module, b: nn.Module) -> bool:
    return all(torch.equal(p, q) for p, q in zip(a.parameters(), b.parameters(), strict=True))


# ---- meta


def test_building_on_meta_makes_no_tensor_elsewhere(config_of, each_mixer):
    with Devices() as devices:
        model = build_meta(config_of(*each_mixer))
    assert devices.seen == {"meta"}
    assert all(parameter.is_meta for parameter in model.parameters())


def test_a_model_too_large_for_any_machine_is_built_on_meta(config_of):
    model = build_meta(config_of("retention", "attention", d_model=2**20))
    assert sum(parameter.numel() for parameter in model.parameters()) > 10**13


def test_a_model_on_meta_has_the_real_shapes(config_of, each_mixer):
    config = config_of(*each_mixer)

    def shapes(model):
        return {name: (parameter.shape, parameter.dtype) for name, parameter in model.named_parameters()}

    assert shapes(build_meta(config)) == shapes(build_model(config))


# ---- seeds


def test_the_parameters_are_a_function_of_the_seed(config_of, each_mixer):
    config = config_of(*each_mixer)
    torch.manual_seed(1)
    first = build_model(config, seed=5)
    torch.manual_seed(2)
    assert same(first, build_model(config, seed=5))
    assert not torch.equal(first.embedding.weight, build_model(config, seed=6).embedding.weight)


def test_the_global_generator_is_left_as_it_was(config_of, each_mixer):
    before = torch.get_rng_state()
    build_meta(config_of(*each_mixer))
    build_model(config_of(*each_mixer), seed=3)
    assert torch.equal(torch.get_rng_state(), before)


def test_layers_of_one_block_start_apart(config_of):
    model = build_model(config_of("retention", n_layers=2))
    assert not torch.equal(model.blocks[0].mixer.in_proj.weight, model.blocks[1].mixer.in_proj.weight)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_parameters_have_the_dtype_asked_for(config_of, dtype):
    model = build_model(config_of("retention", "attention"), dtype=dtype)
    assert {parameter.dtype for parameter in model.parameters()} == {dtype}


# ---- what cannot be built


class ForgetfulConfig(MixerConfig):
    """A mixer that forgets one of its parameters in `reset_parameters`."""

    kind: Literal["forgetful"] = "forgetful"
    paradigm: Paradigm = Paradigm.PARALLEL

    @property
    def traits(self) -> Traits:
        return Traits(paradigms=frozenset(Paradigm), state="constant", packing=False, shift_invariant=True)

    def build(self, d_model: int, *, layer_idx: int, n_layers: int) -> "Forgetful":
        return Forgetful(self, d_model)


class Forgetful(SequenceMixer[Any]):
    def __init__(self, config: ForgetfulConfig, d_model: int) -> None:
        super().__init__(config)
        self.kept = nn.Parameter(torch.ones(d_model))
        self.forgotten = nn.Parameter(torch.ones(d_model))

    def reset_parameters(self) -> None:
        nn.init.ones_(self.kept)

    def mix(self, x, call):
        return x, None

    def init_state(self, batch_size, *, max_length=None):
        return ()

    def flops(self, length, paradigm, context=0):
        return 0


def test_a_parameter_that_nobody_initialises_is_named(config_of):
    retention = config_of("retention").blocks["block0"]
    forgetful = BlockConfig(mixer=ForgetfulConfig(), ffn=None, norm={"kind": "layernorm"})
    config = config_of("retention", blocks={"ret": retention, "mine": forgetful}, pattern=("ret", "mine"))
    with pytest.raises(ContractError) as raised:
        build_model(config)
    assert str(raised.value) == (
        "blocks.1.mixer.forgotten was left uninitialised: reset_parameters of its module must set it"
    )


@pytest.mark.parametrize("mixer", ["retention", "attention", "linear_attention", "gla"])
@pytest.mark.parametrize("build", [build_meta, build_model])
def test_heads_that_do_not_divide_are_refused_in_one_sentence(config_of, mixer, build):
    block = {"mixer": {"kind": mixer, "n_heads": 3}, "ffn": None, "norm": {"kind": "layernorm"}}
    with pytest.raises(SeqmixError, match=r"3 heads do not divide .*: n_heads = [0-9]+ or [0-9]+ would") as raised:
        build(config_of("retention", blocks={"mine": block}, pattern=None))
    assert "mine" in str(raised.value)
    assert "\n" not in str(raised.value)


@pytest.mark.parametrize("error", [RuntimeError("DefaultCPUAllocator: can't allocate memory"), MemoryError()])
def test_a_model_that_does_not_fit_the_memory_is_refused_in_one_sentence(config_of, monkeypatch, error):
    def fail(self, *, device):
        raise error

    model = build_meta(config := config_of("retention", tie_embeddings=True))
    count = sum(parameter.numel() for parameter in model.parameters())
    monkeypatch.setattr(nn.Module, "to_empty", fail)
    with pytest.raises(SeqmixError, match=rf"^the model has {count:,} parameters, whose {8 * count:,} bytes .* on cpu"):
        build_model(config, dtype=torch.float64)


def test_a_device_that_is_not_there_is_not_taken_for_a_lack_of_memory(config_of, monkeypatch):
    def fail(self, *, device):
        raise RuntimeError("no such device")

    monkeypatch.setattr(nn.Module, "to_empty", fail)
    with pytest.raises(RuntimeError, match="no such device"):
        build_model(config_of("retention"))


# ---- tied embeddings


def test_tied_embeddings_are_one_tensor(config_of):
    for model in (build_meta(config_of("retention", tie_embeddings=True)),):
        assert model.head.weight is model.embedding.weight
    model = build_model(config_of("retention", tie_embeddings=True), dtype=torch.float64)
    assert model.head.weight is model.embedding.weight
    assert "head.weight" not in parameters(model)
    model(torch.tensor([[1, 2]])).logits.sum().backward()
    assert model.embedding.weight.grad is model.head.weight.grad


def test_embeddings_are_two_tensors_unless_tied(config_of):
    model = build_model(config_of("retention"))
    assert model.head.weight is not model.embedding.weight
    assert not torch.equal(model.head.weight, model.embedding.weight)


# ---- init


def xavier_bound(rows: int, columns: int, gain: float) -> float:
    return gain * (6 / (rows + columns)) ** 0.5


def slices(mixer) -> list[torch.Tensor]:
    widths = mixer.widths.values() if isinstance(mixer.widths, dict) else mixer.widths
    assert sum(widths) == mixer.in_proj.out_features
    return list(mixer.in_proj.weight.split(list(widths)))


@pytest.mark.parametrize("tied", [False, True])
def test_embedding_and_output_projection_start_as_the_paper_s(config_of, tied):
    model = build_model(config_of("retention", d_model=64, vocab_size=2000, tie_embeddings=tied))
    for matrix in (model.embedding.weight, model.head.weight):
        assert matrix.std().item() == pytest.approx(64**-0.5, rel=0.02)
        assert matrix.mean().item() == pytest.approx(0, abs=0.002)


@pytest.mark.parametrize(
    ("mixer", "count", "gain", "gain_out"),
    [("retention", 4, 2**-2.5, 2**-1), ("attention", 3, 2**-0.5, 1.0), ("linear_attention", 3, 2**-0.5, 1.0)],
)
def test_each_projection_of_a_mixer_starts_with_bounds_of_its_own(config_of, mixer, count, gain, gain_out):
    layer = build_model(config_of(mixer, d_model=64)).blocks[0].mixer
    assert len(slices(layer)) == count
    for weight, factor in [*((part, gain) for part in slices(layer)), (layer.out_proj.weight, gain_out)]:
        bound = xavier_bound(*weight.shape, factor)
        assert 0.98 * bound < weight.abs().max() <= bound


def test_normal_init_is_one_law_for_all_matrices(config_of):
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
