"""What a study chose on the selecting examples: tuned arms, and arms with a fallback."""

from collections.abc import Iterable, Mapping
from typing import Any

from distill_jax.report.folders import Study
from distill_jax.report.html import Html, el, join
from distill_jax.report.page import muted, row, table
from distill_jax.report.wording import NONE, minus


def sentences(
    tuned: Mapping[str, Mapping[str, Any]], fallback: Mapping[str, Mapping[str, Any]]
) -> list[str]:
    """Returns one line for each name: which arm it stands for, in which seeds.

    Args:
      tuned: entry of that name in `study.json`.
      fallback: likewise.
    """
    lines = [f"{name}: {seeds(found.get('seeds', {}))}" for name, found in tuned.items()]
    for name, found in fallback.items():
        taken = {
            seed: decision["value"]["arm"] or f"open ({decision['value']['why']})"
            for seed, decision in found["seeds"].items()
        }
        lines.append(f"{name}: {seeds(taken)}")
    return lines


def seeds(by_seed: Mapping[str, str]) -> str:
    """Returns in which seeds each arm was chosen, given the arm of each seed."""
    if len(set(by_seed.values())) == 1:
        return f"{next(iter(by_seed.values()))} in every seed"
    parts = (
        f"{arm} in seed{'s'[: len(own) > 1]} {', '.join(own)}"
        for arm in dict.fromkeys(by_seed.values())
        if (own := [seed for seed, a in by_seed.items() if a == arm])
    )
    return "; ".join(parts)


def section(study: Study) -> Html | None:
    """Shows the choices of `study.tuned` and of `study.fallback`."""
    tuned, fallback = study.spec.get("tuned") or {}, study.spec.get("fallback") or {}
    if not tuned and not fallback:
        return None
    parts = []
    if tuned:
        rows = [
            [
                el("th", name, scope="row"),
                el("td", seeds(found.get("seeds", {})) or found.get("arm", NONE)),
                el("td", found["by"]),
            ]
            for name, found in tuned.items()
        ]
        parts += [
            el("h3", "Tuned arms"),
            table(["name", "stands for", "chosen by"], rows, numeric=False),
        ]
    for name, found in fallback.items():
        arm, other = found["arms"]
        errors = f"{found['margin']:g} standard error{'s'[: found['margin'] != 1]}"
        rule = (
            f"{arm} is taken where it has more of the selecting examples right than {other}, by "
            f"more than {errors} of the paired difference; else {other}."
        )
        heads = [
            "seed",
            "taken",
            f"right with {arm}",
            f"right with {other}",
            "of",
            "difference ± se",
        ]
        parts += [
            el("h3", name),
            muted(rule),
            table(heads, list(_decisions(found["seeds"])), numeric=True),
        ]
    return join(
        muted(
            "By examples that are in neither the training nor the test part. A name costs all that "
            "it was chosen from; the section Compute has what was taken."
        ),
        *parts,
    )


def _decisions(by_seed: Mapping[str, Mapping[str, Any]]) -> Iterable[list[Html]]:
    for seed, states in by_seed.items():
        for state, decision in states.items():
            if state == "best" and decision == states["value"]:
                continue
            label = seed + (", best state" if state == "best" else "")
            if decision.get("why"):
                cells = [decision["arm"] or "open", decision["why"], NONE, NONE, NONE]
            else:
                text = f"{decision['difference']:+.4f} ± {decision['se']:.4f}"
                cells = [decision["arm"], *decision["right"], decision["examples"], minus(text)]
            yield row(label, cells)
