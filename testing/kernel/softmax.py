"""Cases of softmax attention, with its definition in float64.

Notation: B batch, T tokens, H heads, G key heads, K key width, V value width, N rows of a state, S slots of a cache.
"""

import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, ClassVar, Literal, NamedTuple, Self

import torch
import torch.nn.functional as F
from hypothesis import strategies as st
from torch import Tensor

from ...ops.attention.inputs import AttentionInputs, require_attention
from ...ops.attention.kv_cache import ForgettingCache, GrowingCache, RingCache, key_cache
from ...ops.runtime.kernel import Kernel, Probe
from ...ops.runtime.packing import Documents
from ..compare import require
from .case import SEGMENT, Drawn, KernelCase, Tensors
from .fixed import FIXED, SCORES, SLOW, WINDOWS
from .layout import writable


class Scores(NamedTuple):
    """Parts of the scores of one row: n queries, m keys."""

    products: Tensor
    """Scaled products of queries and keys, [H n m]."""
    gates: Tensor
    """Sums of the logarithms of the forget gates between key and query, which are added, [H n m]."""
    slopes: Tensor
    """ALiBi penalties, which are subtracted, [H n m]."""
    sink: Tensor
    """Score of the attention sink (a key without a value), [H n 1]; ignored if the call has no sinks."""
    seen: Tensor
    """True where a query sees a key, [n m]."""


@dataclass(frozen=True, kw_only=True, repr=False)
class SoftmaxCase(KernelCase):
    """One call of a kernel of the softmax family (notation: ops/attention/api.py)."""

    n_kv_heads: int = 1
    """Number of key and value heads, G."""
    window: int | None = None
    """Number of keys that a query sees, its own included; None for no limit."""
    cache: Literal["growing", "ring"] = "growing"
    """Kind of the initial state: a cache with a slot per token, or a ring that overwrites its oldest slots."""
    reads: tuple[int, ...] = ()
    """Number of tokens processed before the segment, for each row or document."""
    capacity: int = 0
    """Number of slots of the initial state, S."""
    loud: tuple[int, ...] = ()
    """Indices of tokens whose keys are multiplied by 30."""
    scores: tuple[str, ...] = ()
    """Arguments of the op, other than scale, decay and window, that change scores."""
    forgetting: float = 1.0
    """Standard deviation of the normal numbers x in the logs of forget gates, -|x|."""
    softcap: float = 0.7
    """Soft cap of the scores, if `scores` includes it."""

    decays = (None, "K")
    fixed = (*FIXED, *WINDOWS, *SCORES, {**SLOW, "scores": ("log_forget",), "forgetting": 0.01})
    windows = (False, True)
    score_options = (
        (),
        ("log_forget",),
        ("slopes",),
        ("softcap", "sinks"),
        ("log_forget", "slopes", "softcap", "sinks"),
    )
    axes: ClassVar[Mapping[str, str]] = {
        **SEGMENT,
        "keys": "NSHK",
        "values": "NSHV",
        "gates": "NSH",
        "log_forget": "BTH",
        "slopes": "H",
        "sinks": "H",
    }
    state = ("keys", "values", "gates", "length")
    per_row = (*KernelCase.per_row, "reads")
    reset_together = (
        *KernelCase.reset_together,
        ("n_heads", "n_kv_heads"),
        ("initial_state", "cache", "reads", "capacity"),
    )
    state_is_sum = False

    def dtype_of(self, name: str) -> torch.dtype:
        if name == "length":
            return torch.int64
        return self.wide_dtype if name in ("log_decay", "gates", "log_forget", "slopes", "sinks") else self.dtype

    @classmethod
    def leaves_of_probe(cls, probe: Probe) -> list[str]:
        leaves = [name for name in super().leaves_of_probe(probe) if name != "gates" or "log_forget" in probe.scores]
        return leaves + [name for name in probe.scores if name in cls.axes]

    @property
    def differentiated(self) -> tuple[str, ...]:
        return tuple(name for name in super().differentiated if name != "gates" or "log_forget" in self.scores)

    @classmethod
    def details(cls, drawn: Drawn) -> dict[str, Any]:
        draw, probe, common, heads = drawn
        lengths, chunk_size = common["lengths"], common["chunk_size"]
        # if there are many heads, they are key heads, or query heads that share a key head
        n_kv_heads, queries_per_key = (draw(number) for number in draw(st.permutations([heads, st.integers(1, 2)])))
        edges = [max(1, size + offset) for size in (chunk_size, *lengths) for offset in (-1, 0, 1)]
        windows = st.integers(1, 9) | st.sampled_from([16, 40, 150]) | st.sampled_from(edges)
        window = draw(windows) if probe.window else None
        fields = {
            "n_heads": n_kv_heads * queries_per_key,
            "n_kv_heads": n_kv_heads,
            "window": window,
            "scores": probe.scores,
            "forgetting": draw(st.sampled_from([1.0, 0.01, 9.0])),
            "softcap": draw(st.sampled_from([0.7, 20.0])),
            "loud": draw(st.just(()) | st.just(()) | st.tuples(st.integers(0, 70))),
            "sizes": (draw(st.sampled_from([1.0, 1.0, 1.0, 1.0, 40.0, -40.0])), 1.0, 1.0),
        }
        if not probe.initial_state:
            return fields
        few = st.integers(0, 9)
        around = few if window is None or window > 40 else few | st.integers(-1, 1).map(lambda offset: window + offset)
        reads = [draw(around) for _ in lengths]
        if common["layout"] == "expanded":
            reads = reads[:1] * len(reads)
        cache, capacity = draw(st.sampled_from(["growing", "ring"])), max(reads)
        if cache == "ring":
            longest = max(a + b for a, b in zip(lengths, reads, strict=True))
            capacity = longest if window is None else min(window, longest)
        capacity += draw(st.integers(0, 3))
        return fields | {"cache": cache, "reads": tuple(reads), "capacity": max(capacity, int(cache == "ring"))}

    def with_details(self, probe: Probe) -> KernelCase:
        window = self.window or (16 if probe.window else None)
        case = replace(self, n_kv_heads=self.n_heads, window=window, scores=probe.scores)
        needs_prefix = self.initial_state and not self.reads
        return replace(case, reads=(2,) * len(self.lengths), capacity=3) if needs_prefix else case

    def simpler(self) -> Iterator[Self]:
        # the capacity of a ring depends on its window, so a case with a state keeps its window
        yield from (case for case in super().simpler() if not case.initial_state or case.window == self.window)

    def probe(self, device: torch.device) -> Probe:
        return replace(super().probe(device), window=self.window is not None, scores=self.scores)

    @property
    def overwritable(self) -> tuple[str, ...]:
        """Leaves of the initial cache, if the case wants a final state and has no gradients."""
        return ("keys", "values", "gates") if self.initial_state and self.final_state and not self.grad else ()

    def inputs(self, device: torch.device) -> Tensors:
        randn = self.randn()
        inputs = self.heads(randn, (self.n_heads, self.n_kv_heads, self.n_kv_heads), device)
        for token in self.loud:
            writable(inputs["k"])[:, token % self.length] *= 30
        if self.log_decay is not None:
            # small enough that the decay factors of a block of queries stay within the dtype's range
            inputs["log_decay"] = -randn(self.key_width).abs().to(device, self.wide_dtype) / self.length
        if self.initial_state:
            sizes = {"keys": (self.n_kv_heads, self.key_width), "values": (self.n_kv_heads, self.value_width)}
            for name, size in (sizes | {"gates": (self.n_heads,)}).items():
                x = torch.zeros(len(self.lengths), self.capacity, *size, dtype=torch.float64)
                for n, read in enumerate(self.reads):
                    slots, _ = self.slots(read, self.cache, self.capacity)
                    x[n, slots] = randn(len(slots), *size)
                x = -self.forgetting * x.abs() if name == "gates" else x
                inputs[name] = self.laid_out(name, x.to(device, self.dtype_of(name)))
            inputs["length"] = torch.tensor(self.reads, device=device)
        gates = -self.forgetting * randn(self.rows, self.length, self.n_heads).abs()
        score_inputs = {"log_forget": gates, "slopes": randn(self.n_heads).abs(), "sinks": 2 * randn(self.n_heads)}
        for name in score_inputs.keys() & {*self.scores}:
            inputs[name] = self.laid_out(name, score_inputs[name].to(device, self.wide_dtype))
        if "log_forget" not in self.scores:
            inputs.pop("gates", None)
        return inputs

    def call(self, inputs: Tensors) -> AttentionInputs:
        cache = None
        if self.initial_state:
            kind = GrowingCache if self.cache == "growing" else RingCache
            cache = kind(*(inputs[name] for name in ("keys", "values", "length")))
            cache = ForgettingCache(cache, inputs["gates"]) if "gates" in inputs else cache
        call = AttentionInputs(
            *(inputs[name] for name in "qkv"),
            scale=self.factor,
            window=self.window,
            log_decay=inputs.get("log_decay"),
            log_forget=inputs.get("log_forget"),
            slopes=inputs.get("slopes"),
            softcap=self.softcap if "softcap" in self.scores else None,
            sinks=inputs.get("sinks"),
            cache=cache,
            documents=Documents.of(self.cu_seqlens(inputs), self.length),
            output_final_state=self.final_state,
            chunk_size=self.chunk_size,
        )
        require_attention(call)
        return call

    def leaves_of(self, state: Any) -> Tensors:
        wanted = GrowingCache if self.final_cache[0] == "growing" else RingCache
        gates = {}
        if "log_forget" in self.scores:
            kind = type(state).__name__
            require(
                isinstance(state, ForgettingCache), f"expected the final state to be a ForgettingCache, got a {kind}"
            )
            gates = {"gates": state.log_forget}
        cache = key_cache(state)
        sentence = f"expected the final state to be a {wanted.__name__}, got a {type(cache).__name__}"
        require(isinstance(cache, wanted), sentence)
        return {**cache._asdict(), **gates}

    def define(self, inputs: Tensors) -> Tensors:
        """Compute o_n = sum_m softmax_m(s_nm) v_m over the keys m that the query n sees, without blocks. The scores are
        s_nm = cap tanh(scale sum_d q_nd k_md exp(a_d (n - m)) / cap) + log f_{m+1} + ... + log f_n - slope (n - m)
        and, with a sink, one more key has the score `sink` and the value 0."""
        return self.attend(inputs, lambda _, scores: self.weights(scores)[..., 1:])

    def terms(self, inputs: Tensors, absolute: Tensors) -> Tensors:
        """Return the results with each attention weight enlarged by the error that rounding the scores causes in it.

        The rounding error of a score is in proportion to the size of the score. It causes an equal relative error of
        the score's own weight, and a relative error of all weights of the query: its own weight times the error.
        """
        exact: dict[int, Tensor] = {}
        # a kernel may subtract sums of gates over all tokens of a segment from each other. In lower precision it forms
        # these sums in more digits; float64 has no wider dtype, so their size counts as an error
        sums = [absolute[name].detach().sum(1).max() for name in ("log_forget", "gates") if name in absolute]
        lost = sum(sums, torch.zeros(())) if self.dtype == torch.float64 else torch.zeros(())

        def remember(n: int, scores: Scores) -> Tensor:
            exact[n] = self.weights(scores)
            return exact[n][..., 1:]

        def perturbed(n: int, scores: Scores) -> Tensor:
            # a soft cap makes errors smaller, so it is ignored
            sizes = torch.cat((scores.sink, scores.products + scores.gates + scores.slopes), -1)
            error = 1 + lost + sizes + (exact[n] * sizes).sum(-1, keepdim=True)
            # `error` enlarges the weight itself; the last factor is 1, but differentiable in the scores
            return (exact[n] * error.detach() * (1 + error - error.detach()))[..., 1:]

        self.attend(inputs, remember)
        return self.attend(absolute, perturbed)

    def weights(self, scores: Scores) -> Tensor:
        """Return the attention weights of a row, [H n 1+m], the sink's first."""
        total = scores.products
        if "softcap" in self.scores:
            total = self.softcap * (total / self.softcap).tanh()
        total = (total + scores.gates - scores.slopes).masked_fill(~scores.seen, -math.inf)
        sink = scores.sink if "sinks" in self.scores else torch.full_like(scores.sink, -math.inf)
        return torch.cat((sink, total), -1).softmax(-1)

    def cancelled(self, kernel: Kernel, absolute: Tensors, of_terms: Tensors) -> Tensors:
        """Return `of_terms` plus the terms of log-decays and forget gates that a kernel may add and later subtract.

        A kernel may compute a decay as a product of two factors, each relative to some token. The gradients of these
        factors contain distances between tokens, and cancel. A kernel may also subtract running sums of gates from each
        other; the difference of their gradients has rounding errors of the size of the sink's gradient.
        """
        if "log_forget" in of_terms and "sinks" in of_terms:
            rounding = torch.finfo(torch.promote_types(self.dtype, torch.float32)).eps / kernel.tolerances[self.dtype]
            of_terms = of_terms | {"log_forget": of_terms["log_forget"] + rounding * of_terms["sinks"]}
        if self.log_decay is None:
            return of_terms
        span = self.length + min(self.capacity, max(self.reads, default=0))
        through = span * (absolute["q"].detach() * of_terms["q"]).sum((0, 1, 2))
        return of_terms | {"log_decay": of_terms["log_decay"] + through}

    def attend(self, inputs: Tensors, weigh: Callable[[int, Scores], Tensor]) -> Tensors:
        """Return output and final cache; `weigh(row, scores)` returns the attention weights of a row, [H n m]."""
        input_names = {"keys": "k", "values": "v"}
        if "log_forget" in self.scores:
            input_names["gates"] = "log_forget"
        queries = self.sequences(inputs["q"])
        segment = {leaf: self.sequences(inputs[name]) for leaf, name in input_names.items()}
        outputs, lengths, final = [], [], {leaf: [] for leaf in input_names}
        for n in range(len(self.lengths)):
            q, read, first = queries[n], 0, 0
            row = {leaf: segment[leaf][n] for leaf in input_names}
            if self.initial_state:
                read = self.reads[n]
                slots, first = self.slots(read, self.cache, self.capacity)
                row = {leaf: torch.cat((inputs[leaf][n, slots], row[leaf])) for leaf in input_names}
            end = read + len(q)
            outputs.append(self.attend_row(q, row, inputs, partial(weigh, n)))
            # fill the slots of the final cache with the last tokens
            slots, start = self.slots(end, *self.final_cache)
            for name, tokens in row.items():
                empty = tokens.new_zeros(self.final_cache[1], *tokens.shape[1:])
                final[name].append(empty.index_put((slots,), tokens[start - first :]))
            lengths.append(end)
        results = {"output": self.segment(outputs)}
        if self.final_state:
            results |= {name: torch.stack(rows) for name, rows in final.items()}
            results["length"] = torch.tensor(lengths)
        return results

    def attend_row(self, q: Tensor, row: Tensors, inputs: Tensors, weigh: Callable[[Scores], Tensor]) -> Tensor:
        """Return the output [n H V] of a row's last n tokens.

        Args:
            q: their queries, [n H K].
            row: the row's keys and values, [m G *], and gates, [m H], by name.
            inputs: the inputs of the call.
            weigh: returns attention weights, [H n m].
        """
        if not len(q):  # an empty document
            return q.new_zeros(0, self.n_heads, self.value_width)
        k, v = (row[name].repeat_interleave(self.n_heads // self.n_kv_heads, dim=1) for name in ("keys", "values"))
        positions = torch.arange(len(k))
        distance = positions[-len(q) :, None] - positions
        seen, distance = (distance >= 0) & (distance < (self.window or math.inf)), distance.clamp(min=0)
        decay = q.new_ones(1, 1, self.key_width)
        if self.log_decay is not None:
            decay = (distance[..., None] * inputs["log_decay"]).exp()
        products = self.factor * torch.einsum("nhd,mhd,nmd->hnm", q, k, decay.expand(*distance.shape, -1))
        gates = slopes = torch.zeros_like(products)
        if "gates" in row:
            # sum the gates of the tokens after each key up to the query directly, not as a difference of sums
            between = row["gates"].T[:, None] * (positions <= positions[-len(q) :, None])
            gates = F.pad(between[..., 1:], (0, 1)).flip(-1).cumsum(-1).flip(-1)
        if "slopes" in inputs:
            slopes = inputs["slopes"][:, None, None] * distance
        sink = inputs.get("sinks", q.new_zeros(self.n_heads))[:, None, None].expand(-1, len(q), 1)
        return torch.einsum("hnm,mhd->nhd", weigh(Scores(products, gates, slopes, sink, seen)), v)

    def continued(self, before: KernelCase) -> Self:
        assert isinstance(before, SoftmaxCase)
        kind, capacity = before.final_cache
        return replace(self, initial_state=True, cache=kind, capacity=capacity)

    @property
    def final_cache(self) -> tuple[Literal["growing", "ring"], int]:
        """Kind and capacity of the final cache."""
        if not self.initial_state and self.window is not None:
            return "ring", self.window
        if self.initial_state and self.cache == "ring":
            return "ring", self.capacity
        return "growing", self.capacity + self.length

    @staticmethod
    def slots(read: int, cache: str, capacity: int) -> tuple[Tensor, int]:
        """Return the slots that are filled after `read` tokens, in order of position, and their first position."""
        if cache == "growing":  # right-aligned
            return torch.arange(capacity - read, capacity), 0
        first = max(0, read - capacity)
        return torch.arange(first, read) % capacity, first

    def cotangent(self, name: str, output: Tensor, device: torch.device) -> Tensor:
        # empty slots of a cache are zero and no result depends on them: their gradient is zero
        upstream = super().cotangent(name, output, device)
        return upstream if name == "output" else upstream * (output != 0).to(device)
