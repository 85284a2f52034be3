"""A tiny network, batch and training setup that every contract test shares."""

import importlib
import pkgutil
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from distill_jax.core import partition, state, steps
from distill_jax.core.api import Model, Objective

K, SIZE = 5, 6


def modules(package: str) -> list[str]:
    """Names of the modules of a subpackage that offer `make`."""
    root = importlib.import_module(f"distill_jax.{package}")
    names = [m.name for m in pkgutil.iter_modules(root.__path__) if not m.name.startswith("_")]
    return [n for n in names if hasattr(importlib.import_module(f"{root.__name__}.{n}"), "make")]


def tiny_model(*, width: int = 8, batch_norm: bool = False) -> Model:
    """A two-layer network `[b, 6, 6, 1] -> logits [b, 5]`, written without any library."""

    def init(key, x):
        k1, k2 = jax.random.split(key)
        d = int(np.prod(x.shape[1:]))
        params = {
            "first": {"kernel": jax.random.normal(k1, (d, width)) / 6, "bias": jnp.zeros(width)},
            "last": {"kernel": jax.random.normal(k2, (width, K)) / 3, "bias": jnp.zeros(K)},
        }
        return params, {"mean": jnp.zeros(width)} if batch_norm else {}

    def apply(params, state, x, *, train, rngs):
        del rngs
        h = x.reshape(x.shape[0], -1) @ params["first"]["kernel"]
        if batch_norm:
            mean = h.mean(0) if train else state["mean"].astype(h.dtype)
            h = h - mean[None]
            if train:
                state = {"mean": 0.9 * state["mean"] + 0.1 * mean.astype(state["mean"].dtype)}
        h = jnp.tanh(h + params["first"]["bias"][None])
        logits = h @ params["last"]["kernel"] + params["last"]["bias"][None]
        return {"logits": logits, "embedding": h, "stage1": h}, state

    return Model(init, apply)


def make_batch(b: int = 16, *, seed: int = 0, mixed: bool = False) -> dict[str, Any]:
    r = np.random.RandomState(seed)
    batch = {
        "input": jnp.asarray(r.randn(b, SIZE, SIZE, 1)),
        "label": jnp.asarray(r.randint(0, K, b), jnp.int32),
        "mask": jnp.ones(b),
        "index": jnp.arange(b, dtype=jnp.int32),
        "epoch": jnp.zeros(b, jnp.int32),
    }
    if mixed:
        probs = r.rand(b, K)
        batch["label_probs"] = jnp.asarray(probs / probs.sum(1, keepdims=True))
    return batch


class Setup(NamedTuple):
    """Everything a test needs to step an objective."""

    objective: Objective
    models: dict[str, Model]
    shapes: state.Shapes
    init: Any
    step: Any
    frozen: Any


def setup(name: str, *, batch_norm: bool = False, tx=None, batch=None, **step_kwargs) -> Setup:
    """Builds an objective on tiny networks: "teacher" is frozen, every other role learns."""
    objective = importlib.import_module(f"distill_jax.objectives.{name}").make()
    models = {role: tiny_model(batch_norm=batch_norm) for role in objective.roles}
    tx = optax.sgd(0.1, momentum=0.9) if tx is None else tx
    shapes = state.infer_shapes(objective, models, make_batch() if batch is None else batch)
    trainable = tuple(role for role in objective.roles if role != "teacher")
    init = state.make_init(objective, models, tx, shapes, trainable=trainable, ema={})
    step = steps.make_train_step(objective, models, tx, **step_kwargs)
    frozen = {
        role: models[role].init(jax.random.key(7), *state.zeros(shapes.roles[role].inputs))
        for role in objective.roles
        if role == "teacher"
    }
    return Setup(objective, models, shapes, init, step, frozen)


def run(made: Setup, batch, *, mesh=None, n_steps: int = 1, min_size: int = 1):
    """Steps on a mesh (default: eagerly compiled on one device); returns states and metrics."""
    mesh = partition.make_mesh(devices=jax.devices()[:1]) if mesh is None else mesh
    shapes = jax.eval_shape(made.init, jax.random.key(0))
    shardings = partition.infer(shapes, mesh, rules={}, min_size=min_size)
    current = jax.jit(made.init, out_shardings=shardings)(jax.random.key(0))
    batch = jax.device_put(batch, partition.over_batch(mesh))
    frozen = jax.device_put(made.frozen, partition.replicated(mesh))
    key = jax.device_put(jax.random.key(3), partition.replicated(mesh))
    step = jax.jit(
        made.step, donate_argnums=0, out_shardings=(shardings, partition.replicated(mesh))
    )
    history = []
    for _ in range(n_steps):
        current, metrics = step(current, frozen, batch, key)
        history.append({k: float(v) for k, v in metrics.items()})
    assert step._cache_size() == 1, "compiled more than once"
    return jax.device_get(current), history


def max_relative(a, b) -> float:
    """Largest difference of two trees relative to the largest entry of each leaf of `a`."""

    def one(x, y):
        return float(np.max(np.abs(x - y)) / max(np.max(np.abs(x)), 1e-30)) if np.size(x) else 0.0

    a, b = jax.device_get((a, b))
    return max(jax.tree.leaves(jax.tree.map(one, a, b)), default=0.0)
