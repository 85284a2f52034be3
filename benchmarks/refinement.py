"""Progressive refinement on arithmetic chains: does a draft as context help, and do rounds of it?

  python -m benchmarks.refinement --out=benchmarks/results/refinement.json

A base network learns some problems; its checkpoints after 10, 30 and 60 % of the steps write drafts
for other problems, on which the arms learn from scratch: question, one of the three drafts (drawn
anew in each pass), solution. At test the last checkpoint of the base writes the first draft, and
the network's own solution is the draft of the next round. Every seed has problems of its own. Each
arm has three learning rates; held-out accuracy after one round, of three seeds, chooses.
"""

import argparse
import functools
import json
import pathlib
import time
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks import _sequences as common
from distill_jax.core import chains
from distill_jax.data import arithmetic_chains
from distill_jax.data.transforms import refinement, tokens
from distill_jax.models import transformer

DATA = {"steps": (3, 4), "largest": 9}
PARTS = {"base": 300, "train": 500, "held_out": 300, "test": 600}
NET = {"vocabulary": chains.VOCABULARY, "width": 64, "depth": 2, "heads": 4}
STEPS, BATCH, MARKS, ROUNDS = 400, 32, (40, 120, 240), 3
RATES, CHOOSE, SEEDS = (7.5e-4, 1.5e-3, 3e-3), 3, 5
BASE_RATE = 3e-3
ARMS = {
    "answer_only": 0.0,
    "masked": 0.0,
    "weighted": 0.3,
    "targets": 1.0,
    "shuffled": 0.0,
}
"""Weight of the tokens of drafts. `answer_only` sees none, `shuffled` those of other problems."""


def parts_of(seed: int) -> dict[str, Any]:
    """Returns rows of the parts, with problems of the seed and without distractors."""
    n = PARTS["base"] + PARTS["train"]
    data = arithmetic_chains.make(
        **DATA, n_train=n, n_test=PARTS["held_out"] + 2 * PARTS["test"], held_out=0.0, seed=seed
    )
    train, test = common.rows_of(data.train), common.rows_of(data.test)
    plain = np.flatnonzero(test["distracted"] == 0)
    cut = {
        "base": (train, slice(PARTS["base"])),
        "train": (train, slice(PARTS["base"], n)),
        "held_out": (test, plain[: PARTS["held_out"]]),
        "test": (test, plain[PARTS["held_out"] : PARTS["held_out"] + PARTS["test"]]),
    }
    return {name: jax.tree.map(lambda x, i=i: x[i], rows) for name, (rows, i) in cut.items()}


def with_drafts():
    """Returns a compiled function: the parts with the drafts of a base network."""
    net, prepare = transformer.make(**NET), tokens.make_next_token()

    def run(parts, key):
        def loss(params, rows, step, key):
            batch = prepare(key, rows, step)
            return common.cross_entropy(common.nats(net, params, batch), batch)

        rows = parts["base"]
        early = common.fit(net, loss, rows, key, BASE_RATE, steps=STEPS, batch=BATCH, marks=MARKS)

        def drafts(params, x):
            return common.write(net, params, x["prompt"], x["start"], steps=x["solution"].shape[1])

        found = {"train": jnp.stack([drafts(params, parts["train"]) for params in early[:-1]], 1)}
        for name in ("held_out", "test"):
            found[name] = drafts(early[-1], parts[name])
        return found

    return jax.jit(run)


def program(seen: bool, steps: int):
    """Returns a compiled function that trains a network and lets it refine; `seen`: with drafts."""
    net = transformer.make(**NET)
    # Of weight 1, where the arm's own weight is put.
    prepare = refinement.make_refinement(end=chains.END, draft_weight=1.0 if seen else 0.0)

    def run(parts, drafts, key, lr, weight, shuffled):
        train = parts["train"]
        n = len(train["label"])
        other = jax.random.permutation(jax.random.fold_in(key, 2 * 10**6), n)
        own = jnp.where(shuffled, drafts["train"][other], drafts["train"])
        rows = {name: train[name] for name in ("prompt", "start", "solution")} | {"drafts": own}

        def loss(params, rows, step, key):
            which = jax.random.randint(key, (BATCH,), 0, rows["drafts"].shape[1])
            one = jnp.take_along_axis(rows["drafts"], which[:, None, None], axis=1)
            batch = prepare(key, {**rows, "drafts": one if seen else one[:, :0]}, step)
            if seen:
                final = refinement.make_refinement(end=chains.END)(
                    key, {**rows, "drafts": one}, step
                )["target_mask"]
                mask = final + weight * (batch["target_mask"] - final)
                batch = {**batch, "target_mask": mask}
            return common.cross_entropy(common.nats(net, params, batch), batch)

        params = common.fit(net, loss, rows, key, lr, steps=steps, batch=BATCH)
        found = {}
        for name in ("held_out", "test"):
            x, draft, written = parts[name], drafts[name], []
            if shuffled is not None and seen:
                mixed = jax.random.permutation(jax.random.fold_in(key, 3 * 10**6), len(draft))
                draft = jnp.where(shuffled, draft[mixed], draft)
            for _ in range(ROUNDS if seen else 1):
                prompt, start = x["prompt"], x["start"]
                if seen:
                    prompt, _, start = refinement.joined(
                        prompt, start, draft, end=chains.END, left=True
                    )
                draft = common.write(net, params, prompt, start, steps=x["solution"].shape[1])
                written.append(draft)
            found[name] = written
        return found

    return jax.jit(run)


def differences(arms: dict[str, Any], drafts: dict[str, Any]) -> dict[str, Any]:
    """Paired differences of accuracy between arms after a round, and between rounds of an arm."""
    first = {name: one["values"]["round_1"] for name, one in arms.items()}
    first["drafts"] = [one["test"] for one in drafts.values()]
    gaps = {
        f"{name} minus {other}": common.paired(first[name], first[other])
        for name in first
        for other in first
        if name != other
    }
    for name, one in arms.items():
        for later in ("round_2", "round_3"):
            if later in one["values"]:
                pair = one["values"][later], one["values"]["round_1"]
                gaps[f"{name} {later} minus round_1"] = common.paired(*pair)
    return gaps


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--out", required=True, type=pathlib.Path)
    parser.add_argument("--steps", type=int, default=STEPS)
    parser.add_argument("--seeds", type=int, default=SEEDS)
    parser.add_argument("--rates", default=",".join(map(str, RATES)))
    options = parser.parse_args()
    steps, seeds = options.steps, tuple(range(1, 1 + options.seeds))
    found = json.loads(options.out.read_text()) if options.out.exists() else {}
    arms, began = found.setdefault("arms", {}), time.monotonic()
    base, programs, made = with_drafts(), {}, {}
    for seed in seeds:
        parts = parts_of(seed)
        drafts = base(parts, jax.random.key(seed))
        made[seed] = parts, drafts
        first = common.scores(drafts["test"], parts["test"])["accuracy"]
        on_train = [
            common.scores(drafts["train"][:, i], parts["train"])["accuracy"]
            for i in range(len(MARKS))
        ]
        found.setdefault("drafts", {})[str(seed)] = {"test": first, "train": on_train}
    print("drafts", found["drafts"], f"{time.monotonic() - began:.0f} s", flush=True)

    @functools.cache
    def of(arm, lr, seed):
        seen = arm != "answer_only"
        if seen not in programs:
            programs[seen] = program(seen, steps)
        parts, drafts = made[seed]
        args = (jnp.float32(lr), jnp.float32(ARMS[arm]), jnp.bool_(arm == "shuffled"))
        written = programs[seen](parts, drafts, jax.random.key(seed), *args)
        return {
            name: [common.scores(x, parts[name])["accuracy"] for x in rounds]
            for name, rounds in written.items()
        }

    for arm in ARMS:
        if arm in arms:
            continue
        tried = []
        for lr in map(float, options.rates.split(",")):
            held = float(np.mean([of(arm, lr, seed)["held_out"][0] for seed in seeds[:CHOOSE]]))
            tried.append({"lr": lr, "held_out": held})
            print(arm, tried[-1], f"{time.monotonic() - began:.0f} s", flush=True)
        lr = max(tried, key=lambda x: x["held_out"])["lr"]
        rounds = [of(arm, lr, seed)["test"] for seed in seeds]
        values = {f"round_{i + 1}": [x[i] for x in rounds] for i in range(len(rounds[0]))}
        arms[arm] = {"settings": tried, "chosen": lr, "values": values}
        print(arm, lr, {k: round(float(np.mean(v)), 3) for k, v in values.items()}, flush=True)
        if len(seeds) > 1:
            found["differences"] = differences(arms, found["drafts"])
        found["about"] = {
            "jax": jax.__version__,
            "data": DATA,
            "examples": PARTS,
            "network": NET,
            "steps": steps,
            "steps_of_base": STEPS,
            "marks": MARKS,
            "batch": BATCH,
            "seeds": seeds,
        }
        options.out.write_text(json.dumps(found, indent=1) + "\n")


if __name__ == "__main__":
    main()
