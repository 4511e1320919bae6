"""The layers of a model over one text, each as numbers: weights, reach, decays, gates, states, gradients.

Nothing here knows a mixer by its name: weights come from the ops that a mixer calls (`mixers/influence.py`), or are
gradients with respect to its inputs; states are leaves of its state; gates are those of `GatedNorm`.
"""

from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor

from ..mixers import Paradigm, SequenceMixer
from ..mixers.influence import Seen, captured, reach_of, weights_of
from ..mixers.parts import GatedNorm
from ..mixers.state import is_inexact, to_dict
from ..models import LanguageModel
from ..ops.runtime.recording import recorded

ROWS = 64
POINTS = 16
"""Tokens whose weights are measured, and at which states are, at most; spread evenly."""
OPEN = 0.999
SHUT = 0.01
"""A decay beyond these, and a gate's sigmoid beyond 0.95 and 0.05, is called saturated."""


@dataclass
class StateView:
    """One leaf of a state over the text."""

    name: str
    norms: list[float] = field(default_factory=list)
    """The Frobenius norm, after each of `LayerView.points` tokens."""
    ranks: list[float] = field(default_factory=list)
    """The effective rank, e to the entropy of the singular values (Roy and Vetterli 2007), the mean of the heads."""


@dataclass
class LayerView:
    """One layer."""

    layer: int
    mixer: str
    queries: list[int]
    """Tokens whose weights are measured."""
    maps: Float[Tensor, "H Q T"] | None = None
    """Absolute weights with which outputs at the queries read all tokens, each row over its sum; None without
    gradients."""
    of_heads: bool = False
    """Whether they are the weights of an op's heads; else norms of gradients with respect to the mixer's inputs."""
    reach: list[float] = field(default_factory=list)
    """The mean distance of what a head reads, in tokens."""
    reach_90: list[float] = field(default_factory=list)
    """The distance within which 90 % of a head's weight lies, the mean of the queries."""
    decays: list[float] = field(default_factory=list)
    """By head, e to the mean log-decay over the text; empty where nothing decays."""
    decay_reach: list[float] = field(default_factory=list)
    """The reach of such a decay alone: gamma / (1 - gamma); 0 of one that keeps nothing."""
    saturated_decays: float | None = None
    """The share of decays above 0.999 or below 0.01."""
    saturated_gates: float | None = None
    """The share of the output gate's sigmoids above 0.95 or below 0.05."""
    points: list[int] = field(default_factory=list)
    states: list[StateView] = field(default_factory=list)
    gradient_norm: float = 0.0
    """Of the layer's parameters, of the mean loss of the text."""
    stream_gradient_norm: float = 0.0
    """Of the residual stream after the layer."""

    def as_json(self) -> dict[str, Any]:
        """The numbers, without maps."""
        return asdict(replace(self, maps=None))


def look(model: LanguageModel, tokens: Int[Tensor, "1 T"]) -> list[LayerView]:
    """Run a sequence of T >= 2 tokens through a model in evaluation mode, and measure every layer."""
    mixers = {i: block.mixer for i, block in enumerate(model.blocks)}
    with captured(mixers) as seen, torch.no_grad():
        model(tokens)
    views = [_layer(i, mixer, seen[i]) for i, mixer in mixers.items()]
    _gradients(model, tokens, views)
    return views


def _layer(number: int, mixer: SequenceMixer, seen: Seen) -> LayerView:
    x = seen.x
    length = seen.x.shape[1]
    queries = spread(length, ROWS)
    view = LayerView(number, mixer.kind, queries)
    if mixer.traits.differentiable:
        weights, view.of_heads = weights_of(mixer, x, queries, **seen.options)
        size = weights[0].abs().double()
        view.maps = (size / size.sum(-1, keepdim=True).clamp(min=1e-30)).cpu()
        view.reach = reach_of(weights, queries).tolist()
        view.reach_90 = _within(view.maps, queries, 0.9).tolist()
    gates: list[Tensor] = []
    norms = [module for module in mixer.modules() if isinstance(module, GatedNorm) and module.gate != "none"]
    handles = [norm.register_forward_hook(lambda module, args, output: gates.append(args[1])) for norm in norms]  # noqa: ARG005
    with torch.no_grad(), recorded() as calls:
        mixer(x, **seen.options)
    for handle in handles:
        handle.remove()
    if opened := [gate.float().sigmoid() for gate in gates if gate is not None]:
        view.saturated_gates = _share([(gate < 0.05) | (gate > 0.95) for gate in opened])
    if found := [call.log_decay.double() for call in calls if call.log_decay is not None]:
        by_head = [
            a if a.ndim == 1 else a.flatten(3).mean(3)[0].mean(0) if a.ndim == 4 else a[0].mean(0) for a in found
        ]
        gammas = torch.cat(by_head).exp()
        view.decays = gammas.tolist()
        view.decay_reach = (gammas / (1 - gammas).clamp(min=1e-12)).tolist()
        view.saturated_decays = _share([(a.exp() < SHUT) | (a.exp() > OPEN) for a in found])
    _states(mixer, seen, view)
    return view


@torch.no_grad()
def _states(mixer: SequenceMixer, seen: Seen, view: LayerView) -> None:
    """Norms and ranks of a layer's state over the text."""
    if not mixer.traits.has_state:
        return
    how = mixer.traits.prefer(Paradigm.CHUNKWISE, Paradigm.PARALLEL, from_state=True)
    state = None
    before = 0
    found = dict[str, StateView]()
    view.points = [n + 1 for n in spread(seen.x.shape[1], POINTS)]
    for point in view.points:
        options = {name: value[:, before:point] for name, value in seen.options.items()}
        part = seen.x[:, before:point]
        # from nothing, a paradigm that takes no state would do; the same one keeps rounding equal
        _, state = mixer(part, state, paradigm=how, return_state=True, **options)
        before = point
        for name, leaf in to_dict(state).items() if state is not None else ():
            if not is_inexact(leaf) or not leaf.numel():
                continue
            one = found.setdefault(name, StateView(name))
            one.norms.append(leaf.double().norm().item())
            one.ranks.append(effective_rank(_matrices(name, leaf)))
    view.states = list(found.values())


def _matrices(name: str, leaf: Tensor) -> Tensor:
    """A leaf of one sequence as matrices, one per head: [H K V]."""
    if name.rpartition(".")[2] in ("keys", "values"):  # of a cache, [B S G K]
        leaf = leaf.transpose(1, 2)
    return leaf.reshape(-1, *leaf.shape[-2:]) if leaf.ndim >= 3 else leaf.reshape(1, 1, -1)


def effective_rank(matrices: Float[Tensor, "H K V"]) -> float:
    """e to the entropy of the singular values over their sum, the mean of the matrices; 0 of zeros."""
    values = torch.linalg.svdvals(matrices.double())
    shares = values / values.sum(-1, keepdim=True).clamp(min=1e-30)
    ranks = torch.special.entr(shares).sum(-1).exp() * (values.sum(-1) > 0)
    return ranks.mean().item()


def _gradients(model: LanguageModel, tokens: Tensor, views: Sequence[LayerView]) -> None:
    """Gradient norms of the layers' parameters, and of the residual stream after each."""
    blocks = dict(enumerate(model.blocks))
    with torch.enable_grad(), captured(blocks) as seen:
        loss = model(tokens[:, :-1], targets=tokens[:, 1:]).loss
    assert loss is not None
    for view, block in zip(views, model.blocks, strict=True):
        if not seen[view.layer].output.requires_grad:
            continue
        inputs = [seen[view.layer].output, *(p for p in block.parameters() if p.requires_grad)]
        found = torch.autograd.grad(loss, inputs, retain_graph=True, allow_unused=True)
        norms = [0.0 if gradient is None else gradient.norm().item() for gradient in found]
        view.stream_gradient_norm = norms[0]
        view.gradient_norm = sum(norm**2 for norm in norms[1:]) ** 0.5


def _within(maps: Float[Tensor, "H Q T"], queries: Sequence[int], share: float) -> Float[Tensor, " H"]:
    """The distance within which a share of each row's weight lies, the mean of the queries."""
    rows = []
    for row, n in enumerate(queries):
        nearest_first = maps[:, row, : n + 1].flip(-1).cumsum(-1)
        rows.append((nearest_first < share * nearest_first[:, -1:]).sum(-1).double())
    return torch.stack(rows).mean(0)


def _share(marked: Sequence[Tensor]) -> float:
    return sum(int(each.sum()) for each in marked) / max(sum(each.numel() for each in marked), 1)


def spread(length: int, most: int) -> list[int]:
    """At most so many indices below a length, spread evenly, the last among them."""
    count = min(length, most)
    return [round((i + 1) * length / count) - 1 for i in range(count)]
