"""What the base class refuses and fills in, for every built-in mixer; the contract itself is in test_conformance.py."""

from dataclasses import replace
from typing import Literal

import pytest
import torch
from pydantic import Field, ValidationError
from torch import nn

from seqmix.mixers import MIXERS, ContractError, MixerConfig, Paradigm, SequenceMixer, Traits

D_MODEL = 12
BUILT_IN = [kind for kind in MIXERS.kinds() if MIXERS.origin(kind).startswith("seqmix.")]


@pytest.fixture(params=BUILT_IN)
def config(request):
    return MIXERS.resolve(request.param).example()


@pytest.fixture
def mixer(config):
    return config.build(D_MODEL, layer_idx=0, n_layers=1)


def seen_by(mixer, monkeypatch):
    """The paradigms that the mixer's own method is called with."""
    seen, inner = [], mixer.mix
    monkeypatch.setattr(mixer, "mix", lambda x, call: seen.append(call.paradigm) or inner(x, call))
    return seen


# ---- what is refused


def test_what_is_not_declared_is_refused(mixer, monkeypatch):
    x, kept = torch.randn(1, 4, D_MODEL), mixer.paradigm
    monkeypatch.setattr(mixer, "traits", replace(mixer.traits, paradigms=frozenset({kept}), packing=False))
    for other in set(Paradigm) - {kept}:
        with pytest.raises(ContractError, match=f"{mixer.kind} has no paradigm '{other}'; it declares {kept}"):
            mixer(x, paradigm=other)
    if kept is not Paradigm.RECURRENT:
        with pytest.raises(ContractError, match="has no paradigm 'recurrent'"):
            mixer.step(x[:, :1], mixer.init_state(1))
    with pytest.raises(ContractError, match=f"{mixer.kind} does not declare packing"):
        mixer(x, cu_seqlens=torch.tensor([0, 4]))
    mixer(x)


def test_a_paradigm_that_is_none_is_told_the_nearest(mixer):
    with pytest.raises(ContractError, match=r"has no paradigm 'recurent'; it declares .*did you mean \"recurrent\""):
        mixer(torch.randn(1, 4, D_MODEL), paradigm="recurent")


@pytest.mark.parametrize("shape", [(2, 0, D_MODEL), (4, D_MODEL)])
def test_shapes_that_do_not_fit_are_refused(mixer, shape):
    with pytest.raises(ContractError, match=r"takes \[batch, tokens >= 1, d_model\], and was given \[\d, "):
        mixer(torch.zeros(shape))


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.int64])
def test_a_dtype_that_is_not_the_parameters_is_refused(mixer, dtype):
    with pytest.raises(ContractError, match=f"has parameters of torch.float32 and was given {dtype}: convert"):
        mixer(torch.zeros(1, 4, D_MODEL, dtype=dtype))


@pytest.mark.parametrize(
    ("batch_size", "borders", "sentence"),
    [
        (2, torch.tensor([0, 4]), "a batch of 2 and boundaries"),
        (1, torch.tensor([[0, 4]]), r"a batch of 1 and boundaries \[1, 2\]"),
        (1, torch.tensor([0.0, 4.0]), r"boundaries \[2\] torch.float32"),
        (1, torch.tensor([0, 3]), "must rise from 0 to the 4 tokens given"),
        (1, torch.tensor([1, 4]), "must rise from 0"),
        (1, torch.tensor([0, 3, 1, 4]), "must rise from 0"),
        (1, torch.tensor([0, 5]), "must rise from 0"),
        (1, torch.tensor([0]), "must rise from 0"),
        (1, torch.tensor([], dtype=torch.int64), "must rise from 0"),
    ],
)
def test_borders_that_do_not_fit_are_refused(mixer, batch_size, borders, sentence):
    assert mixer.traits.packing
    for paradigm in mixer.traits.paradigms:
        with pytest.raises(ContractError, match=sentence):
            mixer(torch.randn(batch_size, 4, D_MODEL), paradigm=paradigm, cu_seqlens=borders)


@pytest.mark.parametrize("rows", [1, 2, 4])
def test_a_state_of_other_sequences_is_refused(mixer, rows):
    x, borders = torch.randn(3, 4, D_MODEL), torch.tensor([0, 2, 2, 4])
    for paradigm in mixer.traits.paradigms:
        with pytest.raises(ContractError, match=f"3 sequences and a state of {rows}"):
            mixer(x, mixer.init_state(rows), paradigm=paradigm)
        with pytest.raises(ContractError, match=f"3 sequences and a state of {rows}"):
            mixer(x[:1], mixer.init_state(rows), paradigm=paradigm, cu_seqlens=borders)


def test_a_step_is_one_token(mixer):
    with pytest.raises(ContractError, match="a step mixes one token, and 2 were given"):
        mixer.step(torch.randn(1, 2, D_MODEL), mixer.init_state(1))


class OneWayConfig(MixerConfig):
    kind: Literal["one_way"] = "one_way"
    paradigm: Paradigm = Field(default=Paradigm.RECURRENT, strict=False)

    @property
    def traits(self):
        paradigms = frozenset({Paradigm.RECURRENT})
        return Traits(paradigms=paradigms, state="constant", packing=False, shift_invariant=True)

    def build(self, d_model, *, layer_idx, n_layers):
        raise NotImplementedError


def test_a_default_paradigm_must_be_declared():
    assert OneWayConfig().paradigm is Paradigm.RECURRENT
    with pytest.raises(ValidationError, match="one_way has no paradigm 'parallel'; it declares recurrent"):
        OneWayConfig(paradigm="parallel")


def traits(**changes):
    declared = {"paradigms": frozenset(Paradigm), "state": "constant", "packing": False, "shift_invariant": True}
    return Traits(**{**declared, **changes})


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"paradigms": [Paradigm.PARALLEL]}, r"Traits.paradigms needs a frozenset of Paradigm.PARALLEL, .* given \["),
        ({"paradigms": frozenset()}, "needs a frozenset of Paradigm.PARALLEL"),
        ({"paradigms": frozenset({"paralel"})}, r"needs a frozenset of Paradigm.PARALLEL, .*'paralel'"),
        ({"state": "grows"}, "Traits.state needs 'constant' or 'growing', and was given 'grows'; did you mean"),
        ({"packing": None}, "Traits.packing needs True or False, and was given None"),
        ({"shift_invariant": 1}, "Traits.shift_invariant needs True or False, and was given 1"),
    ],
)
def test_traits_that_are_none_are_refused(changes, sentence):
    with pytest.raises(ContractError, match=sentence):
        traits(**changes)


def test_paradigms_may_be_declared_by_name():
    named = traits(paradigms=frozenset({"parallel", "recurrent"}))
    assert all(type(paradigm) is Paradigm for paradigm in named.paradigms)


@pytest.mark.parametrize(
    ("broken", "sentence"),
    [
        (lambda self: self.nope, "one_way: traits raised AttributeError: .*nope"),
        (lambda self: {"packing": True}, "one_way: traits has to be a Traits\\(...\\), and is {'packing': True}"),
    ],
)
def test_traits_that_cannot_be_had_are_told(broken, sentence):
    config = type("BrokenConfig", (OneWayConfig,), {"traits": property(broken), "__module__": __name__})
    with pytest.raises(ValidationError, match=sentence):
        config()


@pytest.mark.parametrize(
    ("wrong", "sentence"),
    [
        (lambda y, state: None, "mix has to return \\(output, state\\), and returned a NoneType"),
        (lambda y, state: y, "returned a Tensor"),
        (lambda y, state: (y, state, None), "returned a tuple of 3"),
        (lambda y, state: (None, state), "has to return a tensor as output, and returned a NoneType"),
        (lambda y, state: (y[..., :6], state), r"the segment's shape \[2, 4, 12\], and returned one of \[2, 4, 6\]"),
    ],
)
def test_a_result_that_is_no_output_and_state_is_refused(mixer, monkeypatch, wrong, sentence):
    # two rows: a tensor of two could be taken for a pair
    inner = mixer.mix
    monkeypatch.setattr(mixer, "mix", lambda *arguments: wrong(*inner(*arguments)))
    with pytest.raises(ContractError, match=f"^{mixer.kind}: .*{sentence}"):
        mixer(torch.randn(2, 4, D_MODEL))


# ---- what is filled in


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


def test_without_parameters_buffers_tell_the_device_and_dtype():
    mixer, x = Plain(OneWayConfig()), torch.randn(2, 3, 4)
    with pytest.raises(ContractError, match="one_way has neither a parameter nor a buffer of floating-point numbers"):
        mixer(x)
    mixer.inner = nn.Module()
    mixer.inner.register_buffer("positions", torch.arange(3))
    with pytest.raises(ContractError, match="nothing tells its device and dtype"):
        _ = mixer.device
    mixer.inner.register_buffer("one", torch.ones(1))
    assert (mixer.dtype, mixer.double().dtype, mixer.to("meta").device.type) == (torch.float32, torch.float64, "meta")
    assert mixer.float().to_empty(device="cpu")(x)[0] is x


def test_a_state_is_returned_where_it_is_wanted_alone(mixer, monkeypatch):
    x, inner = torch.randn(1, 4, D_MODEL), mixer.mix
    assert mixer(x)[1] is None
    assert mixer(x, return_state=True)[1] is not None
    # whatever a mixer's own method returns
    monkeypatch.setattr(mixer, "mix", lambda x, call: inner(x, call._replace(return_state=True)))
    assert mixer(x)[1] is None


def test_a_paradigm_may_be_given_by_name(mixer, monkeypatch):
    seen = seen_by(mixer, monkeypatch)
    for paradigm in mixer.traits.paradigms:
        mixer(torch.randn(1, 7, D_MODEL), paradigm=str(paradigm))
        assert seen.pop() is paradigm


def test_the_configured_paradigm_is_the_default_for_every_length(config, monkeypatch):
    for paradigm in config.traits.paradigms:
        mixer = config.model_copy(update={"paradigm": paradigm}).build(D_MODEL, layer_idx=0, n_layers=1)
        seen = seen_by(mixer, monkeypatch)
        mixer(torch.randn(1, 1, D_MODEL))
        mixer(torch.randn(1, 5, D_MODEL))
        assert seen == [paradigm, paradigm]


# ---- examples


class ExampleConfig(OneWayConfig):
    kind: Literal["example"] = "example"
    width: int = Field(gt=1, examples=[4, 2])
    depth: int
    heads: int = Field(default=3, examples=[1])


def test_an_example_fills_in_what_is_required_alone():
    assert ExampleConfig.example_fields() == {"width": 4, "depth": 1}
    assert ExampleConfig.example() == ExampleConfig(width=4, depth=1, heads=3)


class NamelessConfig(OneWayConfig):
    kind: Literal["nameless"] = "nameless"
    name: str


class RefusedExampleConfig(OneWayConfig):
    kind: Literal["refused_example"] = "refused_example"
    width: int = Field(gt=1, examples=[1])


def test_an_example_that_cannot_be_made_is_told():
    with pytest.raises(ContractError, match="field name is required and has no examples: give name="):
        NamelessConfig.example()
    with pytest.raises(ContractError, match=r"field width refuses the first of its own examples: .* than 1"):
        RefusedExampleConfig.example()
