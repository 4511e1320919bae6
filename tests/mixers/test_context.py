"""Context parallelism: several processes compute the same outputs, states and gradients as one; and what they send."""

import multiprocessing
from pathlib import Path

import pytest
from rank_processes import Ranks

from seqmix import MIXERS

if "forkserver" not in multiprocessing.get_all_start_methods():
    pytest.skip("needs processes that fork", allow_module_level=True)

N = 3
"""Ranks: there is one with neighbours on both sides."""
CASES = (
    {"batch": 2, "length": 7},
    {"batch": 2, "length": 1, "state": True, "final": True},
    {"batch": 2, "length": 5, "state": True, "final": True},
    # boundaries of documents inside a rank, across ranks, at their edges; one token, none
    {"batch": 1, "length": 5, "cu_seqlens": [0, 3, 15]},
    {"batch": 1, "length": 5, "cu_seqlens": [0, 5, 5, 6, 10, 14, 15], "state": True, "final": True},
    {"batch": 1, "length": 1, "cu_seqlens": [0, 0, 1, 3, 3], "state": True},
    {"batch": 1, "length": 5, "cu_seqlens": [0, 5, 5, 6, 10, 14, 15]},
)
MIXERS_OF_ALL_OPS = (
    ("retention", {"n_heads": 2, "chunk_size": 4}),
    ("retention", {"n_heads": 2, "decay": "none"}),
    ("linear_attention", {"n_heads": 2, "chunk_size": 4}),
    ("gated_retention", {"n_heads": 2, "chunk_size": 4}),
    ("lightning", {"n_heads": 2, "chunk_size": 4}),
    ("gla", {"n_heads": 2, "chunk_size": 4}),
    ("hgrn2", {"n_heads": 2, "chunk_size": 4}),
    ("gsa", {"n_heads": 2, "chunk_size": 4}),
    ("mlstm", {"n_heads": 2, "chunk_size": 4}),
    ("mamba2", {"head_dim": 8, "d_state": 4, "chunk_size": 4}),
    ("mamba3", {"head_dim": 8, "d_state": 4, "chunk_size": 4}),
    ("rg_lru", {"n_heads": 2, "chunk_size": 4}),
    ("rwkv4", {"chunk_size": 4}),
    ("channel_mix", {}),
    ("h3", {"d_state": 6, "chunk_size": 4}),
    ("rwkv6", {"n_heads": 2, "chunk_size": 4}),
    ("rwkv7", {"n_heads": 2, "chunk_size": 4}),
    ("min_gru", {"chunk_size": 4}),
    ("mamba", {"d_state": 4, "chunk_size": 4}),
    ("delta_net", {"n_heads": 2, "chunk_size": 4}),
    ("gated_delta_net", {"n_heads": 2, "chunk_size": 4, "short_conv": 7}),
    ("delta_product", {"n_heads": 2, "chunk_size": 4}),
    ("kda", {"n_heads": 2, "chunk_size": 4}),
    ("gated_delta_net2", {"n_heads": 2, "chunk_size": 4}),
    ("comba", {"n_heads": 2, "chunk_size": 4}),
    ("attention", {"n_heads": 2, "n_kv_heads": 1, "chunk_size": 3}),
    ("attention", {"n_heads": 2, "window": 4, "positions": "xpos", "chunk_size": 3}),
    ("attention", {"n_heads": 2, "forget_gate": True, "sinks": True, "softcap": 2.0, "chunk_size": 3}),
    ("attention", {"n_heads": 2, "forget_gate": True, "positions": "alibi", "window": 4}),
    ("latent_attention", {"n_heads": 2, "chunk_size": 3}),
    ("hyena", {"short_conv": 4}),
    ("seqmix_mingru:MinGRUConfig", {}),  # knows nothing of context parallelism
    # states of any dtype, and a learned beginning
    ("unusual_mixers:S4DConfig", {}),
    ("unusual_mixers:TorchGRUConfig", {}),
    ("unusual_mixers:LearnedStartConfig", {}),
)
IDS = [" ".join((kind, *(f"{k}={v}" for k, v in fields.items()))) for kind, fields in MIXERS_OF_ALL_OPS]


@pytest.fixture(scope="module")
def ranks():
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(Path(__file__).resolve().parents[2] / "examples" / "plugin")
        pool = Ranks(N)
        yield pool
        pool.close()


@pytest.mark.slow
@pytest.mark.parametrize(("kind", "fields"), MIXERS_OF_ALL_OPS, ids=IDS)
def test_sequence_split_over_ranks_matches_one_rank(ranks, kind, fields):
    config = MIXERS.resolve(kind)(**fields)
    first, *others = sorted(config.traits.paradigms, key=lambda p: p is not config.paradigm)
    cases = [{"paradigm": first.value, **case} for case in CASES]
    cases += [{"paradigm": other.value, **case} for other in others for case in CASES[2:5:2]]
    cases = [case for case in cases if config.traits.packing or "cu_seqlens" not in case]
    ranks("mixer_as_one", kind, fields, cases)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("kind", "fields"),
    [
        ("retention", {"n_heads": 2}),
        ("mamba2", {"head_dim": 8, "d_state": 4}),
        ("delta_net", {"n_heads": 2}),
        ("attention", {"n_heads": 2, "window": 4}),
    ],
)
def test_sequential_fallback_matches_one_rank(ranks, kind, fields):
    cases = [{"paradigm": "recurrent", **case} for case in CASES]
    if kind == "attention":
        cases = cases[:3]
    ranks("mixer_as_one", kind, fields, cases, in_turn=True)


@pytest.mark.parametrize(("kind", "fields"), [("hyena", {}), ("path_attention", {"n_heads": 2})])
def test_growing_state_has_no_sequential_fallback(ranks, kind, fields):
    with pytest.raises(AssertionError, match=rf"{kind}.*context_parallel"):
        ranks("mixer_as_one", kind, fields, [{"paradigm": "recurrent", **CASES[0]}], in_turn=True)


def test_wrong_document_boundaries_raise(ranks):
    case = {"paradigm": "chunkwise", "batch": 1, "length": 5, "cu_seqlens": [0, 5]}
    with pytest.raises(AssertionError, match=r"cu_seqlens.*15"):
        ranks("mixer_as_one", "retention", {"n_heads": 2}, [case], whole=False)


@pytest.mark.slow
@pytest.mark.parametrize("preset", ["hybrid-tiny", "mamba2-tiny", "rwkv7-tiny"])
def test_model_split_over_ranks_matches_one_rank(ranks, preset):
    ranks("model_as_one", preset)


@pytest.mark.slow
@pytest.mark.parametrize("window", [None, 4])
def test_shared_keys_and_values_split_over_ranks_match_one_rank(ranks, window):
    mixer = f"model.blocks.attn.mixer.window={'null' if window is None else window}"
    ranks("model_as_one", "attention-tiny", mixer, "model.kv_sharing={kind: groups, size: 2}")


@pytest.mark.slow
def test_canon_layers_split_over_ranks_match_one_rank(ranks):
    ranks("model_as_one", "retnet-tiny", "model.blocks.ret.canon=[a, c, d]")


@pytest.mark.slow
@pytest.mark.parametrize(("kind", "fields"), MIXERS_OF_ALL_OPS[:-1], ids=IDS[:-1])
def test_communication_grows_with_length_only_for_growing_states(ranks, kind, fields):
    # what each rank receives in forward and backward for one layer with d_model 16
    short, long = (ranks("bytes_received", kind, fields, length) for length in (16, 64))
    attends = kind in ("attention", "latent_attention")
    if (attends or kind == "hyena") and "window" not in fields:
        assert all(3 * few < many <= 4 * few for few, many in zip(short, long, strict=True))
    else:
        assert long == short
    # of attention, the last receives the blocks of all, and the first the gradients of its own
    assert attends or len(set(short)) == 1


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["retention", "delta_net", "attention"])
def test_mixer_under_context_parallelism_compiles_to_one_graph(ranks, kind):
    ranks("compiled", kind, dict(MIXERS_OF_ALL_OPS)[kind])
