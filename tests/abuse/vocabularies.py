"""Vocabularies (tokenizer.json) of anyone's making, with all that the library can be asked for."""

import json
import random
from collections.abc import Callable, Iterator
from copy import deepcopy
from functools import partial
from itertools import count
from pathlib import Path
from typing import Any

from abuse.tally import Case

from seqmix.models import load_tokenizer, train_bpe

TEXTS = ("the text of a run", "", "a" * 2000, "ä\u2028\ufeff\U0001f600 \n\t", "\0\x01", "- " * 500)
HUGE = (-1, 0, 1, 2, 2**31, 2**32 - 1, 2**32, 2**63, 10**30, 1e308, -1e308, 0.5, 2.0, None, True, "", "x", [], {})
DOUBLE = {"type": "Replace", "pattern": {"String": "a"}, "content": "aa"}
REGEX = (
    "(a*)*b",
    "(a|a)*$",
    "(?=(a+))\\1*b",
    "(" * 500 + ")" * 500,
    "a{1000}{1000}",
    "[",
    "\\",
    "",
    "(?<n>a)\\k<n>",
    "^",
    "$",
)
SPLITS = ("Removed", "Isolated", "MergedWithPrevious", "MergedWithNext", "Contiguous")


def vocabularies(folder: Path, drawn: random.Random) -> Iterator[Case]:
    """Every part replaced, every number and text out of range, parts that multiply a text."""
    train_bpe([("a", b"the text of a small run, over and over again")], 300, folder / "good.json")
    good = json.loads((folder / "good.json").read_text())
    number = count()

    def case(what: str, change: Callable[[dict[str, Any]], object], refused: bool = False) -> Case:
        def use() -> None:
            tree = deepcopy(good)
            changed = change(tree)
            _use(folder / f"{next(number)}.json", changed if isinstance(changed, bytes) else json.dumps(tree).encode())

        return Case(what, use, refused)

    yield case("whole", lambda tree: None)
    yield case("dropout", lambda tree: tree["model"].update(dropout=0.5), refused=True)
    for part in ("normalizer", "pre_tokenizer", "post_processor", "decoder"):
        for name, value in _components():
            yield case(f"{part} {name}", partial(_put, part, value))
    for name, model in _models():
        yield case(f"model {name}", partial(_put, "model", model))
    for path, value in _leaves(good):
        for huge in drawn.sample(HUGE, 6):
            yield case(f"{'.'.join(map(str, path))} = {huge!r:.30} for {value!r:.20}", partial(_set, path, huge))
    for huge in (*HUGE, "a", "é" * 5000):
        for key in ("id", "content", "single_word", "lstrip"):
            token = {"id": 300, "content": "<x>", "single_word": False, "lstrip": False, "rstrip": False}
            token |= {"normalized": False, "special": True, key: huge}
            yield case(f"added token with {key} = {huge!r:.20}", partial(_put, "added_tokens", [token]))
    for text in (b"[" * 10**5, b'{"a":' * 10**5, b"", b"{}", b"null", b"\xff\xfe", b'{"version": "9"}', b"1e999"):
        yield case(f"{text[:12]!r}", lambda tree, text=text: text, refused=True)


def _components() -> Iterator[tuple[str, Any]]:
    """Normalizers, pre-tokenizers, post-processors and decoders, each of which is put everywhere."""
    yield "a", None
    for kind in (
        "NFC",
        "NFKD",
        "Lowercase",
        "StripAccents",
        "Nmt",
        "ByteLevel",
        "Whitespace",
        "WhitespaceSplit",
        "Fuse",
    ):
        yield kind, {"type": kind}
    for kind in ("BertPreTokenizer", "UnicodeScripts", "ByteFallback", "none", "Bert", "Sequence"):
        yield kind, {"type": kind}
    yield "twice as long 40 times", {"type": "Sequence", "normalizers": [DOUBLE] * 40}
    yield "twice as long 40 times in decoders", {"type": "Sequence", "decoders": [DOUBLE] * 40}
    yield "a long content", {"type": "Replace", "pattern": {"String": ""}, "content": "x" * 10**6}
    yield "a long prefix", {"type": "Prepend", "prepend": "x" * 10**7}
    yield "an empty prefix", {"type": "Prepend", "prepend": ""}
    nested: Any = {"type": "NFC"}
    for _ in range(100):
        nested = {"type": "Sequence", "normalizers": [nested]}
    yield "nested 100 times", nested
    for regex in REGEX:
        yield f"a Replace of {regex:.12}", {"type": "Replace", "pattern": {"Regex": regex}, "content": "b"}
        for behavior in SPLITS:
            split = {"type": "Split", "pattern": {"Regex": regex}, "behavior": behavior, "invert": len(regex) % 2 == 0}
            yield f"a Split by {regex:.12} {behavior}", split
    yield "an empty Split", {"type": "Split", "pattern": {"String": ""}, "behavior": "Removed", "invert": False}
    for huge in HUGE:
        yield f"FixedLength {huge!r:.12}", {"type": "FixedLength", "length": huge}
        yield f"Strip {huge!r:.12}", {"type": "Strip", "content": "a", "start": huge, "stop": huge}
        yield (
            f"Metaspace {huge!r:.12}",
            {"type": "Metaspace", "replacement": huge, "prepend_scheme": "always", "split": True},
        )
        yield f"Digits {huge!r:.12}", {"type": "Digits", "individual_digits": huge}
        yield f"CTC {huge!r:.12}", {"type": "CTC", "pad_token": huge, "word_delimiter_token": "", "cleanup": True}
        yield f"WordPiece {huge!r:.12}", {"type": "WordPiece", "prefix": huge, "cleanup": True}
        yield f"Precompiled {huge!r:.12}", {"type": "Precompiled", "precompiled_charsmap": huge}
    for charsmap in ("", "AAAA", "//////////8=", "AAAAAAAAAAA=", "BAAAAP////8=", "!!", "QUFBQUFBQUFBQUFB" * 50):
        yield f"Precompiled {charsmap:.12}", {"type": "Precompiled", "precompiled_charsmap": charsmap}
    for pattern in ({"id": "<s>", "type_id": 0}, {"id": "no", "type_id": 2**31}):
        template = {"type": "TemplateProcessing", "single": [{"SpecialToken": pattern}] * 10**5, "pair": []}
        yield (
            f"a template of {pattern['id']}",
            template | {"special_tokens": {"<s>": {"id": "<s>", "ids": [0], "tokens": ["<s>"]}}},
        )


def _models() -> Iterator[tuple[str, Any]]:
    """Models of every kind, with vocabularies that have holes, doubles, gaps and numbers out of range."""
    words = {"the": 0, "t": 1, "[UNK]": 2}
    for huge in HUGE:
        yield f"WordLevel id {huge!r:.12}", {"type": "WordLevel", "vocab": words | {"a": huge}, "unk_token": "[UNK]"}
        yield f"WordLevel unk {huge!r:.12}", {"type": "WordLevel", "vocab": words, "unk_token": huge}
        piece = {"type": "WordPiece", "vocab": words, "unk_token": "[UNK]", "continuing_subword_prefix": "##"}
        yield f"WordPiece longest {huge!r:.12}", piece | {"max_input_chars_per_word": huge}
        yield f"WordPiece unk {huge!r:.12}", piece | {"max_input_chars_per_word": 100, "unk_token": huge}
        yield (
            f"WordPiece prefix {huge!r:.12}",
            piece | {"max_input_chars_per_word": 100, "continuing_subword_prefix": huge},
        )
        unigram = {"type": "Unigram", "vocab": [["<unk>", 0.0], ["a", -1.0]], "byte_fallback": True}
        yield f"Unigram unk {huge!r:.12}", unigram | {"unk_id": huge}
        yield (
            f"Unigram score {huge!r:.12}",
            unigram | {"unk_id": 0, "vocab": [["<unk>", huge], ["a", huge], ["aa", huge]]},
        )
        yield f"Unigram piece {huge!r:.12}", unigram | {"unk_id": 0, "vocab": [["<unk>", 0.0], [huge, -1.0]]}
    unigram = {"type": "Unigram", "unk_id": 0, "byte_fallback": False}
    for name, vocab in (("empty", []), ("doubles", [["a", 0.0]] * 3), ("empty pieces", [["", 0.0], ["", 0.0]])):
        yield f"Unigram {name}", unigram | {"vocab": vocab}
        yield f"Unigram {name} without unk", unigram | {"vocab": vocab, "unk_id": None}
    bpe = {"type": "BPE", "dropout": None, "unk_token": None, "fuse_unk": True, "byte_fallback": True}
    for name, vocab, merges in (
        ("empty", {}, []),
        ("one", {"a": 0}, []),
        ("merges of itself", {"a": 0, "aa": 1}, [["a", "a"], ["aa", "aa"]]),
        ("merges of nothing", {"a": 0}, [["", ""], ["a", ""]]),
        ("one id for all", {"a": 0, "t": 0, "at": 0}, [["a", "t"]]),
        ("an empty token", {"": 0, "a": 1}, [["a", ""]]),
        ("old merges", {"a": 0, "b": 1, "ab": 2}, ["a b", "b"]),
        ("a large id", {"a": 2**32 - 1, "b": 2**32 - 2}, []),
    ):
        for more in ({}, {"unk_token": "zz"}, {"continuing_subword_prefix": "##"}, {"end_of_word_suffix": "é" * 1000}):
            yield f"BPE {name} {list(more)}", bpe | {"vocab": vocab, "merges": merges} | more


def _leaves(tree: Any, path: tuple[Any, ...] = ()) -> Iterator[tuple[tuple[Any, ...], Any]]:
    """Settings by their path, but of a vocabulary only the first and last entry."""
    if not isinstance(tree, dict | list):
        yield path, tree
        return
    entries = list(tree.items() if isinstance(tree, dict) else enumerate(tree))
    for key, value in entries if len(entries) < 20 else (entries[0], entries[-1]):
        yield from _leaves(value, (*path, key))


def _put(part: str, value: Any, tree: dict[str, Any]) -> None:
    tree[part] = value


def _set(path: tuple[Any, ...], value: Any, tree: Any) -> None:
    for key in path[:-1]:
        tree = tree[key]
    tree[path[-1]] = value


def _use(file: Path, content: bytes) -> None:
    """Read a vocabulary, encode texts and decode every token."""
    file.write_bytes(content)
    try:
        tokenizer = load_tokenizer(file)
    finally:
        file.unlink()
    encoded = [tokens.tolist() for tokens in tokenizer.encode_documents([("a", text.encode()) for text in TEXTS])]
    again = [tokens.tolist() for tokens in tokenizer.encode_documents([("a", text.encode()) for text in TEXTS])]
    assert encoded == again, "a text has other tokens the second time"
    assert all(0 <= token < tokenizer.vocab_size for tokens in encoded for token in tokens), "tokens out of range"
    for tokens in (*encoded, [*range(min(300, tokenizer.text_tokens))] * 2):
        decode = tokenizer.decoder()
        for token in (*tokens, None):
            decode(token)
