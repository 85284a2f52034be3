"""Courses of MCL on source code: does an encoder learn more of Python by more than one of them?

  python -m benchmarks.courses --out=benchmarks/results/courses.json

Small encoders of bytes are trained without labels by the arms of `configs/language/mcl.py`, with as
many steps of the same rows. A linear probe of their frozen outputs then says of bytes to what kind
of token and to what kind of statement they belong, as Python's own tokenizer and parser do; files
of the parts are disjoint. Each arm gets the learning rate that is best on held-out files. Controls
are an encoder at initialization and the bytes around a place. Every seed divides the files anew. An
interrupted run goes on where it was.
"""

import argparse
import functools
import json
import pathlib
import time
from typing import Any, cast

import jax
import jax.numpy as jnp
import numpy as np
from sklearn import metrics
from sklearn.linear_model import LogisticRegression

from benchmarks import _sequences as common
from benchmarks._code_kinds import UNKNOWN, labels
from distill_jax.core import means
from distill_jax.core.api import Model
from distill_jax.data import _tokens, stdlib_bytes
from distill_jax.data.transforms import tokens
from distill_jax.models import projector, transformer
from distill_jax.objectives import mcl

LENGTH, BATCH, WIDTH, WINDOW, PLACES = 64, 8, 64, 4, 4
CHOOSE, SEEDS = 101, (1, 2, 3, 4, 5)
RATES = (3e-4, 1e-3, 3e-3)
STRENGTHS = (1e-3, 1e-2, 1e-1, 1.0)
ROWS = {"train": 1000, "held_out": 1500, "test": 3000}
"""Rows of a part that are probed, at `PLACES` bytes each."""
ARMS: dict[str, dict[str, Any] | None] = {
    "window": None,
    "untrained": {"courses": ()},
    "mlm": {"courses": ()},
    "electra": {"courses": ("replaced",), "correction": False},
    "courses": {"correction": False},
    "mcl": {},
}


@functools.lru_cache(maxsize=1)
def division(seed: int, steps: int) -> dict[str, Any]:
    """Returns rows to train on, and of each part rows with places and their labels."""
    dataset, found = stdlib_bytes.make(length=LENGTH, split_seed=seed), {}
    for name, count in ROWS.items():
        part: Any = getattr(dataset, name)
        random = np.random.default_rng([seed, len(name)])
        chosen = np.sort(random.choice(len(part) - 1, count, replace=False))
        made = {"rows": dict(part.read(chosen)), "label": {}}
        made["place"] = random.permuted(np.tile(np.arange(LENGTH), (count, 1)), axis=1)[:, :PLACES]
        for kind, ids in labels().items():
            # The same rows of labels; an end of document stays what it is, which is no kind.
            of = _tokens.TokenRows(
                part.tokens._replace(ids=ids),
                part.documents,
                length=LENGTH,
                provenance=part.provenance,
            )
            read = of.read(chosen)["input"]["tokens"]
            made["label"][kind] = np.take_along_axis(read, made["place"], 1).ravel()
        found[name] = made
    part = dataset.train
    chosen = np.random.default_rng([seed, steps]).choice(len(part) - 1, steps * BATCH)
    rows = part.read(np.sort(chosen))
    return {**found, "pretraining": {"input": jax.tree.map(jnp.asarray, rows["input"])}}


def networks(arm: str) -> dict[str, Model]:
    encoder = {"vocabulary": 257, "causal": False, "activation": "silu"}
    head = "none" if mcl.make(**ARMS[arm] or {}).courses else "masked"
    made = {"student": transformer.make(width=WIDTH, depth=2, heads=4, head=head, **encoder)}
    if head == "none":
        small = {"width": WIDTH // 2, "depth": 1, "heads": 2, "head": "masked"}
        made["generator"] = transformer.make(**small, **encoder)
        made["detector"] = projector.make(features=3)
    return made


def together(nets: dict[str, Model]) -> Model:
    """All networks of an arm as one."""

    def init(key, x):
        inputs = {"detector": jnp.zeros((1, 8, WIDTH))}
        keys = dict(zip(nets, jax.random.split(key, len(nets)), strict=True))
        return {n: net.init(keys[n], inputs.get(n, x))[0] for n, net in nets.items()}, {}

    return Model(init, lambda *args, **kwargs: ({}, {}))


def prepared(rows: Any, key: Any) -> Any:
    batch = tokens.make_next_token()(key, rows, jnp.int32(0))
    return tokens.make_token_courses()(key, batch, jnp.int32(0))


def loss_of(arm: str):
    objective, nets = mcl.make(**ARMS[arm] or {}), networks(arm)

    def loss(params, rows, step, key):
        def called(role, x, *, train=False):
            return nets[role].apply(params[role], {}, x, train=train)

        terms = objective.loss(cast(Any, called), prepared(rows, key), {}, step)
        return means.mean_loss(terms, jnp.ones(BATCH))[0]

    return loss


@functools.cache
def trained(arm: str, steps: int):
    """Returns a compiled function `(rows, key, lr) -> params`."""
    net = together(networks(arm))
    if arm == "untrained":
        return jax.jit(
            lambda rows, key, lr: net.init(jax.random.fold_in(key, 0), jnp.zeros((1, 8), int))[0]
        )
    fit = functools.partial(common.fit, net, loss_of(arm), steps=steps, batch=BATCH)
    return jax.jit(fit)


def flops(arm: str, steps: int) -> float:
    """Returns the operations of a step of training, as XLA counts them."""
    rows = common.identified(division(CHOOSE, steps)["pretraining"], jnp.arange(BATCH), 0)
    params, _ = together(networks(arm)).init(jax.random.key(0), jnp.zeros((1, 8), int))
    lowered = jax.jit(jax.grad(loss_of(arm))).lower(params, rows, 0, jax.random.key(0))
    return float(lowered.cost_analysis()["flops"])  # pyright: ignore


def detections(arm: str, params: Any, rows: Any) -> dict[str, Any]:
    """Returns how well the student tells altered bytes of test rows from others."""
    options, nets = ARMS[arm] or {}, networks(arm)
    if options.get("courses") == ():
        return {}
    batch = prepared(common.identified(rows, jnp.arange(len(rows["label"])), 0), jax.random.key(7))
    seen: dict[str, list[Any]] = {role: [] for role in nets}

    def called(role, x, *, train=False):
        made = nets[role].apply(params[role], {}, x, train=train)
        seen[role].append(made[0]["output"] if role == "detector" else x["tokens"])
        return made

    objective = mcl.make(**{**options, "correction": False})
    terms = objective.loss(cast(Any, called), batch, {}, jnp.int32(0))
    found: dict[str, Any] = {
        "unchanged": float(terms.values["unchanged"].sum() / terms.counts["unchanged"].sum())
    }
    valid, names = np.asarray(batch["course_valid"] > 0), ("rtd", "std", "itd")
    asked_of = [name for name in names if name in terms.values]
    for name, text, output in zip(asked_of, seen["student"], seen["detector"], strict=True):
        changed = (
            batch["course_inserted"] < 0 if name == "itd" else text != batch["input"]["tokens"]
        )
        altered, z = np.asarray(changed)[valid], np.asarray(output[..., names.index(name)])[valid]
        found[name] = {
            "altered": float(altered.mean()),
            "accuracy": float(((z > 0) == altered).mean()),
            "auc": float(metrics.roc_auc_score(altered, z)),
        }
    return found


def features(arm: str, params: Any, made: dict[str, Any]) -> np.ndarray:
    """Returns what the probe reads of the places, `[n, d]`."""
    rows, place = made["rows"]["input"], made["place"]
    ids = np.asarray(rows["tokens"][:, :LENGTH])
    if ARMS[arm] is None:
        padded = np.pad(ids, ((0, 0), (WINDOW, WINDOW)), constant_values=256)
        around = place[..., None] + np.arange(2 * WINDOW + 1)
        around = np.take_along_axis(padded[:, None], around, 2).reshape(-1, 2 * WINDOW + 1)
        return np.eye(257, dtype=np.float32)[around].reshape(len(around), -1)
    view = {"tokens": jnp.asarray(ids), "segments": jnp.asarray(rows["segments"][:, :LENGTH])}
    outputs = jax.jit(networks(arm)["student"].apply)(params["student"], {}, view)[0]
    z = np.concatenate([outputs["block1"], outputs["tokens"]], -1)
    return np.take_along_axis(z, place[..., None], 1).reshape(place.size, -1)


def probed(arm: str, params: Any, data: dict[str, Any], measured: str) -> dict[str, float]:
    """Returns the accuracies of both probes on a part; held-out places choose the penalty."""
    z, found = {name: features(arm, params, data[name]) for name in ROWS}, {}
    mean, scale = z["train"].mean(0), z["train"].std(0)
    used = scale > 0.03  # bytes that all but never occur at a place are left out
    z = {name: ((x - mean) / scale.clip(1e-6))[:, used] for name, x in z.items()}
    for kind in labels():
        y = {name: data[name]["label"][kind] for name in ROWS}
        known = {name: y[name] < UNKNOWN for name in ROWS}
        best, start = (-1.0, {}), None
        for c in STRENGTHS:
            linear = LogisticRegression(
                C=c, class_weight="balanced", max_iter=100, tol=1e-3, warm_start=True
            )
            if start:
                linear.coef_, linear.intercept_ = start
            linear.fit(z["train"][known["train"]], y["train"][known["train"]])
            start = linear.coef_, linear.intercept_
            scores = {}
            for name in ("held_out", measured):
                said, label = linear.predict(z[name][known[name]]), y[name][known[name]]
                scores[name] = {
                    kind: float(metrics.balanced_accuracy_score(label, said)),
                    f"{kind}, accuracy": float((label == said).mean()),
                    f"{kind}, strength": c,
                }
            best = max(best, (scores["held_out"][kind], scores[measured]), key=lambda x: x[0])
        found |= best[1]
    return found


def run(arm: str, steps: int, rate: float, seed: int, measured: str) -> dict[str, Any]:
    began, data = time.monotonic(), division(seed, steps)
    if ARMS[arm] is None:
        return probed(arm, None, data, measured)
    params = trained(arm, steps)(data["pretraining"], jax.random.key(seed), jnp.float32(rate))
    params, seconds = jax.block_until_ready(params), time.monotonic() - began
    found = probed(arm, params, data, measured)
    return {**found, **detections(arm, params, data["test"]["rows"]), "seconds": seconds}


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--out", required=True, type=pathlib.Path)
    parser.add_argument("--steps", type=int, default=700)
    options = parser.parse_args()
    found = json.loads(options.out.read_text()) if options.out.exists() else {"arms": {}}
    about = {"jax": jax.__version__, "steps": options.steps, "batch": BATCH}
    steps = found.setdefault("about", about)["steps"]

    def keep(row: dict[str, Any], key: Any, of: Any) -> None:
        if str(key) not in row:
            row[str(key)] = of()
            print(key, row[str(key)], flush=True)
            options.out.write_text(json.dumps(found, indent=1) + "\n")

    arms = {arm: found["arms"].setdefault(arm, {"tried": {}, "runs": {}}) for arm in ARMS}
    for arm, row in arms.items():
        row["rate"] = 0.0
        if arm in ("window", "untrained"):
            continue
        keep(row, "flops", functools.partial(flops, arm, steps))
        for lr in RATES:
            keep(
                row["tried"],
                lr,
                functools.partial(run, arm, steps * 2 // 5, lr, CHOOSE, "held_out"),
            )
        tried = {lr: sum(row["tried"][str(lr)][kind] for kind in labels()) for lr in RATES}
        row["rate"] = max(RATES, key=tried.__getitem__)
    for seed in SEEDS:
        for arm, row in arms.items():
            keep(row["runs"], seed, functools.partial(run, arm, steps, row["rate"], seed, "test"))


if __name__ == "__main__":
    main()
