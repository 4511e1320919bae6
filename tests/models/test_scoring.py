"""Scores of shared contexts and segmented texts match one pass over each sequence."""

import pytest
import torch
from small_runs import refusal

from seqmix.models import scoring
from seqmix.models.scoring import Scorer

CONTEXTS = ([1, 2, 3, 4, 5, 6, 7], [9], [5, 6, 5, 6, 7, 2, 3, 1, 1])
CONTINUATIONS = ([8], [2, 2, 2, 4, 1], [3, 9])
PAIRS = [(context, continuation) for continuation in CONTINUATIONS for context in CONTEXTS]


def alone(model, context, continuation):
    """The log-likelihood of a continuation by one pass over everything."""
    tokens = torch.tensor(context + continuation)
    logits = model(tokens[None, :-1]).logits[0, len(context) - 1 :]
    found = logits.log_softmax(-1).gather(1, tokens[len(context) :, None]).sum()
    return found.item(), bool((logits.argmax(-1) == tokens[len(context) :]).all())


@pytest.mark.slow
@torch.no_grad()
def test_continuation_scores_match_one_pass(model_of, each_mixer):
    model = model_of(*each_mixer)
    best = model(torch.tensor([CONTEXTS[0]])).logits[0, -1].argmax().item()
    pairs = [*PAIRS, (CONTEXTS[0], [best])]
    for batch_size in (2, 16):
        scorer = Scorer(model, batch_size=batch_size)
        for pair, score in zip(pairs, scorer.continuations(pairs), strict=True):
            log_likelihood, greedy = alone(model, *pair)
            assert score.log_likelihood == pytest.approx(log_likelihood, abs=1e-4)
            assert score.greedy is greedy
    assert score.greedy


def test_shared_context_is_processed_once(model_of):
    model = model_of("retention", "attention")
    scorer = Scorer(model)
    scorer.continuations(PAIRS)
    # each context once, and every continuation without its last token
    assert scorer.forwarded_tokens == sum(map(len, CONTEXTS)) + sum(len(continuation) - 1 for _, continuation in PAIRS)
    assert scorer.forwarded_tokens < sum(len(context) + len(continuation) - 1 for context, continuation in PAIRS)


@torch.no_grad()
def test_texts_of_any_length_are_scored_in_segments(model_of, each_mixer, monkeypatch):
    model = model_of(*each_mixer)
    texts = [torch.randint(50, (length,), generator=torch.Generator().manual_seed(length)) for length in (3, 40, 17, 2)]
    monkeypatch.setattr(scoring, "SEGMENT", 24)
    seen: list[int] = []
    model.register_forward_pre_hook(lambda _, arguments: seen.append(arguments[0].numel()))
    scorer = Scorer(model, batch_size=2)
    found = scorer.texts(texts)
    assert scorer.forwarded_tokens == 2 + 39 + 16 + 1
    if all(block.mixer.traits.state == "constant" for block in model.blocks):
        assert max(seen) <= 24  # so memory does not depend on the length
    for text, score in zip(texts, found, strict=True):
        loss = model(text[None, :-1], targets=text[None, 1:], reduction="sum").loss.item()
        assert score.log_likelihood == pytest.approx(-loss, rel=1e-5)


def test_empty_continuation_or_zero_batch_size_raises(model_of):
    model = model_of("retention")
    assert "at least one token each" in refusal(lambda: Scorer(model).continuations([([1], [])]))
    assert "at least 1, got 0" in refusal(lambda: Scorer(model, batch_size=0))
