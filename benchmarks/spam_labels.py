"""How well a frozen sentence encoder knows spam from few labels, beside words alone.

  python tools/fetch_spam.py --out=runs/spam
  python benchmarks/spam_labels.py --data=runs/spam --out=benchmarks/results/spam_labels.json \\
      --page=docs/results/language.md

Logistic regression on the embeddings of all-MiniLM-L6-v2 (the teacher of `language/spam`) and on
tf-idf weights of the same 64 tokens, for a few labels of each class and for all of a sample of
training messages. Its strength is chosen for each input and number of labels on held-out messages,
by the mean balanced accuracy over draws of labels; the test messages are measured once. A teacher
that knows less than words do cannot help a student that sees the words.
"""

import argparse
import json
import pathlib
import warnings
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import numpy as np
from sklearn.exceptions import ConvergenceWarning
from sklearn.feature_extraction.text import TfidfTransformer
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import average_precision_score, balanced_accuracy_score

from distill_jax.data import text_classes
from distill_jax.models import pretrained
from distill_jax.report import statistics

SIZES = {"train": 1000, "held_out": 400, "test": 600}
LABELS = (5, 10, 20, 40, 0)
"""Labels of each class; 0 is all."""

STRENGTHS = (0.1, 1.0, 10.0, 100.0)
INPUTS = ("encoder", "words")
METRICS = ("balanced_accuracy", "average_precision")


def read(data: pathlib.Path, sizes: dict[str, int]) -> dict[str, dict[str, Any]]:
    """Returns labels, embeddings `[n, d]` and tf-idf weights `[n, v]` of a sample of each part."""
    dataset = text_classes.make(
        path=str(data / "spam.jsonl"), tokenizer_path=str(data / "minilm"), classes=("ham", "spam")
    )
    net = pretrained.language_model(data / "minilm")
    embed = jax.jit(lambda params, x: net.model.apply(params, {}, x, train=False)[0]["embedding"])
    found: dict[str, dict[str, Any]] = {}
    for part, size in sizes.items():
        source = getattr(dataset, part)
        rows = np.random.default_rng(0).permutation(len(source))[:size]
        batch = source.read(rows)
        x = batch["input"]
        parts = [jax.tree.map(lambda a, i=i: a[i : i + 50], x) for i in range(0, len(rows), 50)]
        embeddings = [np.asarray(embed(net.params, part)) for part in parts]
        counts = np.zeros((len(rows), dataset.vocabulary), np.float32)
        np.add.at(counts, (np.arange(len(rows))[:, None], x["tokens"]), x["mask"])
        found[part] = {
            "label": batch["label"],
            "encoder": np.concatenate(embeddings),
            "words": counts,
        }
    tfidf = TfidfTransformer(sublinear_tf=True).fit(found["train"]["words"])
    for part in found.values():
        part["words"] = tfidf.transform(part["words"])
    return found


def measure(found: dict[str, dict[str, Any]], name: str, labels: int, draw: int) -> np.ndarray:
    """Returns metrics `[strengths, parts, metrics]` for one draw of labels."""
    y = found["train"]["label"]
    order = np.random.default_rng(draw).permutation(len(y))
    rows = order if not labels else np.concatenate([order[y[order] == c][:labels] for c in (0, 1)])
    values = []
    for strength in STRENGTHS:
        net = LogisticRegression(C=strength, max_iter=1000)
        net.fit(found["train"][name][rows], y[rows])
        values.append([])
        for part in (found["held_out"], found["test"]):
            score = net.decision_function(part[name])
            balanced = balanced_accuracy_score(part["label"], score > 0)
            values[-1].append([balanced, average_precision_score(part["label"], score)])
    return np.array(values)


BEGIN, END = "<!-- table: benchmarks/spam_labels.py -->", "<!-- end -->"


def table(rows: Sequence[Mapping[str, Any]]) -> str:
    """Returns the Markdown of the results."""
    names = [f"{name}, {metric.replace('_', ' ')}" for metric in METRICS for name in INPUTS]
    head = ["labels of each class", *names, "encoder minus words (95 % interval)"]
    lines = [head, ["---"] * len(head)]
    for row in rows:
        difference = row["encoder_minus_words"]
        low, high = difference["interval"] or (None, None)
        interval = "one draw" if low is None else f"{low:+.3f} to {high:+.3f}"
        values = [f"{row[name][metric]:.3f}" for metric in METRICS for name in INPUTS]
        said = f"{difference['balanced_accuracy']:+.3f} ({interval})"
        lines.append([str(row["labels_per_class"]), *values, said])
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def write_page(page: pathlib.Path, rows: Sequence[Mapping[str, Any]]) -> None:
    """Replaces the table between the marks of a page."""
    before, _, rest = page.read_text().partition(BEGIN)
    after = rest.partition(END)[2]
    page.write_text(f"{before}{BEGIN}\n\n{table(rows)}\n\n{END}{after}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--data", type=pathlib.Path, required=True)
    parser.add_argument("--out", type=pathlib.Path, required=True)
    parser.add_argument("--page", type=pathlib.Path, help="a page with a table to replace")
    parser.add_argument("--draws", type=int, default=20)
    flags = parser.parse_args()
    warnings.simplefilter("ignore", ConvergenceWarning)
    found = read(flags.data, SIZES)
    rows = []
    for labels in LABELS:
        row: dict[str, Any] = {"labels_per_class": labels or "all of 1,000"}
        tested = {}
        for name in INPUTS:
            draws = range(flags.draws if labels else 1)
            values = np.stack([measure(found, name, labels, draw) for draw in draws])
            best = int(values[:, :, 0, 0].mean(0).argmax())
            tested[name] = values[:, best, 1]
            means = dict(zip(METRICS, tested[name].mean(0).round(4).tolist(), strict=True))
            row[name] = {"strength": STRENGTHS[best], **means}
        difference = statistics.estimate((tested["encoder"] - tested["words"])[:, 0].tolist())
        row["encoder_minus_words"] = {
            "balanced_accuracy": round(difference.mean, 4),
            "interval": difference.interval and [round(x, 4) for x in difference.interval],
        }
        rows.append(row)
        print(json.dumps(row), flush=True)
    known = {"messages": SIZES, "draws": flags.draws, "rows": rows}
    flags.out.write_text(json.dumps(known, indent=1) + "\n")
    if flags.page:
        write_page(flags.page, rows)


if __name__ == "__main__":
    main()
