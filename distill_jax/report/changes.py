"""What changed between the reference of a comparison and its other arms: classes and examples."""

from collections.abc import Mapping, Sequence
from typing import NamedTuple

import numpy as np

from distill_jax.evaluators import classification
from distill_jax.evaluators._logits import log_softmax
from distill_jax.report import figures
from distill_jax.report.folders import Run, Study
from distill_jax.report.html import Html, el, join
from distill_jax.report.page import figure, grid, muted, row, spread, table
from distill_jax.report.statistics import estimate
from distill_jax.report.wording import cut, minus

_PANELS = 4
_CLASSES = 20
_EXAMPLES = 12

_FILE = "Of the logits in predictions.npz of each run."


class _Pair(NamedTuple):
    """Predictions of two runs for the same test examples, `[n]` each."""

    index: np.ndarray
    label: np.ndarray
    before: np.ndarray
    after: np.ndarray
    confidence: np.ndarray


def by_class(study: Study) -> Html | None:
    """Returns the recall of each class by arm, and its paired difference to the reference."""
    recalls = {arm: _recalls(study.finished_by_seed(arm)) for arm in study.arms}
    recalls = {arm: seeds for arm, seeds in recalls.items() if seeds}
    reference = str(study.spec.get("reference"))
    if len(recalls) < 2 or reference not in recalls:
        return None
    if len({r.shape for seeds in recalls.values() for r in seeds.values()}) != 1:
        return None
    base = recalls[reference]
    k = len(next(iter(base.values())))
    classes = study.finished(reference)[0].class_names(k)
    paired = {
        arm: np.stack([values - base[seed] for seed, values in seeds.items() if seed in base])
        for arm, seeds in recalls.items()
        if arm != reference and set(seeds) & set(base)
    }
    if not paired:
        return None
    largest = np.max([np.abs(d.mean(axis=0)) for d in paired.values()], axis=0)
    measured = np.flatnonzero(np.isfinite(largest))  # classes with a test example
    order = measured[np.argsort(-largest[measured], kind="stable")][:_CLASSES]
    charts = []
    for arm, differences in list(paired.items())[:_PANELS]:
        rows = []
        for c in order:
            values = differences[:, c][np.isfinite(differences[:, c])].tolist()
            if values:
                mean, _, _, interval = estimate(values)
                seeds = {str(i): v for i, v in enumerate(values)}
                rows.append(
                    figures.Row(name=classes[c], values=seeds, mean=mean, interval=interval)
                )
        number = dict.fromkeys(classes, study.colours.get(arm, 0))
        plot = figures.dot_plot(rows, x_label="difference of recall", zero=True, colours=number)
        charts.append(figure(f"{arm} minus {reference}", plot))
    shares = {
        arm: [spread([float(v[c]) for v in seeds.values()]) for c in order]
        for arm, seeds in recalls.items()
    }
    rows = [row(classes[c], (shares[arm][j] for arm in shares)) for j, c in enumerate(order)]
    cut_off = f" The {_CLASSES} classes that differ most, of {k}." if k > _CLASSES else ""
    return join(
        muted(f"Share of the test examples of a class that are predicted right. {_FILE}{cut_off}"),
        grid(charts),
        table(["class", *recalls], rows),
    )


def by_example(study: Study) -> Html | None:
    """Returns how many predictions each arm mends and spoils, and the clearest of them."""
    reference = str(study.spec.get("reference"))
    if reference not in study.arms:
        return None
    base = study.finished_by_seed(reference)
    rows, listed = [], []
    for arm in study.arms:
        runs = study.finished_by_seed(arm)
        made = [_pair(base[seed], run) for seed, run in runs.items() if seed in base]
        pairs = [pair for pair in made if pair is not None and len(pair.index)]
        if arm == reference or not pairs:
            continue
        shares = [_shares(pair) for pair in pairs]
        names = ("mended", "spoilt", "net", "other error")
        cells = [minus(f"{100 * np.mean([s[n] for s in shares]):.2f} %") for n in names]
        net = estimate([s["net"] for s in shares]).interval
        cells.append("" if net is None else minus(f"[{100 * net[0]:+.2f}, {100 * net[1]:+.2f}]"))
        rows.append(row(arm, [*cells, f"{len(pairs[0].index):,}", len(pairs)]))
        classes = study.finished(arm)[0].classes
        listed.append(
            el(
                "details",
                el("summary", f"{arm}: examples whose prediction changed most clearly"),
                _table_of(pairs[0], classes, reference=reference, arm=arm),
            )
        )
    if not rows:
        return None
    heads = ["", "mended", "spoilt", "net", "wrong differently", "95 % of net", "examples", "seeds"]
    return join(
        muted(
            f"Test examples that {reference} predicts wrong and the arm right (mended), the "
            f"reverse (spoilt), and their difference, paired by example and seed. {_FILE}"
        ),
        table(heads, rows),
        listed,
    )


def _recalls(runs: Mapping[str, Run]) -> dict[str, np.ndarray]:
    """Returns recall of each class `[k]` by seed; NaN for a class without an example."""
    recalls = {}
    for seed, run in runs.items():
        role = run.roles[0] if run.roles else ""
        metrics = run.evaluate(classification.make(role=role), role) if role else {}
        if metrics:
            counts = metrics["confusion"].astype(np.float64)
            total = counts.sum(axis=1)
            empty = np.full(len(total), np.nan)
            recalls[seed] = np.divide(counts.diagonal(), total, out=empty, where=total > 0)
    return recalls


def _pair(base: Run, run: Run) -> _Pair | None:
    """Returns predictions of two runs for the examples that both stored; None without any."""
    if not base.roles or not run.roles:
        return None
    try:
        logits = [r.array(f"logits_{r.roles[0]}").astype(np.float64) for r in (base, run)]
        rows = [{int(i): j for j, i in enumerate(r.array("index"))} for r in (base, run)]
        labels = [r.array("label") for r in (base, run)]
    except (KeyError, ValueError):  # absent, or objects, which are not unpickled
        return None
    if labels[0].ndim != 1 or labels[0].dtype.kind not in "iu" or logits[0].ndim != 2:
        return None
    common = [i for i in rows[0] if i in rows[1]]
    a, b = ([r[i] for i in common] for r in rows)
    if logits[0].shape[1:] != logits[1].shape[1:] or (labels[0][a] != labels[1][b]).any():
        return None
    p = [np.exp(log_softmax(z[at])) for z, at in zip(logits, (a, b), strict=True)]
    return _Pair(
        index=np.array(common),
        label=labels[0][a],
        before=p[0].argmax(axis=1),
        after=p[1].argmax(axis=1),
        confidence=np.minimum(p[0].max(axis=1), p[1].max(axis=1)),
    )


def _shares(pair: _Pair) -> Mapping[str, float]:
    before, after = pair.before == pair.label, pair.after == pair.label
    mended, spoilt = float((~before & after).mean()), float((before & ~after).mean())
    other = float((~before & ~after & (pair.before != pair.after)).mean())
    return {"mended": mended, "spoilt": spoilt, "net": mended - spoilt, "other error": other}


def _table_of(pair: _Pair, classes: Sequence[str], *, reference: str, arm: str) -> Html:
    changed = np.flatnonzero(pair.before != pair.after)
    chosen = changed[np.argsort(-pair.confidence[changed], kind="stable")][:_EXAMPLES]

    def name(c: int, label: int) -> Html:
        right = c == label
        text = ("✓ " if right else "✗ ") + cut(classes[c], 40)
        return el("td", text, class_="good" if right else "bad")

    rows = []
    for j in chosen.tolist():
        label, before, after = (int(x[j]) for x in (pair.label, pair.before, pair.after))
        rows.append(
            [
                el("th", int(pair.index[j]), scope="row"),
                el("td", cut(classes[label], 40)),
                name(before, label),
                name(after, label),
                el("td", f"{pair.confidence[j]:.0%}", class_="n"),
            ]
        )
    return table(["index", "label", reference, arm, "confidence of both"], rows, numeric=False)
