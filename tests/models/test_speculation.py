"""Speculative decoding gives the same text as plain decoding for any draft."""

import json
import math
from collections import Counter
from random import Random

import pytest
import torch
from nightly import NIGHTLY
from torch._dynamo.utils import counters

from seqmix import Sampling, SeqmixError, build_model, generate_text, load_config
from seqmix.models import Decoder, Draft, Speculation, SubwordTokenizer, generate_tokens, prefill, train_bpe
from seqmix.models.sampling import Sampler
from seqmix.training.presets import single_kind_presets

GREEDY = Sampling(temperature=0)
SAMPLED = Sampling(temperature=0.9, top_p=0.95, seed=5)


def prompts(*lengths):
    """Prompts that repeat themselves, so that n-grams are found."""
    generator = torch.Generator().manual_seed(3)
    return [torch.randint(97, 100, (length,), generator=generator) for length in lengths]


def generated(model, texts, sampling, speculation=None, count=24, **options):
    tokens = generate_tokens(
        model, texts, max_new_tokens=count, sampling=sampling, speculation=speculation, vocab_size=110, **options
    )
    return torch.stack(list(tokens), dim=1)


def almost(model, scale=0.02):
    """A model that mostly guesses right."""
    other = build_model(model.config, dtype=torch.float64).eval()
    generator = torch.Generator().manual_seed(9)
    with torch.no_grad():
        for parameter, source in zip(other.parameters(), model.parameters(), strict=True):
            noise = torch.randn(source.shape, generator=generator, dtype=source.dtype)
            parameter.copy_(source * (1 + scale * noise))
    return other


class Oracle(Draft):
    """Guesses what a list says, a share of the tokens right and the others wrong."""

    def __init__(self, tokens, right):
        self.tokens = tokens
        self.right = right
        self.generator = Random(0)

    def guess(self, token):
        return token if self.generator.random() < self.right else (token + 1) % 110

    def start(self, texts, sampler, *, more, vocab_size):
        self.counts = [0] * len(texts)

    def extend(self, row, tokens):
        self.counts[row] += len(tokens)

    def propose(self, counts):
        places = zip(self.tokens, self.counts, counts, strict=True)
        return [[self.guess(token) for token in tokens[done : done + n]] for tokens, done, n in places]


@pytest.mark.parametrize("sampling", [GREEDY, SAMPLED], ids=["greedy", "sampled"])
def test_speculative_text_matches_plain_decoding_for_every_mixer(model_of, each_mixer, sampling):
    model = model_of(*each_mixer)
    texts = prompts(9, 21, 2)
    expected = generated(model, texts, sampling, count=16)
    for draft in ("ngram", almost(model)):
        speculation = Speculation(draft, block=5)
        assert torch.equal(generated(model, texts, sampling, speculation, count=16), expected)
        assert 0 <= speculation.accepted <= speculation.drafted
        if draft != "ngram":
            assert speculation.drafted > 20


@pytest.mark.slow
@pytest.mark.parametrize(
    "preset",
    [
        pytest.param(name, marks=NIGHTLY if name in ("log-linear-tiny", "mesa-net-tiny") else ())
        for name in single_kind_presets()
    ],
)
def test_speculative_float32_text_matches_plain_decoding_for_fifty_prompts(preset):
    model = build_model(load_config(preset).model).eval()
    texts = prompts(*range(8, 58))
    expected = generated(model, texts, GREEDY, count=40)
    speculation = Speculation(Oracle(expected.tolist(), 0.7))
    assert torch.equal(generated(model, texts, GREEDY, speculation, count=40), expected)
    assert 0.3 * speculation.drafted < speculation.accepted < speculation.drafted


def test_row_in_batch_is_sampled_as_if_alone(model_of):
    model = model_of("retention")
    texts = prompts(9, 21, 2)
    together = generated(model, texts, SAMPLED)
    for row, text in enumerate(texts):
        alone = generated(model, [text], Sampling(temperature=0.9, top_p=0.95, seed=5 + row))
        assert torch.equal(alone[0], together[row])


@pytest.mark.parametrize("right", [True, False])
def test_number_of_calls_depends_on_correct_guesses(model_of, right):
    model = model_of("gated_delta_net")
    expected = generated(model, prompts(9), GREEDY, count=25)
    speculation = Speculation(Oracle(expected.tolist(), right), block=8)
    assert torch.equal(generated(model, prompts(9), GREEDY, speculation, count=25), expected)
    # the first token comes from the prompt; 24 follow, eight a call or one a call
    assert speculation.calls == (3 if right else 24)
    assert speculation.segments == speculation.calls
    assert speculation.accepted == (21 if right else 0)


def test_texts_with_right_and_wrong_guesses_match_plain_decoding(model_of):
    model = model_of("attention", "mamba2")
    texts = prompts(9, 9)
    expected = generated(model, texts, GREEDY, count=25)
    tokens = expected.tolist()
    tokens[1] = [(token + 1) % 110 for token in tokens[1]]
    speculation = Speculation(Oracle(tokens, True), block=8)
    assert torch.equal(generated(model, texts, GREEDY, speculation, count=25), expected)
    assert speculation.calls == 24


@pytest.mark.parametrize("stop_after", [1, 7, 24])
def test_final_cache_continues_the_text(model_of, stop_after):
    model = model_of("retention", "attention")
    texts = prompts(9, 21)
    whole = generated(model, texts, GREEDY, count=30)
    caches = []
    tokens = generate_tokens(
        model,
        texts,
        max_new_tokens=24,
        sampling=GREEDY,
        vocab_size=110,
        on_end=caches.append,
        speculation=Speculation(almost(model)),
    )
    for _ in range(stop_after):
        next(tokens)
    tokens.close()
    more = generated(model, [], GREEDY, Speculation(), count=30 - stop_after, after=caches[0])
    assert torch.equal(more, whole[:, stop_after:])


@pytest.mark.usefixtures("plainly_compiled")
def test_verification_call_compiles_to_one_graph(model_of):
    model = model_of("retention", "attention")
    texts = prompts(9, 21)
    expected = generated(model, texts, GREEDY)
    assert torch.equal(generated(model, texts, GREEDY, Speculation(almost(model)), compiled=True), expected)
    assert counters["stats"]["unique_graphs"] == 1


@pytest.mark.usefixtures("plainly_compiled")
def test_float32_model_with_native_kernels_compiles():
    model = build_model(load_config("retnet-tiny", ["model.n_layers=1"]).model).eval()
    texts = prompts(9, 21)
    _, state = prefill(model, texts, max_length=64)
    Decoder(model, state, compiled=True).step(torch.tensor([97, 98]))
    generated(model, texts, GREEDY, Speculation(), count=4, compiled=True)


def test_sampled_token_frequencies_match_probabilities():
    shares, count = torch.tensor([0.5, 0.3, 0.15, 0.05]), 20_000
    sampler = Sampler(Sampling(seed=1), 1, torch.device("cpu"))
    logits = shares.log()[None]
    found = Counter()
    for _ in range(count // 2):
        # two positions at once, as where a guess is verified
        found.update(sampler.tokens_at(logits.expand(2, -1), [(0, 0), (0, 1)]).tolist())
        sampler.advance(0, 2)
    for token, share in enumerate(shares.tolist()):
        assert found[token] / count == pytest.approx(share, abs=4 * math.sqrt(share * (1 - share) / count))


def test_resampling_a_position_gives_the_same_token():
    sampler = Sampler(Sampling(seed=1), 2, torch.device("cpu"))
    logits = torch.zeros(2, 1000)
    places = [(0, 3), (1, 0)]
    first = sampler.tokens_at(logits, places)
    assert torch.equal(sampler.tokens_at(logits, places), first)
    sampler.advance(0, 3)
    assert sampler.tokens_at(logits, [(0, 0), (1, 0)]).tolist() == first.tolist()
    assert first[0] != first[1]


def test_invalid_speculation_settings_raise(model_of):
    with pytest.raises(SeqmixError, match="block must be at least 2"):
        Speculation(block=1)
    with pytest.raises(SeqmixError, match='did you mean "ngram"'):
        Speculation("ngrams")
    other = model_of("retention", vocab_size=300)
    with pytest.raises(SeqmixError, match="vocabulary of the model, 257 tokens, got 300"):
        generate_text(model_of("retention"), ["ab"], max_new_tokens=3, speculation=Speculation(other))


def test_draft_model_with_different_tokenizer_raises(model_of, tmp_path):
    model, draft = model_of("retention", vocab_size=270), model_of("retention", vocab_size=270)
    model.tokenizer = train_bpe([("a", b"the cat sat on the mat" * 20)], 270, tmp_path / "a.json")
    draft.tokenizer = train_bpe([("b", b"some other words, over and over" * 20)], 270, tmp_path / "b.json")
    assert model.tokenizer.vocab_size == draft.tokenizer.vocab_size
    with pytest.raises(SeqmixError, match=r"needs the tokenizer of the model.*data\.tokenizer"):
        generate_text(model, ["the"], max_new_tokens=3, speculation=Speculation(draft))
    written_differently = json.dumps(json.loads(model.tokenizer.vocabulary)).encode()
    draft.tokenizer = SubwordTokenizer(written_differently, "the same tokens")
    assert draft.tokenizer.identity != model.tokenizer.identity
    generate_text(model, ["the"], max_new_tokens=3, speculation=Speculation(draft))
