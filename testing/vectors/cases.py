"""The cases of the conformance vectors, each with the property that it tests and the kind of bug that it shows."""

from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

import torch

from ...registry import SeqmixError, choices_hint
from ..kernel.case import KernelCase
from .families import FAMILIES

Fields = Mapping[str, Any]

SMALL: Fields = {"n_heads": 2, "key_width": 3, "value_width": 2, "dtype": torch.bfloat16}
"""Fields that all cases have. Queries, keys, values and cotangents are numbers of bfloat16, so they are the same in
every dtype; decays and states are float32."""


class Situation(NamedTuple):
    """A kind of call that a family is tested on."""

    property: str
    """Property that the case tests: a row of the runner's table."""
    reason: str
    """The kind of bug that the case shows."""
    fields: Fields
    """Fields of the kernel case."""


class VectorCase(NamedTuple):
    """A case of the vectors."""

    id: str
    family: str
    property: str
    reason: str
    case: KernelCase


ONE_TOKEN = {
    "one_token": Situation(
        "one token",
        "A single token is the first and the last one: loops that start at the second token, and dimensions of size "
        "one that are squeezed away.",
        {"lengths": (1,)},
    ),
    "step": Situation(
        "state in",
        "One token from a state is a decoding step, which often has a code path of its own.",
        {"lengths": (1, 1), "initial_state": True},
    ),
}
SEQUENCES = {
    "chunk_and_one": Situation(
        "chunk + 1",
        "65 tokens are one more than chunks of 64, 32 or 16: a last chunk of one token, and padding that reaches "
        "results.",
        {"lengths": (65,)},
    ),
    "batch": Situation(
        "batch",
        "Rows are independent: a state, a running sum or a maximum that is shared by rows.",
        {"lengths": (7, 7, 7)},
    ),
    "state_in": Situation(
        "state in",
        "A segment continues an earlier one, and its gradient reaches the earlier state: an initial state that is "
        "ignored, not decayed, or detached.",
        {"lengths": (20, 20), "initial_state": True},
    ),
    "packed": Situation(
        "packed",
        "Documents in one row do not see each other; one boundary is inside a chunk, one document has one token.",
        {"lengths": (66, 1, 13), "packed": True},
    ),
    "packed_states": Situation(
        "packed",
        "Every document starts from its own row of the state and ends in its own.",
        {"lengths": (5, 18, 2), "packed": True, "initial_state": True},
    ),
    "empty_documents": Situation(
        "empty documents",
        "Empty documents, at the ends and side by side, have a state too, which stays as it was.",
        {"lengths": (0, 4, 0, 0, 6, 0), "packed": True, "initial_state": True},
    ),
    "odd_widths": Situation(
        "odd widths",
        "Keys and values of different widths, which are no powers of two: tiles that are partly empty.",
        {"lengths": (9,), "key_width": 17, "value_width": 5},
    ),
}
FORGETTING = {
    "reset": Situation(
        "log-decay -inf",
        "A log-decay of -inf forgets everything before the token: a difference of two running sums is inf - inf, NaN.",
        {"lengths": (40,), "resets": (5, 16, 17, 39)},
    ),
    "reset_first": Situation(
        "log-decay -inf",
        "A log-decay of -inf at the first token forgets the initial state, whose gradient is then zero and not NaN.",
        {"lengths": (9,), "resets": (0,), "initial_state": True},
    ),
    "strong_decay": Situation(
        "strong decay",
        "Log-decays below -9 at every token: exp(-sum) of a chunk overflows float32, and decays underflow to zero.",
        {"lengths": (65,), "strength": 5.0, "weakest": 9.0},
    ),
}
REMEMBERING = {
    "weak_decay": Situation(
        "weak decay",
        "Log-decays near -0.001: a decay that is rounded to 16 bits is 1, and nothing is forgotten.",
        {"lengths": (200,), "n_heads": 1, "strength": 0.001},
    ),
}
LONG: Fields = {"lengths": (4096,), "n_heads": 1, "key_width": 2, "value_width": 2, "grad": ()}
LENGTHS = {
    "long": Situation(
        "long",
        "4,096 tokens: the running sum of all log-decays reaches about -5,000, and the difference of two of its "
        "float32 values has lost the digits of a single decay.",
        {**LONG, "weakest": 0.5},
    ),
    "long_memory": Situation(
        "long",
        "4,096 tokens that are hardly forgotten: errors of a state that is rounded at every token add up.",
        {**LONG, "strength": 0.001},
    ),
}
NEVER_FORGETTING = {
    "long_memory": Situation("long", LENGTHS["long_memory"].reason, LONG),
}
DELTA = {
    "reflections": Situation(
        "beta up to 2",
        "With beta above 1 a key's transition has a negative eigenvalue: a beta that is clamped to 1.",
        {"lengths": (30,), "rate": 2.0},
    ),
    "zero_keys": Situation(
        "zero keys",
        "Keys of zeros write nothing and give finite gradients: a division by their norm is NaN.",
        {"lengths": (9,), "key_norm": 0.0},
    ),
}
GROUPED = {
    "grouped_heads": Situation(
        "grouped heads",
        "Two value heads share each query and key head: heads that are repeated in the wrong order (tiled, not "
        "interleaved).",
        {"lengths": (18,), "shared": 2},
    ),
}
RESET_ONE_KEY = {
    "reset_one_key": Situation(
        "log-decay -inf",
        "A log-decay of -inf in one key dimension forgets one row of the state and no other.",
        {"lengths": (20,), "resets": (5, 16, 17), "resets_one_key": True},
    ),
}
PER_TOKEN = {**ONE_TOKEN, **SEQUENCES, **FORGETTING, **REMEMBERING, **LENGTHS}
FIXED_DECAY = {**ONE_TOKEN, **SEQUENCES, **REMEMBERING}
WITHOUT_DECAY = {**ONE_TOKEN, **SEQUENCES, **NEVER_FORGETTING}
CACHED: Fields = {"initial_state": True, "cache": "growing"}
ATTENTION = {
    **ONE_TOKEN,
    **{name: SEQUENCES[name] for name in ("chunk_and_one", "batch", "packed", "odd_widths")},
    "step": Situation(
        "state in",
        "One token after cached keys is a decoding step.",
        {"lengths": (1, 1), **CACHED, "reads": (6, 6), "capacity": 6},
    ),
    "state_in": Situation(
        "state in",
        "A segment after cached keys sees all of them: a causal mask that is aligned to the wrong corner.",
        {"lengths": (8, 8), **CACHED, "reads": (5, 5), "capacity": 5},
    ),
    "uneven_states": Situation(
        "state in",
        "Rows have read different numbers of tokens: empty slots of a cache that are attended to.",
        {"lengths": (4, 4), **CACHED, "reads": (2, 5), "capacity": 6},
    ),
    "empty_documents": Situation(
        "empty documents",
        "Empty documents, at the ends and side by side.",
        {"lengths": (0, 4, 0, 0, 6, 0), "packed": True},
    ),
    "grouped_heads": Situation(
        "grouped heads",
        "Two query heads share each key head: key heads that are repeated in the wrong order (tiled, not interleaved).",
        {"lengths": (18,), "n_heads": 4, "n_kv_heads": 2},
    ),
    "large_scores": Situation(
        "large scores",
        "Scores of both signs in the hundreds: exp without the row's maximum overflows.",
        {"lengths": (18,), "sizes": (200.0, 1.0, 1.0)},
    ),
    "window": Situation(
        "window",
        "A window of 4 keys includes the query's own: off by one.",
        {"lengths": (18,), "window": 4},
    ),
    "window_of_one": Situation(
        "window", "A window of one key is the query's own: the output is its value.", {"lengths": (9,), "window": 1}
    ),
    "window_and_state": Situation(
        "window",
        "A window reaches into the cached keys, but not to the oldest.",
        {"lengths": (6, 6), **CACHED, "reads": (5, 5), "capacity": 5, "window": 4},
    ),
    "window_packed": Situation(
        "window",
        "A window ends at the start of a document.",
        {"lengths": (9, 3, 6), "packed": True, "window": 4},
    ),
    "sinks": Situation(
        "sinks", "A sink takes part of the weight and gives no value.", {"lengths": (18,), "scores": ("sinks",)}
    ),
    "softcap": Situation(
        "soft cap",
        "The cap is applied after the scale and before the mask.",
        {"lengths": (18,), "scores": ("softcap",), "softcap": 0.7},
    ),
    "alibi": Situation(
        "ALiBi",
        "Slopes are subtracted per token of distance, also from cached keys.",
        {"lengths": (8, 8), **CACHED, "reads": (5, 5), "capacity": 5, "scores": ("slopes",)},
    ),
    "forget_gates": Situation(
        "forget gates",
        "A gate counts for the keys before its token, and not for its own key.",
        {"lengths": (65,), "scores": ("log_forget",)},
    ),
    "forget_gates_and_state": Situation(
        "forget gates",
        "Gates of cached tokens count too.",
        {"lengths": (8, 8), **CACHED, "reads": (5, 5), "capacity": 5, "scores": ("log_forget",)},
    ),
    "key_decay": Situation(
        "key decay",
        "Every key dimension decays with the distance (xPos): factors of single positions overflow.",
        {"lengths": (65,), "log_decay": "K"},
    ),
    "everything": Situation(
        "soft cap",
        "The order in which cap, gates, slopes and sinks are applied.",
        {"lengths": (18,), "scores": ("log_forget", "slopes", "softcap", "sinks"), "softcap": 0.7},
    ),
    "long": Situation(
        "long",
        "1,024 tokens: a softmax over blocks that is rescaled many times.",
        {"lengths": (1024,), "n_heads": 1, "n_kv_heads": 1, "key_width": 2, "value_width": 2} | {"grad": ()},
    ),
}
SHORT_CONVOLUTION = {
    **ONE_TOKEN,
    **{name: x for name, x in SEQUENCES.items() if name != "odd_widths"},
    "width_one": Situation("odd widths", "A filter of one tap has an empty state.", {"lengths": (9,), "key_width": 1}),
    "no_bias": Situation("no bias", "The bias is optional.", {"lengths": (9,), "has_bias": False}),
    "silu": Situation("silu", "silu follows the bias.", {"lengths": (18,), "silu": True}),
}
LONG_CONVOLUTION = {
    **{name: x for name, x in (ONE_TOKEN | SEQUENCES).items() if name not in ("odd_widths", "packed_states")},
    "step": Situation("state in", ONE_TOKEN["step"].reason, {"lengths": (1, 1), "initial_state": True, "past": 40}),
    "state_in": Situation(
        "state in",
        "The filter reaches into the inputs before the segment: a circular convolution that wraps around.",
        {"lengths": (20, 20), "initial_state": True, "past": 9},
    ),
    "empty_documents": Situation(
        "empty documents",
        "Empty documents, at the ends and side by side.",
        {"lengths": (0, 4, 0, 0, 6, 0), "packed": True},
    ),
    "short_filter": Situation(
        "odd widths", "A filter that is shorter than the text forgets older inputs.", {"lengths": (20,), "key_width": 5}
    ),
    "long": Situation(
        "long",
        "1,024 tokens and a filter of as many taps: an FFT of too small a size wraps around.",
        {"lengths": (1024,), "n_heads": 1, "value_width": 2, "key_width": 1024, "grad": ()},
    ),
}

Variants = Mapping[str, tuple[Fields, Mapping[str, Situation]]]

VARIANTS: Mapping[str, Variants] = {
    "decay": {
        "no_decay": ({}, {**WITHOUT_DECAY, **GROUPED}),
        "per_head": ({"log_decay": "H"}, {**FIXED_DECAY, **GROUPED}),
        "per_token": ({"log_decay": "B T H"}, {**PER_TOKEN, **GROUPED}),
        "per_key": ({"log_decay": "B T H K"}, {**PER_TOKEN, **GROUPED, **RESET_ONE_KEY}),
    },
    "delta": {
        "no_decay": ({}, {**WITHOUT_DECAY, **DELTA}),
        "per_token": ({"log_decay": "B T H"}, {**PER_TOKEN, **DELTA}),
        "per_key": ({"log_decay": "B T H K"}, {**PER_TOKEN, **DELTA, **RESET_ONE_KEY}),
    },
    "delta_product": {
        "": ({"log_decay": "B T H"}, {**ONE_TOKEN, **SEQUENCES, **FORGETTING, **DELTA}),
    },
    "dplr": {
        "no_decay": ({}, WITHOUT_DECAY),
        "per_key": ({"log_decay": "B T H K"}, {**PER_TOKEN, **RESET_ONE_KEY}),
        "without_b": ({"log_decay": "B T H K", "has_b": False}, {**ONE_TOKEN, **SEQUENCES, **FORGETTING}),
    },
    "scan": {"": ({"log_decay": "B T H V"}, PER_TOKEN)},
    "log_scan": {"": ({"log_decay": "B T H V"}, PER_TOKEN)},
    "selective_scan": {
        "": ({}, {name: x for name, x in PER_TOKEN.items() if "reset" not in name}),
    },
    "diagonal_scan": {"": ({"log_decay": "K C"}, {**FIXED_DECAY, "long_memory": LENGTHS["long_memory"]})},
    "softmax": {"": ({"n_kv_heads": 2}, ATTENTION)},
    "short_convolution": {"": ({"key_width": 4}, SHORT_CONVOLUTION)},
    "long_convolution": {"": ({"key_width": 65}, LONG_CONVOLUTION)},
}
"""Variants of each family by name, each with its fields and its situations."""


def vector_cases(families: tuple[str, ...] = ()) -> Iterator[VectorCase]:
    """Yield the cases of the named families, or of all families if none is named.

    Raises:
        SeqmixError: a family is unknown; the message names the nearest match.
    """
    for family in families:
        if family not in FAMILIES:
            raise SeqmixError(f"there is no family {family!r}{choices_hint(family, FAMILIES, 'families')}")
    for family in dict.fromkeys(families) or FAMILIES:
        for variant, (fields, situations) in VARIANTS[family].items():
            for name, situation in situations.items():
                identifier = "/".join(part for part in (family, variant, name) if part)
                case = _case(family, {**SMALL, **fields, **situation.fields})
                yield VectorCase(identifier, family, situation.property, situation.reason, case)


def _case(family: str, fields: dict[str, Any]) -> KernelCase:
    """Return the kernel case of these fields; unless they say otherwise, with the final state and all gradients.

    Gradients go through the final state only in cases that begin with a state, so that an implementation without
    states can compute the gradients of the others.
    """
    kind = FAMILIES[family].case
    # the final state of attention and long convolutions has all inputs so far: there is nothing to compute
    fields["final_state"] = family not in ("softmax", "long_convolution")
    if not fields.get("initial_state"):
        fields["upstream"] = "output"
    if "grad" not in fields:
        inputs = kind(**fields).inputs(torch.device("cpu"))
        fields["grad"] = tuple(name for name, x in inputs.items() if x.is_floating_point())
    return kind(**fields)
