"""Masked thought on arithmetic chains: does hiding parts of solutions help, and what controls do?

  python -m benchmarks.masked_thought --out=benchmarks/results/masked_thought.json

The arms of `configs/studies/paper_masked_thought.py` as one program: training of a small decoder on
few problems, which it learns by heart. Every seed has problems of its own. Each arm has four
settings: three rates, and at the best of them a larger share (plain training: a fourth rate). The
mean held-out accuracy of three seeds chooses; the test part measures with eight.
"""

import argparse
import json
import pathlib
import time
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks import _record
from benchmarks import _sequences as common
from distill_jax.core import chains
from distill_jax.data import arithmetic_chains
from distill_jax.data.transforms import tokens
from distill_jax.models import transformer

DATA = {"steps": (3, 4), "largest": 9, "distracted": 0.2}
PARTS = {"train": 500, "held_out": 600, "test": 1200}
WRITTEN = ("held_out", "test")
NET = {"vocabulary": chains.VOCABULARY, "width": 64, "depth": 2, "heads": 4}
STEPS, BATCH, RAMP = 1200, 32, 2 / 3
SEEDS, CHOOSE = tuple(range(1, 9)), 3
RATES, SHARES = (5e-4, 1e-3, 2e-3), (0.1, 0.3)
UNIT = 10**6
MASKED = (chains.VOCABULARY, chains.MASK)


ARMS = {
    "sft": "",
    "random": "solution",
    "masked": "solution",
    "dropout": "dropout",
    "question": "question",
    "smoothing": "smoothing",
}
"""`masked` and `random`: hidden tokens of solutions become the mask token, or random ids;
`question`: random ids in the question instead."""


def parts_of(seed: int) -> dict[str, Any]:
    """Returns rows of the parts, with problems of the seed."""
    n = PARTS["train"] + PARTS["held_out"]
    data = arithmetic_chains.make(
        **DATA, n_train=n, n_test=PARTS["test"], held_out=PARTS["held_out"] / n, seed=seed
    )
    return {name: common.rows_of(part) for name, part in data.parts.items()}


def program(dropout: float):
    """Returns a compiled function that trains one network and lets it write."""
    net = transformer.make(**NET, dropout=dropout)
    prepare = tokens.make_next_token()
    # At a rate of 1 the share is step / ramp, so that the step that it is given is the share.
    hide = {
        name: tokens.make_masked_thought(vocabulary=ids, rate=1.0, ramp=UNIT, mask_token=token)
        for name, ids, token in (("random", chains.END, -1), ("masked", *MASKED))
    }

    def run(parts, key, arm):
        def loss(params, rows, step, key):
            batch = prepare(key, rows, step)
            clean, mask = batch["input"]["tokens"], batch["target_mask"]
            real = batch["input"]["segments"] == 0
            share = UNIT * jnp.minimum(1, step / (RAMP * STEPS))
            keys = jax.random.split(key, 4)
            made = [
                hide["masked"](keys[0], batch, share * arm["solution"]),
                hide["random"](keys[0], batch, share * arm["solution"]),
            ]
            hidden = jnp.where(arm["mask_token"], *(x["input"]["tokens"] for x in made))
            asked = {**batch, "target_mask": (1 - mask) * real}
            odd = hide["random"](keys[1], asked, share * arm["question"])["input"]["tokens"]
            seen = jnp.where(hidden == clean, odd, hidden)
            batch = {**batch, "input": {**batch["input"], "tokens": seen}}
            log_p = common.nats(net, params, batch, train=keys[2] if dropout else None)
            return common.cross_entropy(log_p, batch, arm["smoothing"])

        rows = parts["train"]
        params = common.fit(net, loss, rows, key, arm["lr"], steps=STEPS, batch=BATCH)
        for_writing = {name: parts[name] for name in WRITTEN}
        return {
            name: common.write(net, params, x["prompt"], x["start"], steps=x["solution"].shape[1])
            for name, x in for_writing.items()
        }

    return jax.jit(run)


def measure(run, arm: str, setting: dict[str, Any], seed: int) -> dict[str, Any]:
    parts = parts_of(seed)
    zeros = {"solution": 0.0, "question": 0.0, "smoothing": 0.0}
    traced = {**zeros, **setting, "mask_token": arm == "masked"}
    traced.pop("dropout", None)
    written = run(parts, jax.random.key(seed), jax.tree.map(jnp.asarray, traced))
    return {name: common.scores(x, parts[name]) for name, x in written.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--out", required=True, type=pathlib.Path)
    parser.add_argument("--arms", type=_record.some_of(ARMS), default=list(ARMS))
    options = parser.parse_args()
    found = json.loads(options.out.read_text()) if options.out.exists() else {}
    arms, runs = found.setdefault("arms", {}), found.setdefault("runs", {})
    began, programs = time.monotonic(), {}

    def of(arm, setting, seed):
        name = " ".join([arm, *(f"{k}={v}" for k, v in setting.items()), f"seed={seed}"])
        if name not in runs:
            dropout = setting.get("dropout", 0.0)
            if dropout not in programs:
                programs[dropout] = program(dropout)
            runs[name] = measure(programs[dropout], arm, setting, seed)
            options.out.write_text(json.dumps(found, indent=1) + "\n")
            print(name, runs[name]["test"], f"{time.monotonic() - began:.0f} s", flush=True)
        return runs[name]

    def tried_out(arm, setting):
        made = [of(arm, setting, seed)["held_out"]["accuracy"] for seed in SEEDS[:CHOOSE]]
        return {**setting, "held_out": float(np.mean(made))}

    for arm in options.arms:
        share = ARMS[arm]
        settings = [{"lr": lr, share: SHARES[0]} if share else {"lr": lr} for lr in RATES]
        tried = [tried_out(arm, x) for x in settings]
        best = max(tried, key=lambda x: x["held_out"])["lr"]
        last = {"lr": best, share: SHARES[1]} if share else {"lr": 2 * RATES[-1]}
        tried.append(tried_out(arm, last))
        chosen = {
            k: x for k, x in max(tried, key=lambda x: x["held_out"]).items() if k != "held_out"
        }
        made = [of(arm, chosen, seed) for seed in SEEDS]
        metrics = {
            f"{part}/{name}": [run[part][name] for run in made]
            for part in WRITTEN
            for name in ("accuracy", "step_accuracy", "sums_right", "accuracy_distracted")
        }
        arms[arm] = {"settings": tried, "chosen": chosen, "values": metrics}
        print(arm, arms[arm]["chosen"], {k: np.mean(v).round(3) for k, v in metrics.items()})
        found["differences"] = {
            f"{name} minus {base}": {
                metric: common.paired(arms[name]["values"][metric], arms[base]["values"][metric])
                for metric in ("test/accuracy", "test/step_accuracy", "test/accuracy_distracted")
            }
            for base in ("sft", "question", "smoothing", "dropout")
            for name in arms
            if base in arms and name != base and (base == "sft" or name in ("masked", "random"))
        }
        found["about"] = {
            "jax": jax.__version__,
            "data": DATA,
            "examples": PARTS,
            "network": NET,
            "steps": STEPS,
            "batch": BATCH,
            "seeds": SEEDS,
        }
        options.out.write_text(json.dumps(found, indent=1) + "\n")


if __name__ == "__main__":
    main()
