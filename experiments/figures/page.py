"""A page of HTML in one file that needs no network: Vega and the figures' specs, light and dark, wide and narrow."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from . import theme
from .figure import Figure, legend
from .libraries import charts_module, vega

HERE = Path(__file__).parent


def render(figures: Sequence[Figure], *, template: Path = HERE / "page.html", **values: Any) -> str:
    """The page that a template lays out, which has `values` by name; a SeqmixError where Altair is not installed."""
    import jinja2  # which Altair and torch need, too

    charts = charts_module()
    loader = jinja2.FileSystemLoader([template.parent, HERE])
    engine = jinja2.Environment(loader=loader, autoescape=True, trim_blocks=True, lstrip_blocks=True)
    specs = {}
    for figure in figures:
        found = charts.scales(figure)
        specs[figure.name] = {"spec": charts.page_spec(figure), "scales": found, "smooth": figure.smooth}
    return engine.get_template(template.name).render(
        values,
        figures=figures,
        styles=legend(figures),
        switches={name: {at: list(kinds) for at, kinds in one["scales"].items()} for name, one in specs.items()},
        legend=legend,
        theme=theme,
        # within a script nothing ends it but its tag
        specs=json.dumps(specs, ensure_ascii=False).replace("</", "<\\/"),
        style=theme.style_sheet(":root") + (HERE / "page.css").read_text(encoding="utf-8"),
        script=(HERE / "page.js").read_text(encoding="utf-8"),
        vega=vega(),
    )
