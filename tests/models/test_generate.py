"""Generation: prefill and decoding match a full forward pass; sampling; streaming."""

import itertools
import math
from collections import Counter
from collections.abc import Iterator
from types import SimpleNamespace

import pytest
import torch
from hypothesis import example, given
from hypothesis import strategies as st
from torch.testing import assert_close
from torch.utils._pytree import tree_leaves

import seqmix.models.generate
from seqmix import Paradigm, Sampling, SeqmixError, Traits, generate_text, stream_text
from seqmix.models import ByteTokenizer, generate_tokens, prefill, sample

GREEDY = Sampling(temperature=0)
LENGTHS = (5, 1, 9, 2)


def prompts(lengths=LENGTHS):
    generator = torch.Generator().manual_seed(3)
    return [torch.randint(0, 257, (length,), generator=generator) for length in lengths]


def generated(model, given, count=6, sampling=GREEDY, **options):
    return torch.stack(list(generate_tokens(model, given, max_new_tokens=count, sampling=sampling, **options)), dim=1)


def test_prefill_returns_logits_and_state_after_every_prompt(model_of, each_mixer):
    model = model_of(*each_mixer)
    logits, state = prefill(model, prompts(), max_length=20)
    assert not any(leaf.requires_grad for leaf in tree_leaves((logits, state)))
    more = torch.randint(0, 257, (4, 3), generator=torch.Generator().manual_seed(4))
    following = model(more, state).logits
    for i, prompt in enumerate(prompts()):
        whole = model(torch.cat([prompt, more[i]])[None]).logits[0]
        assert_close(logits[i], whole[len(prompt) - 1], rtol=1e-9, atol=1e-9)
        assert_close(following[i], whole[len(prompt) :], rtol=1e-9, atol=1e-9)


def test_prefill_runs_chunkwise_and_decoding_recurrent(model_of):
    model, calls = model_of("retention", "attention"), []
    model.register_forward_pre_hook(
        lambda module, args, kwargs: calls.append((args[0].shape, kwargs["paradigm"])), with_kwargs=True
    )
    generated(model, prompts(), count=3)
    assert calls == [
        ((1, sum(LENGTHS)), (Paradigm.CHUNKWISE,) * 2),
        ((4, 1), (Paradigm.RECURRENT,) * 2),
        ((4, 1), (Paradigm.RECURRENT,) * 2),
    ]


def restrict(model, **traits):
    """Make a model's mixers declare less than they can."""
    declared = {"paradigms": frozenset(Paradigm), "state": "constant", "packing": True, "shift_invariant": False}
    for block in model.blocks:
        block.mixer.traits = Traits(**declared | traits)
    return model


@pytest.mark.parametrize(
    ("mixer", "traits"),
    [
        ("attention", {"packing": False}),
        ("retention", {"packing": False}),
        *(("retention", {"paradigms": frozenset({paradigm})}) for paradigm in Paradigm),
    ],
    ids=str,
)
def test_mixer_with_fewer_declared_traits_generates_same_tokens(model_of, mixer, traits):
    expected = generated(model_of(mixer), prompts())
    assert torch.equal(generated(restrict(model_of(mixer), **traits), prompts()), expected)


@pytest.mark.parametrize("count", [1, 2, 3])
def test_model_is_called_once_per_requested_token(model_of, count):
    model, calls = model_of("retention").train(), []
    model.register_forward_hook(lambda *_: calls.append(1))
    assert len(list(generate_tokens(model, prompts(), max_new_tokens=count, sampling=GREEDY))) == count
    assert len(calls) == count
    assert model.training  # as the caller set it


@pytest.mark.parametrize("count", [0, -1])
def test_invalid_max_new_tokens_raises(model_of, count):
    with pytest.raises(SeqmixError, match=f"max_new_tokens .* {count}"):
        generated(model_of("retention"), prompts(), count=count)


@pytest.mark.parametrize("given", [[], [torch.tensor([], dtype=torch.int64)], [torch.tensor([1]), torch.tensor([])]])
def test_prompt_without_tokens_raises(model_of, given):
    with pytest.raises(SeqmixError, match="prompt"):
        generated(model_of("retention"), given)


def test_tokens_above_vocab_size_are_never_chosen(model_of):
    model = model_of("retention")
    assert generated(model, prompts(), count=30).max() >= 10
    assert generated(model, prompts(), count=30, vocab_size=10).max() < 10
    assert generated(model, prompts(), count=30, vocab_size=10, sampling=Sampling()).max() < 10
    wants = torch.zeros(257, dtype=torch.float64)
    wants[256] = 1e9
    model.head.register_forward_hook(lambda module, args, out: out + wants)
    assert generated(model, prompts(), count=2).unique().tolist() == [256]
    assert generate_text(model, ["ab"], max_new_tokens=8, sampling=GREEDY)[0]  # bytes all the same


def logits_of(*probabilities):
    return torch.tensor([probabilities], dtype=torch.float64).log()


def drawn(logits, sampling, count=4000, seed=0):
    """How often each token is chosen."""
    chosen = sample(logits.expand(count, -1), sampling, torch.Generator().manual_seed(seed))
    return Counter(chosen.tolist())


def test_temperature_0_takes_most_probable_token():
    logits = torch.tensor([[0.0, 3.0, 1.0], [5.0, 4.0, 4.9]])
    assert sample(logits, GREEDY).tolist() == [1, 0]
    for temperature in (1e-3, 1e6):  # the extremes still choose
        assert drawn(torch.tensor([[-50.0, 50.0]]), Sampling(temperature=temperature), count=10)


FOUR = (0.2, 0.3, 0.1, 0.4)


@pytest.mark.parametrize(
    ("probabilities", "fields", "support"),
    [
        (FOUR, {"top_k": 2}, {3, 1}),
        (FOUR, {"top_k": 9}, {0, 1, 2, 3}),
        (FOUR, {"top_p": 1e-9}, {3}),
        (FOUR, {"top_p": 0.39}, {3}),
        (FOUR, {"top_p": 0.41}, {3, 1}),
        (FOUR, {"top_p": 1.0}, {0, 1, 2, 3}),
        # 0.4 and 0.3 of the whole are 4/7 and 3/7 of what top_k leaves
        (FOUR, {"top_k": 2, "top_p": 0.5}, {3}),
        # the temperature comes first: 0.8 and 0.2 are 0.94 and 0.06 at 0.5, and 0.67 and 0.33 at 2
        ((0.8, 0.2), {"temperature": 0.5, "top_p": 0.85}, {0}),
        ((0.8, 0.2), {"temperature": 2.0, "top_p": 0.85}, {0, 1}),
    ],
    ids=str,
)
def test_top_k_and_top_p_keep_most_probable_tokens(probabilities, fields, support):
    assert set(drawn(logits_of(*probabilities), Sampling(**fields))) == support


def test_top_p_applies_per_row_and_stops_when_reached_exactly():
    assert len(drawn(torch.zeros(1, 4), Sampling(top_p=0.5))) == 2
    logits = torch.cat([logits_of(0.9, 0.04, 0.03, 0.03), logits_of(0.02, 0.32, 0.33, 0.33)]).repeat(2000, 1)
    chosen = sample(logits, Sampling(top_p=0.9), torch.Generator().manual_seed(0))
    assert set(chosen[0::2].tolist()) == {0}
    assert set(chosen[1::2].tolist()) == {1, 2, 3}


@pytest.mark.parametrize("temperature", [0.5, 1.0, 2.0])
def test_token_frequencies_match_probabilities(temperature):
    shares, count = torch.tensor([0.5, 0.3, 0.15, 0.05]), 20_000
    expected = shares ** (1 / temperature) / (shares ** (1 / temperature)).sum()
    found = drawn(logits_of(*shares.tolist()), Sampling(temperature=temperature), count)
    for token, share in enumerate(expected.tolist()):
        deviation = math.sqrt(share * (1 - share) / count)
        assert found[token] / count == pytest.approx(share, abs=4 * deviation)


def test_sampled_tokens_depend_only_on_seed(model_of):
    model = model_of("retention")
    torch.manual_seed(1)
    first = generated(model, prompts(), sampling=Sampling(seed=7))
    torch.manual_seed(2)
    before = torch.get_rng_state()
    assert torch.equal(generated(model, prompts(), sampling=Sampling(seed=7)), first)
    assert not torch.equal(generated(model, prompts(), sampling=Sampling(seed=8)), first)
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize(
    ("field", "values", "words"),
    [
        ("temperature", [-0.1, 1e-9, math.nan, math.inf], "0 0.001"),
        ("seed", [-1, 2**63], "0 63"),
        ("top_k", [0], "1"),
        ("top_p", [0.0, 1.1, math.nan], "0 1"),
    ],
)
def test_out_of_range_sampling_value_is_named_with_its_range(field, values, words):
    for value in values:
        with pytest.raises(SeqmixError) as raised:
            Sampling(**{field: value})
        for word in (field, f"{value:g}" if isinstance(value, float) else str(value), *words.split()):
            assert word in str(raised.value)


TEXT_MODEL = SimpleNamespace(config=SimpleNamespace(vocab_size=257), tokenizer=ByteTokenizer())
"""All that `stream_text` itself asks of a model."""


@pytest.fixture
def script(monkeypatch):
    """Make a model write texts that are given; returns how many steps were taken."""

    def install(*texts: str | bytes) -> list[int]:
        rows = [text.encode() if isinstance(text, str) else text for text in texts]
        steps: list[int] = []

        def tokens(model, prompts, **options) -> Iterator[torch.Tensor]:
            for column in itertools.zip_longest(*rows, fillvalue=ord("~")):
                steps.append(1)
                yield torch.tensor(column)

        monkeypatch.setattr(seqmix.models.generate, "generate_tokens", tokens)
        return steps

    return install


def streamed(*prompts: str, **options) -> list[list[str]]:
    """The pieces of each text."""
    pieces = list(stream_text(TEXT_MODEL, prompts or ("x",), **options))
    return [list(parts) for parts in zip(*pieces, strict=True)]


@pytest.mark.parametrize(
    ("text", "stop", "pieces"),
    [
        ("abc", [], ["a", "b", "c", ""]),
        # a character comes with its last byte
        ("aé€😀b", [], ["a", "", "é", "", "", "€", "", "", "", "😀", "b", ""]),
        # no part of a stop string, and what is held back as soon as it cannot be one, or at the end
        ("a ENx ENDb", ["END"], ["a", " ", "", "", "ENx", " ", "", "", ""]),
        ("ENEND", ["END"], ["", "", "EN", "", ""]),
        ("aEN", ["END"], ["a", "", "", "EN"]),
    ],
)
def test_text_is_streamed_as_soon_as_possible(script, text, stop, pieces):
    script(text)
    assert streamed(stop=stop) == [pieces]


def test_generation_ends_when_all_texts_have_ended(script):
    steps = script("one END and more", "longer END and more")
    assert ["".join(parts) for parts in streamed("x", "y", stop=["END"])] == ["one ", "longer "]
    assert len(steps) == len("longer END")
    # one that has ended stays silent while others continue
    script("aEND!END!", "bcdefghij")
    assert ["".join(parts) for parts in streamed("x", "y", stop=["END"])] == ["a", "bcdefghij"]


def first_stop(text: str, stop: list[str]) -> str:
    """The text before the first stop string, by looking at every prefix of it."""
    for end in range(len(text) + 1):
        if found := [text[:end].find(word) for word in stop if word and word in text[:end]]:
            return text[: min(found)]
    return text


@given(st.text("ab€", max_size=12), st.lists(st.text("ab€", max_size=4), max_size=3))
@example("abacabab", ["abab"])
@example("abcd", ["bcd", "c"])  # c is there before bcd is
@example("ab", ["b", "ab"])  # both are there with the same byte: before the first of them
@example("ba€b", ["€b", "é"])
@example("aab\n\nb", ["\n\n", ""])
def test_streamed_text_equals_the_whole_text_cut_at_the_first_stop_string(text, stop):
    piecewise = seqmix.models.generate._Text(ByteTokenizer().decoder(), tuple(stop))
    pieces = [piecewise.add(byte) for byte in text.encode()]
    expected = first_stop(text, stop)
    for end in range(len(pieces) + 1):
        assert expected.startswith("".join(pieces[:end]))
    assert "".join(pieces) + piecewise.add(None) == expected


def test_generated_texts_equal_joined_stream_pieces(model_of):
    model = model_of("retention", "attention")
    options = {"max_new_tokens": 20, "sampling": Sampling(seed=3)}
    pieces = list(stream_text(model, ["ab", "Wörter"], **options))
    assert len(pieces) == 21
    assert generate_text(model, ["ab", "Wörter"], **options) == ["".join(parts) for parts in zip(*pieces, strict=True)]


@pytest.mark.parametrize(
    ("texts", "options", "words"),
    [
        ([""], {}, "prompt"),
        (["a", ""], {}, "prompt"),
        ([], {}, "prompt"),
        # it would be a list of its characters
        ("def ", {}, "prompts ['def ']"),
        (["def "], {"stop": "END"}, "stop ['END']"),
    ],
)
def test_invalid_prompts_or_stop_strings_raise(model_of, texts, options, words):
    with pytest.raises(SeqmixError) as raised:
        generate_text(model_of("retention"), texts, **options)
    assert all(word in str(raised.value) for word in words.split(" ", 1))


def test_vocabulary_smaller_than_tokenizer_raises(model_of):
    with pytest.raises(SeqmixError, match=r"257.*100"):
        generate_text(model_of("retention", vocab_size=100), ["a"])


@pytest.mark.parametrize("temperature", [0, 1])
def test_model_with_nan_logits_raises(model_of, temperature):
    model = model_of("retention")
    model.embedding.weight.data[256] = math.nan
    with pytest.raises(SeqmixError, match="finite"):
        generate_text(model, ["a"], sampling=Sampling(temperature=temperature))
