"""The op families as kernels are tested on them: what a case of each holds, and its definition in float64.

Notation: B batch, T tokens, H heads, G key heads, K key width, V value width, N rows of a state, S slots of a cache.
"""

import itertools
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, ClassVar, Literal, Self

import torch
import torch.nn.functional as F
from hypothesis import strategies as st
from torch import Tensor

from ..ops.kernels import Kernel, Probe
from ..ops.packing import Documents
from ..ops.recurrence import Recurrence, require_recurrence
from ..ops.softmax.cache import GrowingCache, RingCache
from ..ops.softmax.call import Attention, require_attention
from .compare import require
from .kernel_case import Exact, KernelCase, Tensors
from .kernel_sizes import FIXED, Layout

SEGMENT = {"output": "BTHV", "q": "BTHK", "k": "BTHK", "v": "BTHV"}
"""The dimensions of what every op has."""


@dataclass(frozen=True, kw_only=True, repr=False)
class DecayCase(KernelCase):
    """One call of a kernel of the decay family (ops/decay/api.py has its notation)."""

    strength: float = 1.0
    """How much the log-decays vary."""
    weakest: float = 0.0
    """What is taken from all of them: none is above its negative."""
    resets: tuple[int, ...] = ()
    """Tokens whose log-decay is -inf; heads, where there is one scalar per head."""
    resets_one_key: bool = False
    """Whether a reset is one of the first key dimension alone."""

    decays = (None, "H", "B T H", "B T H K")
    # where decays are strong, differences of large sums are noise
    fixed = (*FIXED, {"lengths": (14,) * 2, "key_width": 3, "value_width": 2, "log_decay": "B T H", "weakest": 9.0})
    axes: ClassVar[Mapping[str, str]] = {**SEGMENT, "state": "NHKV"}
    state = ("state",)
    adds_up = True

    def dtype_of(self, name: str) -> torch.dtype:
        return self.wide if name in ("log_decay", "state") else self.dtype

    @classmethod
    def details(
        cls,
        draw: Callable[..., Any],
        probe: Probe,
        lengths: Sequence[int],
        layout: Layout,
        heads: st.SearchStrategy[int],
    ) -> dict[str, Any]:
        del layout
        found = {"n_heads": draw(heads)}
        if probe.log_decay is None:
            return found
        length = sum(lengths) if probe.packed else lengths[0]
        # of one scalar per head a single one, or nothing would be left
        some = st.lists(st.integers(0, length - 1), max_size=1 if probe.log_decay == "H" else 3).map(tuple)
        return found | {
            "strength": draw(st.sampled_from([1.0, 0.0, 0.01, 0.3, 5.0])),
            "weakest": draw(st.sampled_from([0.0, 0.0, 0.0, 9.0])),
            "resets": draw(st.just(()) | some | some | st.just(tuple(range(length)))),
            "resets_one_key": draw(st.booleans()),
        }

    def inputs(self, device: torch.device) -> Tensors:
        randn = self.randn()
        inputs = self.heads(randn, self.n_heads, device)
        if self.log_decay is not None:
            sizes = {"B": self.rows, "T": self.length, "H": self.n_heads, "K": self.key_width}
            random = randn(*(sizes[axis] for axis in self.log_decay.split()))
            a = -self.strength * random.abs() - self.weakest
            tokens = a if a.ndim == 1 else a.transpose(0, 1)
            for reset in self.resets:
                tokens[(reset % len(tokens), ..., *([0] if self.resets_one_key and a.ndim == 4 else []))] = -math.inf
            inputs["log_decay"] = self.laid_out("log_decay", a.to(device, self.wide))
        if self.initial_state:
            state = randn(len(self.lengths), self.n_heads, self.key_width, self.value_width)
            inputs["state"] = self.laid_out("state", state.to(device, self.wide))
        return inputs

    def call(self, inputs: Tensors) -> Recurrence:
        call = Recurrence(
            *(inputs[name] for name in "qkv"),
            log_decay=inputs.get("log_decay"),
            beta=inputs.get("beta"),
            initial_state=inputs.get("state"),
            cu_seqlens=self.cu_seqlens(inputs),
            boundaries=None,
            scale=self.factor,
            chunk_size=self.chunk_size,
            output_final_state=self.final_state,
        )
        require_recurrence(call)
        return call

    def define(self, inputs: Tensors) -> Tensors:
        """S_t = diag(exp(a_t)) S_{t-1} + k_t v_t^T and o_t = scale q_t S_t, token by token."""
        written = inputs["k"][..., :, None] * inputs["v"][..., None, :]  # [B T H K V]
        return self.recurrence(inputs, lambda t, decay, state: torch.addcmul(written[:, t], decay, state))

    def recurrence(self, inputs: Tensors, step: Callable[[int, Tensor, Tensor], Tensor]) -> Tensors:
        """Output and final state; `step` makes the next state of a token's number, its decay and the state before."""
        q, k, v = (inputs[name] for name in "qkv")
        a = inputs.get("log_decay", k.new_zeros(self.n_heads))
        a = a.expand(*k.shape[:2], -1) if a.ndim == 1 else a
        decays = (a if a.ndim == 4 else a[..., None]).exp()[..., None].unbind(1)
        boundaries = [0, *itertools.accumulate(self.lengths)] if self.packed else [0, self.length]
        states, final = [], []
        for n, (start, stop) in enumerate(itertools.pairwise(boundaries)):
            state = k.new_zeros(self.rows, self.n_heads, self.key_width, v.shape[3])
            if "state" in inputs:
                state = inputs["state"][n : n + 1] if self.packed else inputs["state"]
            for t in range(start, stop):
                state = step(t, decays[t], state)
                states.append(state)
            final.append(state)
        found = {"output": self.factor * torch.einsum("bthk,bthkv->bthv", q, torch.stack(states, dim=1))}
        return found | ({"state": torch.cat(final)} if self.final_state else {})

    def terms(self, inputs: Tensors, absolute: Tensors) -> Tensors:
        del inputs
        return self.define(absolute)  # every term is a product of inputs and decays

    def cancelled(self, kernel: Kernel, absolute: Tensors, of_terms: Tensors) -> Tensors:
        """A kernel may say that it forms the gradient of a token's log-decay as the sum over later tokens of
        q dq - k dk."""
        if not kernel.differences or self.log_decay is None or "T" not in self.log_decay:
            return of_terms
        through = absolute["q"].detach() * of_terms["q"] + absolute["k"].detach() * of_terms["k"]
        through = through.flip(1).cumsum(1).flip(1)
        if "K" not in self.log_decay:
            through = through.sum(-1)
        return of_terms | {"log_decay": of_terms["log_decay"] + through}


@dataclass(frozen=True, kw_only=True, repr=False)
class DeltaCase(DecayCase):
    """One call of a kernel of the delta family (ops/delta/api.py has its notation); keys have norm 1."""

    rate: float = 1.0
    """The largest beta; the smallest is 0."""

    decays = (None, "H", "B T H")
    extras = ("beta",)
    axes: ClassVar[Mapping[str, str]] = {**DecayCase.axes, "beta": "BTH"}

    def dtype_of(self, name: str) -> torch.dtype:
        return self.wide if name == "beta" else super().dtype_of(name)

    @classmethod
    def details(
        cls,
        draw: Callable[..., Any],
        probe: Probe,
        lengths: Sequence[int],
        layout: Layout,
        heads: st.SearchStrategy[int],
    ) -> dict[str, Any]:
        # a state of small betas remembers everything
        return super().details(draw, probe, lengths, layout, heads) | {"rate": draw(st.sampled_from([1.0, 2.0, 0.01]))}

    def inputs(self, device: torch.device) -> Tensors:
        inputs, generator = super().inputs(device), torch.Generator().manual_seed(self.seed + 2**17)
        if self.dtype.is_floating_point:  # others are for kernels to refuse
            inputs["k"].copy_(F.normalize(inputs["k"].double(), dim=-1))
        beta = torch.randn(self.rows, self.length, self.n_heads, generator=generator, dtype=torch.float64)
        beta = self.rate * (0.5 + beta).clamp(0, 1)
        return inputs | {"beta": self.laid_out("beta", beta.to(device, self.wide))}

    def define(self, inputs: Tensors) -> Tensors:
        """S_t = P_t + b_t k_t (v_t - k_t^T P_t) with P_t = exp(a_t) S_{t-1}, and o_t = scale q_t S_t, by token."""
        return self.replaced(inputs, lambda _, key, decay, state: (-_row(key, decay * state), state))

    def terms(self, inputs: Tensors, absolute: Tensors) -> Tensors:
        """The terms of a token's own sums: added up over tokens, as those of `decay`, they would grow while a state
        that is replaced does not. Those of gradients do add up."""
        before: list[Tensor] = []

        def remember(_: int, key: Tensor, decay: Tensor, state: Tensor) -> tuple[Tensor, Tensor]:
            before.append(state.detach().abs())
            return -_row(key, decay * state), state

        def exact(t: int, key: Tensor, decay: Tensor, state: Tensor) -> tuple[Tensor, Tensor]:
            return _row(key, decay * before[t]), state + (before[t] - state).detach()

        self.replaced(inputs, remember)
        return self.replaced(absolute, exact)

    def replaced(
        self, inputs: Tensors, predict: Callable[[int, Tensor, Tensor, Tensor], tuple[Tensor, Tensor]]
    ) -> Tensors:
        """The recurrence; `predict` makes of a token's number, its key, its decay and the state before what is added
        to the value, and the state that decays."""
        k, v, beta = (inputs[name] for name in ("k", "v", "beta"))

        def step(t: int, decay: Tensor, state: Tensor) -> Tensor:
            predicted, state = predict(t, k[:, t], decay, state)
            written = beta[:, t, :, None] * (v[:, t] + predicted)
            return torch.addcmul(k[:, t, :, :, None] * written[:, :, None], decay, state)

        return self.recurrence(inputs, step)

    def exact(self, kernel: Kernel) -> Exact:
        """The definition's. A transition gathers in one element what was in many, so a gradient is one of its terms."""
        found = super().exact(kernel)
        terms = {name: torch.maximum(found.gradients_terms[name], x.abs()) for name, x in found.gradients.items()}
        return found._replace(gradients_terms=terms)


def _row(x: Tensor, state: Tensor) -> Tensor:
    """x^T S: [B H K], [B H K V] -> [B H V]."""
    return torch.einsum("bhk,bhkv->bhv", x, state)


@dataclass(frozen=True, kw_only=True, repr=False)
class SoftmaxCase(KernelCase):
    """One call of a kernel of the softmax family (ops/softmax/api.py has its notation)."""

    n_kv_heads: int = 1
    window: int | None = None
    cache: Literal["growing", "ring"] = "growing"
    """The kind of the initial state."""
    reads: tuple[int, ...] = ()
    """Length of the prefix of each row or document."""
    capacity: int = 0
    """Slots of the initial state."""

    decays = (None, "K")
    windows = (False, True)
    axes: ClassVar[Mapping[str, str]] = {**SEGMENT, "keys": "NSHK", "values": "NSHV"}
    state = ("keys", "values", "length")
    per_row = (*KernelCase.per_row, "reads")
    at_once = (*KernelCase.at_once, ("n_heads", "n_kv_heads"), ("initial_state", "cache", "reads", "capacity"))
    adds_up = False

    def dtype_of(self, name: str) -> torch.dtype:
        return {"length": torch.int64, "log_decay": self.wide}.get(name, self.dtype)

    @classmethod
    def details(
        cls,
        draw: Callable[..., Any],
        probe: Probe,
        lengths: Sequence[int],
        layout: Layout,
        heads: st.SearchStrategy[int],
    ) -> dict[str, Any]:
        # many heads are those of keys, or of queries that share one
        n_kv_heads, shared = (draw(order) for order in draw(st.permutations([heads, st.integers(1, 2)])))
        window = draw(st.integers(1, 9) | st.sampled_from([16, 40])) if probe.window else None
        found = {"n_heads": n_kv_heads * shared, "n_kv_heads": n_kv_heads, "window": window}
        if not probe.initial_state:
            return found
        reads = [draw(st.integers(0, 9)) for _ in lengths]
        if layout == "expanded":
            reads = reads[:1] * len(reads)
        cache, capacity = draw(st.sampled_from(["growing", "ring"])), max(reads)
        if cache == "ring":
            longest = max(a + b for a, b in zip(lengths, reads, strict=True))
            capacity = longest if window is None else min(window, longest)
        capacity += draw(st.integers(0, 3))
        return found | {"cache": cache, "reads": tuple(reads), "capacity": max(capacity, int(cache == "ring"))}

    def with_details(self, probe: Probe) -> KernelCase:
        window, rows = 16 if probe.window else None, len(self.lengths)
        case = replace(self, n_kv_heads=self.n_heads, window=window)
        return replace(case, reads=(2,) * rows, capacity=3) if self.initial_state else case

    def simpler(self) -> Iterator[Self]:
        # the capacity of a ring is that of its window
        yield from (case for case in super().simpler() if not case.initial_state or case.window == self.window)

    def probe(self, device: torch.device) -> Probe:
        return replace(super().probe(device), window=self.window is not None)

    @property
    def consumed(self) -> tuple[str, ...]:
        """A cache, without grad, where a final one is wanted."""
        return ("keys", "values") if self.initial_state and self.final_state and not self.grad else ()

    def inputs(self, device: torch.device) -> Tensors:
        randn = self.randn()
        inputs = self.heads(randn, self.n_kv_heads, device)
        if self.log_decay is not None:
            # far from where the factors of one block of queries leave the dtype's range
            inputs["log_decay"] = -randn(self.key_width).abs().to(device, self.wide) / self.length
        if self.initial_state:
            for name, width in (("keys", self.key_width), ("values", self.value_width)):
                x = torch.zeros(len(self.lengths), self.capacity, self.n_kv_heads, width, dtype=torch.float64)
                for n, read in enumerate(self.reads):
                    slots, _ = self.slots(read, self.cache, self.capacity)
                    x[n, slots] = randn(len(slots), self.n_kv_heads, width)
                inputs[name] = self.laid_out(name, x.to(device, self.dtype))
            inputs["length"] = torch.tensor(self.reads, device=device)
        return inputs

    def call(self, inputs: Tensors) -> Attention:
        kind = GrowingCache if self.cache == "growing" else RingCache
        call = Attention(
            *(inputs[name] for name in "qkv"),
            scale=self.factor,
            window=self.window,
            log_decay=inputs.get("log_decay"),
            cache=kind(*(inputs[name] for name in self.state)) if self.initial_state else None,
            documents=Documents.of(self.cu_seqlens(inputs), self.length),
            output_final_state=self.final_state,
            chunk_size=self.chunk_size,
        )
        require_attention(call)
        return call

    def leaves_of(self, state: Any) -> Tensors:
        wanted = GrowingCache if self.final_cache[0] == "growing" else RingCache
        require(isinstance(state, wanted), f"the final state is a {type(state).__name__}, not a {wanted.__name__}")
        return dict(zip(self.state, state, strict=True))

    def define(self, inputs: Tensors) -> Tensors:
        """o_n = sum_m softmax_m(scale sum_d q_nd k_md exp(a_d (n - m))) v_m over the keys that n sees, densely."""
        return self.attend(inputs, lambda _, scores, seen: scores.masked_fill(~seen, -math.inf).softmax(-1))

    def terms(self, inputs: Tensors, absolute: Tensors) -> Tensors:
        """An error of a score moves its own weight by as much, relatively, and all weights by its weight's share."""
        exact: list[Tensor] = []

        def remember(_: int, scores: Tensor, seen: Tensor) -> Tensor:
            exact.append(scores.masked_fill(~seen, -math.inf).softmax(-1))
            return exact[-1]

        def perturbed(n: int, scores: Tensor, _: Tensor) -> Tensor:
            error = 1 + scores + (exact[n] * scores).sum(-1, keepdim=True)
            # itself, and the factor of its own gradient
            return exact[n] * error.detach() * (1 + error - error.detach())

        self.attend(inputs, remember)
        return self.attend(absolute, perturbed)

    def cancelled(self, kernel: Kernel, absolute: Tensors, of_terms: Tensors) -> Tensors:
        """A decay may be formed of two factors, each relative to some token: their gradients have distances of tokens
        as factors, and cancel."""
        del kernel
        if self.log_decay is None:
            return of_terms
        span = self.length + max(self.reads, default=0)
        through = span * (absolute["q"].detach() * of_terms["q"]).sum((0, 1, 2))
        return of_terms | {"log_decay": of_terms["log_decay"] + through}

    def attend(self, inputs: Tensors, weigh: Callable[[int, Tensor, Tensor], Tensor]) -> Tensors:
        """Output and final cache; `weigh` makes weights of a row's number, its scores [H n m] and what is seen."""
        segment = [self.sequences(inputs[name]) for name in "qkv"]
        outputs, keys, values, lengths = [], [], [], []
        for n, (q, *own) in enumerate(zip(*segment, strict=True)):
            (k, v), read, first = own, 0, 0
            if self.initial_state:
                read = self.reads[n]
                slots, first = self.slots(read, self.cache, self.capacity)
                past = inputs["keys"][n, slots], inputs["values"][n, slots]
                k, v = (torch.cat(pair) for pair in zip(past, own, strict=True))
            end = read + len(q)
            distance = torch.arange(read, end)[:, None] - torch.arange(first, end)
            seen = (distance >= 0) & (distance < (self.window or math.inf))
            wide_k, wide_v = (x.repeat_interleave(self.n_heads // self.n_kv_heads, dim=1) for x in (k, v))
            decay = q.new_ones(1, 1, self.key_width)
            if "log_decay" in inputs:
                decay = (distance.clamp(min=0)[..., None] * inputs["log_decay"]).exp()
            scores = self.factor * torch.einsum("nhd,mhd,nmd->hnm", q, wide_k, decay.expand(*distance.shape, -1))
            outputs.append(torch.einsum("hnm,mhd->nhd", weigh(n, scores, seen), wide_v))
            # the final cache: its slots are filled with the last tokens
            slots, start = self.slots(end, *self.final_cache)
            for leaf, tokens in ((keys, k), (values, v)):
                empty = tokens.new_zeros(self.final_cache[1], *tokens.shape[1:])
                leaf.append(empty.index_put((slots,), tokens[start - first :]))
            lengths.append(end)
        found = {"output": self.segment(outputs)}
        if self.final_state:
            found |= {"keys": torch.stack(keys), "values": torch.stack(values), "length": torch.tensor(lengths)}
        return found

    def continued(self, before: KernelCase) -> Self:
        assert isinstance(before, SoftmaxCase)
        kind, capacity = before.final_cache
        return replace(self, initial_state=True, cache=kind, capacity=capacity)

    @property
    def final_cache(self) -> tuple[Literal["growing", "ring"], int]:
        """Kind and capacity of the final state."""
        if not self.initial_state and self.window is not None:
            return "ring", self.window
        if self.initial_state and self.cache == "ring":
            return "ring", self.capacity
        return "growing", self.capacity + self.length

    @staticmethod
    def slots(read: int, cache: str, capacity: int) -> tuple[Tensor, int]:
        """The slots that are filled after so many tokens, in the order of their positions, and the first position."""
        if cache == "growing":  # right-aligned
            return torch.arange(capacity - read, capacity), 0
        first = max(0, read - capacity)
        return torch.arange(first, read) % capacity, first

    def cotangent(self, name: str, output: Tensor, device: torch.device) -> Tensor:
        # nothing depends on the empty slots of a cache, which are zero
        above = super().cotangent(name, output, device)
        return above if name == "output" else above * (output != 0).to(device)


FAMILIES: dict[str, type[KernelCase]] = {"decay": DecayCase, "delta": DeltaCase, "softmax": SoftmaxCase}
"""Every op that kernels are declared for."""
