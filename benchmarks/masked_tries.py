"""Short runs of masked methods, one change at a time, and what several features of them are worth.

  DISTILL_JAX_DATA=FOLDER python -m benchmarks.masked_tries --only=mae_3e-3 --out=tries.json
  python -m benchmarks.masked_tries --page=docs/results/ssl_images.md --out=tries.json

A ViT, 64 wide and four blocks deep, learns from Fashion-MNIST in patches of 4 x 4 pixels, or from
digits in patches of 2 x 2. Features are judged on images held out of the training part: 4,000 of
Fashion-MNIST and 440 of digits; the test part is not read. `mean` is the mean of the last tokens,
`blocks` the means of the four blocks side by side, `tokens` all last tokens side by side. `spread`
is the deviation of a token at one place between images, as a share of its size: where it is small,
tokens say where they are and not what is there. `probe` has the labels of 8,000 images (of digits,
1,000), `few` five labels a class, `knn` 20 neighbours among these images.

`--page` writes the tables of the file into a page, behind its mark.
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
import optax

from distill_jax.core import state as state_lib
from distill_jax.core import steps as steps_lib
from distill_jax.data import digits, fashion_mnist, masks
from distill_jax.data.transforms import geometry, views
from distill_jax.evaluators import _features, few_label_probe, knn
from distill_jax.models import token_predictor, vit
from distill_jax.objectives import ijepa, mae

MARK = "<!-- tries: benchmarks/masked_tries.py -->"
END = "<!-- end of tries -->"
BANK, HELD_OUT = 8000, {"fashion": 4000, "digits": 440}
FASHION = {"data": "fashion", "batch": 64, "steps": 1500, "lr": 1e-3, "decay": 0.05}
DIGITS = {"data": "digits", "batch": 128, "steps": 600, "lr": 2e-3, "decay": 1e-4, "crop": 0.5}
JEPA = {"method": "ijepa", "average": 0.94, "steps": 700, "targets": 2, "keep": 0.3}

TRIES: dict[str, dict[str, Any]] = {
    "raw": {"data": "fashion", "steps": 0},
    "mae": FASHION,
    "mae_3e-3": {**FASHION, "lr": 3e-3},
    "mae_pixels": {**FASHION, "lr": 3e-3, "norm_pix": False},
    "ijepa": {**FASHION, **JEPA},
    "ijepa_learned": {**FASHION, **JEPA, "positions": "learned"},
    "digits_raw": {"data": "digits", "steps": 0},
    "digits_mae_unit": {**DIGITS, "unit": True},
    "digits_mae": DIGITS,
    "digits_ijepa": {**DIGITS, "method": "ijepa", "average": 0.996, "lr": 5e-4},
    "digits_ijepa_95": {**DIGITS, "method": "ijepa", "average": 0.95, "lr": 5e-4},
}


def images(name: str, *, unit: bool) -> tuple[np.ndarray, ...]:
    """Returns images and labels to learn from, and those held out, of the training part."""
    part = (fashion_mnist if name == "fashion" else digits).make(held_out=0.0).train
    rows = part.read(np.arange(len(part)))
    x, y = np.asarray(rows["input"], np.float32) / 255, np.asarray(rows["label"], np.int64)
    order, n = np.random.default_rng(0).permutation(len(x)), HELD_OUT[name]
    x, y = x[order], y[order]
    x = x if unit else (x - x[n:].mean()) / x[n:].std()
    return x[n:], y[n:], x[:n], y[:n]


def networks(t: dict[str, Any]):
    """Returns objective, networks, averages and transforms of a try."""
    patch, grid = (4, (7, 7)) if t["data"] == "fashion" else (2, (4, 4))
    sizes = {"width": 64, "depth": 4, "heads": 4, "patch_size": patch, "pool": "mean"}
    net = vit.make(num_classes=0, positions=t.get("positions", "fourier"), **sizes)
    light = t["data"] == "fashion" or t.get("method") == "ijepa"
    head = token_predictor.make(width=32 if light else 64, depth=2, heads=4, grid=grid)
    chain = {}
    if "crop" in t:
        area = (t["crop"], 1.0)
        chain["random_resized_crop"] = geometry.make_random_resized_crop(area=area, flip=0.0)
    if t.get("method") == "ijepa":
        hide = {"targets": t.get("targets", 4), "keep": t.get("keep", 0.4)}
        chain["block_masks"] = masks.make_block_masks(patch_size=patch, **hide)
        found = {"student": net, "target": net, "predictor": head}
        return ijepa.make(), found, {"target": "student"}, views.compose(chain)
    chain["random_masks"] = masks.make_random_masks(patch_size=patch)
    method = mae.make(norm_pix=t.get("norm_pix", True), epsilon=0.01)
    return method, {"student": net, "decoder": head}, {}, views.compose(chain)


def batch_of(x, index, epoch):
    return {"input": x, "mask": jnp.ones(len(x)), "index": index, "epoch": epoch}


def program(t: dict[str, Any]):
    """Returns compiled functions: the state before training, a step, and the features of images."""
    method, nets, averages, transform = networks(t)
    adam = optax.scale_by_adam(b1=0.9, b2=0.95)

    def prepared(x, index, epoch, key):
        return transform(key, batch_of(x, index, epoch), jnp.int32(0))

    @jax.jit
    def step(state, x, index, epoch, key, rate, decay, average):
        key = jax.random.fold_in(key, state.step)
        batch = prepared(x, index, epoch, key)

        def loss(params):
            bound = steps_lib.bind_networks(nets, state.replace(params=params), {}, key=key)
            terms = method.loss(bound, batch, state.memory, state.step)
            (values,) = terms.values.values()
            return values.mean()

        value, grads = jax.value_and_grad(loss)(state.params)
        updates, opt = adam.update(grads, state.opt_state)
        params = jax.tree.map(
            lambda p, u: p - rate * (u + decay * p * (p.ndim > 1)), state.params, updates
        )
        targets = {
            role: jax.tree.map(
                lambda o, n: average * o + (1 - average) * n, state.targets[role], params[source]
            )
            for role, source in averages.items()
        }
        changed = {"params": params, "targets": targets, "opt_state": opt}
        return state.replace(step=state.step + 1, **changed), value

    @jax.jit
    def features(params, x):
        out, _ = nets["student"].apply(params, {}, x, train=False, rngs={})
        tokens = out["tokens"]
        spread = jnp.sqrt(tokens.var(0).mean() / (tokens**2).mean())
        flat = {"tokens": tokens.reshape(len(x), -1)} if t["data"] == "digits" else {}
        return {"mean": tokens.mean(1), "blocks": out["last_blocks"], **flat}, spread

    side = 28 if t["data"] == "fashion" else 8
    b = t["batch"]
    given = (jnp.zeros((b, side, side, 1)), *(jnp.zeros(b, jnp.int32),) * 2, jax.random.key(0))
    shapes = state_lib.infer_shapes(method, nets, jax.eval_shape(prepared, *given))
    own = tuple(role for role in nets if role not in averages)
    init = state_lib.make_init(method, nets, adam, shapes, trainable=own, ema=averages)
    return jax.jit(init), step, features


def judge(bank: np.ndarray, labels: np.ndarray, z: np.ndarray, y: np.ndarray, *, few: bool):
    """Returns accuracies of simple classifiers."""
    queries, kept = (_features.normalized(a).astype(np.float32) for a in (z, bank))
    where, similar = knn.nearest(queries, kept, 20)
    scaler = _features.Scaler.fit(bank)
    known, asked = scaler(bank), scaler(z)

    def probe(rows, c):
        linear = _features.fit_logistic(known[rows], labels[rows], 10, c=c, tolerance=1e-3)
        return float((linear.predict(asked) == y).mean())

    found = {"knn": float((knn.vote(labels[where], similar, 10, 0.07) == y).mean())}
    found["probe"] = probe(np.arange(len(bank)), 0.1)
    if few:
        ranks = [few_label_probe.draw(labels, seed=0, number=i) for i in range(10)]
        found["few"] = float(np.mean([probe(np.flatnonzero(r < 5), 1.0) for r in ranks]))
    return {name: round(value, 4) for name, value in found.items()}


def run(name: str, *, shorter: int) -> dict[str, Any]:
    """Trains one try and returns its curve."""
    t = {**TRIES[name], "steps": TRIES[name]["steps"] // shorter}
    x, y, held, asked = images(t["data"], unit=t.get("unit", False))
    if "lr" not in t:
        known, z = (np.asarray(v.reshape(len(v), -1), np.float64) for v in (x[:BANK], held))
        raw = {"mean": judge(known, y[:BANK], z, asked, few=t["data"] == "digits")}
        return {"settings": t, "curve": [{"step": 0, "role": "pixels", **raw}]}
    init, step, features = program(t)
    key, random, begin = jax.random.key(1), np.random.default_rng(1), time.time()
    state, total, b = init(key), t["steps"], t["batch"]
    curve, value = [], None

    def measure(state, at, value):
        known = min(BANK, len(x))
        for role in ("target", "student") if state.targets else ("student",):
            params = (state.targets if role == "target" else state.params)[role]
            rows = np.concatenate([x[:known], held])
            chunks = [features(params, rows[i : i + 500]) for i in range(0, len(rows), 500)]
            found: dict[str, Any] = {"step": at, "role": role}
            found["loss"] = None if value is None else round(float(value), 4)
            found["spread"] = round(float(np.mean([spread for _, spread in chunks])), 3)
            for kind in chunks[0][0]:
                z = np.concatenate([np.asarray(out[kind], np.float64) for out, _ in chunks])
                few = t["data"] == "digits"
                found[kind] = judge(z[:known], y[:known], z[known:], asked, few=few)
            curve.append(found)
            print(name, json.dumps(found), flush=True)

    measure(state, 0, value)
    per = len(x) // b
    for at in range(total):
        order = random.permutation(len(x)) if at % per == 0 else order  # noqa: F821
        rows = order[at % per * b : (at % per + 1) * b]
        warm = 0.1 * total
        falls = 0.5 * (1 + math.cos(math.pi * max(0.0, at - warm) / (total - warm)))
        rate = t["lr"] * min(1.0, at / warm) * falls
        first = t.get("average", 0.0)
        moving = (rate, t["decay"], first + (1 - first) * at / total)
        fed = (x[rows], rows.astype(np.int32), np.full(b, at // per, np.int32), key)
        state, value = step(state, *fed, *(np.float32(v) for v in moving))
        if at + 1 in (total // 2, total):
            measure(state, at + 1, value)
    minutes = round((time.time() - begin) / 60, 2)
    return {"settings": t, "minutes": minutes, "curve": curve}


def tables(tries: dict[str, Any]) -> list[str]:
    """Returns the Markdown of the tries."""
    lines = []
    for data, more in (("fashion", ("mean", "blocks")), ("digits", ("mean", "tokens"))):
        kinds = ("probe", "knn") if data == "fashion" else ("few", "knn")
        head = ["try", "steps", "judged", "loss", "spread"]
        head += [f"{kind}, {feature}" for feature in more for kind in kinds]
        lines += ["", f"| {' | '.join(head)} |", "|" + " --- |" * len(head)]
        for name, found in tries.items():
            for row in found["curve"] if found["settings"]["data"] == data else ():
                cells = [name, *(row.get(key) for key in ("step", "role", "loss", "spread"))]
                values = [row.get(f, {}).get(kind) for f in more for kind in kinds]
                cells += ["" if v is None else f"{v:.3f}" for v in values]
                shown = ["" if c is None else str(c) for c in cells]
                lines.append(f"| {' | '.join(shown)} |")
    return lines


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--only", default=",".join(TRIES), help="names of tries, by commas")
    parser.add_argument("--out", type=pathlib.Path, required=True, help="JSON, added to")
    parser.add_argument("--page", type=pathlib.Path, help="page to write the tables into")
    parser.add_argument("--shorter", type=int, default=1, help="divides the steps")
    given = parser.parse_args()
    tries = json.loads(given.out.read_text()) if given.out.exists() else {}
    if given.page:
        text = given.page.read_text()
        before, _, rest = text.partition(MARK)
        after = rest.partition(END)[2]
        given.page.write_text("\n".join([before + MARK, *tables(tries), "", END + after]))
        return
    for name in given.only.split(","):
        tries[name] = run(name, shorter=given.shorter)
        given.out.write_text(json.dumps(tries, indent=1) + "\n")


if __name__ == "__main__":
    main()
