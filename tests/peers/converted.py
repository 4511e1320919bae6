"""Models of other libraries, tiny and random, beside what `seqmix.interop.convert` makes of them, and of that again."""

from contextlib import contextmanager
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from seqmix.interop.convert import export_to, import_from
from seqmix.mixers import Paradigm
from seqmix.training import load_run

LENGTH, VOCAB = 30, 300


@dataclass
class Comparison:
    """The largest difference of logits, over the largest logit, by paradigm; and where the way back is not exact."""

    worst: dict[str, float] = field(default_factory=dict)
    changed: list[str] = field(default_factory=list)


def moved(model, scale=0.3):
    """Weights as far from their start as training takes them, norms' too; of digits that any dtype holds."""
    torch.manual_seed(0)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            step = scale * torch.randn_like(parameter)
            parameter.copy_((parameter + step if parameter.ndim < 2 or "A_log" in name else step).bfloat16())
    return model.eval()


def difference(found, wanted):
    return ((found - wanted).abs().max() / wanted.abs().max()).item()


@torch.no_grad()
def logits_agree(ours, logits, tokens):
    """Of our model in every paradigm that it has: all tokens at once, packed, and in pieces with a state."""
    worst = {}
    for paradigm in Paradigm:
        if any(paradigm not in block.mixer.traits.paradigms for block in ours.blocks):
            continue
        whole = ours(tokens, paradigm=paradigm).logits
        boundaries = torch.tensor([0, LENGTH, 2 * LENGTH])
        packed = ours(tokens.reshape(1, -1), paradigm=paradigm, cu_seqlens=boundaries).logits.view_as(logits)
        state, pieces = None, []
        for start, stop in pairwise([0, 12, 13, 20, LENGTH]):
            output = ours(tokens[:, start:stop], state, paradigm=paradigm, return_state=True)
            state = output.state
            pieces.append(output.logits)
        found = (whole, packed, torch.cat(pieces, 1))
        worst[paradigm] = max(difference(each, logits) for each in found)
    return worst


def compare(source: Path, folder: Path, name: str, reference, dtype) -> Comparison:
    """A folder of theirs with the logits of `reference(tokens)`; and the same folder again, from ours."""
    ours, back = folder / "ours", folder / "back"
    architecture, _ = import_from(source, ours, tokenizer="bytes")
    assert architecture.name == name
    tokens = torch.randint(VOCAB, (2, LENGTH), generator=torch.Generator().manual_seed(0))
    result = Comparison(logits_agree(load_run(ours).to(dtype), reference(tokens), tokens))
    export_to(ours, back, name, on_note=print)
    wanted, found = (load_file(each / "model.safetensors") for each in (source, back))
    result.changed = sorted(wanted.keys() ^ found.keys())
    result.changed += [key for key in wanted.keys() & found.keys() if not exactly(wanted[key], found[key])]
    return result


def exactly(a, b):
    return a.dtype == b.dtype and a.shape == b.shape and torch.equal(a, b)


@contextmanager
def computing_in(dtype):
    """What they compute in float32 whatever the dtype is then of this one, if it is float64."""
    usual = torch.get_default_dtype()
    with pytest.MonkeyPatch.context() as patch:
        if dtype == torch.float64:
            patch.setattr(torch.Tensor, "float", torch.Tensor.double)
            for name in ("float32", "float"):
                patch.setattr(torch, name, torch.float64)
        torch.set_default_dtype(dtype)
        try:
            yield
        finally:
            torch.set_default_dtype(usual)
