"""Measurements of every layer of a model on one text: weights, reach, decays, gates, states, gradients.

The same code measures all kinds of mixers. Weights come from the ops that a mixer calls
(`mixers/base/influence.py`), or are gradients with respect to
the mixer's inputs. States are the tensors of its state; gates are those of `GatedNorm`.
"""

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.utils._pytree import tree_leaves

from ...mixers import Paradigm, SequenceMixer
from ...mixers.base.influence import ModuleCall, reach_of, record_calls, weights_of
from ...mixers.base.layer_call import LayerCall
from ...mixers.base.state import is_inexact, to_dict
from ...mixers.parts import GatedNorm
from ...models import LanguageModel
from ...ops.runtime.recording import recorded

ROWS = 64
"""Maximum number of query tokens whose attention weights are measured, spread evenly over the text."""
POINTS = 16
"""Maximum number of positions at which states are measured, spread evenly over the text."""
OPEN = 0.999
"""Bound above which a decay counts as saturated: the state forgets almost nothing."""
SHUT = 0.01
"""Bound below which a decay counts as saturated: the state forgets almost everything."""


@dataclass
class StateView:
    """Measurements of one tensor of a layer's state over the text."""

    name: str
    """Name of the tensor in the state."""
    norms: list[float] = field(default_factory=list)
    """Frobenius norms of the tensor, one for each number of tokens in `LayerView.points`."""
    ranks: list[float] = field(default_factory=list)
    """Effective ranks, one for each number of tokens in `LayerView.points`: the exponential of the entropy of the
    singular values (Roy and Vetterli 2007), mean of heads."""


@dataclass
class LayerView:
    """Measurements of one layer on one text, from `look`."""

    layer: int
    """Index of the layer, from 0."""
    mixer: str
    """Kind of the mixer, such as "retention"."""
    queries: list[int]
    """Indices, from 0, of the query tokens whose weights are measured."""
    maps: Float[Tensor, "H Q T"] | None = None
    """Absolute weight of each of the T tokens in the output at each of the Q queries, per head; each row is divided by
    its sum. None if the mixer is not differentiable."""
    of_heads: bool = False
    """True if `maps` has the weights of a mixer's heads; False if it has norms of gradients with respect to the mixer's
    inputs, as a single head."""
    reach: list[float] = field(default_factory=list)
    """Mean distance, by weight, from a query to the tokens that a head reads, in tokens; one per head."""
    reach_90: list[float] = field(default_factory=list)
    """Distance within which 90 % of a head's weight lies, mean of the queries, in tokens; one per head."""
    decays: list[float] = field(default_factory=list)
    """Geometric mean of the decays over the text, one per head; empty if the mixer has no decays."""
    decay_reach: list[float] = field(default_factory=list)
    """Reach of each mean decay gamma alone: gamma / (1 - gamma), in tokens."""
    saturated_decays: float | None = None
    """Share of decays above 0.999 or below 0.01; None if the mixer has no decays."""
    saturated_gates: float | None = None
    """Share of the output gate's sigmoids above 0.95 or below 0.05; None if the mixer has no output gate."""
    points: list[int] = field(default_factory=list)
    """Numbers of tokens after which the state is measured."""
    states: list[StateView] = field(default_factory=list)
    """Measurements of each floating-point tensor of the state; empty if the mixer has no state."""
    gradient_norm: float = 0.0
    """Norm of the mean loss's gradient with respect to the layer's parameters."""
    stream_gradient_norm: float = 0.0
    """Norm of the mean loss's gradient with respect to the residual stream after the layer; with attention residuals,
    to the sources that the later branches may read."""

    def as_json(self) -> dict[str, Any]:
        """Return all fields except the maps, for JSON."""
        return asdict(replace(self, maps=None))


def look(model: LanguageModel, tokens: Int[Tensor, "1 T"]) -> list[LayerView]:
    """Run a sequence of T >= 2 tokens through a model, which must be in evaluation mode, and measure every layer."""
    mixers = {i: block.mixer for i, block in enumerate(model.blocks)}
    with record_calls(mixers) as calls, torch.no_grad():
        model(tokens)
    views = [_measure_layer(i, mixer, calls[i]) for i, mixer in mixers.items()]
    _measure_gradients(model, tokens, views)
    return views


def _measure_layer(number: int, mixer: SequenceMixer, call: ModuleCall) -> LayerView:
    """Measure weights, decays, gates and states of a layer, from the call of its mixer on the text."""
    x = call.x
    length = call.x.shape[1]
    queries = spread(length, ROWS)
    view = LayerView(number, mixer.kind, queries)
    if mixer.traits.differentiable:
        weights, view.of_heads = weights_of(mixer, x, queries, call.outside)
        size = weights[0].abs().double()
        view.maps = (size / size.sum(-1, keepdim=True).clamp(min=1e-30)).cpu()
        view.reach = reach_of(weights, queries).tolist()
        view.reach_90 = _distance_of_share(view.maps, queries, 0.9).tolist()
    gates: list[Tensor] = []
    norms = [module for module in mixer.modules() if isinstance(module, GatedNorm) and module.gate != "none"]
    handles = [norm.register_forward_hook(lambda module, args, output: gates.append(args[1])) for norm in norms]  # noqa: ARG005
    with torch.no_grad(), recorded() as op_calls:
        mixer(x, call=call.outside)
    for handle in handles:
        handle.remove()
    if sigmoids := [gate.float().sigmoid() for gate in gates if gate is not None]:
        view.saturated_gates = _share_of_true([(gate < 0.05) | (gate > 0.95) for gate in sigmoids])
    if log_decays := [op_call.log_decay.double() for op_call in op_calls if op_call.log_decay is not None]:
        gammas = torch.cat([_mean_per_head(log_decay) for log_decay in log_decays]).exp()
        view.decays = gammas.tolist()
        view.decay_reach = (gammas / (1 - gammas).clamp(min=1e-12)).tolist()
        view.saturated_decays = _share_of_true([(a.exp() < SHUT) | (a.exp() > OPEN) for a in log_decays])
    _measure_states(mixer, call, view)
    return view


def _mean_per_head(log_decay: Tensor) -> Tensor:
    """Return the mean log-decay of each head [H] over the first sequence; log_decay is [H], [B T H] or [B T H K]."""
    if log_decay.ndim == 1:
        return log_decay
    if log_decay.ndim == 4:
        return log_decay.flatten(3).mean(3)[0].mean(0)
    return log_decay[0].mean(0)


@torch.no_grad()
def _measure_states(mixer: SequenceMixer, call: ModuleCall, view: LayerView) -> None:
    """Measure the norms and effective ranks of a layer's state over the text."""
    if not mixer.traits.has_state or mixer.takes_shared_kv:  # the earlier layer has the cache
        return
    paradigm = mixer.traits.prefer(Paradigm.CHUNKWISE, Paradigm.PARALLEL, from_state=True)
    state = None
    before = 0
    states = dict[str, StateView]()
    view.points = [n + 1 for n in spread(call.x.shape[1], POINTS)]
    for point in view.points:
        first, tokens = (
            None if values is None else values[:, before:point]
            for values in (call.outside.first_values, call.outside.token_values)
        )
        segment = call.x[:, before:point]
        # one paradigm for all segments, even for the first one without a state, so that rounding is the same in all
        asked = LayerCall(state, paradigm, return_state=True, first_values=first, token_values=tokens)
        state = mixer(segment, call=asked).state
        before = point
        for name, leaf in to_dict(state).items() if state is not None else ():
            if not is_inexact(leaf) or not leaf.numel():
                continue
            state_view = states.setdefault(name, StateView(name))
            state_view.norms.append(leaf.double().norm().item())
            state_view.ranks.append(effective_rank(_matrices(name, leaf)))
    view.states = list(states.values())


def _matrices(name: str, leaf: Tensor) -> Tensor:
    """Return a state tensor of one sequence as matrices, one per head: [H K V]."""
    if name.rpartition(".")[2] in ("keys", "values"):  # a cache has [B S G K]
        leaf = leaf.transpose(1, 2)
    return leaf.reshape(-1, *leaf.shape[-2:]) if leaf.ndim >= 3 else leaf.reshape(1, 1, -1)


def effective_rank(matrices: Float[Tensor, "H K V"]) -> float:
    """Return the exponential of the entropy of the normalised singular values, averaged over the matrices.

    A matrix of zeros counts as 0.
    """
    values = torch.linalg.svdvals(matrices.double())
    shares = values / values.sum(-1, keepdim=True).clamp(min=1e-30)
    ranks = torch.special.entr(shares).sum(-1).exp() * (values.sum(-1) > 0)
    return ranks.mean().item()


def _measure_gradients(model: LanguageModel, tokens: Tensor, views: Sequence[LayerView]) -> None:
    """Measure the gradient norms of the layers' parameters, and of the residual stream after each layer."""
    blocks = dict(enumerate(model.blocks))
    with torch.enable_grad(), record_calls(blocks) as calls:
        loss = model(tokens[:, :-1], targets=tokens[:, 1:]).loss
    assert loss is not None
    for view, block in zip(views, model.blocks, strict=True):
        leaves = tree_leaves(calls[view.layer].output)
        stream = [leaf for leaf in leaves if isinstance(leaf, Tensor) and leaf.requires_grad]
        if not stream:
            continue
        inputs = [*stream, *(p for p in block.parameters() if p.requires_grad)]
        gradients = torch.autograd.grad(loss, inputs, retain_graph=True, allow_unused=True)
        norms = [0.0 if gradient is None else gradient.norm().item() for gradient in gradients]
        view.stream_gradient_norm = math.hypot(*norms[: len(stream)])
        view.gradient_norm = sum(norm**2 for norm in norms[len(stream) :]) ** 0.5


def _distance_of_share(maps: Float[Tensor, "H Q T"], queries: Sequence[int], share: float) -> Float[Tensor, " H"]:
    """Return for each head the distance, in tokens, within which this share of a query's weight lies.

    It is the mean over the queries.
    """
    distances = []
    for row, n in enumerate(queries):
        nearest_first = maps[:, row, : n + 1].flip(-1).cumsum(-1)
        distances.append((nearest_first < share * nearest_first[:, -1:]).sum(-1).double())
    return torch.stack(distances).mean(0)


def _share_of_true(masks: Sequence[Tensor]) -> float:
    """Return the share of elements that are True, over all masks together."""
    return sum(int(mask.sum()) for mask in masks) / max(sum(mask.numel() for mask in masks), 1)


def spread(length: int, max_count: int) -> list[int]:
    """Return at most `max_count` indices below `length`, spread evenly; the last index is always included."""
    count = min(length, max_count)
    return [round((i + 1) * length / count) - 1 for i in range(count)]
