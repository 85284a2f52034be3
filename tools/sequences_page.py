"""Writes the tables of `docs/results/sequences.md` from the numbers of its studies.

  python tools/sequences_page.py

What is above the mark is written by hand, and kept. A claim holds, or is contradicted, where the
95 % interval of the paired difference excludes 0. Where it includes 0, a study in `SHORT` does not
answer the claim, and another one has no effect to show: null.
"""

import json
import pathlib
from typing import Any

ROOT = pathlib.Path(__file__).parents[1]
PAGE = ROOT / "docs/results/sequences.md"
MARK = "<!-- tables: tools/sequences_page.py -->"
STUDIES = ("masked_thought", "ul2", "ul2_4000", "refinement", "refinement_1600")
SHORT = ("ul2", "refinement")
"""Studies whose networks still learn at their end."""

CLAIMS = (
    # (study, claim, path of the difference, sign of a difference that agrees)
    ("masked_thought", "hidden tokens (mask token) solve more", "masked minus sft", 1),
    ("masked_thought", "hidden tokens (random ids) solve more", "random minus sft", 1),
    ("masked_thought", "control: more than random ids in questions", "masked minus question", 1),
    ("masked_thought", "control: more than dropout", "masked minus dropout", 1),
    ("masked_thought", "control: more than smoothed labels", "masked minus smoothing", 1),
    ("masked_thought", "control: random ids in questions solve more", "question minus sft", 1),
    ("masked_thought", "control: dropout solves more", "dropout minus sft", 1),
    ("masked_thought", "control: smoothed labels solve more", "smoothing minus sft", 1),
    ("masked_thought", "with an irrelevant clause (mask token)", "masked minus sft*", 1),
    ("masked_thought", "with an irrelevant clause (random ids)", "random minus sft*", 1),
    ("masked_thought", "with an irrelevant clause: more than dropout", "masked minus dropout*", 1),
    ("ul2", "spans alone fill in better than plain text", "spans minus causal: infill", -1),
    ("ul2", "plain text continues better than spans alone", "causal minus spans: continuation", -1),
    ("ul2", "prefixes continue better than plain text", "prefix minus causal: continuation", -1),
    ("ul2", "prefixes continue better than spans alone", "prefix minus spans: continuation", -1),
    ("ul2", "the mixture fills in as well as spans alone", "mixture minus spans: infill", 0),
    ("ul2", "it continues better than spans alone", "mixture minus spans: continuation", -1),
    ("ul2", "it continues as well as plain text", "mixture minus causal: continuation", 0),
    ("ul2", "mode tokens help to fill in", "mixture minus mixture_unmarked: infill", -1),
    ("ul2", "mode tokens help to continue", "mixture minus mixture_unmarked: continuation", -1),
    ("ul2", "filling in with the wrong mode costs", "infill/S minus infill/R", 1),
    ("ul2", "continuing with the wrong mode costs", "continuation/R minus continuation/S", 1),
    ("refinement", "a draft as context beats none", "masked minus answer_only", 1),
    ("refinement", "drafts as context beat drafts as targets", "masked minus targets", 1),
    ("refinement", "control: drafts beat those of other problems", "masked minus shuffled", 1),
    ("refinement", "a solution is better than its draft", "masked minus drafts", 1),
    ("refinement", "a second round improves", "masked round_2 minus round_1", 1),
    ("refinement", "a third round improves", "masked round_3 minus round_1", 1),
    ("refinement", "a small weight of drafts helps", "weighted minus masked", 1),
)


def difference(found: dict[str, Any], study: str, path: str) -> dict[str, Any] | None:
    if study == "masked_thought":
        metric = "test/accuracy_distracted" if path.endswith("*") else "test/accuracy"
        return found.get("differences", {}).get(path.rstrip("*"), {}).get(metric)
    pair, _, task = path.partition(": ")
    value = found.get("differences", {}).get(pair) or found.get("marks", {}).get(pair)
    return value[task] if value and task else value


def verdict(gap: dict[str, Any] | None, sign: int, *, short: bool) -> tuple[str, str]:
    """Returns the difference as text, and what it says of a claim; sign 0 claims no loss."""
    if gap is None:
        return "", "not run"
    low, high = gap["interval"]
    text = f"{gap['mean']:+.3f} ± {gap['se']:.3f} [{low:+.3f}, {high:+.3f}]"
    if sign == 0:
        found = "contradicted" if low > 0 else "holds, better" if high < 0 else "no loss seen"
        return text, found
    if low <= 0 <= high:
        return text, "not answered" if short else "null"
    return text, "holds" if (low > 0) == (sign > 0) else "contradicted"


def claims(studies: dict[str, dict[str, Any]]) -> list[str]:
    rows = ["| study | claim | difference ± se, interval | verdict |", "|---|---|---|---|"]
    for study, claim, path, sign in CLAIMS:
        gap = difference(studies.get(study, {}), study, path)
        rows.append(
            "| " + " | ".join((study, claim, *verdict(gap, sign, short=study in SHORT))) + " |"
        )
    return rows


def arms(study: str, found: dict[str, Any]) -> list[str]:
    """A table of the arms of a study: what was chosen, and means over the seeds."""
    if not found.get("arms"):
        return []
    names: list[str] = []
    for one in found["arms"].values():
        keys = ("infill", "continuation") if study.startswith("ul2") else one["values"]
        names += [key for key in keys if key not in names and not key.startswith("held_out/")]
    lines = [f"## {study}", ""]
    lines += [f"| arm | chosen | {' | '.join(names)} |", "|" + "---|" * (len(names) + 2)]
    for arm, one in found["arms"].items():
        chosen = one["chosen"] if isinstance(one["chosen"], dict) else {"lr": one["chosen"]}
        form = {"task forms": " / ".join(one["forms"].values())} if "forms" in one else {}
        size = {"tokens a row": one["tokens_a_row"]} if "tokens_a_row" in one else {}
        told = ", ".join(f"{key} {value}" for key, value in {**chosen, **form, **size}.items())
        cells = []
        for name in names:
            values = one["values"].get(name, [])
            cells.append(f"{sum(values) / len(values):.3f}" if values else "")
        lines.append(f"| {arm} | {told} | {' | '.join(cells)} |")
    tuned = {arm: one for arm, one in found["arms"].items() if one["settings"]}
    if tuned:
        lines += ["", "Settings that were tried, and what held-out examples say of them:", ""]
    for arm, one in tuned.items():
        tried = "; ".join(
            ", ".join(f"{k} {v:.4g}" for k, v in setting.items()) for setting in one["settings"]
        )
        lines.append(f"- `{arm}`: {tried}")
    if "drafts" in found:
        drafts = list(found["drafts"].values())
        mean = sum(x["test"] for x in drafts) / len(drafts)
        on_train = [sum(x["train"][i] for x in drafts) / len(drafts) for i in range(3)]
        shares = ", ".join(f"{x:.3f}" for x in on_train)
        lines += ["", f"Right drafts: {shares} of the three for training, {mean:.3f} at test."]
    about = ", ".join(f"{key} {value}" for key, value in found["about"].items())
    return [*lines, "", f"Settings: {about}.", ""]


def main() -> None:
    studies = {}
    for name in STUDIES:
        path = ROOT / f"benchmarks/results/{name}.json"
        if path.exists():
            studies[name] = json.loads(path.read_text())
    above = PAGE.read_text().partition(MARK)[0]
    body = [*claims(studies), ""]
    for name, found in studies.items():
        body += arms(name, found)
    PAGE.write_text(f"{above}{MARK}\n\n" + "\n".join(body).rstrip() + "\n")


if __name__ == "__main__":
    main()
