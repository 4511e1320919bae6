"""Our mixers in Hugging Face models: generation with cache and padding, and attention with copied weights."""

from importlib.util import find_spec

import pytest
import torch
from einops import rearrange
from hf_models import ragged
from safetensors.torch import load_file
from torch.testing import assert_close

from seqmix import SeqmixError
from seqmix.mixers.gla import GLAConfig

if find_spec("transformers") is None:
    pytest.skip("needs pip install transformers", allow_module_level=True)

import transformers

from seqmix.interop.hf import replace_mixers
from seqmix.interop.hf.cache import CACHE_NAME

D_MODEL, H, G, K = 32, 4, 2, 8
FIELDS = {
    "vocab_size": 257,
    "hidden_size": D_MODEL,
    "intermediate_size": 48,
    "num_hidden_layers": 4,
    "num_attention_heads": H,
    "num_key_value_heads": G,
    "head_dim": K,
    "pad_token_id": 256,
    "eos_token_id": None,
    "initializer_range": 0.3,
    "tie_word_embeddings": False,
}
FAMILIES = {
    "llama": ("Llama", {}),
    "mistral": ("Mistral", {"sliding_window": 4}),
    "qwen2": ("Qwen2", {}),
    "qwen3": ("Qwen3", {}),
}
GLA = {"kind": "gla", "n_heads": 2, "chunk_size": 4}
NEW = 7


def decoder(family, seed=0):
    name, changes = FAMILIES[family]
    torch.manual_seed(seed)
    config = getattr(transformers, f"{name}Config")(**FIELDS, **changes)
    return getattr(transformers, f"{name}ForCausalLM")(config).double().eval()


@pytest.mark.parametrize("layers", [None, [0, 2], [3]], ids=["all", "0 and 2", "the last"])
@pytest.mark.parametrize("mixer", [GLA, {"kind": "attention", "n_heads": 2}], ids=["gla", "attention"])
@pytest.mark.parametrize("family", FAMILIES)
def test_generation_is_the_same_with_and_without_cache_and_padding(family, mixer, layers):
    model, (prompts, tokens, mask) = replace_mixers(decoder(family), mixer, layers), ragged()
    options = {"max_new_tokens": NEW, "do_sample": False}
    found = model.generate(tokens, attention_mask=mask, **options)
    assert torch.equal(found, model.generate(tokens, attention_mask=mask, use_cache=False, **options))
    for row, prompt in zip(found, prompts, strict=True):
        alone = model.generate(prompt[None], attention_mask=torch.ones_like(prompt)[None], **options)
        assert torch.equal(alone[0], row[-len(alone[0]) :])


@torch.no_grad()
def test_beam_search_is_the_same_with_and_without_cache():
    model, (_, tokens, mask) = replace_mixers(decoder("qwen3"), GLA, [1, 2]), ragged()
    options = {"attention_mask": mask, "max_new_tokens": NEW, "do_sample": False, "num_beams": 3}
    found = model.generate(tokens, **options)
    assert torch.equal(found, model.generate(tokens, use_cache=False, **options))
    assert not torch.equal(found, model.generate(tokens, **options | {"num_beams": 1}))


@torch.no_grad()
def test_saved_weights_load_into_a_model_with_the_same_replacement(tmp_path):
    model, (_, tokens, mask) = replace_mixers(decoder("llama"), GLA, [1]), ragged()
    model.save_pretrained(tmp_path)
    again = replace_mixers(decoder("llama", seed=1), GLA, [1])
    again.load_state_dict(load_file(tmp_path / "model.safetensors"))
    assert torch.equal(again(tokens, attention_mask=mask).logits, model(tokens, attention_mask=mask).logits)


def weights_of(theirs):
    """Ours of their attention: they turn pairs (j, j + K/2) of a head's dimensions, and we (2j, 2j + 1)."""

    def in_pairs(rows):
        return rearrange(rows, "(h pair k) ... -> (h k pair) ...", pair=2, k=K // 2)

    parts = (in_pairs(theirs.q_proj.weight), in_pairs(theirs.k_proj.weight), theirs.v_proj.weight)
    found = {"in_proj.weight": torch.cat(parts), "out_proj.weight": theirs.o_proj.weight}
    if hasattr(theirs, "q_norm"):
        found |= {f"qk_norm.{name}_weight": in_pairs(getattr(theirs, f"{name}_norm").weight) for name in "qk"}
    return found


@pytest.mark.parametrize(
    ("family", "fields"), [("llama", {}), ("mistral", {"window": 4}), ("qwen3", {"qk_norm": "rms"})]
)
@torch.no_grad()
def test_attention_with_copied_weights_matches_transformers(family, fields):
    model, changed = decoder(family), decoder(family)
    attention = {"kind": "attention", "n_heads": H, "n_kv_heads": G, "head_dim": K, **fields}
    replace_mixers(changed, attention, [1, 3])
    for index in (1, 3):
        mixer = changed.model.layers[index].self_attn.mixer
        mixer.load_state_dict(weights_of(model.model.layers[index].self_attn))
    prompts, tokens, mask = ragged()
    expected = model(tokens, attention_mask=mask).logits
    found = changed(tokens, attention_mask=mask).logits
    real = mask.bool()
    assert_close(found[real], expected[real], rtol=1e-4, atol=1e-4)  # they turn in float32
    options = {"attention_mask": mask, "max_new_tokens": NEW, "do_sample": False}
    assert torch.equal(changed.generate(tokens, **options), model.generate(tokens, **options))
    packed = torch.cat(prompts)[None]
    positions = torch.cat([torch.arange(len(prompt)) for prompt in prompts])[None]
    logits = [each(packed, position_ids=positions, use_cache=False).logits for each in (changed, model)]
    assert_close(*logits, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("checkpointing", [False, True])
def test_gradients_reach_replaced_mixers_and_ignore_padding(checkpointing):
    model, (prompts, tokens, mask) = replace_mixers(decoder("llama").train(), GLA, [0, 2]), ragged()
    if checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": False})
    labels = tokens.masked_fill(mask == 0, -100)
    labels[0, 4] = labels[2, -1] = -100  # nothing predicts the first token of a row
    # another call before the backward pass, which recomputes the first with the first's padding
    loss = model(tokens, attention_mask=mask, labels=labels, use_cache=False).loss
    model(tokens, use_cache=False)
    loss.backward()
    found = {name: parameter.grad.clone() for name, parameter in model.named_parameters()}
    assert any("mixer.in_proj" in name for name in found)
    model.zero_grad()
    rows = [(prompt, len(prompt) - 1) for prompt in prompts if len(prompt) > 1]
    total = sum(count for _, count in rows)
    for prompt, count in rows:
        (model(prompt[None], labels=prompt[None], use_cache=False).loss * count / total).backward()
    for name, parameter in model.named_parameters():
        assert_close(found[name], parameter.grad, rtol=1e-5, atol=1e-6)


REFUSED = {
    "another layer": (lambda model: replace_mixers(model, GLA, [4]), "no layer 4 with attention; .* 0, 1, 2, 3"),
    "another kind": (lambda model: replace_mixers(model, {"kind": "glaa"}), 'did you mean "gla"'),
    "an unknown kind": (
        lambda model: replace_mixers(model, {"kind": "glaaa"}),
        "^the mixer: kind: unknown mixer kind 'glaaa'",
    ),
    "a wrong type": (
        lambda model: replace_mixers(model, {"kind": "gla", "n_heads": "four"}),
        "^the mixer: n_heads: expected an integer, got 'four'$",
    ),
    "no mapping": (lambda model: replace_mixers(model, "gla"), "^the mixer: .*'gla'"),
    "a number of layers": (lambda model: replace_mixers(model, GLA, 1), r"such as \[1\]"),
    "a wrong width": (lambda model: replace_mixers(model, {"kind": "gla", "n_heads": 3}), "3"),
    "no attention": (lambda model: replace_mixers(model.lm_head, GLA), "attention as self_attn, got a Linear"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_invalid_replacement_raises(case):
    act, sentence = REFUSED[case]
    with pytest.raises(SeqmixError, match=sentence):
        act(decoder("llama"))


def test_operations_unsupported_by_states_raise():
    model, tokens = decoder("llama"), torch.zeros(1, 3, dtype=torch.int64)
    before = model(tokens)[CACHE_NAME]
    replace_mixers(model, GLAConfig(**GLA))
    for call, sentence in [
        (lambda: model(tokens, **{CACHE_NAME: before}), "from before the mixers were replaced"),
        # by transformers before 5.25, and by later ones
        (
            lambda: model.generate(tokens, prompt_lookup_num_tokens=2),
            "not supported with stateful models|a cache that can be cropped",
        ),
        (lambda: model(tokens)[CACHE_NAME].crop(1), "earlier tokens cannot be removed"),
        (lambda: model(tokens, attention_mask=torch.ones(1, 1, 3, 3)), "one entry per token"),
    ]:
        with pytest.raises(ValueError, match=sentence):
            call()
