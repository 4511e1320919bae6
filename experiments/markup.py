"""Elements of HTML and SVG: built as a tree, so that text is escaped by construction."""

from typing import TypeAlias
from xml.etree.ElementTree import Element, tostring

Child: TypeAlias = "Element | str | list[Element] | None"


def element(tag: str, *children: Child, **attributes: str | float | None) -> Element:
    """An element with its children; None is no child, and no attribute.

    Args:
        tag: its name.
        children: elements and texts, in order.
        attributes: by name; `class_` is class, and stroke_width is stroke-width.
    """
    made = Element(tag)
    for name, value in attributes.items():
        if value is not None:
            made.set(name.rstrip("_").replace("_", "-"), value if isinstance(value, str) else f"{round(value, 1):g}")
    for child in children:
        if isinstance(child, str) and len(made):
            made[-1].tail = (made[-1].tail or "") + child
        elif isinstance(child, str):
            made.text = (made.text or "") + child
        elif child is not None:
            made.extend(child if isinstance(child, list) else [child])
    return made


def html(root: Element) -> str:
    """A document of HTML."""
    return f"<!doctype html>\n{tostring(root, encoding='unicode', method='html')}\n"


def xml(root: Element) -> str:
    """A document of XML, such as a file of SVG."""
    return tostring(root, encoding="unicode") + "\n"
