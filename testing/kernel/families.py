"""Test cases of the ops with matrix states (decay, delta, DPLR), with the definitions of these ops in float64.

The cases of scans are in scans.py, those of cells in cells.py, those of softmax attention in softmax.py; `FAMILIES` has
all of them by op.

Notation: B batch, T tokens, H heads, K key width, V value width, N rows of a state.
"""

import itertools
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from hypothesis import strategies as st
from torch import Tensor

from ...ops.recurrence.family import Recurrence, require_recurrence
from ...ops.runtime.kernel import Kernel
from .case import SEGMENT, Drawn, Exact, KernelCase, Tensors
from .cells import M2RNNCase, SLSTMCase
from .fixed import ABOVE, BELOW, FIXED, LONG, RESETS, SLOW, STATES, WIDE
from .layout import writable
from .scans import ConvolutionCase, DiagonalCase, LogScanCase, ScanCase, SelectiveCase
from .softmax import SoftmaxCase

MAX_FLOAT16_PRODUCT = 100.0
"""Largest product of the sizes of queries, keys and values at which the sums of a decay case fit into float16."""


@dataclass(frozen=True, kw_only=True, repr=False)
class DecayCase(KernelCase):
    """One call of a kernel of the decay family (notation: ops/decay/api.py)."""

    strength: float = 1.0
    """Standard deviation of the normal numbers x in the log-decays, -|x| - weakest."""
    weakest: float = 0.0
    """Amount by which all log-decays are lowered: none is above -weakest."""
    resets: tuple[int, ...] = ()
    """Indices of the tokens whose log-decay is -inf; indices of heads, if there is one scalar per head."""
    resets_one_key: bool = False
    """True if a reset is only in the first key dimension (log-decays with a key dimension)."""
    shared: int = 1
    """Number of value heads that share each of the `n_heads` query and key heads."""

    decays, wide_outputs = (None, "H", "B T H", "B T H K"), (False, True)
    # the last case has strong decays, with which differences of large sums would be noise
    fixed = (
        *FIXED,
        *STATES,
        *WIDE,
        *RESETS,
        LONG,
        {**SLOW, "log_decay": "B T H", "strength": 0.01},
        {**SLOW, "log_decay": "B T H K", "strength": 0.01},
        {"lengths": (14,) * 2, "key_width": 3, "value_width": 2, "log_decay": "B T H", "weakest": 9.0},
    )
    axes: ClassVar[Mapping[str, str]] = {**SEGMENT, "state": "NHKV"}
    state = ("state",)
    state_is_sum = True
    groups: ClassVar[st.SearchStrategy[int]] = st.sampled_from([1, 1, 1, 2, 3])

    @property
    def all_heads(self) -> int:
        """H, the number of value heads."""
        return self.shared * self.n_heads

    def dtype_of(self, name: str) -> torch.dtype:
        wide = name in ("log_decay", "state") or (name == "output" and self.wide_output)
        return self.wide_dtype if wide else self.dtype

    @property
    def undefined(self) -> tuple[str, ...]:
        """The output, if float16 cannot represent it, or the states from which it is computed.

        A kernel may multiply queries by states in the inputs' dtype. The final state is wider and always defined.
        """
        q, k, v = self.sizes
        beyond = k * v > MAX_FLOAT16_PRODUCT or (q * k * v > MAX_FLOAT16_PRODUCT and not self.wide_output)
        return ("output",) if self.dtype == torch.float16 and beyond else ()

    def underflow(self, name: str) -> float:
        """Return the absolute error that is always allowed, including that of underflow in the inputs' dtype.

        In that dtype a kernel may store the states from which it computes a wide output, and the products of keys and
        their decays per key dimension, whose sum is a state.
        """
        info = torch.finfo(self.dtype)
        underflow = 8 * info.tiny * info.eps
        of_output = underflow if name == "output" and self.wide_output else 0.0
        of_state = underflow * self.sizes[2] if name == "state" and self.log_decay == "B T H K" else 0.0
        return super().underflow(name) + of_output + of_state

    @classmethod
    def details(cls, drawn: Drawn) -> dict[str, Any]:
        draw, probe, common, heads = drawn
        # float16 states beyond their range are not drawn: some outputs would be undefined
        sizes = st.sampled_from([(1.0, 1.0, 1.0)] * 6 + [BELOW] + ([ABOVE] if probe.dtype != torch.float16 else []))
        fields: dict[str, Any] = {"n_heads": draw(heads), "sizes": draw(sizes), "shared": draw(cls.groups)}
        if probe.log_decay is None:
            return fields
        length = sum(common["lengths"]) if probe.packed else common["lengths"][0]
        # with one scalar per head, usually at most one reset: otherwise most states would be empty
        some = st.lists(st.integers(0, length - 1), max_size=1 if probe.log_decay == "H" else 3).map(tuple)
        return fields | {
            "strength": draw(st.sampled_from([1.0, 0.0, 0.01, 0.3, 5.0])),
            "weakest": draw(st.sampled_from([0.0, 0.0, 0.0, 9.0])),
            "resets": draw(st.just(()) | some | some | st.just(tuple(range(length)))),
            "resets_one_key": draw(st.booleans()),
        }

    def inputs(self, device: torch.device) -> Tensors:
        randn = self.randn()
        inputs = self.heads(randn, (self.n_heads, self.n_heads, self.all_heads), device)
        if self.log_decay is not None:
            sizes = {"B": self.rows, "T": self.length, "H": self.all_heads, "K": self.key_width}
            random = randn(*(sizes[axis] for axis in self.log_decay.split()))
            a = -self.strength * random.abs() - self.weakest
            tokens = a if a.ndim == 1 else a.transpose(0, 1)
            for reset in self.resets:
                tokens[(reset % len(tokens), ..., *([0] if self.resets_one_key and a.ndim == 4 else []))] = -math.inf
            inputs["log_decay"] = self.laid_out("log_decay", a.to(device, self.wide_dtype))
        if self.initial_state:
            state = randn(len(self.lengths), self.all_heads, self.key_width, self.value_width)
            state *= self.sizes[1] * self.sizes[2]
            inputs["state"] = self.laid_out("state", state.to(device, self.wide_dtype))
        return inputs

    def call(self, inputs: Tensors) -> Recurrence:
        call = Recurrence(
            *(inputs[name] for name in "qkv"),
            log_decay=inputs.get("log_decay"),
            beta=inputs.get("beta"),
            a=inputs.get("a"),
            b=inputs.get("b"),
            initial_state=inputs.get("state"),
            cu_seqlens=self.cu_seqlens(inputs),
            boundaries=None,
            scale=self.factor,
            chunk_size=self.chunk_size,
            output_final_state=self.final_state,
            wide_output=self.wide_output,
        )
        require_recurrence(call)
        return call

    def define(self, inputs: Tensors) -> Tensors:
        """Compute S_t = diag(exp(a_t)) S_{t-1} + k_t v_t^T and o_t = scale q_t S_t, token by token."""
        inputs = inputs | {name: inputs[name].repeat_interleave(self.shared, dim=2) for name in "qk"}
        written = inputs["k"][..., :, None] * inputs["v"][..., None, :]  # [B T H K V]
        return self.recurrence(inputs, lambda t, decay, state: torch.addcmul(written[:, t], decay, state))

    def recurrence(self, inputs: Tensors, step: Callable[[int, Tensor, Tensor], Tensor]) -> Tensors:
        """Return output and final state; `step(t, decay, state)` returns the state after token t."""
        q, k, v = (inputs[name] for name in "qkv")
        a = inputs.get("log_decay", k.new_zeros(self.all_heads))
        a = a.expand(*k.shape[:2], -1) if a.ndim == 1 else a
        decays = (a if a.ndim == 4 else a[..., None]).exp()[..., None].unbind(1)
        boundaries = [0, *itertools.accumulate(self.lengths)] if self.packed else [0, self.length]
        states, final = [], []
        for n, (start, stop) in enumerate(itertools.pairwise(boundaries)):
            state = k.new_zeros(self.rows, self.all_heads, self.key_width, v.shape[3])
            if "state" in inputs:
                state = inputs["state"][n : n + 1] if self.packed else inputs["state"]
            for t in range(start, stop):
                state = step(t, decays[t], state)
                states.append(state)
            final.append(state)
        results = {"output": self.factor * torch.einsum("bthk,bthkv->bthv", q, torch.stack(states, dim=1))}
        return results | ({"state": torch.cat(final)} if self.final_state else {})

    def terms(self, inputs: Tensors, absolute: Tensors) -> Tensors:
        del inputs
        return self.define(absolute)  # every term is a product of inputs and decays, so absolute inputs suffice

    def cancelled(self, kernel: Kernel, absolute: Tensors, of_terms: Tensors) -> Tensors:
        """Add the terms that cancel in log-decay gradients, for a kernel that declares `gradient_by_subtraction`.

        Such a kernel computes the gradient of a token's log-decay as the sum of q dq - k dk over that token and all
        later ones.
        """
        if not kernel.gradient_by_subtraction or self.log_decay is None or "T" not in self.log_decay:
            return of_terms
        through = absolute["q"].detach() * of_terms["q"] + absolute["k"].detach() * of_terms["k"]
        through = through.flip(1).cumsum(1).flip(1).repeat_interleave(self.shared, dim=2)
        if "K" not in self.log_decay:
            through = through.sum(-1)
        return of_terms | {"log_decay": of_terms["log_decay"] + through}


@dataclass(frozen=True, kw_only=True, repr=False)
class DeltaCase(DecayCase):
    """One call of a kernel of the delta family (notation: ops/delta/api.py); all keys have the same norm."""

    rate: float = 1.0
    """Upper bound of beta; the lower bound is 0."""
    key_norm: float = 1.0
    """Norm of the keys."""

    wide_outputs, groups, extras = (False,), st.just(1), ("beta",)
    axes: ClassVar[Mapping[str, str]] = {**DecayCase.axes, "beta": "BTH"}

    @property
    def sign(self) -> int:
        """Sign with which the vector read from a state is written back."""
        return -1

    def dtype_of(self, name: str) -> torch.dtype:
        return self.wide_dtype if name == "beta" else super().dtype_of(name)

    @property
    def undefined(self) -> tuple[str, ...]:
        """The output in the cases of the base class, and then also the final state if there is an initial state.

        Keys read the initial state, so the final state has the same problem as the output.
        """
        return (*super().undefined, "state") if super().undefined and self.initial_state else super().undefined

    def underflow(self, name: str) -> float:
        """Return the absolute error that is always allowed; for a state, it includes underflow in the inputs' dtype.

        A state is the sum of vectors that tokens write. These have the inputs' dtype; the state's dtype is wider.
        """
        info = torch.finfo(self.dtype)
        return super().underflow(name) + (8 * info.tiny * info.eps if name == "state" else 0.0)

    @classmethod
    def details(cls, drawn: Drawn) -> dict[str, Any]:
        draw = drawn.draw
        # with small betas, a state remembers all tokens
        fields = super().details(drawn) | {"rate": draw(st.sampled_from([1.0, 2.0, 0.01]))}
        return fields | {"key_norm": draw(st.sampled_from([1.0, 1.0, 1.0, 0.5, 0.0]))}

    def inputs(self, device: torch.device) -> Tensors:
        inputs, generator = super().inputs(device), torch.Generator().manual_seed(self.seed + 2**17)
        if self.dtype.is_floating_point:  # kernels refuse other dtypes
            keys = writable(inputs["k"])
            keys.copy_(self.key_norm * F.normalize(keys.double(), dim=-1))
        beta = torch.randn(self.rows, self.length, self.n_heads, generator=generator, dtype=torch.float64)
        beta = self.rate * (0.5 + beta).clamp(0, 1)
        return inputs | {"beta": self.laid_out("beta", beta.to(device, self.wide_dtype))}

    def define(self, inputs: Tensors) -> Tensors:
        """Compute S_t = P_t + b_t k_t (v_t - k_t^T P_t) with P_t = exp(a_t) S_{t-1}, and o_t = scale q_t S_t."""
        return self.delta_rule(inputs, lambda _, key, decay, state: (self.sign * _row(key, decay * state), state))

    def terms(self, inputs: Tensors, absolute: Tensors) -> Tensors:
        """Return the error scales: the results of `define` with every term of every sum replaced by its absolute value.

        Each token's sums start from the exact state before it. The delta rule replaces the contents of a state: terms
        that add up over tokens, as in the decay family, would grow while the state does not. The terms of gradients do
        add up over tokens.
        """
        before: list[Tensor] = []

        def remember(_: int, key: Tensor, decay: Tensor, state: Tensor) -> tuple[Tensor, Tensor]:
            before.append(state.detach().abs())
            return self.sign * _row(key, decay * state), state

        def exact(t: int, key: Tensor, decay: Tensor, state: Tensor) -> tuple[Tensor, Tensor]:
            return _row(key, decay * before[t]), state + (before[t] - state).detach()

        self.delta_rule(inputs, remember)
        return self.delta_rule(absolute, exact)

    def delta_rule(
        self, inputs: Tensors, predict: Callable[[int, Tensor, Tensor, Tensor], tuple[Tensor, Tensor]]
    ) -> Tensors:
        """Return output and final state of the delta rule.

        `predict(t, key, decay, state)` returns the vector that is added to the value of token t, and the state that
        decays.
        """
        k, v, beta = (inputs[name] for name in ("k", "v", "beta"))

        def step(t: int, decay: Tensor, state: Tensor) -> Tensor:
            predicted, state = predict(t, k[:, t], decay, state)
            written = beta[:, t, :, None] * (v[:, t] + predicted)
            return torch.addcmul(k[:, t, :, :, None] * written[:, :, None], decay, state)

        return self.recurrence(inputs, step)

    def exact(self, kernel: Kernel) -> Exact:
        """Return the definition's results, with error scales of gradients that are at least the gradients themselves.

        The state transition can add many elements into one; the terms of single tokens do not include these sums.
        """
        exact = super().exact(kernel)
        terms = {name: torch.maximum(exact.gradients_terms[name], x.abs()) for name, x in exact.gradients.items()}
        return exact._replace(gradients_terms=terms)


@dataclass(frozen=True, kw_only=True, repr=False)
class DplrCase(DeltaCase):
    """One call of a DPLR kernel, which reads a state by the vector a (notation: ops/dplr/api.py).

    a has the norm of the keys, and the vector b, along which the read value is added, is close to -beta a: as in the
    delta rule, a state loses what it contains along a. With independent vectors, results could be mere rounding errors.
    """

    has_b: bool = True
    """True if the call has b; otherwise b = -k."""

    extras = ("a", "b")
    axes: ClassVar[Mapping[str, str]] = {**DecayCase.axes, "a": "BTHK", "b": "BTHK"}

    @property
    def sign(self) -> int:
        return 1 if self.has_b else -1

    @classmethod
    def details(cls, drawn: Drawn) -> dict[str, Any]:
        fields = super().details(drawn) | {"has_b": drawn.draw(st.booleans())}
        drawn_grad = drawn.common["grad"]
        grad = tuple(name for name in drawn_grad if name != "b" or fields["has_b"])
        # if only b has a gradient, keep b: the probe asks for a case with gradients
        return fields | ({"grad": grad} if grad or not drawn_grad else {"has_b": True})

    def inputs(self, device: torch.device) -> Tensors:
        inputs, generator = super().inputs(device), torch.Generator().manual_seed(self.seed + 2**18)
        a, e = torch.randn(2, *inputs["k"].shape, generator=generator, dtype=torch.float64)
        a = self.key_norm * F.normalize(a, dim=-1)
        beta = inputs.pop("beta").cpu().abs().double()[..., None]
        vectors = {"a": a}
        removed = beta * a * (1 + e.clamp(-1, 1) / 4)
        if self.has_b:
            vectors["b"] = -removed
        elif self.dtype.is_floating_point:
            keys = writable(inputs["k"])
            keys.copy_(removed[:, :, : keys.shape[2]])
        return inputs | {name: self.laid_out(name, x.to(device, self.dtype)) for name, x in vectors.items()}

    def delta_rule(
        self, inputs: Tensors, predict: Callable[[int, Tensor, Tensor, Tensor], tuple[Tensor, Tensor]]
    ) -> Tensors:
        k, v, a = (inputs[name] for name in ("k", "v", "a"))
        b = inputs.get("b", k)  # without b, it is -k: `sign` has the minus

        def step(t: int, decay: Tensor, state: Tensor) -> Tensor:
            read, state = predict(t, a[:, t], decay, state)
            written = k[:, t, :, :, None] * v[:, t, :, None] + b[:, t, :, :, None] * read[:, :, None]
            return torch.addcmul(written, decay, state)

        return self.recurrence(inputs, step)


def _row(x: Tensor, state: Tensor) -> Tensor:
    """Return x^T S: [B H K], [B H K V] -> [B H V]."""
    return torch.einsum("bhk,bhkv->bhv", x, state)


FAMILIES: dict[str, type[KernelCase]] = {
    "decay": DecayCase,
    "delta": DeltaCase,
    "dplr": DplrCase,
    "softmax": SoftmaxCase,
    "scan": ScanCase,
    "log_scan": LogScanCase,
    "diagonal_scan": DiagonalCase,
    "selective_scan": SelectiveCase,
    "short_convolution": ConvolutionCase,
    "slstm": SLSTMCase,
    "m2rnn": M2RNNCase,
}
"""Classes of cases by op: all ops that have kernels."""
