"""First values: external values that layers take beside the tokens and mix into their own, and also return."""

from collections.abc import Callable
from contextlib import suppress
from dataclasses import replace
from functools import partial
from typing import Any

import pytest
import torch
from feature_cases import BUILT_IN, mixers_with, require_property
from mutants.specimen import Specimen, SpecimenConfig
from torch import Tensor, nn

from seqmix import MIXERS, ContractError
from seqmix.mixers import LayerCall, MixResult
from seqmix.mixers.attention import AttentionConfig
from seqmix.mixers.base.contract import SequenceMixer
from seqmix.mixers.delta_product import DeltaProductConfig
from seqmix.mixers.mlstm import MLSTMConfig
from seqmix.mixers.retention import RetentionConfig
from seqmix.testing.compare import CheckFailure, require, require_near
from seqmix.testing.contract.packing import describe_lengths, mix_each_alone, pack_outputs
from seqmix.testing.mixer.case import Draw
from seqmix.testing.mixer.trial import SegmentCall, Trial, learnable

GRADIENT = "the gradient of"


def first_values_are_read_with_their_tokens(trial: Trial) -> None:
    """Every paradigm, pieces and packed documents give the same output, values, final state and gradients, of given
    values too; what mixes them in learns. Wanted values change nothing."""
    mixer, x, state = taking(trial), trial.tokens(), trial.state()
    width = mixer.value_width or x.shape[-1]
    outside = [trial.like(x[..., :1].expand(*x.shape[:2], width)) for takes in takes_of(mixer) if takes]
    both = torch.cat((x, *outside), dim=-1)
    whole = compared(trial, "with values from outside", partial(with_values, mixer), both, state, mixer)
    for gradient in whole[f"{GRADIENT} the input"][..., x.shape[-1] :].split(width, -1):
        require(gradient.any(), "values from outside have no gradient")
    for name in learnable(mixer).keys() - learnable(trial.mixer).keys():
        require(whole[f"{GRADIENT} {name}"].any(), f"{name} has no gradient: nothing depends on it")
    first = compared(trial, "of the first layer", partial(with_values, trial.mixer), x, state, trial.mixer)
    y, _ = trial.mix(x, state, paradigm=trial.reference)
    trial.compare("values wanted against not", (first["the output"][..., : x.shape[-1]], None), (y, None))
    _under_autocast(trial, x.float())


def _under_autocast(trial: Trial, x: Tensor) -> None:
    """Values that a first layer gives under autocast are such as a later one takes there: two layers' roundings."""
    layers = trial.rebuilt(torch.float32), taking(trial).float()

    def run(on: bool) -> Tensor:
        with torch.no_grad(), torch.autocast(x.device.type, torch.bfloat16, enabled=on):
            values = layers[0](x, call=LayerCall(return_values=True)).values
            token = values.sin() if layers[1].takes_token_values else None
            return layers[1](x, call=LayerCall(first_values=values, token_values=token)).y

    what = "under autocast, with values that the first layer gives there"
    require_near("the output", what, run(True), run(False), 2 * trial.subject.tolerances[torch.bfloat16])


def taking(trial: Trial) -> SequenceMixer:
    """The case's mixer as a later layer, which takes first values, and vectors of the tokens if it can."""
    mixer = trial.rebuilt()
    mixer.accept_first_values()
    with suppress(ContractError):
        mixer.accept_token_values(2.0, 3)
    require(mixer.takes_first_values, "accept_first_values leaves takes_first_values False")
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        mixer.reset_parameters()
    with torch.no_grad():
        for parameter in mixer.parameters():
            parameter.add_(0.1 * trial.like(parameter))
    return mixer.to(trial.subject.device, trial.case.dtype)


def with_values(mixer: SequenceMixer, x: Tensor, state: Any, **options: Any) -> tuple[Tensor, Any]:
    """Output and values, side by side, [B T D+C], of tokens, or of tokens and the values from outside that a mixer
    takes."""
    d_model = x.shape[-1]
    if count := sum(takes_of(mixer)):
        d_model = d_model // (1 + count) if mixer.value_width is None else d_model - count * mixer.value_width
    x, *outside = x.split([d_model, *[mixer.value_width or d_model] * count], dim=-1)
    names = (name for name, takes in zip(("first_values", "token_values"), takes_of(mixer), strict=True) if takes)
    call = LayerCall(state, **dict(zip(names, outside, strict=True)), return_values=True, **options)
    result = mixer(x, call=call)
    return torch.cat((result.y, result.values), dim=-1), result.state


def takes_of(mixer: SequenceMixer) -> tuple[bool, bool]:
    """True for each kind of values that a mixer takes: first values, and vectors of the tokens."""
    return mixer.takes_first_values, mixer.takes_token_values


def compared(
    trial: Trial, what: str, mix: Callable[..., Any], x: Tensor, state: Any, mixer: SequenceMixer
) -> dict[str, Tensor]:
    """Output and gradients of the whole in the reference paradigm, which all others gave."""
    kept = x.clone()
    whole = trial.differentiate(trial.call(trial.reference, mix), x, state, mixer=mixer)
    for paradigm in trial.paradigms:
        call = trial.call(paradigm, mix)
        ways: dict[str, SegmentCall] = {}
        if paradigm != trial.reference:
            ways[f"{paradigm}"] = call
        if len(trial.case.lengths) > 1:
            ways[f"{paradigm}, in pieces,"] = trial.in_pieces(call)
        for way, used in ways.items():
            found = trial.differentiate(used, x, state, mixer=mixer)
            trial.compare(f"{what}: {way} against {trial.reference}", found, whole)
    if (boundaries := trial.boundaries()) is not None:
        before = trial.state(len(trial.case.lengths))
        separate = mix_each_alone(trial, trial.mix, x, before, mixer=mix)
        for paradigm in trial.paradigms:
            packed, _ = trial.mix(x, before, mix, cu_seqlens=boundaries, paradigm=paradigm)
            said = f"{what}: documents of {describe_lengths(trial)} tokens, {paradigm}, and alone"
            trial.compare(said, (packed, None), (pack_outputs(separate, trial.case.lengths), None))
    require(torch.equal(x, kept), f"{what}: a call writes into its tokens or first values")
    return whole[0]


DRAW = Draw(pieces=(1, 3), tokens=(1, 9), long=12, batch_size=(1, 2), lists=((3, 1, 5),))


def has_values(mixer):
    return mixer.traits.value_residual and mixer.traits.differentiable


OPTIONAL = [
    AttentionConfig(n_heads=2, n_kv_heads=1, value_residual=True),
    RetentionConfig(n_heads=2, value_residual=True),
    DeltaProductConfig(n_heads=2, value_residual=True),
    MLSTMConfig(n_heads=2, value_residual=True),
]
"""One mixer of each way to compute values: cached, with a state, in several steps, with a `mix` of its own."""


@pytest.mark.parametrize("config", OPTIONAL, ids=lambda config: config.kind)
def test_external_values_are_read_with_their_tokens(config):
    require_property(first_values_are_read_with_their_tokens, config, DRAW, has_values, examples=6)


@pytest.mark.parametrize("kind", BUILT_IN)
def test_value_residual_option_sets_the_trait(kind):
    config = MIXERS.resolve(kind)
    if "value_residual" in config.model_fields:
        on, off = (config(**config.example_fields(), value_residual=each) for each in (True, False))
        assert (on.traits.value_residual, off.traits.value_residual) == (True, False)


@mixers_with(has_values)
def test_first_values_are_read_with_their_tokens(config):
    require_property(first_values_are_read_with_their_tokens, config, DRAW, has_values)


class Residual(Specimen):
    """A healthy layer that mixes the first one's values into its own."""

    first = None

    def accept_first_values(self):
        self.takes_first_values = True
        self.share = nn.Parameter(torch.zeros(self.config.n_heads * self.width, device=self.device, dtype=self.dtype))

    def mix(self, x, call):
        self.first = self.given(call)
        y, after = super().mix(x, call)
        return MixResult(y, after, super().heads(x)[1].transpose(1, 2).flatten(2))

    def given(self, call):
        return call.first_values

    def heads(self, x):
        qk, v, a = super().heads(x)
        if self.first is not None:
            own = v.transpose(1, 2).flatten(2)
            mixed = own.lerp(self.first.to(own), self.share.sigmoid().to(own))
            v = mixed.unflatten(-1, (-1, self.width)).transpose(1, 2)
        return qk, v, a


class DetachesFirstValues(Residual):
    """In the recurrent form, the first layer's values have no gradient (fla PR #145)."""

    def given(self, call):
        first = super().given(call)
        return first if first is None or call.paradigm != "recurrent" else first.detach()


class ResidualConfig(SpecimenConfig):
    layer = Residual

    @property
    def traits(self):
        return replace(super().traits, value_residual=True)


def test_detached_first_values_fail_the_check():
    require_property(first_values_are_read_with_their_tokens, ResidualConfig(), DRAW, has_values, examples=4)
    wrong = type("WrongConfig", (ResidualConfig,), {"layer": DetachesFirstValues, "__module__": __name__})()
    with pytest.raises(CheckFailure, match="gradient"):
        require_property(first_values_are_read_with_their_tokens, wrong, DRAW, has_values)
