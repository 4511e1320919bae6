"""Hugging Face `generate` matches ours, also with padding, and rejects what recurrent states do not support."""

import copy
from dataclasses import replace
from importlib.util import find_spec

import pytest
import torch
from hf_models import LENGTHS, PAD, ragged, tiny
from torch.testing import assert_close

if find_spec("transformers") is None:
    pytest.skip("needs pip install transformers", allow_module_level=True)

import transformers

from seqmix import Sampling, SeqmixError
from seqmix.interop.hf import SeqmixCache, SeqmixForCausalLM
from seqmix.interop.hf.cache import CACHE_NAME, CAN_CROP
from seqmix.models import generate_tokens
from seqmix.training.presets import single_kind_presets

EIGHT = ["retnet", "attention", "gla", "gated-delta-net", "mamba2", "hyena", "rwkv7", "mlstm"]
NEW = 8


def greedy(model, prompts, new=NEW):
    """Ours."""
    sampling = Sampling(temperature=0)
    return torch.stack(list(generate_tokens(model, prompts, max_new_tokens=new, sampling=sampling, vocab_size=PAD)), 1)


@pytest.mark.parametrize("preset", [*EIGHT, "hybrid", "zamba2"])
def test_greedy_generation_of_a_padded_batch_matches_ours(preset):
    model, (prompts, tokens, mask) = tiny(f"{preset}-tiny"), ragged()
    found = SeqmixForCausalLM.wrap(model).generate(tokens, attention_mask=mask, max_new_tokens=NEW, do_sample=False)
    assert torch.equal(found[:, : tokens.shape[1]], tokens)
    assert torch.equal(found[:, tokens.shape[1] :], greedy(model, prompts))


def stepwise(model, tokens, mask, first):
    """Logits with a cache: `first` tokens, and then one by one."""
    logits, cache = [], None
    for start, stop in [(0, first), *((at, at + 1) for at in range(first, tokens.shape[1]))]:
        output = model(tokens[:, start:stop], attention_mask=mask[:, :stop], **{CACHE_NAME: cache}, use_cache=True)
        cache = output[CACHE_NAME]
        logits.append(output.logits)
    return torch.cat(logits, dim=1)


@pytest.mark.parametrize("packing", [True, False], ids=["packed", "row by row"])
@pytest.mark.parametrize("preset", sorted(single_kind_presets()))
@torch.no_grad()
def test_padded_row_has_the_same_logits_as_the_row_alone(preset, packing):
    model, (prompts, tokens, mask) = tiny(preset, "model.n_layers=2"), ragged((5, 12, 1))
    for block in model.blocks:
        block.mixer.traits = replace(block.mixer.traits, packing=block.mixer.traits.packing and packing)
    wrapped = SeqmixForCausalLM.wrap(model)
    for logits in (wrapped(tokens, attention_mask=mask).logits, stepwise(wrapped, tokens, mask, 9)):
        for row, prompt in zip(logits, prompts, strict=True):
            assert_close(row[-len(prompt) :], model(prompt[None]).logits[0], rtol=1e-9, atol=1e-9)
    right = SeqmixForCausalLM.wrap(model)(tokens.flip(1), attention_mask=mask.flip(1), use_cache=False).logits
    assert_close(right[0, :5], model(prompts[0].flip(0)[None]).logits[0], rtol=1e-9, atol=1e-9)


def beam_search(model, prompt, beams, new):
    """The most probable of the continuations that a beam search without a cache keeps."""
    kept = [(0.0, prompt)]
    for _ in range(new):
        longer = []
        for score, text in kept:
            chances = model(text[None]).logits[0, -1].float()
            chances = chances.log_softmax(-1)[:PAD]
            longer += [
                (score + chance, torch.cat((text, torch.tensor([i])))) for i, chance in enumerate(chances.tolist())
            ]
        kept = sorted(longer, key=lambda scored: -scored[0])[:beams]
    return kept[0][1][len(prompt) :]


@pytest.mark.parametrize("preset", ["retnet-tiny", "attention-tiny", "hyena-tiny"])
@torch.no_grad()
def test_beam_search_matches_a_search_without_cache(preset):
    # sharper than at initialisation, so that the beams cross
    model, (prompts, tokens, mask) = tiny(preset, "model.n_layers=2"), ragged()
    model.head.weight.mul_(2)
    wrapped = SeqmixForCausalLM.wrap(model)
    found = wrapped.generate(tokens, attention_mask=mask, max_new_tokens=6, num_beams=4, do_sample=False)
    expected = torch.stack([beam_search(model, prompt, 4, 6) for prompt in prompts])
    assert torch.equal(found[:, tokens.shape[1] :], expected)
    assert not torch.equal(expected, greedy(model, prompts, 6))


@pytest.mark.parametrize("preset", ["gla-tiny", "hybrid-tiny"])
def test_sampling_is_the_same_with_and_without_cache(preset):
    wrapped, (_, tokens, mask) = SeqmixForCausalLM.wrap(tiny(preset)), ragged()
    options = {"attention_mask": mask, "max_new_tokens": NEW, "do_sample": True, "top_k": 20, "num_return_sequences": 2}
    found = []
    for use_cache in (True, False):
        torch.manual_seed(0)
        found.append(wrapped.generate(tokens, use_cache=use_cache, **options))
    assert torch.equal(*found)
    assert len(found[0].unique(dim=0)) == 2 * len(LENGTHS)


@pytest.mark.parametrize("preset", ["retnet-tiny", "hybrid-tiny"])
def test_copied_cache_continues_a_text_like_the_original(preset):
    wrapped, (_, tokens, mask) = SeqmixForCausalLM.wrap(tiny(preset)), ragged()
    options = {"do_sample": False, "return_dict_in_generate": True}
    first = wrapped.generate(tokens, attention_mask=mask, max_new_tokens=4, **options)
    mask = torch.cat((mask, torch.ones(3, 4, dtype=mask.dtype)), dim=1)
    cache = getattr(first, CACHE_NAME)
    assert cache.get_seq_length() == tokens.shape[1] + 3
    for given in (copy.deepcopy(cache), cache):
        more = {"attention_mask": mask, "max_new_tokens": 70, "do_sample": False}
        found = wrapped.generate(first.sequences, **{CACHE_NAME: given}, **more)
        assert torch.equal(found, wrapped.generate(first.sequences, **more))


def test_streamed_tokens_match_ours():
    model = tiny("retnet-tiny")
    pieces = []

    class Streamer(transformers.generation.BaseStreamer):
        def put(self, value):
            pieces.append(value.flatten().tolist())

        def end(self):
            pieces.append(None)

    prompt = model.tokenizer.encode("def ")
    SeqmixForCausalLM.wrap(model).generate(prompt[None], max_new_tokens=NEW, do_sample=False, streamer=Streamer())
    assert pieces == [prompt.tolist(), *([token] for token in greedy(model, [prompt])[0].tolist()), None]


def test_forward_supports_both_cache_names_and_logits_to_keep():
    wrapped, (prompts, _, _) = SeqmixForCausalLM.wrap(tiny("retnet-tiny")), ragged()
    whole = wrapped(prompts[1][None], use_cache=False)
    assert whole[CACHE_NAME] is None if CACHE_NAME in whole else True
    for name in ("cache", "past_key_values"):
        cache = SeqmixCache(len(wrapped.model.blocks))
        wrapped(prompts[1][None, :4], **{name: cache})
        logits = wrapped(prompts[1][None, 4:], **{name: cache}, logits_to_keep=2).logits
        assert_close(logits, whole.logits[:, -2:])
    logits = wrapped(prompts[1][None], logits_to_keep=torch.tensor([3, 7])).logits
    assert_close(logits, whole.logits[:, [3, 7]])
    assert_close(wrapped(prompts[1][None], return_dict=False)[0], whole.logits)
    embeddings = wrapped.get_input_embeddings()(prompts[1][None])
    assert_close(wrapped(inputs_embeds=embeddings).logits, whole.logits)


def call(**arguments):
    return lambda model: model(torch.zeros(2, 3, dtype=torch.int64), **arguments)


def generating(**arguments):
    return lambda model: model.generate(torch.zeros(1, 3, dtype=torch.int64), max_new_tokens=2, **arguments)


def cropped(model):
    model(torch.zeros(2, 3, dtype=torch.int64))[CACHE_NAME].crop(1)


REFUSED = {
    "another cache of generate": (generating(cache_implementation="static"), "has its own cache"),
    "continuous batching": (lambda model: model.generate_batch([[1, 2]]), "has states"),
    "another cache": (
        call(past_key_values=transformers.DynamicCache()),
        "expected a SeqmixCache .* got a DynamicCache",
    ),
    "two caches": (call(past_key_values=SeqmixCache(4), cache=SeqmixCache(4)), "two names for the same argument"),
    "crop": (cropped, "earlier tokens cannot be removed"),
    "a mask of four dimensions": (call(attention_mask=torch.ones(2, 1, 3, 3)), "one entry per token"),
    "a short mask": (call(attention_mask=torch.ones(2, 2)), r"got shape \[2, 2\]"),
    "hidden states": (call(output_hidden_states=True), "use forward hooks"),
    "embeddings and tokens": (call(inputs_embeds=torch.zeros(2, 3, 64)), "got both or neither"),
    "packed rows": (call(position_ids=torch.tensor([[0, 1, 0]] * 2), use_cache=False), "one row"),
    "packed documents with a cache": (call(cu_seq_lens_q=torch.tensor([0, 3]), use_cache=True), "cannot fill a cache"),
    "a new vocabulary": (lambda model: model.resize_token_embeddings(300), "vocabulary is fixed"),
}


@pytest.mark.skipif(not CAN_CROP, reason="this transformers does not announce that it removes tokens")
@pytest.mark.parametrize("preset", ["retnet-tiny", "sliding-window-tiny", "hybrid-tiny"])
@pytest.mark.parametrize("length", [5, 300])  # a prompt longer than what is recorded
def test_assisted_decoding_generates_the_same_text(preset, length):
    model = SeqmixForCausalLM.wrap(tiny(preset).double())
    assistant = copy.deepcopy(model)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in assistant.parameters():
            parameter.mul_(1 + 0.02 * torch.randn(parameter.shape, generator=generator))
    prompt = torch.randint(97, 100, (1, length), generator=generator)
    options = {"max_new_tokens": 40, "do_sample": False}
    expected = model.generate(prompt, **options)
    assert torch.equal(model.generate(prompt, prompt_lookup_num_tokens=5, **options), expected)
    assert torch.equal(model.generate(prompt, assistant_model=assistant, **options), expected)


@pytest.mark.skipif(CAN_CROP, reason="this transformers announces that it removes tokens")
def test_assisted_decoding_raises_on_an_older_transformers():
    with pytest.raises(ValueError, match="not supported with stateful models"):
        generating(prompt_lookup_num_tokens=2)(SeqmixForCausalLM.wrap(tiny("retnet-tiny")))


def test_cache_cannot_be_cropped_beyond_its_recording():
    model = SeqmixForCausalLM.wrap(tiny("retnet-tiny"))
    cache = model(torch.zeros(1, 5, dtype=torch.int64))[CACHE_NAME]
    for layer in cache.layers:
        layer.activate_past_recording()
    tokens = torch.tensor([[97, 98, 99]])
    model(tokens, **{CACHE_NAME: cache})
    cache.crop(-2)
    assert cache.get_seq_length() == 6
    with pytest.raises(SeqmixError, match="expects 0 to -1 tokens"):
        cache.crop(-2)
    following = model(tokens[:, 1:], **{CACHE_NAME: cache}).logits
    whole = model(torch.tensor([[0, 0, 0, 0, 0, 97, 98, 99]])).logits
    torch.testing.assert_close(following, whole[:, -2:])


@pytest.mark.parametrize("case", REFUSED)
def test_unsupported_calls_raise_with_the_reason(case):
    act, sentence = REFUSED[case]
    with pytest.raises(ValueError, match=sentence):
        act(SeqmixForCausalLM.wrap(tiny("retnet-tiny")))
