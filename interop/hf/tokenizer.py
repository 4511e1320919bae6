"""Conversion of tokenizers to Hugging Face: same tokens for the same text, preceded by the begin token."""

import json
from typing import Any

from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

from ...models import ByteTokenizer
from ...models import Tokenizer as OurTokenizer
from ...registry import SeqmixError

BEGIN = "<|begin|>"
"""Text of the begin token in a vocabulary to which it is added."""


def hf_tokenizer(tokenizer: OurTokenizer) -> PreTrainedTokenizerFast:
    """Convert a tokenizer to Hugging Face, with the same tokens; the result pads on the left, as generation needs.

    Raises:
        SeqmixError: the IDs of the vocabulary have a gap that Hugging Face would fill, or there is no vocabulary.
    """
    fast, name = _fast_tokenizer(tokenizer)
    if fast.token_to_id(name) != tokenizer.begin:
        raise SeqmixError(
            f"the IDs of the vocabulary have gaps, so its begin token {tokenizer.begin} would get another ID: "
            "choose a token of the vocabulary as the begin token"
        )
    fast.post_processor = processors.TemplateProcessing(
        single=f"{name} $A", pair=f"{name} $A {name} $B", special_tokens=[(name, tokenizer.begin)]
    )
    fast.no_truncation()
    fast.no_padding()
    roles = dict.fromkeys(("bos_token", "eos_token", "pad_token"), name)
    options = {"clean_up_tokenization_spaces": False, "model_input_names": ["input_ids", "attention_mask"]}
    return PreTrainedTokenizerFast(tokenizer_object=fast, padding_side="left", **roles, **options)


def _fast_tokenizer(tokenizer: OurTokenizer) -> tuple[Tokenizer, str]:
    """Return a tokenizer of the library `tokenizers` with the same tokens, and the text of its begin token."""
    if tokenizer.vocabulary is None:
        if not isinstance(tokenizer, ByteTokenizer):
            raise SeqmixError(
                f"a {type(tokenizer).__name__} has no tokenizer.json, so it cannot be converted to Hugging Face"
            )
        vocabulary: dict[str, Any] = {letter: byte for byte, letter in enumerate(_byte_letters())}
        fast = Tokenizer(models.BPE(vocabulary, []))
        fast.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
        fast.decoder = decoders.ByteLevel()
    else:
        fast = Tokenizer.from_str(tokenizer.vocabulary.decode())
        names = {number: name for name, number in fast.get_vocab(with_added_tokens=True).items()}
        if tokenizer.begin in names:
            return fast, names[tokenizer.begin]
        parts = json.loads(tokenizer.vocabulary)
        if isinstance(vocab := parts["model"].get("vocab"), dict):  # in a dict, the begin token can have any ID
            vocab[BEGIN] = tokenizer.begin
            fast = Tokenizer.from_str(json.dumps(parts))
    fast.add_special_tokens([AddedToken(BEGIN, special=True, normalized=False)])
    return fast, BEGIN


def _byte_letters() -> list[str]:
    """Return for each byte, 0 to 255, the letter that stands for it in a byte-level vocabulary (GPT-2's)."""
    printable = {*range(33, 127), *range(161, 173), *range(174, 256)}
    substitutes = iter(range(256, 512))
    return [chr(byte if byte in printable else next(substitutes)) for byte in range(256)]
