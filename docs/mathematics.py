"""A hook of the site: LaTeX between `$` or in `math` blocks becomes MathML, which browsers draw without any script.

GitHub draws the same sources. `pymdownx.arithmatex` finds them, and latex2mathml (extra `docs`) translates them.
"""

import re
from html import unescape
from typing import Any

FORMULA = re.compile(r'<(span|div) class="arithmatex">\\[(\[](.*?)\\[)\]]</\1>', re.DOTALL)


def on_page_content(html: str, **_: Any) -> str:
    """A page's HTML with MathML in the place of LaTeX."""
    from latex2mathml.converter import convert

    def mathml(found: re.Match[str]) -> str:
        return convert(unescape(found[2]), display="inline" if found[1] == "span" else "block")

    return FORMULA.sub(mathml, html)
