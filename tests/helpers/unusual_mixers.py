"""Right mixers that are unlike the built-in ones, in plain torch: the kit refuses none of them.

Notation: B rows, T tokens, D channels; u_t is a projection of token t, in the dtype of the state.
"""

from typing import ClassVar, Literal, NamedTuple

import torch
import torch.nn.functional as F
from pydantic import Field, create_model
from torch import nn

from seqmix import ContractError, MixerConfig, Paradigm, SequenceMixer, Traits
from seqmix.mixers.base.state import concatenate, select

UNUSUAL: list[MixerConfig] = []
RECURRENT, PARALLEL = frozenset([Paradigm.RECURRENT]), frozenset([Paradigm.RECURRENT, Paradigm.PARALLEL])


class UnusualConfig(MixerConfig):
    paradigm: Paradigm = Paradigm.RECURRENT
    layer: ClassVar[type["Unusual"]]

    @property
    def traits(self):
        usual = {"paradigms": RECURRENT, "state": "constant", "packing": False, "shift_invariant": True}
        return Traits(**(usual | self.layer.declares))

    def build(self, d_model, *, layer_idx, n_layers):
        return self.layer(self, d_model)


class Unusual(SequenceMixer):
    """Tokens are projected, go one by one through `token` or at once through `parallel`, and are projected again."""

    declares: ClassVar[dict] = {}
    inputs: ClassVar[int] = 1
    """u_t has so many times D numbers; none is no projections."""

    def __init_subclass__(cls, right=True):
        name = cls.__name__.lower()
        paradigm = next(p for p in (Paradigm.RECURRENT, *Paradigm) if p in cls.declares.get("paradigms", RECURRENT))
        more = {"kind": (Literal[name], name), "paradigm": (Paradigm, Field(paradigm, strict=False))}
        # no field has a docstring, and to look for them takes a tenth of a second per class
        kwargs = {"use_attribute_docstrings": False}
        cls.config_class = create_model(cls.__name__ + "Config", __base__=UnusualConfig, __cls_kwargs__=kwargs, **more)
        cls.config_class.layer = cls
        globals()[cls.config_class.__name__] = cls.config_class
        if right:
            UNUSUAL.append(cls.config_class())

    def __init__(self, config, d_model):
        super().__init__(config)
        self.width = d_model
        if self.inputs:
            self.in_proj, self.out_proj = nn.Linear(d_model, self.inputs * d_model), nn.Linear(d_model, d_model)
        self.parts()
        self.reset_parameters()

    def parts(self):
        """What it has beside projections."""

    def reset_parameters(self):
        for module in self.children():
            module.reset_parameters()

    def zeros(self, *shape, dtype=None):
        return torch.zeros(shape, dtype=dtype or self.state_dtype, device=self.device)

    def init_state(self, batch_size, *, max_length=None):
        return Memory(self.zeros(batch_size, self.width))

    def flops(self, length, paradigm, context=0):
        weights = self.inputs and (self.inputs + 1) * self.width**2
        return 2 * (length * weights + self.products(length, paradigm))

    def products(self, length, paradigm):
        """Multiplications of the matrix products between the projections."""
        return 0

    def mix(self, x, call):
        state = self.init_state(call.rows(len(x))) if call.state is None else call.state
        u = self.in_proj(x) if self.inputs else x
        with torch.autocast(x.device.type, enabled=False):
            mixed = self.parallel if call.paradigm is Paradigm.PARALLEL else self.recurrent
            o, state = (
                mixed(u.to(self.state_dtype), state) if call.documents is None else self.packed(mixed, u, state, call)
            )
        o = o.to(u.dtype)
        return self.out_proj(o) if self.inputs else o, state

    def packed(self, mixed, u, state, call):
        """Documents one by one."""
        outputs, states = [], []
        for n, document in enumerate(u.to(self.state_dtype).split(call.cu_seqlens.diff().tolist(), dim=1)):
            row = select(state, torch.tensor([n]))
            o, row = mixed(document, row) if document.shape[1] else (document[..., : self.width], row)
            outputs.append(o)
            states.append(row)
        return torch.cat(outputs, dim=1), concatenate(states)

    def recurrent(self, u, state):
        outputs = []
        for token in u.unbind(1):
            o, state = self.token(token, state)
            outputs.append(o)
        return torch.stack(outputs, dim=1), state


def between(log_decay):
    """The sum of [B T D] from token j + 1 to token i, [B D T T]; -inf where j comes after i."""
    x = log_decay.mT[..., None].expand(-1, -1, -1, log_decay.shape[1])
    return x.tril(-1).cumsum(-2).masked_fill(torch.ones_like(x, dtype=torch.bool).triu(1), -torch.inf)


class Memory(NamedTuple):
    memory: torch.Tensor


class LearnedStart(Unusual):
    """h_t = h_{t-1} / 2 + u_t from a learned h_0."""

    declares: ClassVar = {"packing": True, "compiles": False}

    def parts(self):
        self.start = nn.Parameter(torch.empty(self.width))

    def reset_parameters(self):
        super().reset_parameters()
        nn.init.normal_(self.start)

    def init_state(self, batch_size, *, max_length=None):
        return Memory(self.start.to(self.state_dtype).expand(batch_size, -1))

    def token(self, u, state):
        h = state.memory / 2 + u
        return h, Memory(h)


class NoState(LearnedStart):
    """The parallel form has no place for a state."""

    declares: ClassVar = {"paradigms": PARALLEL, "parallel_from_state": False, "packing": True, "compiles": False}

    def products(self, length, paradigm):
        return length**2 * self.width if paradigm is Paradigm.PARALLEL else 0

    def parallel(self, u, state):
        t = torch.arange(u.shape[1], device=u.device)
        weights = (0.5 ** (t[:, None] - t).to(u.dtype)).tril()
        h = weights @ u + 0.5 ** (t[:, None] + 1) * self.start.to(u.dtype)
        return h, Memory(h[:, -1].clone())


class LogSpaceGRU(Unusual):
    """minGRU on logarithms: log h_t = log(exp(log(1 - z_t) + log h_{t-1}) + exp(log z_t + log g(u_t))), h_0 = 0."""

    declares: ClassVar = {"paradigms": PARALLEL}
    inputs = 2

    def init_state(self, batch_size, *, max_length=None):
        return Memory(self.zeros(batch_size, self.width) - torch.inf)

    def gates(self, u):
        z, g = u.chunk(2, dim=-1)
        log_g = torch.where(g >= 0, (g.relu() + 0.5).log(), -F.softplus(-g))
        return -F.softplus(z), log_g - F.softplus(-z)

    def token(self, u, state):
        kept, added = self.gates(u)
        h = torch.logaddexp(kept + state.memory, added)
        return h.exp(), Memory(h)

    def parallel(self, u, state):
        kept, added = self.gates(u)
        each = between(kept) + added.mT[:, :, None]
        h = torch.cat((each, (kept.cumsum(1) + state.memory[:, None]).mT[..., None]), dim=-1).logsumexp(-1).mT
        return h.exp(), Memory(h[:, -1].clone())


class S4D(Unusual):
    """x_t = a x_{t-1} + u_t, y_t = Re(c x_t) with complex a and c; in parallel a convolution by FFT."""

    declares: ClassVar = {"paradigms": PARALLEL}

    def parts(self):
        self.decay, self.angle = nn.Parameter(torch.empty(self.width, 4)), nn.Parameter(torch.empty(self.width, 4))
        self.c = nn.Parameter(torch.empty(self.width, 4, 2))

    def reset_parameters(self):
        super().reset_parameters()
        nn.init.constant_(self.decay, -1.0)
        self.angle.data.copy_(torch.arange(4) / 4)
        nn.init.normal_(self.c)

    def init_state(self, batch_size, *, max_length=None):
        return Memory(
            self.zeros(batch_size, self.width, 4, dtype=torch.promote_types(self.state_dtype, torch.complex64))
        )

    def weights(self):
        wide = [part.to(self.state_dtype) for part in (self.decay, self.angle, self.c)]
        return torch.complex(-wide[0].exp(), wide[1]), torch.view_as_complex(wide[2])

    def token(self, u, state):
        log_a, c = self.weights()
        x = log_a.exp() * state.memory + u[..., None]
        return (c * x).real.sum(-1), Memory(x)

    def parallel(self, u, state):
        (log_a, c), length = self.weights(), u.shape[1]
        t = torch.arange(length + 1, device=u.device, dtype=u.dtype)[:, None, None]
        powers = (log_a * t).exp()
        kernel = (c * powers[:-1]).real.sum(-1)
        y = torch.fft.irfft(torch.fft.rfft(u, 2 * length, 1) * torch.fft.rfft(kernel, 2 * length, 0), 2 * length, 1)
        y = y[:, :length] + (c * powers[1:] * state.memory[:, None]).real.sum(-1)
        last = (powers[:-1].flip(0) * u[..., None]).sum(1)
        return y, Memory(powers[-1] * state.memory + last)


class Ring(NamedTuple):
    keys: torch.Tensor
    values: torch.Tensor
    filled: torch.Tensor
    slot: torch.Tensor


class SinksInARing(Unusual):
    """Attention to the first two tokens and the last four: `slot` is the next to be written, from 5 back to 2."""

    inputs = 3

    def init_state(self, batch_size, *, max_length=None):
        keys = self.zeros(batch_size, 6, self.width, dtype=self.dtype)
        filled, slot = self.zeros(batch_size, 6, dtype=torch.bool), self.zeros(batch_size, dtype=torch.int64)
        return Ring(keys, keys.clone(), filled, slot)

    def products(self, length, paradigm):
        return length * 12 * self.width

    def token(self, u, state):
        q, k, v = u.chunk(3, dim=-1)
        written = F.one_hot(state.slot, 6).bool()
        keys, values = (
            torch.where(written[..., None], new.to(old.dtype)[:, None], old)
            for new, old in ((k, state.keys), (v, state.values))
        )
        filled = state.filled | written
        scores = (q[:, None] @ keys.to(q.dtype).mT)[:, 0].masked_fill(~filled, -torch.inf)
        o = (scores.softmax(-1)[:, None] @ values.to(q.dtype))[:, 0]
        return o, Ring(keys, values, filled, torch.where(state.slot < 5, state.slot + 1, 2))


class NegativeDecays(Unusual):
    """y_t = h_{t-1} and h_t = a h_{t-1} + u_t with a in (-1, 1), and no other parameter: nothing is drawn."""

    declares: ClassVar = {"paradigms": PARALLEL}
    inputs = 0

    def parts(self):
        self.decay = nn.Parameter(torch.empty(self.width))

    def reset_parameters(self):
        self.decay.data.copy_(torch.linspace(-2, 2, self.width))

    def token(self, u, state):
        return state.memory, Memory(self.decay.to(u.dtype).tanh() * state.memory + u)

    def parallel(self, u, state):
        t, a = torch.arange(u.shape[1], device=u.device)[:, None], self.decay.to(u.dtype).tanh()
        weights = torch.where(t >= t.mT, a[:, None, None] ** (t - t.mT).clamp(min=0), 0)
        h = (weights.permute(1, 2, 0) * u[:, None]).sum(2) + a ** (t + 1) * state.memory[:, None]
        return torch.cat((state.memory[:, None], h[:, :-1]), dim=1), Memory(h[:, -1].clone())


class MLSTMState(NamedTuple):
    memory: torch.Tensor
    weight: torch.Tensor
    largest: torch.Tensor


class MLSTM(Unusual):
    """xLSTM's matrix memory, stabilised by the largest logarithm m of a gate: what is stored is C e^-m and n e^-m."""

    declares: ClassVar = {"paradigms": PARALLEL}
    inputs = 4

    def init_state(self, batch_size, *, max_length=None):
        memory = self.zeros(batch_size, self.width, self.width)
        return MLSTMState(memory, memory[:, 0].clone(), memory[:, 0, 0] - torch.inf)

    def products(self, length, paradigm):
        recurrent = paradigm is Paradigm.RECURRENT
        return length * self.width**2 * (1 if recurrent else 2) + (0 if recurrent else 2 * length**2 * self.width)

    def heads(self, u):
        q, k, v, gates = u.chunk(4, dim=-1)
        return q, k / self.width**0.5, v, gates[..., 0], F.logsigmoid(gates[..., 1] + 3)

    def divide(self, h, weight, largest):
        return h / torch.maximum(weight.abs(), (-largest).clamp(max=30).exp())[..., None]

    def token(self, u, state):
        q, k, v, i, f = self.heads(u)
        m = torch.maximum(f + state.largest, i)
        kept, k = (f + state.largest - m).exp()[:, None], (i - m).exp()[:, None] * k
        memory = kept[..., None] * state.memory + k[..., None] * v[:, None]
        weight = kept * state.weight + k
        return self.divide((q[:, None] @ memory)[:, 0], (q * weight).sum(-1), m), MLSTMState(memory, weight, m)

    def parallel(self, u, state):
        q, k, v, i, f = self.heads(u)
        passed = between(f[..., None])[:, 0] + i[:, None]
        before = f.cumsum(1) + state.largest[:, None]
        m = torch.maximum(before, passed.amax(-1))
        left, kept = (passed - m[..., None]).exp(), (before - m).exp()
        scores = torch.einsum("bid,bjd->bij", q, k) * left
        h = scores @ v + kept[..., None] * (q @ state.memory)
        o = self.divide(h, scores.sum(-1) + kept * (q * state.weight[:, None]).sum(-1), m)
        k, kept = left[:, -1, :, None] * k, kept[:, -1, None]
        memory = torch.einsum("bjk,bjv->bkv", k, v) + kept[..., None] * state.memory
        return o, MLSTMState(memory, k.sum(1) + kept * state.weight, m[:, -1].clone())


class TorchGRU(Unusual):
    """`nn.GRU`, which torch.compile does not take."""

    declares: ClassVar = {"compiles": False}

    def parts(self):
        self.gru = nn.GRU(self.width, self.width, batch_first=True)

    def products(self, length, paradigm):
        return length * 6 * self.width**2

    def recurrent(self, u, state):
        weights = {name: weight.to(u.dtype) for name, weight in self.gru.named_parameters()}
        h, last = torch.func.functional_call(self.gru, weights, (u, state.memory[None]))
        return h, Memory(last[0])


class Ridge(NamedTuple):
    gram: torch.Tensor
    products: torch.Tensor


class Mesa(Unusual):
    """y_t = q_t R_t^-1 S_t with R_t = I + sum of k k^T and S_t = sum of k v^T: R is positive definite."""

    declares: ClassVar = {"paradigms": PARALLEL}
    inputs = 3

    def init_state(self, batch_size, *, max_length=None):
        gram = self.zeros(batch_size, self.width, self.width)
        return Ridge(gram + torch.eye(self.width, dtype=gram.dtype, device=gram.device), gram)

    def products(self, length, paradigm):
        return length * self.width**2

    def read(self, q, state):
        solved = torch.cholesky_solve(q[..., None], torch.linalg.cholesky(state.gram))
        return (solved.mT @ state.products)[..., 0, :]

    def token(self, u, state):
        q, k, v = u.chunk(3, dim=-1)
        state = Ridge(state.gram + k[..., None] * k[:, None], state.products + k[..., None] * v[:, None])
        return self.read(q, state), state

    def parallel(self, u, state):
        q, k, v = u.chunk(3, dim=-1)
        products = ((k[..., None] * other[:, :, None]).cumsum(1) for other in (k, v))
        every = Ridge(*(old[:, None] + new for old, new in zip(state, products, strict=True)))
        return self.read(q, every), Ridge(*(leaf[:, -1].clone() for leaf in every))


class HardGates(Unusual):
    """A token is skipped, h_t = h_{t-1}, where its gate is below 0; of others the three largest channels are kept."""

    declares: ClassVar = {"surrogate_gradients": True}
    inputs = 2

    def token(self, u, state):
        u, gate = u.chunk(2, dim=-1)
        soft = gate.sum(-1, keepdim=True).sigmoid()
        hard = (soft > 0.5).to(soft.dtype) + (soft - soft.detach())
        kept = torch.zeros_like(u).scatter(-1, u.topk(3, dim=-1).indices, 1.0)
        h = hard * (kept * u + state.memory / 2) + (1 - hard) * state.memory
        return h, Memory(h)


class Counted(NamedTuple):
    memory: torch.Tensor
    position: torch.Tensor


class LearnedPositions(Unusual):
    """h_t = h_{t-1} / 2 + u_t + E_t with a table E of 512 positions; further ones are refused."""

    declares: ClassVar = {"shift_invariant": False}

    def parts(self):
        self.table = nn.Embedding(512, self.width)

    def init_state(self, batch_size, *, max_length=None):
        return Counted(self.zeros(batch_size, self.width), self.zeros(batch_size, dtype=torch.int64))

    def token(self, u, state):
        if not torch.compiler.is_compiling() and state.position.amax() >= 512:
            raise ContractError(f"{self.kind} has a table of 512 positions, and was given more tokens")
        h = state.memory / 2 + u + self.table(state.position).to(u.dtype)
        return h, Counted(h, state.position + 1)


class Pool(NamedTuple):
    keys: torch.Tensor
    length: torch.Tensor


class PagedCache(Unusual):
    """Attention to all tokens, whose cache grows by pages; its length counts what the cache holds."""

    declares: ClassVar = {"state": "growing"}
    page: ClassVar = 48

    def init_state(self, batch_size, *, max_length=None):
        keys = self.zeros(batch_size, 0, self.width, dtype=self.dtype)
        return Pool(keys, self.zeros(batch_size, dtype=torch.int64))

    def shift_state(self, state, tokens):
        return state

    def flops(self, length, paradigm, context=0):
        slots = sum(-(-(context + n) // self.page) * self.page for n in range(1, length + 1))
        return super().flops(length, paradigm) + 4 * slots * self.width

    def token(self, u, state):
        keys, length = state
        if int(length.amax()) == keys.shape[1]:
            keys = torch.cat((keys, keys.new_zeros(len(keys), self.page, self.width)), dim=1)
        slots = torch.arange(keys.shape[1], device=u.device)
        keys = self.written(keys, (slots == length[:, None])[..., None], u.to(keys.dtype)[:, None])
        wide = keys.to(u.dtype)
        scores = (u[:, None] @ wide.mT).masked_fill((slots > length[:, None])[:, None], -torch.inf)
        return (scores.softmax(-1) @ wide)[:, 0], Pool(keys, length + 1)

    def written(self, keys, here, new):
        return torch.where(here, new, keys)
