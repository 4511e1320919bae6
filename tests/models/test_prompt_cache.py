"""Prompt caches: continuations match generation in one pass and never change the cache."""

import gc

import pytest
import torch
from torch.testing import assert_close

from seqmix import Sampling, SeqmixError, generate_text
from seqmix.mixers.base.state import clone, nbytes, to_dict
from seqmix.models import PromptCache, cache_text, cache_tokens, generate_tokens, stream_text

GREEDY = Sampling(temperature=0)
PROMPTS = [torch.arange(40, 40 + length) for length in (5, 2, 9)]


def generated(model, prompts, count, **options):
    return torch.stack(
        list(generate_tokens(model, prompts, max_new_tokens=count, sampling=GREEDY, compiled=False, **options)), dim=1
    )


def test_continued_generation_matches_one_pass(model_of, each_mixer):
    model, caches = model_of(*each_mixer), []
    whole = generated(model, PROMPTS, 12)
    first = generated(model, PROMPTS, 5, on_end=caches.append)
    (cache,) = caches
    before = clone(cache.state)
    second = generated(model, [], 7, after=cache)
    assert torch.equal(torch.cat([first, second], dim=1), whole)
    assert cache.lengths.tolist() == [10, 7, 14]
    # it is a value: not written, and the same again
    assert_close(to_dict(cache.state), to_dict(before), rtol=0, atol=0)
    assert torch.equal(generated(model, [], 7, after=cache), second)


def test_one_prefix_serves_many_continuations(model_of, each_mixer):
    model = model_of(*each_mixer)
    more = [torch.tensor([1, 2, 3]), torch.tensor([4]), torch.tensor([], dtype=torch.int64)]
    prefix = cache_tokens(model, PROMPTS[2:])
    expected = torch.cat([generated(model, [torch.cat([PROMPTS[2], new])], 6) for new in more])
    assert torch.equal(generated(model, more, 6, after=prefix), expected)
    # what came after a prefix is a prefix again
    further = cache_tokens(model, [torch.tensor([1])], after=prefix)
    assert (prefix.lengths.tolist(), further.lengths.tolist()) == ([9], [10])
    assert torch.equal(generated(model, [torch.tensor([2, 3])], 6, after=further), expected[:1])


def test_cached_texts_can_be_continued_with_one_prompt_each_or_a_shared_prompt(model_of):
    model = model_of("retention", "attention", "hyena")
    cache, more = cache_tokens(model, PROMPTS), [torch.tensor([7]), torch.tensor([8, 9]), torch.tensor([1])]
    expected = [generated(model, [torch.cat(parts)], 4) for parts in zip(PROMPTS, more, strict=True)]
    assert torch.equal(generated(model, more, 4, after=cache), torch.cat(expected))
    one = [generated(model, [torch.cat([prompt, more[1]])], 4) for prompt in PROMPTS]
    assert torch.equal(generated(model, more[1:2], 4, after=cache), torch.cat(one))
    chosen = cache.select([2, 0, 2])
    assert torch.equal(generated(model, more[1:2], 4, after=chosen), torch.cat([one[2], one[0], one[2]]))
    with pytest.raises(SeqmixError, match=r"3 texts.*got 2"):
        generated(model, more[:2], 4, after=cache)
    with pytest.raises(SeqmixError, match=r"rows .*from 0 to 2, got 3"):
        cache.select([3])


def test_texts_selected_from_a_cache_continue_when_the_longest_is_left_out(model_of, each_mixer):
    model = model_of(*each_mixer)
    texts = cache_tokens(model, PROMPTS)
    # as in a file, whose rows are as long as the longest
    saved = PromptCache(texts.resized_state(model, None), texts.recent, texts.lengths)
    for chosen in ([1], [0, 1], [1, 2]):
        expected = generated(model, [PROMPTS[row] for row in chosen], 3)
        assert torch.equal(generated(model, [], 3, after=saved.select(chosen)), expected)


def test_state_can_be_resized_down_to_its_prefix(model_of):
    model, caches = model_of("attention", "hyena"), []
    next(iter(generate_tokens(model, PROMPTS, max_new_tokens=200, sampling=GREEDY, on_end=caches.append)))
    (cache,) = caches  # the generator was closed
    least = cache.resized_state(model, None)
    assert [leaf.shape[1] for name, leaf in to_dict(least).items() if leaf.ndim == 4] == [9, 9, 9]
    assert nbytes(least) < nbytes(cache.state) / 10
    roomy = cache.resized_state(model, 50)
    assert [leaf.shape[1] for name, leaf in to_dict(roomy).items() if leaf.ndim == 4] == [50, 50, 50]
    with pytest.raises(SeqmixError, match=r"attention.* 9 .*max_length.* 8"):
        cache.resized_state(model, 8)


def test_failed_step_yields_no_cache(model_of):
    model, caches = model_of("retention"), []
    tokens = generate_tokens(model, PROMPTS, max_new_tokens=5, sampling=GREEDY, on_end=caches.append)
    next(tokens)
    model.head.register_forward_hook(lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        next(tokens)
    assert not caches


@pytest.mark.parametrize("prompts", [[torch.tensor([1])], []])
def test_caching_prompts_shorter_than_two_tokens_raises(model_of, prompts):
    with pytest.raises(SeqmixError, match="prompt"):
        cache_tokens(model_of("retention"), prompts)


def test_continued_text_matches_one_pass(model_of):
    model, caches = model_of("retention", "attention"), []
    options = {"sampling": GREEDY, "compiled": False}
    whole = generate_text(model, ["ab", "Wörter"], max_new_tokens=20, **options)
    first = generate_text(model, ["ab", "Wörter"], max_new_tokens=8, on_end=caches.append, **options)
    second = generate_text(model, [], max_new_tokens=12, after=caches[0], **options)
    assert len(second) == 2
    assert [a.rstrip("\ufffd") for a in first] == [
        w[: len(a.rstrip("\ufffd"))] for a, w in zip(first, whole, strict=True)
    ]
    prefix = cache_text(model, ["ab"])
    assert prefix.lengths.tolist() == [3]
    expected = generate_text(model, ["abc", "abé"], max_new_tokens=9, **options)
    assert generate_text(model, ["c", "é"], max_new_tokens=9, after=prefix, **options) == expected


def test_character_may_be_split_across_continuation(model_of):
    """The model repeats "€" and is stopped after the first byte of one."""
    model, caches = model_of("retention"), []
    after = {0xE2: 0x82, 0x82: 0xAC, 0xAC: 0xE2}
    wanted = torch.zeros(257, 257, dtype=torch.float64)
    for token in range(257):
        wanted[token, after.get(token, 0xE2)] = 1e9
    last = []
    model.register_forward_pre_hook(lambda module, args: last.append(args[0].flatten()[-1]))
    model.head.register_forward_hook(lambda module, args, out: out + wanted[last[-1]])
    options = {"sampling": GREEDY, "compiled": False}
    assert generate_text(model, ["ab"], max_new_tokens=4, on_end=caches.append, **options) == ["€\ufffd"]
    assert generate_text(model, [], max_new_tokens=5, after=caches[0], **options) == ["€€"]


def test_cache_includes_stop_string(model_of):
    model, caches = model_of("retention"), []
    (whole,) = generate_text(model, ["ab"], max_new_tokens=12, sampling=GREEDY)
    stop = whole[3]
    list(stream_text(model, ["ab"], max_new_tokens=12, sampling=GREEDY, stop=[stop], on_end=caches.append))
    (cache,) = caches
    assert chr(cache.recent[0, -1]) == stop
    assert cache.lengths.tolist() == [3 + whole.index(stop) + 1]


@pytest.mark.slow
def test_long_generation_does_not_accumulate_token_tensors(model_of, monkeypatch):
    model = model_of("retention")
    whole, gathered, alive = [], [], []
    generated(model, PROMPTS, 25, on_end=whole.append)
    monkeypatch.setattr("seqmix.models.generate.MAX_TOKENS_IN_MEMORY", 4)
    for _ in generate_tokens(
        model, PROMPTS, max_new_tokens=25, sampling=GREEDY, compiled=False, on_end=gathered.append
    ):
        alive.append(sum(type(each) is torch.Tensor for each in gc.get_objects()))
    assert max(alive[13:]) <= max(alive[1:13])
    for name in ("recent", "lengths"):
        assert torch.equal(getattr(whole[0], name), getattr(gathered[0], name))
    assert_close(to_dict(whole[0].state), to_dict(gathered[0].state), rtol=0, atol=0)
