"""Precision of batch normalization beside PyTorch's, and what it costs in a training step.

    python benchmarks/batch_norm.py --rounds 60 --out benchmarks/results/batch_norm.json

Inputs are `N(0, 1) s + m`, float32; the reference is computed in float64 from the same inputs.
Reported for every (m, s) are the largest relative error of the variance, the largest absolute
error of the output, and the largest error of the gradient relative to its largest entry, over five
draws: of the package, of the form `E[x^2] - E[x]^2`, and of PyTorch where it can be imported.

The step is that of a ResNet-20 on 32x32x3 images with momentum, the package's against the same
with the form `E[x^2] - E[x]^2`, both compiled in one process on one device and called by turns.
Wall and process CPU time are medians; the latter is steadier on a busy machine.
"""

import argparse
import json
import os
import time
from collections.abc import Callable
from importlib.metadata import PackageNotFoundError, version
from typing import Any

os.environ.setdefault("JAX_PLATFORMS", "cpu")

import _record
import _turns
import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import linen as nn
from jax import lax

from distill_jax.models import layers, resnet

SETTINGS = ((0, 1), (100, 1), (1000, 1), (1000, 0.1), (100, 0.1), (10, 0.01))
SHAPES = ((64, 8), (64, 8, 8, 8))
SEEDS = range(5)
EPSILON = 1e-5
COLUMNS = ("variance", "output", "gradient")

Moments = tuple[np.ndarray, np.ndarray, np.ndarray]
"""Variance, output and gradient with respect to the input."""


class RawMoments(nn.Module):
    """`layers.BatchNorm` from the raw moments, `E[x^2] - E[x]^2`."""

    momentum: float = 0.9
    epsilon: float = EPSILON
    affine: bool = True

    @nn.compact
    def __call__(self, x: Any, *, train: bool) -> Any:
        shape = (x.shape[-1],)
        scale, bias = jnp.ones(shape), jnp.zeros(shape)
        if self.affine:
            scale = self.param("scale", nn.initializers.ones, shape)
            bias = self.param("bias", nn.initializers.zeros, shape)
        ra_mean = self.variable("batch_stats", "mean", jnp.zeros, shape, jnp.float32)
        ra_var = self.variable("batch_stats", "var", jnp.ones, shape, jnp.float32)
        mean, var = ra_mean.value, ra_var.value
        if train:
            axes = tuple(range(x.ndim - 1))
            mean = x.mean(axes)
            var = jnp.maximum(0.0, (x * x).mean(axes) - mean * mean)
            if not self.is_initializing():
                keep = self.momentum
                ra_mean.value = keep * ra_mean.value + (1 - keep) * mean
                ra_var.value = keep * ra_var.value + (1 - keep) * var
        gain = scale * lax.rsqrt(var + self.epsilon)
        row = (1,) * (x.ndim - 1) + shape
        return x * gain.reshape(row) + (bias - mean * gain).reshape(row)


def reference(x: np.ndarray, g: np.ndarray) -> Moments:
    """In float64, with `g` the gradient with respect to the output."""
    x, g = x.astype(np.float64), g.astype(np.float64)
    axes = tuple(range(x.ndim - 1))
    var = x.var(axes)
    scale = 1 / np.sqrt(var + EPSILON)
    y = (x - x.mean(axes)) * scale
    return var, y, scale * (g - g.mean(axes) - y * (g * y).mean(axes))


def flax_moments(module: Any) -> Callable[[np.ndarray, np.ndarray], Moments]:
    """Returns what a module of the package's signature gives."""
    norm = module(momentum=0.0)

    @jax.jit
    def moments(x, g):
        variables = norm.init(jax.random.key(0), x, train=False)

        def apply(x):
            return norm.apply(variables, x, train=True, mutable=["batch_stats"])

        y, pull, state = jax.vjp(apply, x, has_aux=True)
        return state["batch_stats"]["var"], y, pull(g)[0]

    return lambda x, g: moments(x, g)


def torch_moments(x: np.ndarray, g: np.ndarray) -> Moments:
    """What PyTorch gives, its running variance made biased."""
    import torch

    n = x[..., 0].size
    image, upstream = (torch.tensor(np.moveaxis(a, -1, 1).copy()) for a in (x, g))
    image.requires_grad_(True)
    kind = torch.nn.BatchNorm1d if x.ndim == 2 else torch.nn.BatchNorm2d
    norm = kind(x.shape[-1], momentum=1.0, eps=EPSILON)
    y = norm(image)
    y.backward(upstream)
    var = norm.running_var.detach().double().numpy() * (n - 1) / n
    back = (np.moveaxis(t.detach().numpy(), 1, -1) for t in (y, image.grad))
    return (var, *back)


def errors(moments: Callable, shape: tuple[int, ...], m: float, s: float) -> dict[str, float]:
    """Returns the largest errors over `SEEDS` by column."""
    worst = np.zeros(3)
    for seed in SEEDS:
        draw = np.random.default_rng(seed)
        x = (draw.normal(size=shape) * s + m).astype(np.float32)
        g = draw.normal(size=shape).astype(np.float32)
        true = reference(x, g)
        found = [np.asarray(a, np.float64) for a in moments(x, g)]
        scales = true[0], 1.0, np.abs(true[2]).max()
        pairs = zip(found, true, scales, strict=True)
        worst = np.maximum(worst, [np.abs((a - b) / c).max() for a, b, c in pairs])
    return {name: float(f"{x:.2e}") for name, x in zip(COLUMNS, worst, strict=True)}


def precision() -> dict[str, Any]:
    """Returns errors by shape, setting and implementation."""
    kinds = {
        "distill_jax": flax_moments(layers.BatchNorm),
        "raw_moments": flax_moments(RawMoments),
    }
    if installed("torch"):
        kinds["torch"] = torch_moments
    table: dict[str, Any] = {}
    for shape in SHAPES:
        rows = table["x".join(map(str, shape))] = {}
        for m, s in SETTINGS:
            row = {name: errors(moments, shape, m, s) for name, moments in kinds.items()}
            if "torch" in row:
                pairs = {c: row["distill_jax"][c] / row["torch"][c] for c in COLUMNS}
                row["over_torch"] = {c: round(x, 3) for c, x in pairs.items()}
            rows[f"mean {m}, deviation {s}"] = row
            print(shape, m, s, json.dumps(row), flush=True)
    return table


def make_step(call: Callable, batch: int) -> Callable[[], Any]:
    """Returns a compiled and warm training step with `call` as the batch norm's method."""
    model = resnet.make(num_classes=10, depth=20)
    x = jax.random.normal(jax.random.key(0), (batch, 32, 32, 3))
    y = jax.random.randint(jax.random.key(1), (batch,), 0, 10)
    tx = optax.sgd(0.01, momentum=0.9)

    def train(carry):
        params, state, opt_state = carry

        def loss(params):
            outputs, new = model.apply(params, state, x, train=True, rngs={})
            losses = optax.softmax_cross_entropy_with_integer_labels(outputs["logits"], y)
            return losses.mean(), new

        (value, state), grads = jax.value_and_grad(loss, has_aux=True)(params)
        updates, opt_state = tx.update(grads, opt_state, params)
        return (optax.apply_updates(params, updates), state, opt_state), value

    usual = layers.BatchNorm.__call__
    layers.BatchNorm.__call__ = call
    params, state = jax.jit(model.init)(jax.random.key(2), x)
    carry = params, state, tx.init(params)
    compiled = jax.jit(train, donate_argnums=0).lower(carry).compile()
    layers.BatchNorm.__call__ = usual

    def step():
        nonlocal carry
        carry, value = compiled(carry)
        return value.block_until_ready()

    for _ in range(3):
        step()
    return step


def step_cost(rounds: int, batch: int) -> dict[str, Any]:
    """Returns medians of a step's time, and of the ratio within a round."""
    calls = {"raw_moments": RawMoments.__call__, "distill_jax": layers.BatchNorm.__call__}
    steps = {name: make_step(call, batch) for name, call in calls.items()}
    times: dict[str, list[dict[str, float]]] = {name: [] for name in steps}
    for i in range(rounds):
        for name in list(steps)[:: 1 if i % 2 else -1]:
            wall, cpu = time.perf_counter(), time.process_time()
            steps[name]()
            wall, cpu = time.perf_counter() - wall, time.process_time() - cpu
            times[name].append({"wall": wall, "cpu": cpu})
    found: dict[str, Any] = {"net": f"ResNet-20, 32x32x3, batch {batch}", "rounds": rounds}
    for key in ("wall", "cpu"):
        medians = {name: _turns.median_ms(turns, key) for name, turns in times.items()}
        found[key] = {
            "median_ms": medians,
            "ratio_of_medians": round(medians["distill_jax"] / medians["raw_moments"], 4),
            "median_ratio": _turns.ratio(times["distill_jax"], times["raw_moments"], key),
        }
    return found


def installed(package: str) -> str | None:
    """Returns the version of a package, or None."""
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--rounds", type=int, default=60)
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--out", default="benchmarks/results/batch_norm.json")
    args = parser.parse_args()
    result = {
        "versions": {p: installed(p) for p in ("jax", "jaxlib", "flax", "torch", "numpy")},
        **_record.machine(),
        "seeds": list(SEEDS),
        "load_average_at_start": os.getloadavg(),
        "errors": precision(),
        "step": step_cost(args.rounds, args.batch),
        "load_average": os.getloadavg(),
    }
    _record.write(result, args.out, indent=2)
    print(json.dumps(result["step"], indent=2))


if __name__ == "__main__":
    main()
