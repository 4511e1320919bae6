"""The report of a model's inspection: a page in the style of studies' reports, in one file."""

from collections.abc import Sequence
from pathlib import Path

import torch

from ..experiments.figures import page
from ..experiments.figures.figure import Axis, Figure, Point, Series, drawable
from .pictures import picture
from .views import LayerView

TEMPLATE = Path(__file__).with_name("report.html")
HEADS = "layer", "mixer", "head", "reach", "90 % within", "decay", "its reach", "decays saturated", "gate saturated"
MOST_HEADS = 16
"""Maps of a layer that are shown."""


def sections_of(views: Sequence[LayerView]) -> list[tuple[str, list[Figure]]]:
    """Headings, and the figures below each."""
    sections = {"How far back": reach_figures, "States": state_figures, "Gradients": gradient_figures}
    return [(heading, drawable(figures(views))) for heading, figures in sections.items()]


def render(views: Sequence[LayerView], title: str, facts: str) -> str:
    """The page as HTML.

    Raises:
        SeqmixError: what draws its figures is not installed.
    """
    sections = sections_of(views)
    return page.render(
        [figure for _, figures in sections for figure in figures],
        template=TEMPLATE,
        title=title,
        facts=facts,
        sections=sections,
        heads=HEADS,
        rows=[row for view in views for row in rows_of(view)],
        maps=[(view, maps_of(view)) for view in views if view.maps is not None],
        command="seqmix inspect RUN --text FILE",
    )


def rows_of(view: LayerView) -> list[tuple[str, ...]]:
    """The rows of a layer's table: one per head."""
    columns = {"{:.1f}": (view.reach, view.reach_90), "{:.4f}": (view.decays,), "{:.1f} ": (view.decay_reach,)}
    texts = [list(map(text.format, values)) for text, each in columns.items() for values in each]
    shares = ["" if share is None else f"{share:.1%}" for share in (view.saturated_decays, view.saturated_gates)]
    rows = []
    for head in range(max(1, *map(len, texts))):
        cells = [column[head] if head < len(column) else "" for column in texts]
        name = f"{head}" if view.of_heads else "all"
        rows.append((f"{view.layer}", view.mixer, name, *cells, *(shares if head == 0 else ("", ""))))
    return rows


def maps_of(view: LayerView) -> list[tuple[str, str, str]]:
    """The heads' names and pictures, and what they show, for those who do not see it."""
    what = "weights" if view.of_heads else "gradient norms"
    found = []
    for head, values in enumerate(() if view.maps is None else view.maps[:MOST_HEADS]):
        name = f"head {head}" if view.of_heads else "gradients"
        words = f"{what} of layer {view.layer}, {name}: mean distance {view.reach[head]:.1f} tokens"
        found.append((name, picture(values), words))
    return found


def reach_figures(views: Sequence[LayerView]) -> list[Figure]:
    """The share of weight within a distance, and the reach of heads by layer."""
    shown = [view for view in views if view.maps is not None]
    within = [Series(f"{view.layer} {view.mixer}", _within(view), view.layer) for view in shown]
    heads = [Point(view.layer, reach) for view in views for reach in view.reach]
    tokens = Axis("distance (tokens)", log=False)
    share = Axis("share of weight", unit="share", zero=True, log=False)
    layers = Axis("layer", log=False)
    caption = "Of what a query reads, how much is at most so far back; the mean of heads and queries."
    reach = "The mean distance of what each head reads; without heads, that of gradients."
    distance = Axis("mean distance (tokens)", zero=True)
    return [
        Figure("within", "Weight within a distance", caption, tokens, share, within),
        Figure("reach", "Reach by layer", reach, layers, distance, [Series("a head", heads)], joined=False),
    ]


def _within(view: LayerView) -> list[Point]:
    """The cumulative weight by distance; of queries that have so many tokens before them."""
    assert view.maps is not None
    length = view.maps.shape[-1]
    total = torch.zeros(length, dtype=torch.float64)
    for row, n in enumerate(view.queries):
        cumulative = view.maps[:, row, : n + 1].flip(-1).cumsum(-1).mean(0)
        total += torch.cat((cumulative, cumulative[-1:].expand(length - n - 1)))
    return [Point(distance, value) for distance, value in enumerate((total / len(view.queries)).tolist())]


def state_figures(views: Sequence[LayerView]) -> list[Figure]:
    """Norms and effective ranks of the first leaf of each layer's state, over the text."""
    found = [(view, view.states[0]) for view in views if view.states]
    over = Axis("tokens", log=False)

    def series(of: str) -> list[Series]:
        names = [f"{view.layer} {view.mixer}: {state.name}" for view, state in found]
        points = [[*map(Point, view.points, getattr(state, of))] for view, state in found]
        return [Series(name, each, view.layer) for name, each, (view, _) in zip(names, points, found, strict=True)]

    rank = "e to the entropy of the singular values of a head's matrix; the mean of heads."
    return [
        Figure("state-norm", "State norm", "Frobenius norm of the first leaf.", over, Axis("norm"), series("norms")),
        Figure("state-rank", "Effective rank", rank, over, Axis("rank", zero=True, log=False), series("ranks")),
    ]


def gradient_figures(views: Sequence[LayerView]) -> list[Figure]:
    """Gradient norms by layer."""
    each = {"parameters": "gradient_norm", "stream after the layer": "stream_gradient_norm"}
    series = [
        Series(name, [Point(view.layer, getattr(view, of)) for view in views], style)
        for style, (name, of) in enumerate(each.items())
    ]
    caption = "Of the mean loss of the text: of a layer's parameters, and of the residual stream after it."
    return [Figure("gradients", "Gradient norms", caption, Axis("layer", log=False), Axis("gradient norm"), series)]
