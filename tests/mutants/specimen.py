"""The specimens: two small healthy mixers, which mutants change in one place each.

The first is retention whose decay depends on the token, with a denominator, in all paradigms:

    q, k, v, a = x W by head;  q and k get length 1 and turn by the angle n theta at position n;  a_n = log sigmoid(a)
    S_n = exp(a_n) S_{n-1} + k_n^T v_n        z_n = exp(a_n) z_{n-1} + 1
    o_n = q_n S_n / z_n                       y   = o W_O

The second is attention of one head with a growing cache, in one paradigm. Both are plain torch, with a method for
everything that a mixer may get wrong. Notation: B rows, H heads, T tokens, S slots, D channels, K key width, V value
width; heads come before tokens.
"""

from typing import ClassVar, Literal, NamedTuple

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from pydantic import Field
from torch import Tensor, nn

from seqmix import ContractError, MixerConfig, Paradigm, SequenceMixer, Traits


class SpecimenConfig(MixerConfig):
    kind: Literal["specimen"] = "specimen"
    n_heads: int = Field(default=2, gt=0)
    denominator: bool = True
    """Whether outputs are divided by the sum of what decays have left of every token's 1."""
    chunk_size: int = Field(default=4, gt=0)
    """Chunk length in tokens; changes the cost, never the result."""
    paradigm: Paradigm = Field(default=Paradigm.CHUNKWISE, strict=False)

    layer: ClassVar[type["Specimen"]]

    @property
    def traits(self) -> Traits:
        return Traits(paradigms=frozenset(Paradigm), state="constant", packing=True, shift_invariant=True)

    def build(self, d_model: int, *, layer_idx: int, n_layers: int) -> "Specimen":
        if d_model % (2 * self.n_heads):
            raise ContractError(f"{self.n_heads} heads of even width do not divide d_model = {d_model}")
        return self.layer(self, d_model)


class SpecimenState(NamedTuple):
    """The state of the specimen: a summary of the processed prefix."""

    memory: Float[Tensor, "B H K V"]
    """S."""
    weight: Float[Tensor, "B H"]
    """z."""
    position: Int[Tensor, " B"]


class Specimen(SequenceMixer[SpecimenState]):
    def __init__(self, config: SpecimenConfig, d_model: int) -> None:
        super().__init__(config)
        self.config = config
        self.width = d_model // config.n_heads
        self.in_proj = nn.Linear(d_model, 3 * d_model, bias=False)
        self.decay_proj = nn.Linear(d_model, config.n_heads)
        self.out_proj = nn.Linear(d_model, d_model, bias=False)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        for projection in (self.in_proj, self.decay_proj, self.out_proj):
            nn.init.xavier_uniform_(projection.weight)
        # a memory of hundreds of tokens: in a short one an error decays
        nn.init.constant_(self.decay_proj.bias, 6.0)

    def init_state(self, batch_size: int, *, max_length: int | None = None) -> SpecimenState:
        heads, like = self.config.n_heads, {"device": self.device, "dtype": self.state_dtype}
        return SpecimenState(
            torch.zeros(batch_size, heads, self.width, self.width, **like),
            torch.zeros(batch_size, heads, **like),
            torch.zeros(batch_size, device=self.device, dtype=torch.int64),
        )

    def flops(self, length: int, paradigm: Paradigm, context: int = 0) -> int:
        weights = sum(p.weight.numel() for p in (self.in_proj, self.decay_proj, self.out_proj))
        size = {Paradigm.RECURRENT: 0, Paradigm.CHUNKWISE: self.config.chunk_size, Paradigm.PARALLEL: length}[paradigm]
        whole, ragged = divmod(length, size) if size else (0, 0)
        pairs = whole * size**2 + ragged**2
        # scores and their product with the values; the state is read, and written
        return 2 * length * weights + self.config.n_heads * 4 * (pairs * self.width + length * self.width**2)

    def mix(self, x, call):
        packed = None if call.documents is None else call.documents.of_token
        state = self.before(call.state, call.rows(len(x)))
        qk, v, a = self.heads(x)
        q, k = self.turn(self.unit(qk), self.positions(state, x, call)).chunk(2, dim=1)
        # autocast would carry the state in low precision
        with torch.autocast(x.device.type, enabled=False):
            tokens = [part.to(self.wide(x)) for part in (q, k, v, a, torch.ones_like(a))]
            if packed is not None:
                tokens = self.unpack(tokens, packed, len(state.position))
            o, z, memory, weight = self.attend(call.paradigm, tokens, state)
            if packed is not None:
                o, z = self.pack(o, packed), self.pack(z, packed)
            o = self.divide(o, z)
        y = self.out_proj(o.to(v.dtype).transpose(1, 2).flatten(2))
        return y, SpecimenState(memory, weight, self.advanced(state, x, call))

    def before(self, state, rows):
        """The state before the segment; None is the initial state."""
        return self.init_state(rows) if state is None else state

    def unpack(self, tokens, packed, rows):
        """One row per document, of all tokens: those of others write nothing and do not decay."""
        mine = (packed == torch.arange(rows, device=packed.device)[:, None])[:, None]
        q, *rest = tokens
        return [q, *(torch.where(mine[..., None] if x.ndim == 4 else mine, x, 0) for x in rest)]

    def pack(self, x, packed):
        """Of every token what its own document's row has, [1 H T ...]."""
        return x.transpose(1, 2)[packed, torch.arange(len(packed), device=packed.device)].transpose(0, 1)[None]

    def heads(self, x):
        """Queries with keys [B 2H T K], values [B H T V] and log-decays [B H T]."""
        qkv = self.in_proj(x).unflatten(-1, (-1, self.width)).transpose(1, 2)
        qk, v = qkv.split((2 * self.config.n_heads, self.config.n_heads), dim=1)
        return qk, v, F.logsigmoid(self.decay_proj(x).transpose(1, 2))

    def unit(self, x):
        return F.normalize(x, dim=-1, eps=1e-6)

    def positions(self, state, x, call):
        return call.positions(x, state.position)

    def angles(self, positions):
        """[B 1 T K/2], float64: a float32 angle is off by 2e-2 at position 1e6."""
        pairs = torch.arange(self.width // 2, device=positions.device, dtype=torch.float64)
        return positions[:, None, :, None].to(torch.float64) * 100 ** -(2 * pairs / self.width)

    def turn(self, x, positions):
        angles = self.angles(positions)
        cos, sin = angles.cos().to(x.dtype), angles.sin().to(x.dtype)
        a, b = x[..., 0::2], x[..., 1::2]
        return torch.stack((a * cos - b * sin, a * sin + b * cos), dim=-1).flatten(-2)

    def wide(self, x):
        """The dtype of the map."""
        return torch.promote_types(x.dtype, torch.float32)

    def advanced(self, state, x, call):
        return call.advance(x, state.position)

    def attend(self, paradigm, tokens, state):
        compute = self.parallel if paradigm is Paradigm.PARALLEL else self.chunkwise
        compute = self.recurrent if paradigm is Paradigm.RECURRENT else compute
        return compute(tokens, state.memory, state.weight)

    def parallel(self, tokens, memory, weight):
        """All pairs of tokens at once."""
        q, k, v, a, one = tokens
        left, decayed = self.decays(a), a.cumsum(-1).exp()
        o = (self.scores(q, k) * left) @ v + decayed[..., None] * (q @ memory)
        z = (left * one[..., None, :]).sum(-1) + decayed * weight[..., None]
        memory = (k * left[..., -1, :, None]).mT @ v + decayed[..., -1, None, None] * memory
        # a view would keep all of z alive
        return o, z, memory, z[..., -1].clone()

    def recurrent(self, tokens, memory, weight):
        """Token by token, by the definition."""
        outputs, weights = [], []
        for q, k, v, a, one in zip(*(x.split(1, dim=2) for x in tokens), strict=True):
            memory = a.exp()[..., None] * memory + k.mT @ v
            weight = (a.exp() * weight[..., None] + one)[..., 0]
            outputs.append(q @ memory)
            weights.append(weight)
        return torch.cat(outputs, dim=2), torch.stack(weights, dim=2), memory, weight

    def chunkwise(self, tokens, memory, weight):
        """All pairs inside a chunk, and the state between chunks; a ragged last chunk is shorter."""
        outputs, weights = [], []
        for chunk in zip(*(x.split(self.config.chunk_size, dim=2) for x in tokens), strict=True):
            o, z, memory, weight = self.parallel(chunk, memory, weight)
            outputs.append(o)
            weights.append(z)
        return torch.cat(outputs, dim=2), torch.cat(weights, dim=2), memory, weight

    def scores(self, q, k):
        return q @ k.mT

    def decays(self, a):
        """What is left of token j at token i, [B H T T]; 0 where j comes after i."""
        # every stretch is a sum of its own: the difference of two running sums rounds small decays after large ones
        between = a[..., None].expand(*a.shape, a.shape[-1]).tril(-1).cumsum(-2)
        future = torch.ones(between.shape[-2:], dtype=torch.bool, device=a.device).triu(1)
        return between.masked_fill(future, -torch.inf).exp()

    def divide(self, o, z):
        return o / z[..., None] if self.config.denominator else o


SpecimenConfig.layer = Specimen


class CachedConfig(MixerConfig):
    kind: Literal["cached"] = "cached"
    paradigm: Paradigm = Field(default=Paradigm.PARALLEL, strict=False)

    layer: ClassVar[type["Cached"]]

    @property
    def traits(self) -> Traits:
        return Traits(paradigms=frozenset([Paradigm.PARALLEL]), state="growing", packing=False, shift_invariant=True)

    def build(self, d_model: int, *, layer_idx: int, n_layers: int) -> "Cached":
        return self.layer(self, d_model)


class Cache(NamedTuple):
    """The KV cache."""

    keys: Float[Tensor, "B S D"]
    values: Float[Tensor, "B S D"]
    length: Int[Tensor, " B"]


class Cached(SequenceMixer[Cache]):
    def __init__(self, config: CachedConfig, d_model: int) -> None:
        super().__init__(config)
        self.in_proj = nn.Linear(d_model, 3 * d_model, bias=False)
        self.out_proj = nn.Linear(d_model, d_model, bias=False)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        for projection in (self.in_proj, self.out_proj):
            nn.init.xavier_uniform_(projection.weight)

    def init_state(self, batch_size: int, *, max_length: int | None = None) -> Cache:
        empty = torch.zeros(batch_size, 0, self.out_proj.in_features, device=self.device, dtype=self.dtype)
        return Cache(empty, empty.clone(), torch.zeros(batch_size, device=self.device, dtype=torch.int64))

    def flops(self, length: int, paradigm: Paradigm, context: int = 0) -> int:
        weights = self.in_proj.weight.numel() + self.out_proj.weight.numel()
        return 2 * length * weights + 4 * length * (context + length) * self.out_proj.in_features

    def mix(self, x, call):
        q, k, v = self.heads(x)
        cache = self.extended(call.state, k, v)
        scores = (q @ cache.keys.mT).to(torch.promote_types(q.dtype, torch.float32)) * q.shape[-1] ** -0.5
        weights = self.masked(scores, ~self.seen(*scores.shape[1:], x.device)).softmax(-1)
        return self.out_proj(weights.to(cache.values.dtype) @ cache.values), cache

    def heads(self, x):
        return self.in_proj(x).chunk(3, dim=-1)

    def extended(self, state, k, v):
        """The cache with new keys and values; autocast makes those narrower than a cache is."""
        keys, values, length = self.init_state(len(k)) if state is None else state
        keys, values = (torch.cat((old, new.to(old.dtype)), dim=1) for old, new in ((keys, k), (values, v)))
        return Cache(keys, values, length + k.shape[1])

    def masked(self, scores, unseen):
        return scores.masked_fill(unseen, -torch.inf)

    def seen(self, queries, keys, device):
        """Which keys a query sees: the last query sees all."""
        return torch.ones(queries, keys, dtype=torch.bool, device=device).tril(keys - queries)


CachedConfig.layer = Cached
