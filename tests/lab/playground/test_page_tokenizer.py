"""The page's tokenizers encode and decode like the Python tokenizers."""

from pathlib import Path

import pytest

import seqmix.lab.playground
from seqmix.models import ByteTokenizer
from seqmix.models.subword import train_bpe

SCRIPT = Path(seqmix.lab.playground.__file__).parent / "page" / "tokenizer.js"
LEARNED = (
    "def add(x, y):\n    return x + y  # the sum\n\nI'll say: don't — they've gone, 1,234 times.\nnaïve Straße\n" * 3
)
TEXTS = [
    LEARNED,
    "",
    " ",
    "\n\n   x",
    "tabs\t\tand  spaces   ",
    "we're I'M it's 'til ''",
    "größer Ωmega 漢字 かな 🙂👍🏽 e\u0301",
    "a\u00a0b\u2003c\u0085d\u2028e\ufefff\u200bg",
    "½ ² ٣ Ⅷ 12٣",
    "x_1 = {'a': [1, 2]}; f(x)->y",
]


@pytest.fixture(scope="module")
def tokenizers(browser):
    page = browser.new_page()
    page.add_script_tag(content=SCRIPT.read_text(encoding="utf-8"))
    yield lambda tokenizer, text: page.evaluate(
        """([run, text]) => {
          const tokenizer = tokenizerOf(run), ids = tokenizer.encode(text), decode = decoderOf(tokenizer);
          return [ids, ids.map(decode).join("")];
        }""",
        [tokenizer, text],
    )
    page.close()


@pytest.mark.parametrize("text", TEXTS)
def test_byte_tokenizer_matches_python(tokenizers, text):
    python = ByteTokenizer()
    assert tokenizers({"tokenizer": "bytes"}, text) == [python.encode(text)[1:].tolist(), text]


def test_bpe_tokenizer_matches_python(tokenizers, tmp_path):
    pytest.importorskip("tokenizers")
    import json

    python = train_bpe([("text", LEARNED.encode())], 330, tmp_path / "tokenizer.json")
    run = {"tokenizer": json.loads(python.vocabulary or b"")}
    for text in TEXTS:
        assert tokenizers(run, text) == [python.encode(text)[1:].tolist(), text], text
