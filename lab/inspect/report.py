"""Report of a model's inspection: one HTML file in the style of the study reports."""

from collections.abc import Callable, Sequence
from pathlib import Path

import torch

from ..figures import page
from ..figures.figure import Axis, Figure, Point, Series, drawable
from .pictures import picture
from .views import LayerView

TEMPLATE = Path(__file__).with_name("report.html")
COLUMNS = "layer", "mixer", "head", "reach", "90 % within", "decay", "its reach", "decays saturated", "gate saturated"
MAX_HEADS = 16
"""Maximum number of heads of a layer whose maps are shown."""


def sections_of(views: Sequence[LayerView]) -> list[tuple[str, list[Figure]]]:
    """Return the sections of the report, each as its heading and its figures."""
    sections = {"How far back": reach_figures, "States": state_figures, "Gradients": gradient_figures}
    return [(heading, drawable(figures(views))) for heading, figures in sections.items()]


def render(views: Sequence[LayerView], title: str, facts: str) -> str:
    """Return the report as an HTML page.

    Raises:
        SeqmixError: the library that draws the figures is not installed.
    """
    sections = sections_of(views)
    return page.render(
        [figure for _, figures in sections for figure in figures],
        template=TEMPLATE,
        title=title,
        facts=facts,
        sections=sections,
        heads=COLUMNS,
        rows=[row for view in views for row in rows_of(view)],
        maps=[(view, maps_of(view)) for view in views if view.maps is not None],
        command="seqmix inspect RUN --text FILE",
    )


def rows_of(view: LayerView) -> list[tuple[str, ...]]:
    """Return the table rows of a layer, one per head, with the columns `COLUMNS`; empty cells for what it lacks."""
    columns = {"{:.1f}": (view.reach, view.reach_90), "{:.4f}": (view.decays,), "{:.1f} ": (view.decay_reach,)}
    texts = [list(map(form.format, values)) for form, lists in columns.items() for values in lists]
    shares = ["" if share is None else f"{share:.1%}" for share in (view.saturated_decays, view.saturated_gates)]
    rows = []
    for head in range(max(1, *map(len, texts))):
        cells = [column[head] if head < len(column) else "" for column in texts]
        name = f"{head}" if view.of_heads else "all"
        rows.append((f"{view.layer}", view.mixer, name, *cells, *(shares if head == 0 else ("", ""))))
    return rows


def maps_of(view: LayerView) -> list[tuple[str, str, str]]:
    """Return for each head its name, its attention map as a data URL, and a description for screen readers."""
    quantity = "weights" if view.of_heads else "gradient norms"
    pictures = []
    for head, values in enumerate(() if view.maps is None else view.maps[:MAX_HEADS]):
        name = f"head {head}" if view.of_heads else "gradients"
        description = f"{quantity} of layer {view.layer}, {name}: mean distance {view.reach[head]:.1f} tokens"
        pictures.append((name, picture(values), description))
    return pictures


def reach_figures(views: Sequence[LayerView]) -> list[Figure]:
    """Return two figures: the share of attention weight within a distance, and the reach of heads by layer."""
    within = _series_of_layers(views, lambda view: [] if view.maps is None else _weight_by_distance(view))
    heads = _series_of_layers(views, lambda view: [Point(view.layer, reach) for reach in view.reach])
    distance_axis = Axis("distance (tokens)", log=False)
    share_axis = Axis("share of weight", unit="share", from_zero=True, log=False)
    layer_axis = Axis("layer", log=False)
    within_caption = "Share of a query's weight on tokens at most this far back; mean of heads and queries."
    reach_caption = (
        "Each point is a head: the mean distance from a query to the tokens that it reads, by weight; by gradients if "
        "there are no heads."
    )
    reach_axis = Axis("mean distance (tokens)", from_zero=True)
    return [
        Figure("within", "Weight within a distance", within_caption, distance_axis, share_axis, within),
        Figure("reach", "Reach by layer", reach_caption, layer_axis, reach_axis, heads, joined=False),
    ]


def _series_of_layers(views: Sequence[LayerView], points: Callable[[LayerView], list[Point]]) -> list[Series]:
    """Return the points of each layer as a series; a layer has the same name and style in all figures."""
    return [Series(f"{view.layer} {view.mixer}", points(view), view.layer) for view in views]


def _weight_by_distance(view: LayerView) -> list[Point]:
    """Return the share of a query's weight within each distance in tokens, the mean over heads and queries.

    Beyond the first token of the text, a query's cumulative weight stays at its final value.
    """
    assert view.maps is not None
    length = view.maps.shape[-1]
    total = torch.zeros(length, dtype=torch.float64)
    for row, n in enumerate(view.queries):
        cumulative = view.maps[:, row, : n + 1].flip(-1).cumsum(-1).mean(0)
        total += torch.cat((cumulative, cumulative[-1:].expand(length - n - 1)))
    return [Point(distance, value) for distance, value in enumerate((total / len(view.queries)).tolist())]


def state_figures(views: Sequence[LayerView]) -> list[Figure]:
    """Return figures of the norm and effective rank of each layer's state (its first tensor) over the text."""
    token_axis = Axis("tokens", log=False)
    tensors = dict.fromkeys(f"{view.states[0].name} of {view.mixer}" for view in views if view.states)

    def series(attribute: str) -> list[Series]:
        def points(view: LayerView) -> list[Point]:
            return list(map(Point, view.points, getattr(view.states[0], attribute))) if view.states else []

        return _series_of_layers(views, points)

    norm_caption = f"Frobenius norm of the first tensor of the state ({', '.join(tensors)})."
    rank_caption = "Exponential of the entropy of the singular values of a head's matrix; mean of heads."
    return [
        Figure("state-norm", "State norm", norm_caption, token_axis, Axis("norm"), series("norms")),
        Figure(
            "state-rank",
            "Effective rank",
            rank_caption,
            token_axis,
            Axis("rank", from_zero=True, log=False),
            series("ranks"),
        ),
    ]


def gradient_figures(views: Sequence[LayerView]) -> list[Figure]:
    """Return one figure, the gradient norms by layer."""
    attributes = {"parameters": "gradient_norm", "stream after the layer": "stream_gradient_norm"}
    series = [
        Series(name, [Point(view.layer, getattr(view, attribute)) for view in views], style)
        for style, (name, attribute) in enumerate(attributes.items())
    ]
    caption = (
        "Norm of the mean loss's gradient with respect to a layer's parameters, and to the stream after the layer."
    )
    return [Figure("gradients", "Gradient norms", caption, Axis("layer", log=False), Axis("gradient norm"), series)]
