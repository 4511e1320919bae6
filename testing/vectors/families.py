"""Families of conformance vectors: the equation of each op, and the meaning of its tensors.

The definitions themselves are those of the kernel checks, token by token in float64 (testing/kernel).
"""

from collections.abc import Mapping
from typing import NamedTuple

from ..kernel.case import KernelCase
from ..kernel.families import FAMILIES as KERNEL_CASES
from .composed import DeltaProductCase, LongConvolutionCase


class Family(NamedTuple):
    """Description of a family, as the index has it."""

    case: type[KernelCase]
    """Class of its cases, which has the definition."""
    recurrence: str
    """The equation."""
    tensors: Mapping[str, str]
    """Shape and meaning of every input and output."""


_NOTATION = "B batch rows, T tokens, N rows of a state (one per packed document, else N = B)"
_STATE = "[N H K V] state before the first token; absent means zero. The state decays before the first token is added"
_FINAL = "[N H K V] state after the last token; an empty document leaves its row as it was"
_DECAY = "natural logarithm of the decay, <= 0, may be -inf: [H], [B T H] or [B T H K]; absent means no decay"
_BOUNDARIES = "[N+1] boundaries of packed documents, from 0 to T, with B = 1; documents may be empty"
_QUERY = "[B T H K] queries; they read the state after the token's update"
_SCAN_STATE = "state before the first token, {0}; absent means {1}. It decays before the first token is added"
_SCAN = {"cu_seqlens": _BOUNDARIES, "output": "[B T H V] h_t"}

NOTATION = f"{_NOTATION}, H heads, G groups of heads, K key width, V value width, C channels"

FAMILIES: dict[str, Family] = {
    "decay": Family(
        KERNEL_CASES["decay"],
        "S_t = diag(exp(log_decay_t)) S_{t-1} + k_t v_t^T;  output_t = scale * q_t S_t",
        {
            "q": "[B T G K] queries, each for H / G neighbouring heads; they read the state after the token's update",
            "k": "[B T G K] keys, each for H / G neighbouring heads",
            "v": "[B T H V] values",
            "log_decay": _DECAY,
            "state": f"input: {_STATE}; output: {_FINAL}",
            "cu_seqlens": _BOUNDARIES,
            "output": "[B T H V]",
        },
    ),
    "delta": Family(
        KERNEL_CASES["delta"],
        "P_t = diag(exp(log_decay_t)) S_{t-1};  S_t = P_t + beta_t k_t (v_t - k_t^T P_t)^T;  "
        "output_t = scale * q_t S_t",
        {
            "q": _QUERY,
            "k": "[B T H K] keys, used as they are: do not normalize them",
            "v": "[B T H V] values",
            "beta": "[B T H] factor of the prediction error that is written, 0 to 2",
            "log_decay": _DECAY,
            "state": f"input: {_STATE}; output: {_FINAL}",
            "cu_seqlens": _BOUNDARIES,
            "output": "[B T H V]",
        },
    ),
    "delta_product": Family(
        DeltaProductCase,
        "the delta rule with n steps per token: S = diag(exp(log_decay_t)) S_{t-1}, then for each step j of the token "
        "S = S + beta_j k_j (v_j - k_j^T S)^T;  S_t is the last S;  output_t = scale * q_t S_t",
        {
            "q": "[B T H K] queries; they read the state after the token's last step",
            "k": "[B T*n H K] keys, the steps of a token side by side; do not normalize them",
            "v": "[B T*n H V] values",
            "beta": "[B T*n H] factor of the prediction error that a step writes, 0 to 2",
            "log_decay": "[B T H] natural logarithm of the decay before a token's first step, <= 0, may be -inf",
            "state": f"input: {_STATE}; output: {_FINAL}",
            "cu_seqlens": f"{_BOUNDARIES}; they count tokens, not steps",
            "output": "[B T H V]",
        },
    ),
    "dplr": Family(
        KERNEL_CASES["dplr"],
        "P_t = diag(exp(log_decay_t)) S_{t-1};  S_t = P_t + b_t (a_t^T P_t) + k_t v_t^T;  output_t = scale * q_t S_t",
        {
            "q": _QUERY,
            "k": "[B T H K] keys that write the values",
            "v": "[B T H V] values",
            "a": "[B T H K] keys that read the decayed state",
            "b": "[B T H K] keys that write what a has read; absent means -k",
            "log_decay": _DECAY,
            "state": f"input: {_STATE}; output: {_FINAL}",
            "cu_seqlens": _BOUNDARIES,
            "output": "[B T H V]",
        },
    ),
    "scan": Family(
        KERNEL_CASES["scan"],
        "h_t = exp(log_decay_t) h_{t-1} + x_t, element by element;  output_t = h_t",
        {
            "x": "[B T H V] inputs",
            "log_decay": "[B T H V] natural logarithm of the decay, <= 0, may be -inf",
            "state": _SCAN_STATE.format("[N H V]", "zero"),
            **_SCAN,
        },
    ),
    "log_scan": Family(
        KERNEL_CASES["log_scan"],
        "h_t = log(exp(log_decay_t + h_{t-1}) + exp(x_t)), element by element;  output_t = h_t",
        {
            "x": "[B T H V] logarithms of the inputs",
            "log_decay": "[B T H V] natural logarithm of the decay, <= 0, may be -inf",
            "state": _SCAN_STATE.format("[N H V]", "-inf, the logarithm of zero"),
            **_SCAN,
        },
    ),
    "selective_scan": Family(
        KERNEL_CASES["selective_scan"],
        "h_t = exp(step_t rate) h_{t-1} + k_t x_t^T;  output_t = q_t h_t",
        {
            "x": "[B T C] inputs",
            "step": "[B T C] step sizes, >= 0; the input is not multiplied by them",
            "rate": "[K C] log-decay per unit of step, <= 0",
            "k": "[B T K] keys",
            "q": "[B T K] queries",
            "state": _SCAN_STATE.format("[N K C]", "zero"),
            "cu_seqlens": _BOUNDARIES,
            "output": "[B T C]",
        },
    ),
    "diagonal_scan": Family(
        KERNEL_CASES["diagonal_scan"],
        "h_t = exp(log_decay + i angle) h_{t-1} + x_t, complex;  output_t = Re(sum_k weight_k h_{t,k})",
        {
            "x": "[B T C] inputs",
            "log_decay": "[K C] natural logarithm of the decay, <= 0, of all tokens",
            "angle": "[K C] rotation per token, in radians",
            "weight": "[K C 2] complex weights of the output, as pairs of real numbers",
            "state": _SCAN_STATE.format("[N K C 2], pairs of real numbers", "zero"),
            "cu_seqlens": _BOUNDARIES,
            "output": "[B T C]",
        },
    ),
    "softmax": Family(
        KERNEL_CASES["softmax"],
        "output_n = sum_m softmax_m(s_nm) v_m over the keys m <= n of the same document (the last `window` of them);  "
        "s_nm = cap(scale * sum_d q_nd k_md exp(log_decay_d (n - m))) + sum_{m<l<=n} log_forget_l - slope (n - m);  "
        "cap(s) = softcap tanh(s / softcap);  sinks add exp(sink) to the denominator",
        {
            "q": "[B T H K] queries",
            "k": "[B T G K] keys, each for H / G neighbouring heads",
            "v": "[B T G V] values",
            "log_decay": "[K] decay of the products per token of distance; absent means none",
            "log_forget": "[B T H] natural logarithm of each token's forget gate, <= 0; absent means none",
            "slopes": "[H] ALiBi: subtracted from a score per token of distance; absent means zero",
            "sinks": "[H] score of one more key, whose value is zero; absent means no such key",
            "keys": "[N S G K] keys before the segment: the last length_n slots, in order; other slots are empty",
            "values": "[N S G V] values before the segment",
            "gates": "[N S H] log_forget of the tokens before the segment",
            "length": "[N] number of tokens before the segment",
            "cu_seqlens": _BOUNDARIES,
            "output": "[B T H V]",
        },
    ),
    "short_convolution": Family(
        KERNEL_CASES["short_convolution"],
        "output_t = f(bias + sum_{i<W} weight[:, W-1-i] x_{t-i});  f is silu or the identity",
        {
            "x": "[B T C] inputs",
            "weight": "[C W] filters; weight[:, W-1] multiplies the newest token",
            "bias": "[C]; absent means zero",
            "state": "[N W-1 C] inputs before the segment (as output: before the next one), oldest first",
            "cu_seqlens": _BOUNDARIES,
            "output": "[B T C]",
        },
    ),
    "long_convolution": Family(
        LongConvolutionCase,
        "output_t = sum_{i<L} filters[:, i] x_{t-i}",
        {
            "x": "[B T C] inputs",
            "filters": "[C L] filters; filters[:, 0] multiplies the newest token",
            "state": "[N P C] inputs before the segment, oldest first; absent means zeros",
            "cu_seqlens": _BOUNDARIES,
            "output": "[B T C]",
        },
    ),
}
"""All families by name."""
