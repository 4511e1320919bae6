"""Basis of `seqmix linearize`: `projections` by role and head, and `set_reach`."""

import math
from collections.abc import Iterable
from typing import Any

import pytest
import torch
from feature_cases import mixers_with, require_property
from mutants.specimen import Specimen, SpecimenConfig
from torch import Tensor

from seqmix.mixers.base.contract import SequenceMixer
from seqmix.mixers.base.state import to_dict
from seqmix.mixers.ttt import TTT
from seqmix.testing.compare import EXACT, CheckFailure, require
from seqmix.testing.mixer.case import Draw
from seqmix.testing.mixer.trial import Trial

WIDEST = 70
"""Tokens that no short convolution sees at once."""

HUGE, SMALL = 1e8, 1e-2
"""How large a head is beside others, and how small tokens are that norms do not move."""

REACH = (10.0, 40.0)
"""Tokens of memory that are asked for."""

BETWEEN, AFTER = 120, 40
"""Tokens over which fading is measured, and those that follow."""


def close(one: Tensor, other: Tensor) -> bool:
    return bool(((one - other).abs() <= EXACT * (1 + other.abs())).all())


def projections_have_their_roles(trial: Trial) -> None:
    """`projections` are views of what is read, in their order. A head's q, k and v change nothing where its o is zero;
    a query counts at its own token alone, a value later too; and of one token's output, a key changes no more than the
    scale."""
    x, roles, channel = trial.tokens(), trial.mixer.projections, trial.d_model // 2
    for role in roles:
        _is_a_view(trial, role, x, channel)
    for role in roles.keys() - {"o"} if "o" in roles and not _norm_is_over_heads(trial, x, "v") else ():
        if not _norm_is_over_heads(trial, x, role):
            _heads_are_apart(trial, role, x)

    def is_read_later(role: str, length: int) -> bool:
        first = trial.tokens(length=length)
        first[:, 1:, channel] = 0  # written where the first token alone has anything
        y, other = _outputs(trial, first, lambda p: p[role][..., channel])
        return not close(y[:, -1], other[:, -1])

    require("q" not in roles or not is_read_later("q", WIDEST), "projections: q of a token is read by a later one")
    # a window may be one token
    y, other = (trial.mix(torch.stack((before, x[:, 1]), 1), None)[0] for before in (x[:, 0], x[:, 2]))
    read = "v" not in roles or torch.equal(y[:, 1], other[:, 1]) or is_read_later("v", 2)
    require(read, "projections: v of a token is not read by the next")


def _is_a_view(trial: Trial, role: str, x: Tensor, channel: int) -> None:
    """[H _ D]: what reads a channel counts where x has one, and what writes a channel changes no other."""
    shape, kept = list(trial.mixer.projections[role].shape), torch.arange(trial.d_model, device=x.device) != channel
    sizes = f"projections: {role} of {shape} is not [H _ D], of D = {trial.d_model}"
    require(len(shape) == 3 and shape[-1] == trial.d_model, sizes)
    y, other = _outputs(trial, x if role == "o" else x * kept, lambda p: p[role][..., channel])
    one, two = (each[..., kept | (role != "o")] for each in (y, other))
    require(close(one, two), f"projections: {role} of one channel changes what is of others")
    y, other = _outputs(trial, x, lambda p: p[role])
    changed = not math.prod(shape) or not torch.equal(y, other)
    require(changed, f"projections: {role} is written and the output stays: it is no view")


def _norm_is_over_heads(trial: Trial, x: Tensor, role: str) -> bool:
    """Whether beside an enormous head, which itself is not read, the others count no more."""
    mixer, (y, _) = trial.rebuilt(), trial.mix(x, None)
    if isinstance(mixer, TTT) or getattr(mixer, "n_groups", 1) > 1:  # bounded, or normed by group
        return True
    heads, o = (mixer.projections.get(name, x[0, :1]) for name in (role, "o"))
    with torch.no_grad():
        heads[0] *= HUGE
        o[: max(1, len(o) // len(heads))] = 0
        beside, _ = trial.mix(x, None, mixer)
        heads[1:] += trial.like(heads[1:])
    moved = trial.mix(x, None, mixer)[0] - beside
    return len(heads) > 1 and bool(moved.norm() <= 1e-3 * y.norm())


def _heads_are_apart(trial: Trial, role: str, x: Tensor) -> None:
    heads, outputs = (len(trial.mixer.projections[name]) for name in (role, "o"))
    each = outputs // heads
    fresh = not any(leaf.any() for leaf in to_dict(trial.initial_state(2) or ()).values())
    for head in {0, heads - 1} if each * heads == outputs else ():
        own = range(head * each, (head + 1) * each)
        y, other = _outputs(trial, x, lambda p, head=head: p[role][head], zero=own)
        sentence = f"projections: {role} of head {head} changes "
        require(close(y, other), sentence + "what other heads give")
        if role == "k" and fresh:
            rest = [n for n in range(outputs) if n != own[0]]
            y, *others = _outputs(trial, x[:1, :1], lambda p, head=head: p[role][head], zero=rest, times=4)
            # a token may write other values beside this one, and be normed: a plane
            ways = torch.linalg.svdvals(torch.cat([other - y for other in others], 1)[0])
            require(ways[2] <= 1e-6 * ways[0] + EXACT, sentence + "more of one token's output than its scale")


def _outputs(trial: Trial, x: Tensor, rows: Any, zero: Iterable[int] = (), times: int = 1) -> list[Tensor]:
    """The output, and those after rows of projections were written, each time otherwise; o is zero of some heads."""
    mixer, found = trial.rebuilt(), []
    with torch.no_grad():
        if zero:
            mixer.projections["o"][[*zero]] = 0
        for _ in range(times + 1):
            found.append(trial.mix(x, None, mixer)[0])
            written = rows(mixer.projections)
            written += 0.5 * trial.like(written)
    return found


def memory_reaches_as_far_as_is_set(trial: Trial) -> None:
    """After `set_reach`, what a token wrote fades by tokens / (tokens + 1) with every token of zeros."""
    rows, (few, many) = trial.case.batch_size, REACH
    heads = getattr(trial.mixer, "n_heads", getattr(trial.config, "n_heads", 0))
    # two tokens each, at the start and later, then zeros: of many, as a rotation turns them
    texts = trial.tokens(2 * rows, BETWEEN + AFTER).zero_().unflatten(0, (2, rows))
    for row in range(0, rows, 2):
        texts[:, row, row % 8] = texts[:, row + 1, row % 8 + BETWEEN] = SMALL * trial.tokens(2, 1)[:, 0]
    texts[..., -1, :] = trial.tokens(1, 1)[:, 0]
    for asked in ([few] * heads, [many] + [few] * (heads - 1)) if heads else ():
        mixer = trial.rebuilt()
        if not mixer.set_reach(torch.tensor(asked, dtype=mixer.dtype, device=mixer.device)):
            return
        one, other = trial.mix(texts.flatten(0, 1), None, mixer)[0][:, -1].chunk(2)
        early, late = ((one - other)[start::2].square().sum().item() for start in (0, 1))
        gamma = (early / late) ** (0.5 / BETWEEN) if late else 0.0
        reach = gamma / (1 - gamma) if gamma < 1 else math.inf
        sentence = f"set_reach of {max(asked):g} tokens: what a token wrote reaches {reach:.3g} tokens"
        require(abs(reach / max(asked) - 1) < 1 / 3, sentence)


ROLES = Draw(tokens=(9, 9), batch_size=(2, 2), starts=("none",))
DECAYS = Draw(tokens=(1, 1), batch_size=(32, 32), starts=("none",))


def has_projections(mixer):
    return bool(mixer.projections)


def sets_reach(mixer):
    own = type(mixer).set_reach is not SequenceMixer.set_reach
    return mixer.traits.state == "constant" and (own or any(hasattr(part, "set_reach") for part in mixer.children()))


@pytest.mark.slow
@mixers_with(has_projections)
def test_declared_query_key_and_value_projections_act_as_such(config):
    require_property(projections_have_their_roles, config, ROLES, has_projections, examples=4)


@mixers_with(sets_reach)
def test_set_reach_sets_how_far_memory_reaches(config):
    require_property(memory_reaches_as_far_as_is_set, config, DECAYS, sets_reach, examples=3)


class NamesKeysValues(Specimen):
    @property
    def projections(self):
        q, v, k = self.in_proj.weight.unflatten(0, (3, self.config.n_heads, -1)).unbind(0)
        return {"q": q, "k": k, "v": v, "o": self.out_proj.weight.T.unflatten(0, (self.config.n_heads, -1))}


class SetsTheDecayForItsLogit(Specimen):
    @torch.no_grad()
    def set_reach(self, tokens):
        self.decay_proj.bias.copy_(tokens / (tokens + 1))
        return ["decay_proj.bias"]


@pytest.mark.parametrize(
    ("layer", "test", "draw", "named"),
    [
        (NamesKeysValues, projections_have_their_roles, ROLES, "projections: "),
        (SetsTheDecayForItsLogit, memory_reaches_as_far_as_is_set, DECAYS, "set_reach of "),
    ],
    ids=["roles", "reach"],
)
def test_layer_with_wrong_roles_or_reach_fails_the_check(layer, test, draw, named):
    config = type("WrongConfig", (SpecimenConfig,), {"layer": layer, "__module__": __name__})()
    with pytest.raises(CheckFailure, match=named):
        require_property(test, config, draw, lambda mixer: True)
