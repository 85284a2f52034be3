"""Tables of `docs/results/outer_gradients.md`, from what `outer_gradients.py` found."""

import pathlib
from collections.abc import Mapping
from typing import Any

import numpy as np
from _outer_learned import LENGTH, WAYS

from distill_jax.report import statistics

MARK = "<!-- from here on: benchmarks/outer_gradients.py -->"
NETS = {
    "mlp": "Perceptron",
    "convnet_batch_norm": "ConvNet with batch norm",
    "transformer": "Transformer",
}
SETTINGS = {"clean": "clean data", "two_sources": "two imperfect sources"}
TARGETS = {"1": "K = 1", "5": "K = 5", "20": "K = 20", "100": "K = 100", "end": "to the end"}
ORDER = (
    *("one_step", "one_step_mean_20", "one_step_held_32", "one_step_held_32_mean_20"),
    *("neumann_5", "neumann_20", "neumann_100"),
    *("cg_5", "cg_5_mean_20", "cg_5_held_32", "cg_5_held_32_mean_20", "cg_20"),
    *("truncated_5", "truncated_20", "forward", "seen_followed_20"),
)
AIM = 0.1  # distance of a mean ratio from the best constant


def write(path: pathlib.Path, found: Mapping[str, Any]) -> None:
    """Replaces what follows the mark in the page."""
    above = path.read_text().split(MARK)[0].rstrip() if path.exists() else "# Outer gradients"
    parts = [above, MARK]
    if "gradients" in found:
        parts += [averages(found["gradients"]), *estimates(found["gradients"])]
        parts.append(cost(found["gradients"]))
    if "learned" in found:
        parts.append(learned(found["learned"]))
    if "rates" in found:
        parts.append(rates(found["rates"]))
    path.write_text("\n\n".join(parts) + "\n")


def rows_of(head: list[str], rows: list[list[str]]) -> str:
    lines = ["| " + " | ".join(head) + " |", "|" + " --- |" * len(head)]
    return "\n".join([*lines, *("| " + " | ".join(row) + " |" for row in rows)])


def number(x: float) -> str:
    return f"{x:+.2f}" if abs(x) < 1000 else f"{x:+.0e}".replace("e+0", "e").replace("e+", "e")


def estimates(found: Mapping[str, Any]) -> list[str]:
    """Returns a table for each network and setting: sign, size and cosine of every estimate."""
    parts = []
    for key in (f"{n}/{s}" for n in NETS for s in SETTINGS if f"{n}/{s}" in found):
        net, setting = key.split("/")
        rows = []
        for name in (n for n in ORDER if n in found[key]["estimates"]):
            cells = found[key]["estimates"][name]
            row = [f"{cells[t]['bias_sign']:.1f}, {number(cells[t]['bias_ratio'])}"
                   + (f", {cells[t]['cosine']:+.2f}" if "cosine" in cells[t] else "")
                   for t in TARGETS]  # fmt: skip
            rows.append([name, *row])
        truth = found[key]["truth_of_bias"]
        means = ", ".join(f"{np.mean(truth[t]):+.4f} ({TARGETS[t]})" for t in TARGETS)
        table = rows_of(["estimate", *TARGETS.values()], rows)
        parts.append(f"### {NETS[net]}, {SETTINGS[setting]}\n\n{table}\n\n"
                     f"The truth, mean over the times: {means}.")  # fmt: skip
    return parts


def averages(found: Mapping[str, Any]) -> str:
    """Returns the table of one estimate against the mean of the last twenty."""
    rows = []
    for key, cell in found.items():
        for name in ("one_step", "one_step_held_32", "cg_5", "cg_5_held_32"):
            known = cell["estimates"]
            if f"{name}_mean_20" not in known:
                continue
            row = []
            for target in ("1", "20", "end"):
                single, mean = known[name][target], known[f"{name}_mean_20"][target]
                row.append(f"{single['cosine']:+.2f} to {mean['cosine']:+.2f}")
                row.append(f"{number(single['bias_ratio'])} to {number(mean['bias_ratio'])}")
            net, setting = key.split("/")
            rows.append([f"{NETS[net]}, {SETTINGS[setting]}", name, *row])
    gain = [
        cell["estimates"][f"{name}_mean_20"]["20"]["cosine"]
        > cell["estimates"][name]["20"]["cosine"]
        for cell in found.values()
        for name in ("one_step", "one_step_held_32", "cg_5", "cg_5_held_32")
        if f"{name}_mean_20" in cell["estimates"]
    ]
    head = ["network", "estimate"]
    head += [f"{what}, {TARGETS[t]}" for t in ("1", "20", "end") for what in ("cosine", "size")]
    return (
        "### One estimate, and the mean of the last twenty\n\nThe mean has the higher cosine with "
        f"the truth at K = 20 in {sum(gain)} of {len(gain)} rows.\n\n{rows_of(head, rows)}"
    )


def cost(found: Mapping[str, Any]) -> str:
    rows = []
    for net, title in NETS.items():
        known = found.get(f"{net}/clean", {}).get("cost")
        if not known:
            continue
        for name in ("neumann", "cg", "unrolled"):
            steps = [str(known[f"{name}_{k}"]["plain_steps"]) for k in (1, 5, 20, 100)]
            memory = [str(known[f"{name}_{k}"]["memory"]) for k in (1, 8)]
            rows.append([title, name, *steps, *memory])
        forward = known["forward_every_step"]
        row = [title, "forward, every step", str(forward["plain_steps"]), "", "", ""]
        rows.append([*row, str(forward["memory"]), ""])
    head = ["network", "estimate", "plain steps, K = 1", "5", "20", "100"]
    return (
        "### Cost\n\n"
        + rows_of([*head, "temporary memory, K = 1", "8"], rows)
        + "\n\nMemory is in "
        "that of a plain step, the held-out part included; operations leave that part out."
    )


def interval(values: list[float], digits: int = 4) -> str:
    found = statistics.estimate(values)
    low, high = found.interval or (float("nan"), float("nan"))
    return f"{found.mean:+.{digits}f} [{low:+.{digits}f}, {high:+.{digits}f}]"


def learned(found: Mapping[str, Any]) -> str:
    """Returns what is learned on clean data against the constants, with paired intervals."""
    arms, best = found["arms"], found["best_constant"]
    constants = sorted((a for a in arms if a.replace(".", "").isdigit()), key=float)
    names = [*constants, *(a for a in WAYS if a in arms)]
    reference = arms[best["select_loss"]]
    rows = []
    for name in names:
        arm = arms[name]
        minus = [[a - b for a, b in zip(arm[k]["runs"], reference[k]["runs"], strict=True)]
                 for k in ("test", "test_loss")]  # fmt: skip
        spread = statistics.estimate(arm["ratio"]["runs"]).interval or (0.0, 0.0)
        ratio = f"{arm['ratio']['mean']:.3f}"
        if name not in constants:
            ratio += f" [{spread[0]:.3f}, {spread[1]:.3f}]"
        values = [f"{arm[k]['mean']:.4f}" for k in ("outer_loss", "select_loss", "select")]
        title = f"constant {name}" if name in constants else name
        rows.append([title, ratio, *values, f"{arm['test']['mean']:.4f}",
                     *("" if arm is reference else interval(m) for m in minus)])  # fmt: skip
    head = ["arm", "mean ratio", "outer loss", "select loss", "select accuracy", "test accuracy"]
    head += [f"test accuracy minus constant {best['select_loss']}", "test loss minus it"]
    within = {
        by: [
            f"{n} {arms[n]['ratio']['mean']:.2f}"
            for n in names
            if n not in constants and abs(arms[n]["ratio"]["mean"] - float(best[by])) <= AIM
        ]
        for by in ("select_loss", "outer_loss")
    }
    least = arms[best["select_loss"]]["select_loss"]["runs"]
    flat = []
    for name in constants:
        difference = statistics.estimate(
            [a - b for a, b in zip(arms[name]["select_loss"]["runs"], least, strict=True)]
        )
        if name == best["select_loss"] or (difference.interval or (0, 0))[0] <= 0:
            flat.append(name)
    return (
        f"## What is learned on clean data\n\n{found['seeds']} seeds. The best constant is "
        f"{best['select_loss']} by selecting loss, {best['select']} by selecting accuracy and "
        f"{best['outer_loss']} by the loss of the outer half, which the ratio learns from. "
        f"Constants whose selecting loss is not shown to be worse (paired 95 % interval): "
        f"{', '.join(flat)}. Mean ratios within {AIM} of the best by selecting loss: "
        f"{', '.join(within['select_loss']) or 'none'}; of the best by outer loss: "
        f"{', '.join(within['outer_loss']) or 'none'}.\n\n{rows_of(head, rows)}"
    )


def rates(found: Mapping[str, Any]) -> str:
    """Returns what every outer rate gives, and the best rate against the size of the gradient."""
    parts, summary = [], []
    for setting, title in SETTINGS.items():
        for optimizer in ("adamw", "sgd"):
            keys = {k: f"{setting}/{k}/{optimizer}" for k in (1, 5, 20, 100)}
            cells = {k: found[key] for k, key in keys.items() if key in found}
            if not cells:
                continue
            grid = sorted({rate for cell in cells.values() for rate in cell}, key=float)
            rows = []
            for k, cell in cells.items():
                means = {r: {m: v["mean"] for m, v in cell[r].items()} for r in cell}
                best = max(means, key=lambda r: (means[r]["select"], -means[r]["select_loss"]))
                shown = {r: f"{m['select']:.3f}, {m['select_loss']:.3f}, {m['test']:.3f}"
                         for r, m in means.items()}  # fmt: skip
                shown[best] = f"**{shown[best]}**"
                rows.append([str(k), *(shown.get(r, "-") for r in grid)])
                one = means[best]
                updates = (LENGTH - max(39, k - 1)) // k
                summary.append([
                    title, optimizer, str(k), str(updates), f"{one['grad_norm']:.4f}", best,
                    f"{one['ratio']:.2f}", f"{one['select']:.3f}", f"{one['test']:.3f}",
                ])  # fmt: skip
            parts.append(f"{title[0].upper()}{title[1:]}, {optimizer}:\n\n"
                         + rows_of(["K", *grid], rows))  # fmt: skip
    head = ["data", "optimizer", "K", "outer steps", "norm of the gradient", "best rate"]
    head += ["mean ratio", "select accuracy", "test accuracy"]
    runs = len(next(iter(next(iter(found.values())).values()))["test"]["runs"])
    above = (
        f"The weighting learns every K steps from the last K steps, {runs} seeds. The best rate "
        "has the highest selecting accuracy, then the smallest selecting loss; the norm is the "
        "mean along its run."
    )
    below = "Selecting accuracy, selecting loss and test accuracy for every rate:"
    title = "## The outer learning rate and K"
    return "\n\n".join([title, above, rows_of(head, summary), below, *parts])
