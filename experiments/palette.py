"""What tells one line from another: a colour for light and one for dark, a marker, and a dash.

The colours are those of Okabe and Ito (2008, "Color Universal Design"), made for every common colour vision. On a light
page some are darker, each until it stands out (3 to 1, WCAG 2.2 criterion 1.4.11) and still differs from all others.
"""

INK, MUTED, RULE, PAPER, PANEL = "ink", "muted", "rule", "paper", "panel"
LIGHT = {INK: "#1b1f24", MUTED: "#5b636e", RULE: "#dfe3e8", PAPER: "#ffffff", PANEL: "#f6f7f9"}
DARK = {INK: "#e8eaed", MUTED: "#a2a9b3", RULE: "#343a43", PAPER: "#14171b", PANEL: "#1d2127"}
"""Colours of text, of what is beside it, of lines, and of the background."""

LIGHT_LINES = ("#00649c", "#e26400", "#008d66", "#cc79a7", "#805800", "#1e9be2", "#1b1f24", "#444005")
DARK_LINES = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9", "#e8eaed", "#f0e442")
"""Blue, vermilion, green, purple, orange, sky blue, ink and yellow; further lines take them again, dashed."""
DASHES = (None, "5 3", "2 2.5")
MARKERS = ("circle", "square", "triangle", "diamond", "cross", "down")


def color(style: int) -> int:
    """The place of a line's colour among eight."""
    return style % len(LIGHT_LINES)


def dash(style: int) -> str | None:
    """A line's dashes, as SVG has them."""
    return DASHES[style // len(LIGHT_LINES) % len(DASHES)]


def marker(style: int) -> str:
    """The shape of a line's points."""
    return MARKERS[style % len(MARKERS)]


def named(dark: bool = False) -> dict[str, str]:
    """The colours by name: ink, paper, ..., and line-0 on."""
    names, lines = (DARK, DARK_LINES) if dark else (LIGHT, LIGHT_LINES)
    return names | {f"line-{i}": line for i, line in enumerate(lines)}


def variables(dark: bool = False) -> str:
    """The colours as CSS variables: --ink, --paper, ..., and --line-0 on."""
    return "".join(f"--{name}:{value};" for name, value in named(dark).items())
