"""What words alone know of the texts of a study of `studies/minilm`, from the labels of its seeds.

  python -m benchmarks.text_study --study=runs/minilm --out=benchmarks/results/text_study.json \\
      --page=docs/results/language.md

`words` is logistic regression on tf-idf weights of the tokens that the networks of the study see,
`words_from_words` the same, trained anew on its own labels for all training texts. Strengths are
those of the best held-out balanced accuracy with the labels of seed 0, as the study's rates are.
Differences are paired by seed.
"""

import argparse
import json
import pathlib
from typing import Any

import numpy as np
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import balanced_accuracy_score

import distill_jax as dj
from benchmarks import _record, text_labels
from distill_jax.report import statistics
from distill_jax.run import build
from distill_jax.run import config as config_lib

BEGIN, END = "<!-- table: benchmarks/text_study.py {} -->", "<!-- end of {} -->"


def read(config: Any, seed: int) -> dict[str, dict[str, Any]]:
    """Returns tf-idf weights `[n, v]`, labels, and which are shown, of each part."""
    dataset = build.load_dataset(config_lib.override(config, {"seed": seed}))
    found = {}
    for part, source in dataset.parts.items():
        batch = source.read(np.arange(len(source)))
        counts = text_labels.counts_of(batch["input"], dataset.vocabulary)
        found[part] = {"x": counts, "y": batch["label"], "shown": batch["labelled"] > 0}
    text_labels.weigh(found, "x")
    return found


def words(found: dict[str, dict[str, Any]], strength: float) -> LogisticRegression:
    """Returns a classifier of the labelled texts."""
    x, y, shown = (found["train"][key] for key in ("x", "y", "shown"))
    return LogisticRegression(C=strength, max_iter=1000).fit(x[shown], y[shown])


def again(
    found: dict[str, dict[str, Any]], first: LogisticRegression, strength: float
) -> LogisticRegression:
    """Returns a classifier of all training texts; hidden labels are another's answers."""
    x, y, shown = (found["train"][key] for key in ("x", "y", "shown"))
    own = np.where(shown, y, first.predict(x))
    return LogisticRegression(C=strength, max_iter=1000).fit(x, own)


def score(found: dict[str, dict[str, Any]], net: LogisticRegression, part: str) -> float:
    return float(balanced_accuracy_score(found[part]["y"], net.predict(found[part]["x"])))


def choose(found: dict[str, dict[str, Any]]) -> tuple[float, float]:
    """Returns the strengths of `words` and `again` with the best held-out balanced accuracies."""
    grid = text_labels.STRENGTHS
    first = max(grid, key=lambda c: score(found, words(found, c), "held_out"))
    net = words(found, first)
    return first, max(grid, key=lambda c: score(found, again(found, net, c), "held_out"))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--study", type=_record.study_folder, required=True)
    parser.add_argument("--name", default="genres", help="of the corpus, in the file and the page")
    parser.add_argument("--out", type=pathlib.Path, required=True, help="adds to the file")
    parser.add_argument("--page", type=pathlib.Path, help="a page with a table to replace")
    flags = parser.parse_args()
    study = json.loads((flags.study / "study.json").read_text())
    runs = {
        arm: {int(seed): run["value"] for seed, run in entry["seeds"].items()}
        for arm, entry in study["arms"].items()
    }
    config = dj.load(flags.study / study["arms"]["distilled"]["seeds"]["1"]["run"]).config
    strengths = choose(read(config, 0))
    for seed in runs["alone"]:
        found = read(config, seed)
        first = words(found, strengths[0])
        nets = {"words": first, "words_from_words": again(found, first, strengths[1])}
        for name, net in nets.items():
            runs.setdefault(name, {})[seed] = score(found, net, "test")
    sizes = {part: len(one["y"]) for part, one in found.items()}
    known = json.loads(flags.out.read_text()) if flags.out.exists() else {}
    rows = known[flags.name] = {"texts": sizes, "strengths": strengths, "arms": {}}
    for arm, values in runs.items():
        row = {"balanced_accuracy": values, "mean": statistics.estimate([*values.values()]).mean}
        for other in ("alone", "words"):
            paired = [value - runs[other][seed] for seed, value in values.items()]
            difference = statistics.estimate(paired)
            row[f"minus_{other}"] = [difference.mean, *(difference.interval or ())]
        rows["arms"][arm] = row
    flags.out.write_text(json.dumps(known, indent=1) + "\n")
    print(table(rows["arms"]))
    if flags.page:
        begin, end = BEGIN.format(flags.name), END.format(flags.name)
        before, _, rest = flags.page.read_text().partition(begin)
        after = rest.partition(end)[2]
        flags.page.write_text(f"{before}{begin}\n\n{table(rows['arms'])}\n\n{end}{after}")


def table(arms: dict[str, Any]) -> str:
    """Returns the Markdown of the arms, with 95 % intervals of the differences."""
    lines = [["arm", "balanced accuracy", "minus alone", "minus words"], ["---"] * 4]
    for arm, row in arms.items():
        said = [
            "reference" if arm == other else "{:+.3f} ({:+.3f} to {:+.3f})".format(*row[key])
            for other, key in (("alone", "minus_alone"), ("words", "minus_words"))
        ]
        lines.append([arm, f"{row['mean']:.3f}", *said])
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


if __name__ == "__main__":
    main()
