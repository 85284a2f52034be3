"""Denoisers of UL2 on source code: does a mixture serve two tasks, and do its marks matter?

  python -m benchmarks.ul2 --out=benchmarks/results/ul2.json

The arms of `configs/studies/paper_ul2.py` as one program each: a small decoder reads the same rows
of text in the same order and as many of them, as plain text, as prefix and end, with hidden spans,
or with the seven denoisers, with and without mode tokens. Two tasks are measured on held-out files:
a span in the middle, and the end of a row. Each arm gets the form of a task (mode token, or plain
text from the left) and the learning rate that serve it best on held-out text.
"""

import argparse
import json
import math
import pathlib
import time
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks import _sequences as common
from distill_jax.data import stdlib_bytes
from distill_jax.data.transforms import denoising, tokens
from distill_jax.models import transformer

LENGTH, SCALE, FIRST, SPAN = 64, 2.0, 257, 10
BATCH = 16
CHOOSE, SEEDS = (101,), 5
ROWS = {"held_out": 192, "test": 512}
RESERVED = denoising.extra_tokens(LENGTH, scale=SCALE)
VOCABULARY = FIRST + RESERVED
NET = {"vocabulary": VOCABULARY, "width": 64, "depth": 2, "heads": 4}
SPANS = (("R", 3.0, 0.15), ("R", 8.0, 0.15))
ARMS: dict[str, dict[str, Any] | None] = {
    "causal": None,
    "spans": {"denoisers": SPANS},
    "mixture": {"denoisers": denoising.UL2},
    "mixture_unmarked": {"denoisers": denoising.UL2, "modes": False},
    "prefix": {"denoisers": (("S", 0.0, 0.25),)},
}
TASKS = ("infill", "continuation")
FORMS = ("R", "S", "X", "", "left")


def transform_of(arm: str):
    options = ARMS[arm]
    if options is None:
        return tokens.make_next_token()
    return denoising.make_denoise(vocabulary=VOCABULARY, first=FIRST, scale=SCALE, **options)


def forms_of(arm: str) -> tuple[str, ...]:
    """Forms in which a network can be asked: with the marks that it has seen, or plain text."""
    options = ARMS[arm]
    if options is None:
        return ("left",)
    if not options.get("modes", True):
        return ("", "left")
    return (*sorted({d[0] for d in options["denoisers"]}), "left")


def program(arm: str, steps: int):
    """Returns a compiled function that trains one network and measures it in all forms."""
    net, prepare = transformer.make(**NET), transform_of(arm)
    forms = forms_of(arm)

    def bits(params, rows):
        found = {}
        ids = jnp.arange(len(rows["label"]))
        batch = common.identified(rows, ids, jnp.zeros(1, jnp.int32))
        for form in forms:
            mode = "" if form == "left" else form
            views = denoising.make_denoised_views(
                vocabulary=VOCABULARY,
                first=FIRST,
                span=SPAN,
                infill_mode=mode,
                continuation_mode=mode,
            )(jax.random.key(7), batch, jnp.int32(0))["denoised"]
            for task in TASKS:
                view = views[f"{task}_left" if form == "left" else task]
                seen = {"input": {k: view[k] for k in ("tokens", "segments")}}
                # Of text alone: the end of a span is not what is measured, and arms differ in it.
                log_p = jax.nn.log_softmax(common.nats(net, params, seen)[..., :FIRST])
                asked = {**view, "target": jnp.minimum(view["target"], FIRST - 1)}
                value = common.cross_entropy(log_p, asked) / math.log(2)
                found[f"{task}/{form}"] = value
        return found

    def run(parts, key, lr):
        def loss(params, rows, step, key):
            batch = prepare(key, rows, step)
            return common.cross_entropy(common.nats(net, params, batch), batch)

        params = common.fit(net, loss, parts["train"], key, lr, steps=steps, batch=BATCH)
        return {name: bits(params, parts[name]) for name in ROWS}

    return jax.jit(run)


def parts_of(dataset, seed: int, steps: int) -> dict[str, Any]:
    """Returns as many training rows as are read, drawn by the seed, and rows of the other parts."""
    found = {}
    for name, count in {"train": steps * BATCH, **ROWS}.items():
        part = getattr(dataset, name)
        random = np.random.default_rng([seed if name == "train" else 0, count])
        rows = dict(part.read(np.sort(random.choice(len(part), count, replace=False))))
        found[name] = {key: rows[key] for key in ("input", "label")}
    return found


def choose(made: dict[str, Any], arm: str, task: str) -> str:
    """Returns the form in which held-out text is cheapest."""
    return min(forms_of(arm), key=lambda form: made["held_out"][f"{task}/{form}"])


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--out", required=True, type=pathlib.Path)
    parser.add_argument("--arms", default=",".join(ARMS))
    parser.add_argument("--steps", type=int, default=1000)
    parser.add_argument("--rates", default="1.5e-3,3e-3,6e-3")
    parser.add_argument("--seeds", type=int, default=SEEDS)
    options = parser.parse_args()
    found = json.loads(options.out.read_text()) if options.out.exists() else {}
    arms, began = found.setdefault("arms", {}), time.monotonic()
    seeds = tuple(range(1, 1 + options.seeds))
    steps, rates = options.steps, [float(x) for x in options.rates.split(",")]
    dataset = stdlib_bytes.make(length=LENGTH, reserved=RESERVED)
    for arm in options.arms.split(","):
        if arm in arms:
            continue
        run = program(arm, steps)

        def of(lr, seed, run=run):
            made = run(parts_of(dataset, seed, steps), jax.random.key(seed), jnp.float32(lr))
            return jax.tree.map(float, made)

        tried = []
        for lr in rates if len(rates) > 1 else ():
            made = [of(lr, seed) for seed in CHOOSE]
            best = [
                sum(x["held_out"][f"{task}/{choose(x, arm, task)}"] for task in TASKS) for x in made
            ]
            tried.append({"lr": lr, "held_out": float(np.mean(best))})
            print(arm, tried[-1], f"{time.monotonic() - began:.0f} s", flush=True)
        lr = min(tried, key=lambda x: x["held_out"])["lr"] if tried else rates[0]
        runs = [of(lr, seed) for seed in seeds]
        values = {f"test/{name}": [made["test"][name] for made in runs] for name in runs[0]["test"]}
        forms = {task: choose(runs[0], arm, task) for task in TASKS}
        for task in TASKS:
            values[task] = values[f"test/{task}/{forms[task]}"]
        made = denoised_size(arm)
        arms[arm] = {
            "settings": tried,
            "chosen": lr,
            "forms": forms,
            "values": values,
            "tokens_a_row": made,
        }
        print(arm, forms, {k: round(float(np.mean(v)), 3) for k, v in values.items()}, flush=True)
        found["differences"] = (
            {}
            if len(seeds) < 2
            else {
                f"{one} minus {other}": {
                    task: common.paired(arms[one]["values"][task], arms[other]["values"][task])
                    for task in TASKS
                }
                for one in arms
                for other in arms
                if one != other
            }
        )
        wrong = [("infill/S", "infill/R"), ("continuation/R", "continuation/S")]
        if "mixture" in arms and len(seeds) > 1:
            own = arms["mixture"]["values"]
            found["marks"] = {
                f"{odd} minus {right}": common.paired(own[f"test/{odd}"], own[f"test/{right}"])
                for odd, right in wrong
            }
        found["about"] = {
            "jax": jax.__version__,
            "bytes_of_text": steps * BATCH * LENGTH,
            "network": NET,
            "length": LENGTH,
            "scale": SCALE,
            "span": SPAN,
            "rows": ROWS,
            "steps": steps,
            "rates": rates,
            "batch": BATCH,
            "seeds": seeds,
            "data": dataset.train.provenance.name,
        }
        options.out.write_text(json.dumps(found, indent=1) + "\n")


def denoised_size(arm: str) -> int:
    """Returns the columns of the sequences that a step processes."""
    rows = {"tokens": jnp.zeros((1, LENGTH + 1), jnp.int32)}
    rows["segments"] = rows["tokens"]
    batch = {"input": rows, "index": jnp.zeros(1, jnp.int32), "epoch": jnp.zeros(1, jnp.int32)}
    made = jax.eval_shape(
        lambda: transform_of(arm)(jax.random.key(0), batch, jnp.int32(0))["target"]
    )
    return made.shape[1]


if __name__ == "__main__":
    main()
