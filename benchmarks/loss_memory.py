"""Temporaries of the losses of bfloat16 logits as compiled, in float32 arrays of their shape.

  python benchmarks/loss_memory.py --out=benchmarks/results/loss_memory.json

Of the gradient of each loss with respect to the logits `[256, 50,000]`, compiled from shapes for
the default device, and the processor time of one call. "autodiff" is the same loss without a
derivative of its own.
"""

import argparse
import pathlib
import statistics
import time

import _record
import jax
import jax.numpy as jnp
import optax

from distill_jax.losses import classification, divergences, logits

ROWS, CLASSES, CALLS = 256, 50_000, 7


def plain_kl(student, teacher, *, temperature):
    log_p, log_q = (jax.nn.log_softmax(z / temperature) for z in (teacher, student))
    return temperature**2 * divergences.kl(log_p, log_q)


def plain_cross_entropy(logits, label):
    return optax.softmax_cross_entropy_with_integer_labels(logits, label)


def plain_smoothed(logits, label, *, smoothing):
    uniform = -jax.nn.log_softmax(logits).mean(-1)
    return (1 - smoothing) * plain_cross_entropy(logits, label) + smoothing * uniform


def plain_divergence(kind, student, teacher):
    log_p, log_q = jax.nn.log_softmax(teacher), jax.nn.log_softmax(student)
    return divergences.DIVERGENCES[kind](log_p, log_q, 0.5)


def plain_teacher(student, teacher, *, temperature):
    log_p, log_q = (jax.nn.log_softmax(z / temperature) for z in (teacher, student))
    return -(temperature**2) * (jnp.exp(log_p) * log_q).sum(-1)


LOSSES = {
    "cross_entropy": lambda z, t, y: classification.cross_entropy(z, y),
    "cross_entropy, autodiff": lambda z, t, y: plain_cross_entropy(z, y),
    "smoothing 0.1": lambda z, t, y: classification.cross_entropy(z, y, smoothing=0.1),
    "smoothing 0.1, autodiff": lambda z, t, y: plain_smoothed(z, y, smoothing=0.1),
    "teacher_cross_entropy": lambda z, t, y: logits.teacher_cross_entropy(z, t, temperature=4.0),
    "teacher_cross_entropy, autodiff": lambda z, t, y: plain_teacher(z, t, temperature=4.0),
    "distillation_kl": lambda z, t, y: classification.distillation_kl(z, t, temperature=4.0),
    "distillation_kl, autodiff": lambda z, t, y: plain_kl(z, t, temperature=4.0),
    **{
        name: loss
        for kind in ("reverse", "jeffreys", "jensen_shannon")
        for name, loss in (
            (kind, lambda z, t, y, kind=kind: divergences.softmax_divergence(kind, t, z)),
            (f"{kind}, autodiff", lambda z, t, y, kind=kind: plain_divergence(kind, z, t)),
        )
    },
    "decoupled_kl": lambda z, t, y: sum(logits.decoupled_kl(z, t, y, temperature=4.0)),
}


def measure(loss):
    """Returns temporaries in float32 arrays `[ROWS, CLASSES]`, and milliseconds of a call."""

    def mean(z, t, y):
        return loss(z.astype(jnp.float32), t.astype(jnp.float32), y).mean()

    keys = jax.random.split(jax.random.key(0))
    z, t = (3 * jax.random.normal(k, (ROWS, CLASSES), jnp.bfloat16) for k in keys)
    y = jnp.arange(ROWS) % CLASSES
    compiled = jax.jit(jax.grad(mean)).lower(z, t, y).compile()
    analysis, times = compiled.memory_analysis(), []
    assert analysis is not None
    for _ in range(CALLS):
        began = time.process_time()
        jax.block_until_ready(compiled(z, t, y))
        times.append(time.process_time() - began)
    copies = analysis.temp_size_in_bytes / (4 * ROWS * CLASSES)
    return {"float32_copies": round(copies, 2), "cpu_ms": round(1e3 * statistics.median(times), 2)}


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--out", type=pathlib.Path)
    options = parser.parse_args()
    report = {
        "results": {name: measure(loss) for name, loss in LOSSES.items()},
        "device": jax.devices()[0].device_kind,
        "seed": 0,
        "versions": _record.versions("jax", "jaxlib", "optax"),
    }
    _record.write(report, options.out, show=True)


if __name__ == "__main__":
    main()
