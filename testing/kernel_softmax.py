"""Softmax attention as kernels are tested on it: what a case holds, and its definition in float64.

Notation: B batch, T tokens, H heads, G key heads, K key width, V value width, N rows of a state, S slots of a cache.
"""

import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, ClassVar, Literal, Self

import torch
from hypothesis import strategies as st
from torch import Tensor

from ..ops.kernels import Kernel, Probe
from ..ops.packing import Documents
from ..ops.softmax.cache import GrowingCache, RingCache
from ..ops.softmax.call import Attention, require_attention
from .compare import require
from .kernel_case import SEGMENT, KernelCase, Tensors
from .kernel_fixed import FIXED, SCORES, WINDOWS
from .kernel_layout import writable


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
    loud: tuple[int, ...] = ()
    """Tokens whose keys are 30 times as large."""

    decays = (None, "K")
    fixed = (*FIXED, *WINDOWS, *SCORES)
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
        common: Mapping[str, Any],
        heads: st.SearchStrategy[int],
    ) -> dict[str, Any]:
        lengths, chunk_size = common["lengths"], common["chunk_size"]
        # many heads are those of keys, or of queries that share one
        n_kv_heads, shared = (draw(order) for order in draw(st.permutations([heads, st.integers(1, 2)])))
        edges = [max(1, size + more) for size in (chunk_size, *lengths) for more in (-1, 0, 1)]
        windows = st.integers(1, 9) | st.sampled_from([16, 40, 150]) | st.sampled_from(edges)
        window = draw(windows) if probe.window else None
        found = {"n_heads": n_kv_heads * shared, "n_kv_heads": n_kv_heads, "window": window}
        found |= {"loud": draw(st.just(()) | st.just(()) | st.tuples(st.integers(0, 70)))}
        found |= {"sizes": (draw(st.sampled_from([1.0, 1.0, 1.0, 1.0, 40.0, -40.0])), 1.0, 1.0)}
        if not probe.initial_state:
            return found
        few = st.integers(0, 9)
        around = few if window is None or window > 40 else few | st.integers(-1, 1).map(lambda more: window + more)
        reads = [draw(around) for _ in lengths]
        if common["layout"] == "expanded":
            reads = reads[:1] * len(reads)
        cache, capacity = draw(st.sampled_from(["growing", "ring"])), max(reads)
        if cache == "ring":
            longest = max(a + b for a, b in zip(lengths, reads, strict=True))
            capacity = longest if window is None else min(window, longest)
        capacity += draw(st.integers(0, 3))
        return found | {"cache": cache, "reads": tuple(reads), "capacity": max(capacity, int(cache == "ring"))}

    def with_details(self, probe: Probe) -> KernelCase:
        window = self.window or (16 if probe.window else None)
        case = replace(self, n_kv_heads=self.n_heads, window=window)
        unread = self.initial_state and not self.reads
        return replace(case, reads=(2,) * len(self.lengths), capacity=3) if unread else case

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
        for token in self.loud:
            writable(inputs["k"])[:, token % self.length] *= 30
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
        exact: dict[int, Tensor] = {}

        def remember(n: int, scores: Tensor, seen: Tensor) -> Tensor:
            exact[n] = scores.masked_fill(~seen, -math.inf).softmax(-1)
            return exact[n]

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
        span = self.length + min(self.capacity, max(self.reads, default=0))
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
            outputs.append(self.attend_row(q, (k, v), inputs.get("log_decay"), partial(weigh, n)))
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

    def attend_row(
        self, q: Tensor, kv: tuple[Tensor, Tensor], log_decay: Tensor | None, weigh: Callable[[Tensor, Tensor], Tensor]
    ) -> Tensor:
        """The output [n H V] of a row's last tokens, whose queries are [n H K], of its keys and values [m G *]."""
        if not len(q):  # of an empty document
            return q.new_zeros(0, self.n_heads, self.value_width)
        k, v = (x.repeat_interleave(self.n_heads // self.n_kv_heads, dim=1) for x in kv)
        distance = torch.arange(len(k) - len(q), len(k))[:, None] - torch.arange(len(k))
        seen = (distance >= 0) & (distance < (self.window or math.inf))
        decay = q.new_ones(1, 1, self.key_width)
        if log_decay is not None:
            decay = (distance.clamp(min=0)[..., None] * log_decay).exp()
        scores = self.factor * torch.einsum("nhd,mhd,nmd->hnm", q, k, decay.expand(*distance.shape, -1))
        return torch.einsum("hnm,mhd->nhd", weigh(scores, seen), v)

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
