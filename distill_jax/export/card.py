"""Parity cards: description, origin and deviation from the network of an exported file."""

from collections.abc import Mapping
from typing import Any

import numpy as np

AGREEMENT = 0.99
"""Top-1 agreement with the network below which a file gets a warning."""


def compare(wanted: Mapping[str, Any], given: Mapping[str, Any]) -> dict[str, Any]:
    """Returns how two programs differ on the same examples.

    Args:
      wanted: outputs `{name: [n, ...]}` of the network.
      given: those of the exported file.

    Returns:
      `max_error` by output, None where a value is not finite, and `top1_agreement`, the share of
      examples with the same largest logit or probability, None where there are not two of them.
    """
    errors: dict[str, float | None] = {}
    for name, x in wanted.items():
        difference = np.abs(np.asarray(x, np.float64) - np.asarray(given[name], np.float64))
        largest = float(difference.max()) if difference.size else 0.0
        errors[name] = largest if np.isfinite(largest) else None
    by = next((name for name in ("logits", "probabilities") if name in wanted), None)
    agreement = None
    if by and np.shape(wanted[by])[-1] > 1:
        same = np.argmax(wanted[by], -1) == np.argmax(given[by], -1)
        agreement = float(np.mean(same))
    return {"max_error": errors, "top1_agreement": agreement}


def warning(card: Mapping[str, Any]) -> str:
    """Returns warnings about a file, empty if there are none."""
    parity = card["parity"]
    agreement = parity.get("top1_agreement")
    if None in parity.get("max_error", {}).values():
        return f"{card['file']}: outputs are not finite, or not those of the network"
    if agreement is not None and agreement < AGREEMENT:
        return (
            f"{card['file']} agrees with the network on {100 * agreement:.1f} % of "
            f"{parity['examples']} test examples, less than {100 * AGREEMENT:.0f} %"
        )
    return ""


def markdown(cards: Mapping[str, Mapping[str, Any]], about: Mapping[str, Any]) -> str:
    """Returns the cards of a folder as a page.

    Args:
      cards: by format.
      about: common fields of all cards: `title`, `network`, `data`, `teacher`.
    """
    lines = [f"# {about['title']}", "", "| file | MB | max error | top-1 agreement | ms, batch 1 |"]
    lines.append("|---|---|---|---|---|")
    for card in cards.values():
        parity, latency = card["parity"], card.get("latency_ms")
        errors = [x for x in parity.get("max_error", {}).values() if x is not None]
        agreement = parity.get("top1_agreement")
        cells = [
            card["file"],
            f"{card['bytes'] / 1e6:.2f}",
            f"{max(errors):.1e}" if errors else "-",
            "-" if agreement is None else f"{100 * agreement:.2f} % of {parity['examples']}",
            f"{latency['file']:.3f} (JAX {latency['jax']:.3f})" if latency else "-",
        ]
        lines.append(f"| {' | '.join(cells)} |")
    lines += ["", "Errors are against the network in float32 in JAX; times are on one core.", ""]
    for card in cards.values():
        if card.get("warning"):
            lines += [f"Warning: {card['warning']}.", ""]
    lines.append(f"Network: {about['network']}")
    for split, data in about["data"].items():
        licence = data.get("licence") or "licence not known"
        lines.append(f"- data, {split}: {data['name']}, {data['n']} examples, {licence}")
    for teacher in about["teacher"]:
        licence = teacher.get("licence") or "licence of its data not known"
        lines.append(f"- {teacher['role']}: from {teacher['init']}, {licence}")
    return "\n".join(lines) + "\n"
