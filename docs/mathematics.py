"""MkDocs hook: convert LaTeX between `$` or in `math` blocks to MathML, which browsers render without scripts.

GitHub renders the same sources. `pymdownx.arithmatex` marks the formulas, and latex2mathml (extra `docs`) converts
them.
"""

import re
from html import unescape
from typing import Any

NAMED = re.compile(r'<mo>([A-Za-z]{2,})</mo>(?=<mo stretchy="false">&#x00028;|<mrow><mo |<m[ion]>\w</m[ion]></msub>)')
"""A function name before its argument or index. It must not be an operator (`mo`), which has space around it."""
FORMULA = re.compile(r'<(span|div) class="arithmatex">\\[(\[](.*?)\\[)\]]</\1>', re.DOTALL)
"""A formula that arithmatex has marked: its element, and its LaTeX."""


def on_page_content(html: str, **_: Any) -> str:
    """Return a page's HTML with MathML instead of LaTeX."""
    from latex2mathml.converter import convert

    def to_mathml(match: re.Match[str]) -> str:
        formula = convert(unescape(match[2]), display="inline" if match[1] == "span" else "block")
        return NAMED.sub(r"<mi>\1</mi>", formula)

    return FORMULA.sub(to_mathml, html)
