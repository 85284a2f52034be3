"""Nested containers of a pickle as leaves by dotted names."""

from collections.abc import Callable, Iterator
from typing import Any

from distill_jax.weights.common import WeightsError, shown
from distill_jax.weights.pickles import HINT, SPARE, Global, Storage, kind_of

_DEPTH = 64
_NAMES = 16
"""What a byte of a pickle may give: 64 for a name, one for its characters, 8 for an item."""
_END = object()
_PLAIN = (type(None), str, int, float, bool)
_TANGLED = "its pickle has containers that contain themselves or are nested too deeply"


def flatten(value: Any, size: int, fail: Callable[..., WeightsError]) -> dict[str, Any]:
    """Returns the leaves of nested containers by their dotted names, in their order.

    Lists and tuples of plain values are one leaf, a tuple.

    Args:
      value: the object of a pickle.
      size: bytes of the pickle, which bound the work and the memory.
      fail: makes the error of a message and a hint.

    Raises:
      WeightsError: two leaves have one name, containers are nested in themselves or too deeply, or
        something is no tensor, number, string, boolean or None.
    """
    leaves: dict[str, Any] = {}
    left = _NAMES * size + SPARE
    stack = [("", iter([("", value)]))]
    while stack:
        prefix, items = stack[-1]
        key, node = next(items, (None, _END))
        if node is _END:
            stack.pop()
            continue
        name = f"{prefix}.{key}" if prefix else str(key)
        left -= 64 + len(name)
        if left < 0 or len(stack) > _DEPTH:
            raise fail(_TANGLED)
        if isinstance(node, Global) and node.dtype is not None:
            node = node.name
        if isinstance(node, (list, tuple)):
            left -= 8 * len(node)
            if left < 0:
                raise fail(_TANGLED)
        inner = _items(node)
        if inner is not None:
            stack.append((name, inner))
            continue
        if isinstance(node, (Global, Storage)):
            raise fail(f"has {kind_of(node)} where a tensor belongs: {shown(name)}", HINT)
        name = name or "tensor"
        if name in leaves:
            raise fail(f"has two values of the name {shown(name)}", "each name once")
        leaves[name] = tuple(node) if type(node) is list else node
    return leaves


def _items(node: Any) -> Iterator[tuple[Any, Any]] | None:
    """Returns keys and values of a container, None of a leaf."""
    if isinstance(node, dict):
        return iter(node.items())
    if type(node) in (list, tuple) and not all(type(item) in _PLAIN for item in node):
        return iter(enumerate(node))
    return None
