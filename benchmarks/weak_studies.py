"""Three studies of weak supervision, each as one program over ten divisions of the digits.

  python -m benchmarks.weak_studies --out=benchmarks/results/weak_studies.json

The arms are those of `configs/studies/paper_evidence.py`, `paper_predictions.py` and
`paper_deception.py`, with their networks, lengths and losses; what costs time there is that each of
some hundred runs is a run of its own. Rates are chosen by the 100 clean held-out images, the same
number for each arm; the test images measure, and differences are paired by division.
"""

import argparse
import json
import pathlib
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks import _record
from benchmarks.weak_sweep import apply, init, parts, pooled, train
from distill_jax.evaluators import deception as measure
from distill_jax.losses.arguments import arguments
from distill_jax.losses.classification import cross_entropy
from distill_jax.report.statistics import estimate

RATES = (1e-3, 3e-3)
PIXELS = (4, 8, 16)
FEW = (25, 200)
WIDTHS = (16, 128)
STUDIES = ("evidence", "predictions", "deception")


def divisions(seeds: list[int]) -> dict[str, Any]:
    """Images `[seeds, n, 64]` and labels of each stage, parity, and at least 5 for the students."""
    made = [parts("parity", seed) for seed in seeds]
    found: dict[str, Any] = {}
    for name in made[0]:
        x = np.stack([d[name][0].reshape(len(d[name][0]), -1) for d in made])
        found[name] = {"x": x, "y": np.stack([d[name][1] for d in made])}
    other = [parts("at_least_5", seed)["student"][1] for seed in seeds]
    found["student"]["other"] = np.stack(other)
    return found


def pool(x: Any) -> Any:
    """Returns means of 2 x 2 pixels of images with channels, `[b, 8, 8, c] -> [b, 16 c]`."""
    b, c = x.shape[0], x.shape[-1]
    return x.reshape(b, 4, 2, 4, 2, c).mean((2, 4)).reshape(b, -1)


def fit(layers: Any, fixed: Any, x: Any, y: Any, key: Any, lr: Any, steps: int, **how: Any) -> Any:
    return train(layers, fixed, x, y, key=key, lr=lr, steps=steps, most=steps, **how)


def encoder(key: Any, data: Any, sizes: tuple[int, ...]) -> Any:
    """Layers of a network that learned the ten digits, without the last."""
    x, y = data["pretrain"]["x"], jax.nn.one_hot(data["pretrain"]["y"], 10)
    return fit(init(key, (64, *sizes, 10)), [], x, y, key, 3e-3, 400)


def judged(layers: Any, x: Any) -> Any:
    return jax.nn.softmax(apply(layers, x))


def evidence(key: Any, data: Any, lr: Any) -> dict[str, Any]:
    """Logits of judges and of their students, on held-out and test images."""
    whole = encoder(key, data, (256, 256))
    images = {name: part["x"].reshape(-1, 8, 8, 1) for name, part in data.items()}

    def parity(x: Any) -> Any:
        z = apply(whole, x.reshape(x.shape[0], -1))
        sides = [jax.nn.logsumexp(z[:, i::2], axis=1) for i in (0, 1)]
        return jnp.stack(sides, axis=1)

    def see(name: str, sides: str, pixels: int) -> Any:
        return pool(arguments(parity, images[name], pixels=pixels, sides=sides))

    hot = jax.nn.one_hot(data["weak"]["y"], 2)
    told: dict[str, dict[str, Any]] = {}

    def judge(name: str, sides: str, pixels: int = 8, n: int = 250) -> None:
        x = see("weak", sides, pixels)
        net = fit(init(key, (x.shape[1], 2)), [], x[:n], hot[:n], key, 1e-2, 400)
        told[name] = {part: judged(net, see(part, sides, pixels)) for part in PARTS}

    judge("judge", "neither")
    for n in (150, 200):
        judge(f"judge_{n}", "neither", n=n)
    for pixels in PIXELS:
        judge(f"judge_evidence_{pixels}", "both", pixels)
    judge("judge_one_sided", "own")
    judge("judge_told", "answer")
    groups = {
        "naive": ("judge",),
        "ensemble": ("judge_150", "judge_200", "judge"),
        "evidence": ("judge_evidence_8",),
        "evidence_ensemble": tuple(f"judge_evidence_{n}" for n in PIXELS),
        "one_sided": ("judge_one_sided",),
        "told": ("judge_told",),
    }
    found = {name: {part: jnp.log(p[part]) for part in ASKED} for name, p in told.items()}
    found["arguer"] = {part: parity(images[part]) for part in ASKED}
    truth = jax.nn.one_hot(data["student"]["y"], 2)
    labels = {
        name: sum(told[judge]["student"] for judge in judges) / len(judges)
        for name, judges in groups.items()
    }
    for name, y in {**labels, "ceiling": truth}.items():
        rate = 1e-2 if name == "ceiling" else lr
        head = fit(init(key, (256, 2)), whole[:-1], data["student"]["x"], y, key, rate, 400)
        found[name] = {part: apply([*whole[:-1], *head], data[part]["x"]) for part in ASKED}
    return found


def predictions(key: Any, data: Any, lr: Any) -> dict[str, Any]:
    """Logits of networks that learn from few labels and from pseudo-labels."""
    body, found = encoder(key, data, (64, 64))[:-1], {}
    x, truth = data["student"]["x"], jax.nn.one_hot(data["student"]["y"], 2)
    start = [*body, *init(key, (64, 2))]
    for n in FEW:
        made = {"finetune": fit(start, [], x[:n], truth[:n], key, lr, 400)}
        made["finetune_long"] = fit(start, [], x[:n], truth[:n], key, lr, 1200)
        soft = judged(made["finetune"], x)
        hard = jax.nn.one_hot(soft.argmax(1), 2)
        made["pseudo"] = fit(start, [], x, soft, key, lr, 400)
        made["pseudo_hard"] = fit(start, [], x, hard, key, lr, 400)
        for name, source in (("pseudo_then", "pseudo"), ("hard_then", "pseudo_hard")):
            made[name] = fit(made[source], [], x[:n], truth[:n], key, lr, 400)
        both = jnp.where(jnp.arange(len(x))[:, None] < n, truth, soft)
        made["joint"] = fit(start, [], x, both, key, lr, 800)
        for name, net in made.items():
            found[f"{name}_{n}"] = {part: apply(net, data[part]["x"]) for part in ASKED}
    return found


def conflicts(key: Any, data: Any, lr: Any) -> dict[str, Any]:
    """Logits of students with and without a conflicting reward."""
    x, y, other = (data["student"][name] for name in ("x", "y", "other"))
    truth, found = jax.nn.one_hot(y, 2), {}
    small = {name: pooled(part["x"].reshape(-1, 8, 8)) for name, part in data.items()}
    weak = jax.nn.one_hot(data["weak"]["y"], 2)
    supervisor = fit(init(key, (16, 2)), [], small["weak"], weak, key, 1e-2, 800)
    said = judged(supervisor, small["student"])
    found["weak"] = {part: apply(supervisor, small[part]) for part in ASKED}

    def wrong(logits: Any, rows: Any) -> Any:
        own = jax.lax.stop_gradient(logits).argmax(-1)
        return 0.5 * (own != y[rows]) * cross_entropy(logits, own)

    def task(logits: Any, rows: Any) -> Any:
        return 0.5 * cross_entropy(logits, other[rows])

    for width in WIDTHS:
        body = encoder(key, data, (width, width))[:-1]
        start = [*body, *init(key, (width, 2))]
        nets = {
            "ceiling": fit(start, [], x, truth, key, lr, 400),
            "aligned": fit(start, [], x, said, key, lr, 400),
            "wrong": fit(start, [], x, said, key, lr, 400, more=wrong),
            "wrong_confident": fit(start, [], x, said, key, lr, 400, more=wrong, alpha=0.5),
            "task": fit(start, [], x, said, key, lr, 400, more=task),
        }
        for name, net in nets.items():
            found[f"{name}_{width}"] = {part: apply(net, data[part]["x"]) for part in ASKED}
    return found


PARTS, ASKED = ("student", "clean", "test"), ("clean", "test")


def measured(study: Callable, data: Any, keys: Any) -> dict[str, dict[str, Any]]:
    """Returns, for each arm, the rate that the held-out images choose and the test logits."""
    run = jax.vmap(study, in_axes=(0, 0, None))
    run = jax.jit(jax.vmap(run, in_axes=(None, None, 0)))
    logits = jax.device_get(run(keys, data, jnp.asarray(RATES)))
    found = {}
    for arm, by_part in logits.items():
        hits = {part: (z.argmax(-1) == data[part]["y"]).mean(-1) for part, z in by_part.items()}
        best = int(hits["clean"].mean(1).argmax())
        found[arm] = {
            "rate": RATES[best],
            "accuracy": hits["test"][best].tolist(),
            "logits": by_part["test"],
        }
    return found


def summary(found: dict, pairs: dict[str, tuple[str, str]], of: str) -> dict[str, Any]:
    """Means over divisions, and paired differences with their intervals."""
    made: dict[str, Any] = {}
    for arm, entry in found.items():
        value = estimate(entry[of])
        made[arm] = {"mean": value.mean, "se": value.se, "values": entry[of], "rate": entry["rate"]}
    for one, other in pairs.values():
        pair = zip(found[one][of], found[other][of], strict=True)
        gap = estimate([a - b for a, b in pair])
        made[f"{one} minus {other}"] = {"mean": gap.mean, "se": gap.se, "interval": gap.interval}
    return made


def deceived(found: dict, data: Any) -> dict[str, dict[str, Any]]:
    """What `evaluators.deception` says of each division, both rates alike: those of the student."""
    made: dict[str, dict[str, Any]] = {}
    for width in WIDTHS:
        for kind in ("wrong", "wrong_confident", "task"):
            arm = f"{kind}_{width}"
            rate = RATES.index(found[arm]["rate"])
            rows = []
            for i in range(len(data["test"]["y"])):
                names = {"student": arm, "teacher": "weak"}
                names |= {name: f"{name}_{width}" for name in ("aligned", "ceiling")}
                logits = {
                    role: {"logits": found[name]["logits"][rate][i]} for role, name in names.items()
                }
                rows.append(measure.make()(logits, {"label": data["test"]["y"][i]}))
            made[arm] = {
                name: [row.get(name, float("nan")) for row in rows]
                for name in ("flipped", "deception", "deception_expected", "deception_excess")
            }
    return made


def pairs_of(*pairs: str) -> dict[str, tuple[str, str]]:
    split = [pair.split() for pair in pairs]
    return {pair: (one, other) for pair, (one, other) in zip(pairs, split, strict=True)}


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--out", required=True, type=pathlib.Path)
    parser.add_argument("--seeds", type=int, default=10)
    parser.add_argument("--only", type=_record.some_of(STUDIES), default=list(STUDIES))
    options = parser.parse_args()
    seeds: list[int] = list(range(options.seeds))
    data, keys = divisions(seeds), jax.vmap(jax.random.key)(jnp.asarray(seeds))
    out: dict[str, Any] = json.loads(options.out.read_text()) if options.out.exists() else {}
    out["about"] = {"jax": jax.__version__, "seeds": seeds, "rates": RATES}
    for name in options.only:
        if name == "evidence":
            pairs = pairs_of(
                "judge_evidence_8 judge",
                "ensemble naive",
                "evidence naive",
                "evidence_ensemble ensemble",
                "evidence_ensemble evidence",
                "evidence one_sided",
                "told evidence_ensemble",
            )
            out[name] = summary(measured(evidence, data, keys), pairs, "accuracy")
        elif name == "predictions":
            pairs = pairs_of(
                *(
                    f"pseudo_then_{n} {arm}_{n}"
                    for n in FEW
                    for arm in ("finetune", "finetune_long")
                ),
                *(f"pseudo_then_{n} {arm}_{n}" for n in FEW for arm in ("hard_then", "joint")),
                *(f"pseudo_{n} finetune_long_{n}" for n in FEW),
            )
            out[name] = summary(measured(predictions, data, keys), pairs, "accuracy")
        else:
            found = measured(conflicts, data, keys)
            out[name] = summary(found, {}, "accuracy")
            for arm, values in deceived(found, data).items():
                for metric, rows in values.items():
                    some = [value for value in rows if np.isfinite(value)]
                    value = estimate(some)
                    out[name][arm][metric] = {
                        "mean": value.mean,
                        "se": value.se,
                        "interval": value.interval,
                        "divisions": len(some),
                    }
        options.out.write_text(json.dumps(out, indent=1) + "\n")
        for arm, value in out[name].items():
            short = {k: v for k, v in value.items() if k != "values"}
            print(name, arm, short, flush=True)


if __name__ == "__main__":
    main()
