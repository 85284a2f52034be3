"""How well a frozen sentence encoder knows classes of texts from few labels, beside words alone.

  python tools/fetch_spam.py --out=runs/spam
  python tools/fetch_plays.py --out=runs/plays
  python -m benchmarks.text_labels --out=benchmarks/results/text_labels.json \\
      --page=docs/results/language.md

Logistic regression on the embeddings of all-MiniLM-L6-v2 (the teacher of `language/text_kd`) and on
tf-idf weights of the same tokens, for a few labels of each class and for all of a sample of
training texts. Its strength is chosen for each input and number of labels on held-out texts, by the
mean balanced accuracy over draws of labels; the test texts are measured once. A teacher that knows
less than words do has little to tell a student that sees the words.
"""

import argparse
import json
import pathlib
import warnings
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import numpy as np
from scipy import sparse
from sklearn.exceptions import ConvergenceWarning
from sklearn.feature_extraction.text import TfidfTransformer
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import balanced_accuracy_score

from distill_jax.configs import texts
from distill_jax.data import text_classes
from distill_jax.models import pretrained
from distill_jax.report import statistics

SIZES = {"train": 800, "held_out": 300, "test": 500}
LARGER = {"spam": {"train": 1000, "held_out": 400, "test": 600}}
LABELS = (5, 10, 20, 40, 0)
"""Labels of each class; 0 is all."""

STRENGTHS = (0.1, 1.0, 10.0, 100.0)
INPUTS = ("encoder", "words")


def read(corpus: str, sizes: Mapping[str, int]) -> dict[str, dict[str, Any]]:
    """Returns labels, embeddings `[n, d]` and tf-idf weights `[n, v]` of a sample of each part."""
    kwargs = texts.CORPORA[corpus]
    dataset = text_classes.make(**kwargs)
    net = pretrained.language_model(pathlib.Path(kwargs["tokenizer_path"]))
    embed = jax.jit(lambda params, x: net.model.apply(params, {}, x, train=False)[0]["embedding"])
    found: dict[str, dict[str, Any]] = {}
    for part, size in sizes.items():
        source = getattr(dataset, part)
        rows = np.random.default_rng(0).permutation(len(source))[:size]
        batch = source.read(rows)
        x = batch["input"]
        parts = [jax.tree.map(lambda a, i=i: a[i : i + 50], x) for i in range(0, len(rows), 50)]
        embeddings = [np.asarray(embed(net.params, part)) for part in parts]
        found[part] = {
            "label": batch["label"],
            "encoder": np.concatenate(embeddings),
            "words": counts_of(x, dataset.vocabulary),
        }
    weigh(found, "words")
    return found


def weigh(found: Mapping[str, dict[str, Any]], name: str) -> None:
    """Replaces counts `[n, v]` by tf-idf weights of the tokens that the training part has."""
    known = np.flatnonzero(found["train"][name].sum(0))
    tfidf = TfidfTransformer(sublinear_tf=True).fit(found["train"][name][:, known])
    for part in found.values():
        part[name] = tfidf.transform(part[name][:, known])


def counts_of(x: Mapping[str, np.ndarray], vocabulary: int) -> sparse.csr_matrix:
    """Returns how often each token is in each text, float32 `[n, v]`."""
    n, t = x["tokens"].shape
    at = np.repeat(np.arange(n), t), x["tokens"].reshape(-1)
    values = x["mask"].reshape(-1).astype(np.float32)
    counts = sparse.csr_matrix((values, at), (n, vocabulary))
    counts.eliminate_zeros()
    return counts


def measure(found: dict[str, dict[str, Any]], name: str, labels: int, draw: int) -> np.ndarray:
    """Returns balanced accuracies `[strengths, parts]` for one draw of labels."""
    y = found["train"]["label"]
    order = np.random.default_rng(draw).permutation(len(y))
    drawn = [order[y[order] == c][:labels] for c in np.unique(y)]
    rows = np.concatenate(drawn) if labels else order
    values = []
    for strength in STRENGTHS:
        net = LogisticRegression(C=strength, max_iter=1000)
        net.fit(found["train"][name][rows], y[rows])
        values.append(
            [
                balanced_accuracy_score(part["label"], net.predict(part[name]))
                for part in (found["held_out"], found["test"])
            ]
        )
    return np.array(values)


BEGIN, END = "<!-- table: benchmarks/text_labels.py -->", "<!-- end -->"


def table(corpora: Mapping[str, Sequence[Mapping[str, Any]]]) -> str:
    """Returns the Markdown of the results."""
    names = ["corpus", "labels of each class", *INPUTS, "encoder minus words (95 % interval)"]
    lines = [names, ["---"] * len(names)]
    for corpus, rows in corpora.items():
        for row in rows:
            difference = row["encoder_minus_words"]
            low, high = difference["interval"] or (None, None)
            interval = "one draw" if low is None else f"{low:+.3f} to {high:+.3f}"
            values = [f"{row[name]['balanced_accuracy']:.3f}" for name in INPUTS]
            said = f"{difference['balanced_accuracy']:+.3f} ({interval})"
            lines.append([corpus, str(row["labels_per_class"]), *values, said])
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def write_page(page: pathlib.Path, corpora: Mapping[str, Sequence[Mapping[str, Any]]]) -> None:
    """Replaces the table between the marks of a page."""
    before, _, rest = page.read_text().partition(BEGIN)
    after = rest.partition(END)[2]
    page.write_text(f"{before}{BEGIN}\n\n{table(corpora)}\n\n{END}{after}")


def rows_of(corpus: str, draws: int) -> list[dict[str, Any]]:
    """Returns the results of a corpus, one entry for each number of labels."""
    sizes = LARGER.get(corpus, SIZES)
    found, rows = read(corpus, sizes), []
    least = np.bincount(found["train"]["label"]).min()
    for labels in (labels for labels in LABELS if labels <= least):
        row: dict[str, Any] = {"labels_per_class": labels or f"all of {sizes['train']:,}"}
        tested = {}
        for name in INPUTS:
            seeds = range(draws if labels else 1)
            values = np.stack([measure(found, name, labels, draw) for draw in seeds])
            best = int(values[:, :, 0].mean(0).argmax())
            tested[name] = values[:, best, 1]
            mean = round(float(tested[name].mean()), 4)
            row[name] = {"strength": STRENGTHS[best], "balanced_accuracy": mean}
        difference = statistics.estimate((tested["encoder"] - tested["words"]).tolist())
        row["encoder_minus_words"] = {
            "balanced_accuracy": round(difference.mean, 4),
            "interval": difference.interval and [round(x, 4) for x in difference.interval],
        }
        rows.append(row)
        print(corpus, json.dumps(row), flush=True)
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--corpora", nargs="+", default=list(texts.CORPORA))
    parser.add_argument("--out", type=pathlib.Path, required=True, help="adds to the file")
    parser.add_argument("--page", type=pathlib.Path, help="a page with a table to replace")
    parser.add_argument("--draws", type=int, default=20)
    flags = parser.parse_args()
    warnings.simplefilter("ignore", ConvergenceWarning)
    known = json.loads(flags.out.read_text()) if flags.out.exists() else {}
    known |= {"texts": {"": SIZES} | LARGER, "draws": flags.draws}
    known.setdefault("corpora", {})
    for corpus in flags.corpora:
        known["corpora"][corpus] = rows_of(corpus, flags.draws)
        flags.out.write_text(json.dumps(known, indent=1) + "\n")
    if flags.page:
        write_page(flags.page, known["corpora"])


if __name__ == "__main__":
    main()
