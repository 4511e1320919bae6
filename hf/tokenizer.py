"""Our tokenizers as those of Hugging Face: the same tokens for the same text, and the begin token before it."""

import json
from typing import Any

from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

from ..models import ByteTokenizer
from ..models import Tokenizer as OurTokenizer
from ..registry import SeqmixError

BEGIN = "<|begin|>"
"""The begin token, where it follows the tokens of a vocabulary."""


def hf_tokenizer(tokenizer: OurTokenizer) -> PreTrainedTokenizerFast:
    """Our tokenizer as one of Hugging Face, with the same tokens; it pads on the left, as generation needs.

    Raises:
        SeqmixError: the numbers of the vocabulary have a gap that Hugging Face would fill.
    """
    fast, name = _map(tokenizer)
    if fast.token_to_id(name) != tokenizer.begin:
        raise SeqmixError(f"the vocabulary's ids have gaps: its begin token {tokenizer.begin} would get another number")
    fast.post_processor = processors.TemplateProcessing(
        single=f"{name} $A", pair=f"{name} $A {name} $B", special_tokens=[(name, tokenizer.begin)]
    )
    fast.no_truncation()
    fast.no_padding()
    roles = dict.fromkeys(("bos_token", "eos_token", "pad_token"), name)
    more = {"clean_up_tokenization_spaces": False, "model_input_names": ["input_ids", "attention_mask"]}
    return PreTrainedTokenizerFast(tokenizer_object=fast, padding_side="left", **roles, **more)


def _map(tokenizer: OurTokenizer) -> tuple[Tokenizer, str]:
    """The map of text to tokens, and the name of its begin token."""
    if tokenizer.vocabulary is None:
        if not isinstance(tokenizer, ByteTokenizer):
            raise SeqmixError(f"a {type(tokenizer).__name__} has no tokenizer.json: Hugging Face cannot have it")
        vocabulary: dict[str, Any] = {letter: byte for byte, letter in enumerate(_letters())}
        fast = Tokenizer(models.BPE(vocabulary, []))
        fast.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
        fast.decoder = decoders.ByteLevel()
    else:
        fast = Tokenizer.from_str(tokenizer.vocabulary.decode())
        names = {number: name for name, number in fast.get_vocab(with_added_tokens=True).items()}
        if tokenizer.begin in names:
            return fast, names[tokenizer.begin]
        parts = json.loads(tokenizer.vocabulary)
        if isinstance(words := parts["model"].get("vocab"), dict):  # its number can then be any
            words[BEGIN] = tokenizer.begin
            fast = Tokenizer.from_str(json.dumps(parts))
    fast.add_special_tokens([AddedToken(BEGIN, special=True, normalized=False)])
    return fast, BEGIN


def _letters() -> list[str]:
    """The letter that stands for each byte in a byte-level vocabulary: itself, if it is printable."""
    printable = {*range(33, 127), *range(161, 173), *range(174, 256)}
    others = iter(range(256, 512))
    return [chr(byte if byte in printable else next(others)) for byte in range(256)]
