"""Score modifications of softmax attention (gates, slopes, softcap, sinks) against a query-by-query definition."""

import itertools
import math

import pytest
import torch
from fla_oracles import INSTALLED, agree, loaded, needs_fla, with_gradients
from torch.nn.functional import scaled_dot_product_attention
from torch.testing import assert_close

from seqmix.ops.attention import ForgettingCache, RingCache, empty_cache, resize_cache, sdpa, softmax_attention
from seqmix.ops.runtime.call import Call
from seqmix.ops.runtime.kernel import find
from seqmix.ops.runtime.paradigm import Paradigm
from seqmix.registry import SeqmixError

H, G, K, V = 4, 2, 4, 3
PARADIGMS = list(Paradigm)
every_paradigm = pytest.mark.parametrize("paradigm", PARADIGMS)
NAMES = ("log_forget", "slopes", "softcap", "sinks")
SOME = [*((name,) for name in NAMES), ("log_forget", "slopes"), ("log_forget", "sinks"), ("softcap", "sinks"), NAMES]


def exactly(actual, expected):
    assert_close(actual, expected, rtol=1e-9, atol=1e-9)


def segment(length, batch_size=2):
    torch.manual_seed(length)
    sizes = {"q": (H, K), "k": (G, K), "v": (G, V)}
    tensors = {name: torch.randn(batch_size, length, *size, dtype=torch.float64) for name, size in sizes.items()}
    tensors["log_forget"] = -torch.rand(batch_size, length, H, dtype=torch.float64)
    fixed = {"slopes": torch.linspace(0.1, 2, H).double(), "softcap": 0.7, "sinks": torch.linspace(-1, 3, H).double()}
    return tensors, fixed


def chosen(tensors, fixed, names):
    given = {name: x for name, x in {**tensors, **fixed}.items() if name in names or name in "qkv"}
    return {name: x.clone().requires_grad_() if torch.is_tensor(x) else x for name, x in given.items()}


def definition(given, window=None):
    """One row after another, one query and one head after another."""
    q, k, v = (given[name] for name in "qkv")
    rows = []
    for row, n, h in itertools.product(range(len(q)), range(q.shape[1]), range(H)):
        terms, values = [], []
        for m in range(0 if window is None else max(0, n - window + 1), n + 1):
            score = q[row, n, h] @ k[row, m, h // (H // G)] / math.sqrt(K)
            if "softcap" in given:
                score = given["softcap"] * (score / given["softcap"]).tanh()
            if "log_forget" in given:
                score = score + given["log_forget"][row, m + 1 : n + 1, h].sum()
            if "slopes" in given:
                score = score - given["slopes"][h] * (n - m)
            terms.append(score.exp())
            values.append(v[row, m, h // (H // G)])
        total = sum(terms) + (given["sinks"][h].exp() if "sinks" in given else 0)
        rows.append(sum(term / total * value for term, value in zip(terms, values, strict=True)))
    return torch.stack(rows).view(*q.shape[:3], V)


def with_grads(output, given):
    leaves = [x for x in given.values() if torch.is_tensor(x)]
    above = torch.linspace(-1, 1, output.numel(), dtype=output.dtype).view(output.shape)
    return output.detach(), *torch.autograd.grad(output, leaves, above)


def part(given, start, stop):
    """Tokens start to stop - 1."""
    return {name: x[:, start:stop] if name in ("q", "k", "v", "log_forget") else x for name, x in given.items()}


@pytest.mark.parametrize("names", SOME, ids="-".join)
@pytest.mark.parametrize("window", [None, 4])
@every_paradigm
def test_whole_and_segmented_outputs_match_the_definition(paradigm, window, names):
    given = chosen(*segment(9), names)
    expected = with_grads(definition(given, window), given)
    options = {"window": window, "paradigm": paradigm, "chunk_size": 2}
    exactly(with_grads(softmax_attention(**given, **options)[0], given), expected)
    state, outputs = None, []
    for start, stop in itertools.pairwise([0, 3, 4, 5, 9]):
        piece = part(given, start, stop)
        y, state = softmax_attention(**piece, **options, initial_state=state, output_final_state=True)
        outputs.append(y)
    exactly(with_grads(torch.cat(outputs, 1), given), expected)


@pytest.mark.parametrize("names", SOME, ids="-".join)
@pytest.mark.parametrize("window", [None, 3])
@pytest.mark.parametrize("kind", ["growing", "ring"])
@every_paradigm
def test_documents_and_rows_with_different_pasts_are_independent(paradigm, kind, window, names):
    # three documents, then more of each of them packed, then two tokens more in a batch of three rows
    lengths, more, options = (4, 0, 6), (1, 3, 0), {"window": window, "paradigm": paradigm, "chunk_size": 2}
    alone = [chosen(*segment(a + b + 2, 1), names) for a, b in zip(lengths, more, strict=True)]
    expected = [definition(given, window) for given in alone]

    def packed(starts, sizes):
        parts = [part(given, a, a + n) for given, a, n in zip(alone, starts, sizes, strict=True)]
        joined = {
            name: torch.cat([p[name] for p in parts], 1)
            for name in ("q", "k", "v", "log_forget")
            if name in (*names, "q", "k", "v")
        }
        return alone[0] | joined | {"cu_seqlens": torch.tensor([0, *itertools.accumulate(sizes)])}

    state = None
    if kind == "ring":
        heads = H if "log_forget" in names else None
        state = empty_cache(RingCache, 3, window or 9, (G, K, V), torch.empty(0).double(), heads)
    with torch.no_grad():
        for starts, sizes in (((0, 0, 0), lengths), (lengths, more)):
            y, state = softmax_attention(
                **packed(starts, sizes), **options, initial_state=state, output_final_state=True
            )
            for piece, whole, start in zip(y.split(sizes, 1), expected, starts, strict=True):
                exactly(piece, whole[:, start : start + piece.shape[1]])
        starts = [a + b for a, b in zip(lengths, more, strict=True)]
        pieces = [part(given, start, start + 2) for given, start in zip(alone, starts, strict=True)]
        rows = {
            name: torch.cat([p[name] for p in pieces])
            for name in pieces[0]
            if name not in ("slopes", "softcap", "sinks")
        }
        y, _ = softmax_attention(**alone[0] | rows, **options, initial_state=state, output_final_state=True)
    for row, whole, start in zip(y, expected, starts, strict=True):
        exactly(row, whole[0, start : start + 2])


@every_paradigm
def test_boundaries_known_only_on_device_give_equal_results(paradigm):
    given = chosen(*segment(9, 1), NAMES)
    options = {"state": None, "return_state": True, "chunk_size": 2, "backend": "sdpa"}
    call = Call(paradigm, **options)._replace(
        documents=Call.of(paradigm, 9, cu_seqlens=torch.tensor([0, 4, 9])).documents
    )
    tensors = [given.pop(name) for name in "qkv"]
    known, state = softmax_attention(*tensors, call, **given)
    hidden = call.documents._replace(boundaries=None)
    exactly((known, state), softmax_attention(*tensors, call._replace(documents=hidden), **given))
    after = call._replace(documents=hidden, state=state)
    visible = after._replace(documents=call.documents)
    exactly(softmax_attention(*tensors, after, **given), softmax_attention(*tensors, visible, **given))


@every_paradigm
@pytest.mark.parametrize("strength", [1e-4, 1e-2, 1.0])
def test_gate_sums_keep_full_precision_after_100_000_tokens(paradigm, strength):
    # of many tokens' gates, float32 has at best 7 digits; a weight is to be as exact as that of a few tokens
    generator, length = torch.Generator().manual_seed(0), 100_000
    gates = -strength * torch.rand(1, length, 1, generator=generator)
    k, v = (torch.randn(1, length, 1, 2, generator=generator) for _ in range(2))
    cache = ForgettingCache(RingCache(k, v, torch.tensor([length])), gates)
    now = [torch.randn(1, 2, 1, 2, generator=generator) for _ in range(3)]
    new = -strength * torch.rand(1, 2, 1, generator=generator)
    wide = ForgettingCache(RingCache(k.double(), v.double(), cache.length), gates.double())
    found, expected = (
        softmax_attention(
            *(x.to(cast) for x in now), log_forget=new.to(cast), window=length, initial_state=past, paradigm=paradigm
        )[0]
        for cast, past in ((torch.float32, cache), (torch.float64, wide))
    )
    assert_close(found.double(), expected, rtol=3e-6, atol=3e-6)


def test_gates_stay_accurate_when_decoding_token_by_token():
    # log f = -1e-4: a sum that each token rounds is off by half its last digit each time, and always in one direction
    length = 3000
    generator = torch.Generator().manual_seed(0)
    tensors = {name: torch.randn(1, length, 1, 2, generator=generator) for name in "qkv"}
    gates = tensors["log_forget"] = torch.full((1, length, 1), -1e-4)
    state = ForgettingCache(RingCache(*(torch.zeros(1, length, 1, 2) for _ in "kv"), torch.tensor([0])), 0 * gates)
    with torch.no_grad():
        whole, _ = softmax_attention(**{name: x.double() for name, x in tensors.items()})
        for t in range(length):
            now = {name: x[:, t : t + 1] for name, x in tensors.items()}
            y, state = softmax_attention(**now, initial_state=state, output_final_state=True, paradigm="recurrent")
    assert_close(y[:, 0].double(), whole[:, -1], rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("capacity", [3, 5, 12])
def test_resized_cache_keeps_its_gates(capacity):
    given = chosen(*segment(7), ("log_forget",))
    _, state = softmax_attention(**part(given, 0, 5), window=3, output_final_state=True)
    expected, _ = softmax_attention(**part(given, 5, 7), window=3, initial_state=state)
    for after in (
        resize_cache(state, RingCache, capacity),
        resize_cache(resize_cache(state, RingCache, capacity), RingCache, 3),
    ):
        exactly(softmax_attention(**part(given, 5, 7), window=3, initial_state=after)[0], expected)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("names", SOME, ids="-".join)
def test_gates_and_caps_are_not_rounded_to_16_bits(names, dtype):
    tensors, fixed = segment(40)
    tensors["log_forget"] = 10 * tensors["log_forget"]
    given = {name: x for name, x in (tensors | fixed).items() if name in (*names, "q", "k", "v")}
    narrow = {name: x.to(dtype) if name in "qkv" else x for name, x in given.items()}
    exact = softmax_attention(**narrow | {name: x.double() for name, x in narrow.items() if name in "qkv"})[0]
    for context in (torch.autocast("cpu", dtype, enabled=False), torch.autocast("cpu", dtype)):
        with context:
            found = softmax_attention(**narrow)[0]
        assert found.dtype == dtype
        assert_close(found.double(), exact, rtol=0, atol=6 * torch.finfo(dtype).eps)


@pytest.mark.parametrize("names", [("log_forget",), ("slopes",)], ids="-".join)
def test_sdpa_bias_is_never_wider_than_the_queries(names, monkeypatch):
    # on a GPU it raises, or reads a float32 bias as if it were of 16 bits
    masks = []

    def watched(*args, attn_mask, **options):
        masks.append(attn_mask.dtype)
        return scaled_dot_product_attention(*args, attn_mask=attn_mask, **options)

    monkeypatch.setattr(sdpa, "scaled_dot_product_attention", watched)
    tensors, fixed = segment(5)
    given = {name: x.float() for name, x in (tensors | fixed).items() if name in (*names, "q", "k", "v")}
    softmax_attention(**given)
    softmax_attention(**given | {name: given[name].bfloat16() for name in "qkv"})
    assert masks == [torch.float32]


@pytest.mark.slow
@pytest.mark.parametrize(("paradigm", "case"), list(zip(PARADIGMS, ["growing", "ring", "packed"], strict=True)))
def test_attention_with_score_options_compiles_into_one_graph(paradigm, case):
    given = chosen(*segment(6, 1), NAMES)
    heads = empty_cache(RingCache, 1 + (case == "packed"), 9, (G, K, V), torch.empty(0).double(), H)
    options = {
        "growing": {"initial_state": softmax_attention(**given, output_final_state=True)[1]},
        "ring": {"initial_state": heads, "window": 9},
        "packed": {"initial_state": heads, "cu_seqlens": torch.tensor([0, 2, 6])},
    }[case] | {"output_final_state": True, "chunk_size": 4, "paradigm": paradigm}
    torch._dynamo.reset()
    compiled = torch.compile(softmax_attention, fullgraph=True, backend="aot_eager")
    results = [function(**given, **options) for function in (softmax_attention, compiled)]
    exactly(*results)
    exactly(*(with_grads(y, given) for y, _ in results))


def test_chunkwise_backward_memory_is_linear():
    def saved_bytes(length):
        given, seen = chosen(*segment(length, 1), NAMES), {}

        def pack(x):
            seen[x.untyped_storage().data_ptr()] = x.untyped_storage().nbytes()
            return x

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
            softmax_attention(**given, chunk_size=32, paradigm=Paradigm.CHUNKWISE)
        return sum(seen.values())

    assert saved_bytes(1024) <= 2.1 * saved_bytes(512)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("backend", ["flex", "xformers"])
def test_backends_raise_naming_the_score_option_they_lack(backend, name):
    given = {key: x.float() if torch.is_tensor(x) else x for key, x in chosen(*segment(4), (name,)).items()}
    with torch.no_grad(), pytest.raises(SeqmixError, match=f"{backend} does not support {name}"):
        softmax_attention(**given, backend=backend)
    assert find("softmax", Paradigm.PARALLEL, backend).limits.__module__.endswith(backend)


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"log_forget": torch.zeros(2, 6, 3)}, r"log_forget .*\[2, 6, 4\].*\[2, 6, 3\]"),
        ({"log_forget": torch.zeros(2, 6, 4, dtype=torch.int64)}, "log_forget must be a floating-point tensor"),
        ({"slopes": torch.zeros(2)}, r"slopes .*\[4\].*\[2\]"),
        ({"sinks": torch.zeros(2)}, r"sinks .*\[4\].*\[2\]"),
        ({"softcap": 0.0}, "softcap .* above 0"),
        ({"softcap": math.inf}, "softcap .* above 0"),
        ({"softcaps": 3.0}, "softcaps.*softcap"),
        ({"value_dims": 2}, "value_dims .* empty v"),
        ({"initial_state": empty_cache(RingCache, 2, 8, (G, K, V), torch.empty(0).double(), H)}, "has forget gates"),
        (
            {
                "initial_state": empty_cache(RingCache, 2, 8, (G, K, V), torch.empty(0).double()),
                "log_forget": torch.zeros(2, 6, 4),
            },
            "has no forget gates",
        ),
        (
            {
                "initial_state": empty_cache(RingCache, 2, 8, (G, K, V), torch.empty(0).double(), 2),
                "log_forget": torch.zeros(2, 6, 4),
            },
            r"\[2, 8, 2\]",
        ),
    ],
)
def test_mismatched_arguments_raise(change, named):
    with pytest.raises(SeqmixError, match=named):
        softmax_attention(**chosen(*segment(6), ()) | change)


@needs_fla
@pytest.mark.parametrize("window", [None, 5])
@every_paradigm
def test_gated_attention_matches_fla_forgetting_attention(paradigm, window):
    assert INSTALLED
    tensors, _ = segment(30)
    arguments = [x.float() for x in tensors.values()]

    def ours(q, k, v, g):
        return softmax_attention(q, k, v, log_forget=g, window=window, paradigm=paradigm, chunk_size=8)[:1]

    naive = loaded("forgetting_attn").naive_forgetting_attn
    theirs = with_gradients(lambda q, k, v, g: [naive(q, k, v, g, window_size=window)], arguments)
    agree(with_gradients(ours, arguments), theirs)
