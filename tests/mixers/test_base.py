"""Calls that the base class rejects, and arguments that it fills in.

The conformance kit tests the contract itself, for every mixer.
"""

from dataclasses import replace
from typing import Literal

import pytest
import torch
from pydantic import Field
from torch import nn

from seqmix.mixers import MIXERS, ContractError, LayerCall, MixerConfig, Paradigm, SequenceMixer, Traits
from seqmix.mixers.base.state import to_dict
from seqmix.registry import ConfigError, SeqmixError

D_MODEL = 12


@pytest.fixture(params=["retention", "attention", "hyena"])
def config(request):
    return MIXERS.resolve(request.param).example()


@pytest.fixture
def mixer(config):
    return config.build(D_MODEL, layer_idx=0, n_layers=1)


def test_packed_input_to_a_mixer_without_the_packing_trait_raises(mixer, monkeypatch):
    monkeypatch.setattr(mixer, "traits", replace(mixer.traits, packing=False))
    with pytest.raises(ContractError, match=f"{mixer.kind}.* packing.*cu_seqlens"):
        mixer(torch.randn(1, 4, D_MODEL), cu_seqlens=torch.tensor([0, 4]))


def test_step_with_more_than_one_token_raises(mixer):
    with pytest.raises(ContractError, match="2"):
        mixer.step(torch.randn(1, 2, D_MODEL), mixer.init_state(1))


@pytest.mark.parametrize(
    ("batch_size", "cu_seqlens", "words"),
    [
        (2, torch.tensor([0, 4]), "2"),
        (1, torch.tensor([[0, 4]]), r"\[1, 2\]"),
        (1, torch.tensor([0.0, 4.0]), r"\[2\], torch.float32"),
        (1, torch.tensor([0, 3]), "cu_seqlens .* 0 to 4, .*tokens"),
    ],
    ids=str,
)
def test_invalid_document_boundaries_raise(mixer, batch_size, cu_seqlens, words):
    for paradigm in mixer.traits.paradigms:
        with pytest.raises(ContractError, match=words):
            mixer(torch.randn(batch_size, 4, D_MODEL), paradigm=paradigm, cu_seqlens=cu_seqlens)


class OneWayConfig(MixerConfig):
    kind: Literal["one_way"] = "one_way"
    paradigm: Paradigm = Field(default=Paradigm.RECURRENT, strict=False)

    @property
    def traits(self):
        paradigms = frozenset({Paradigm.RECURRENT})
        return Traits(paradigms=paradigms, state="constant", packing=False, shift_invariant=True)

    def build(self, d_model, *, layer_idx, n_layers):
        raise NotImplementedError


def traits(**changes):
    declared = {"paradigms": frozenset(Paradigm), "state": "constant", "packing": False, "shift_invariant": True}
    return Traits(**{**declared, **changes})


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"paradigms": [Paradigm.PARALLEL]}, r"frozenset, got \[.*Paradigm.PARALLEL"),
        ({"paradigms": frozenset()}, "frozenset, .*Paradigm.PARALLEL"),
        ({"paradigms": frozenset({"paralel"})}, "'paralel'.*Paradigm.PARALLEL"),
        ({"state": "grows"}, "'constant', 'growing' or 'none'.*'grows'.*\"growing\""),
        ({"packing": None}, "None"),
        ({"shift_invariant": 1}, "1"),
        ({"parallel_from_state": False, "paradigms": frozenset({"parallel"})}, "needs another paradigm"),
        ({"compiles": "no"}, "'no'"),
    ],
)
def test_invalid_traits_raise(changes, words):
    named = traits(paradigms=frozenset({"parallel", "recurrent"}))
    assert all(type(paradigm) is Paradigm for paradigm in named.paradigms)
    with pytest.raises(ContractError, match=f"Traits.{next(iter(changes))} .*{words}"):
        traits(**changes)


@pytest.mark.parametrize(
    ("broken", "words"),
    [(lambda self: self.nope, "AttributeError.*nope"), (lambda self: {"packing": True}, "Traits.*{'packing': True}")],
)
def test_broken_traits_property_raises_config_error(broken, words):
    config = type("BrokenConfig", (OneWayConfig,), {"traits": property(broken), "__module__": __name__})
    with pytest.raises(ConfigError, match=f"one_way: traits .*{words}"):
        config()


@pytest.mark.parametrize(
    ("wrong", "words"),
    [
        (lambda y, state: None, "NoneType"),
        (lambda y, state: y, "Tensor"),
        (lambda y, state: (y, state, None), r"\(output, state\) or a MixResult, got a tuple of 3"),
        (lambda y, state: (None, state), "NoneType"),
        (lambda y, state: (y[..., :6], state), r"\[2, 4, 12\].*\[2, 4, 6\]"),
    ],
)
def test_mix_with_malformed_result_raises(mixer, monkeypatch, wrong, words):
    # two rows: a tensor of two could be taken for a pair
    inner = mixer.mix
    monkeypatch.setattr(mixer, "mix", lambda *arguments: wrong(*inner(*arguments)))
    with pytest.raises(ContractError, match=f"^{mixer.kind}: mix .*{words}"):
        mixer(torch.randn(2, 4, D_MODEL))


class Plain(SequenceMixer):
    """Without parameters."""

    def mix(self, x, call):
        return x, call.state

    def init_state(self, batch_size, *, max_length=None):
        return ()

    def reset_parameters(self):
        pass

    def flops(self, length, paradigm, context=0):
        return 0


def test_device_and_dtype_come_from_buffers_without_parameters():
    mixer, x = Plain(OneWayConfig()), torch.randn(2, 3, 4)
    with pytest.raises(ContractError, match=r"one_way.*register_buffer"):
        mixer(x)
    mixer.inner = nn.Module()
    mixer.inner.register_buffer("positions", torch.arange(3))
    with pytest.raises(ContractError, match="register_buffer"):
        _ = mixer.device
    mixer.inner.register_buffer("one", torch.ones(1))
    assert (mixer.dtype, mixer.double().dtype, mixer.to("meta").device.type) == (torch.float32, torch.float64, "meta")
    assert mixer.float().to_empty(device="cpu")(x)[0] is x


def test_state_is_returned_only_on_request(mixer, monkeypatch):
    x, inner = torch.randn(1, 4, D_MODEL), mixer.mix
    assert mixer(x)[1] is None
    assert mixer(x, return_state=True)[1] is not None
    # whatever a mixer's own method returns
    monkeypatch.setattr(mixer, "mix", lambda x, call: inner(x, call._replace(return_state=True)))
    assert mixer(x)[1] is None


def test_paradigm_argument_overrides_configured_paradigm(config, monkeypatch):
    for paradigm in config.traits.paradigms:
        mixer = config.model_copy(update={"paradigm": paradigm}).build(D_MODEL, layer_idx=0, n_layers=1)
        seen, inner = [], mixer.mix
        monkeypatch.setattr(mixer, "mix", lambda x, call, to=seen, f=inner: to.append(call.paradigm) or f(x, call))
        mixer(torch.randn(1, 1, D_MODEL))
        mixer(torch.randn(1, 5, D_MODEL))
        assert seen == [paradigm, paradigm]
        for other in mixer.traits.paradigms:
            mixer(torch.randn(1, 7, D_MODEL), paradigm=str(other))  # by name
            assert seen.pop() is other


class ExampleConfig(OneWayConfig):
    kind: Literal["example"] = "example"
    width: int = Field(gt=1, examples=[4, 2])
    depth: int
    heads: int = Field(default=3, examples=[1])


def test_example_fills_in_only_required_fields():
    assert ExampleConfig.example_fields() == {"width": 4, "depth": 1}
    assert ExampleConfig.example() == ExampleConfig(width=4, depth=1, heads=3)


class NamelessConfig(OneWayConfig):
    kind: Literal["nameless"] = "nameless"
    name: str


def test_required_field_without_example_is_named_in_error():
    with pytest.raises(ContractError, match=r"NamelessConfig.* name .*name="):
        NamelessConfig.example()


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"memo": None}, r"field of LayerCall, pass call=LayerCall\(memo="),
        ({"losses": []}, r"LayerCall\(return_loss=True\)"),
        ({"paradigme": "parallel"}, 'did you mean "paradigm"'),
    ],
    ids=["field", "losses", "misspelt"],
)
def test_unknown_argument_of_a_mixer_raises_with_what_to_pass(mixer, options, words):
    with pytest.raises(SeqmixError, match=words):
        mixer(torch.randn(1, 4, D_MODEL), **options)


def test_arguments_beside_a_layer_call_raise(mixer):
    with pytest.raises(ContractError, match="fields of `call`"):
        mixer(torch.randn(1, 4, D_MODEL), paradigm=Paradigm.PARALLEL, call=LayerCall(return_state=True))


def test_layer_call_gives_the_same_as_arguments(mixer):
    x = torch.randn(1, 4, D_MODEL)
    y, state = mixer(x, return_state=True)
    result = mixer(x, call=LayerCall(return_state=True))
    assert torch.equal(result.y, y)
    assert all(torch.equal(a, b) for a, b in zip(to_dict(result.state).values(), to_dict(state).values(), strict=True))
    assert result[2:] == (None, None, None)
