"""HTML elements that escape their contents."""

import html
from collections.abc import Iterator
from typing import Any

_VOID = {"img", "meta"}


class Html(str):
    """Text that is already HTML. All other strings are escaped when added to an element."""

    __slots__ = ()


def el(tag: str, *children: Any, **attributes: Any) -> Html:
    """Returns one element.

    Args:
      tag: its name.
      *children: `Html` is inserted unchanged, sequences child by child, None is skipped, and all
        else is inserted as escaped text.
      **attributes: escaped values. A trailing underscore is dropped (`class_`), other underscores
        become hyphens, floats get two decimals, and None leaves the attribute out.
    """
    pairs = "".join(
        f' {name.rstrip("_").replace("_", "-")}="{_attribute(value)}"'
        for name, value in attributes.items()
        if value is not None
    )
    if tag in _VOID:
        return Html(f"<{tag}{pairs}>")
    return Html(f"<{tag}{pairs}>{join(*children)}</{tag}>")


def join(*children: Any) -> Html:
    """Returns the concatenated children, converted as in `el`."""
    return Html("".join(_child(child) for child in children))


def _child(child: Any) -> str:
    if child is None:
        return ""
    if isinstance(child, Html):
        return child
    if isinstance(child, (list, tuple, Iterator)):
        return join(*child)
    return html.escape(str(child))


def _attribute(value: Any) -> str:
    return f"{value:.2f}" if isinstance(value, float) else html.escape(str(value))
