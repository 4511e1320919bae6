"""A hook of the site: LaTeX between `$` or in `math` blocks becomes MathML, which browsers draw without any script.

GitHub draws the same sources. `pymdownx.arithmatex` finds them, and latex2mathml (extra `docs`) translates them.
"""

import re
from html import unescape
from typing import Any

NAMED = re.compile(r'<mo>([A-Za-z]{2,})</mo>(?=<mo stretchy="false">&#x00028;|<mrow><mo |<m[ion]>\w</m[ion]></msub>)')
"""A function's name before its argument or index: an operator would have space around it."""
FORMULA = re.compile(r'<(span|div) class="arithmatex">\\[(\[](.*?)\\[)\]]</\1>', re.DOTALL)


def on_page_content(html: str, **_: Any) -> str:
    """A page's HTML with MathML in the place of LaTeX."""
    from latex2mathml.converter import convert

    def mathml(found: re.Match[str]) -> str:
        formula = convert(unescape(found[2]), display="inline" if found[1] == "span" else "block")
        return NAMED.sub(r"<mi>\1</mi>", formula)

    return FORMULA.sub(mathml, html)
