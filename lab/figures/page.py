"""HTML pages with figures: one self-contained file with Vega and all specs, for light and dark, wide and narrow."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from . import theme
from .figure import Figure, by_legend, legend
from .libraries import charts_module, vega

HERE = Path(__file__).parent


def render(figures: Sequence[Figure], *, template: Path = HERE / "page.html", **values: Any) -> str:
    """Return the HTML of a page with these figures, from a Jinja template that may use `values` by name.

    Raises:
        SeqmixError: Altair or vl-convert is not installed.
    """
    import jinja2  # always installed: Altair and torch require it

    charts = charts_module()
    loader = jinja2.FileSystemLoader([template.parent, HERE])
    engine = jinja2.Environment(loader=loader, autoescape=True, trim_blocks=True, lstrip_blocks=True)
    specs = {}
    for figure in figures:
        specs[figure.name] = {
            "spec": charts.page_spec(figure),
            "scales": charts.scales(figure),
            "smooth": figure.smooth,
        }
    return engine.get_template(template.name).render(
        values,
        figures=figures,
        switches={name: {axis: list(kinds) for axis, kinds in one["scales"].items()} for name, one in specs.items()},
        by_legend=by_legend,
        legend=legend,
        theme=theme,
        # inside a script element, only a closing tag needs escaping
        specs=json.dumps(specs, ensure_ascii=False).replace("</", "<\\/"),
        style=theme.style_sheet(":root") + (HERE / "page.css").read_text(encoding="utf-8"),
        script=(HERE / "page.js").read_text(encoding="utf-8"),
        vega=vega(),
    )
