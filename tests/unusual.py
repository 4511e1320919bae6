"""Right mixers that are unlike the built-in ones, in plain torch: the kit refuses none of them.

Notation: B rows, T tokens, D channels; u_t is a projection of token t, in the dtype of the state.
"""

from typing import ClassVar, Literal, NamedTuple

import torch
from pydantic import create_model
from torch import nn

from seqmix import MixerConfig, Paradigm, SequenceMixer, Traits

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
    """Tokens are projected, go one by one through `token`, and are projected again."""

    declares: ClassVar[dict] = {}
    inputs = 1
    """u_t has so many times D numbers."""
    products = 0
    """Multiplications of a token's matrix products beside the projections."""

    def __init_subclass__(cls):
        name = cls.__name__.lower()
        config = create_model(cls.__name__ + "Config", __base__=UnusualConfig, kind=(Literal[name], name))
        config.layer = cls
        cls.config = config
        UNUSUAL.append(config())

    def __init__(self, config, d_model):
        super().__init__(config)
        self.width = d_model
        self.in_proj = nn.Linear(d_model, self.inputs * d_model)
        self.out_proj = nn.Linear(d_model, d_model)
        self.build()
        self.reset_parameters()

    def build(self):
        """What else it has."""

    def reset_parameters(self):
        for module in self.children():
            module.reset_parameters()

    def zeros(self, *shape, dtype=None):
        return torch.zeros(shape, dtype=dtype or self.state_dtype, device=self.device)

    def flops(self, length, paradigm, context=0):
        pairs = length**2 * self.width if paradigm is Paradigm.PARALLEL else 0
        return 2 * (length * (self.in_proj.weight.numel() + self.out_proj.weight.numel() + self.products) + pairs)

    def mix(self, x, call):
        state = self.init_state(len(x)) if call.state is None else call.state
        u = self.in_proj(x)
        with torch.autocast(x.device.type, enabled=False):
            mixed = self.parallel if call.paradigm is Paradigm.PARALLEL else self.recurrent
            o, state = mixed(u.to(self.state_dtype), state)
        return self.out_proj(o.to(u.dtype)), state

    def recurrent(self, u, state):
        outputs = []
        for token in u.unbind(1):
            o, state = self.token(token, state)
            outputs.append(o)
        return torch.stack(outputs, dim=1), state


class Memory(NamedTuple):
    memory: torch.Tensor


class LearnedStart(Unusual):
    """h_t = h_{t-1} / 2 + u_t from a learned h_0."""

    def build(self):
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

    declares: ClassVar = {"paradigms": PARALLEL, "parallel_from_state": False}

    def parallel(self, u, state):
        t = torch.arange(u.shape[1], device=u.device)
        weights = (0.5 ** (t[:, None] - t).to(u.dtype)).tril()
        h = weights @ u + 0.5 ** (t[:, None] + 1) * self.start.to(u.dtype)
        return h, Memory(h[:, -1].clone())
