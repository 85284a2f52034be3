"""Our distillation step against a hand-written `jit` loop of the same networks and data.

  python benchmarks/step_overhead.py --out=benchmarks/results/step_overhead.json

Both loops run in one process on one device, in alternating blocks; the figure is the median over
blocks of the ratio of neighbouring blocks. "step" compares complete loops: ours has the loader, the
progress bar and the bookkeeping of the shell, the hand-written one slices a permutation. A second
hand-written side gives the noise of the ratio. "loader" compares our loop fed by the loader with
our loop fed one constant device batch, and "watch" our loop with what it says of where it is, and
the thread that writes it down, with our loop without. On a busy machine, the ratios of processor
time mean more than those of the clock, above all on one core (`taskset -c 1`).
"""

import argparse
import io
import json
import os
import pathlib
import tempfile
import time

import _record
import jax
import jax.numpy as jnp
import numpy as np
import optax

from distill_jax.core import partition, rng, state, steps
from distill_jax.data import loader, synthetic, transforms
from distill_jax.models import mlp, resnet
from distill_jax.objectives import kd
from distill_jax.run import watch, writers
from distill_jax.run.train.stepping import IN_FLIGHT, wait_every

NETS = {
    # name: (student, teacher, image size, channels, batch, steps in a block)
    "resnet20": (
        lambda: resnet.make(num_classes=10, depth=20),
        lambda: resnet.make(num_classes=10, depth=20),
        32,
        3,
        64,
        2,
    ),
    "mlp": (
        lambda: mlp.make(num_classes=10, hidden=(256, 256)),
        lambda: mlp.make(num_classes=10, hidden=(512, 512)),
        28,
        1,
        64,
        48,
    ),
    # So small that the time is that of the loop: shows what our loop adds, in microseconds.
    "tiny": (
        lambda: mlp.make(num_classes=10, hidden=(16, 16)),
        lambda: mlp.make(num_classes=10, hidden=(16, 16)),
        28,
        1,
        64,
        64,
    ),
}
TEMPERATURE, ALPHA = 4.0, 0.9


def hand_written(student, teacher, tx, batch_size):
    """What a careful user writes: one jitted function, no framework."""

    def loss_fn(params, model_state, frozen, x, y):
        out, model_state = student.apply(params, model_state, x, train=True, rngs={})
        target, _ = teacher.apply(*frozen, x, train=False, rngs={})
        s, t = out["logits"], jax.lax.stop_gradient(target["logits"])
        ce = optax.softmax_cross_entropy_with_integer_labels(s, y).mean()
        log_s, log_t = (jax.nn.log_softmax(z / TEMPERATURE) for z in (s, t))
        kl = TEMPERATURE**2 * (jnp.exp(log_t) * (log_t - log_s)).sum(-1).mean()
        return ALPHA * kl + (1 - ALPHA) * ce, model_state

    @jax.jit
    def normalize(x):
        return x.astype(jnp.float32) / 255

    def step(carry, frozen, images, labels, order, i):
        params, model_state, opt_state = carry
        rows = jax.lax.dynamic_slice_in_dim(order, i * batch_size, batch_size)
        x, y = normalize(images[rows]), labels[rows]
        (loss, model_state), grads = jax.value_and_grad(loss_fn, has_aux=True)(
            params, model_state, frozen, x, y
        )
        updates, opt_state = tx.update(grads, opt_state, params)
        return (optax.apply_updates(params, updates), model_state, opt_state), loss

    return jax.jit(step, donate_argnums=0)


def make_sides(name):
    make_student, make_teacher, size, channels, b, block = NETS[name]
    student, teacher = make_student(), make_teacher()
    data = synthetic.make(n_train=2048, image_size=size, channels=channels, num_classes=10)
    tx = optax.sgd(0.01, momentum=0.9)
    objective = kd.make(temperature=TEMPERATURE, alpha=ALPHA)
    models = {"student": student, "teacher": teacher}
    mesh = partition.make_mesh()
    resident = loader.ResidentLoader(
        data.train, batch_size=b, seed=0, sharding=partition.replicated(mesh)
    )
    transform = transforms.compose({"scale": transforms.make_scale()})
    key = jax.device_put(jax.random.key(0), partition.replicated(mesh))
    raw = loader.fetch_resident(resident.data, resident.window(0), jnp.int32(0), batch_size=b)
    constant = transform(key, raw, jnp.int32(0))
    shapes = state.infer_shapes(objective, models, jax.eval_shape(lambda: constant))
    init = state.make_init(objective, models, tx, shapes, trainable=("student",), ema={})
    frozen = {"teacher": jax.jit(teacher.init)(jax.random.key(1), constant["input"])}
    core_step = steps.make_train_step(objective, models, tx)

    def update(state, frozen, batch, key):
        state, metrics = core_step(state, frozen, batch, key)
        return state, jnp.stack(list(metrics.values()))

    def fed(state, frozen, arrays, window, key):
        batch = loader.fetch_resident(arrays, window, state.step, batch_size=b)
        batch = transform(rng.stream(key, "transform"), batch, state.step)
        return update(state, frozen, batch, key)

    def ours(fn, feed, log_line=watch.enter):
        current = jax.jit(init)(key)
        compiled = jax.jit(fn, donate_argnums=0).lower(current, frozen, *feed(0), key).compile()
        box = {"state": current, "step": 0, "pace": None}
        progress = writers.Progress(10**9, file=io.StringIO())

        def run():
            pending, every, began = [], wait_every(box["pace"]), time.perf_counter()
            for _ in range(block):
                log_line("data")
                arguments = feed(box["step"])
                log_line("dispatch")
                box["state"], metrics = compiled(box["state"], frozen, *arguments, key)
                box["step"] += 1
                pending.append(metrics)
                if len(pending) % every == 0:
                    log_line("device")
                    pending[-IN_FLIGHT].block_until_ready()
                log_line("other")
                progress.update(box["step"])
            for metrics in pending:
                np.asarray(metrics)
            box["pace"] = (time.perf_counter() - began) / block

        return run

    images, labels = resident.data["input"], resident.data["label"]
    order = jnp.asarray(np.random.default_rng(0).permutation(len(data.train)))
    per_epoch = len(data.train) // b

    def hand():
        params, model_state = jax.jit(student.init)(jax.random.key(0), constant["input"])
        by_hand = hand_written(student, teacher, tx, b)
        box = {"carry": (params, model_state, tx.init(params)), "step": 0}

        def run():
            loss = None
            for _ in range(block):
                i = box["step"] % per_epoch
                box["carry"], loss = by_hand(
                    box["carry"], frozen["teacher"], images, labels, order, i
                )
                box["step"] += 1
            jax.block_until_ready(loss)

        return run

    return {
        "ours": ours(fed, lambda step: (resident.data, resident.window(step))),
        "hand_written": hand(),
        "hand_written_again": hand(),
        "ours_unwatched": ours(
            fed, lambda step: (resident.data, resident.window(step)), lambda phase: None
        ),
        "ours_constant_batch": ours(update, lambda step: (constant,)),
    }


def alternate(sides, *, seconds):
    """Seconds per block of each side `[2, blocks]`, of the clock and of the processor.

    Blocks are interleaved in rotating order.
    """
    for run in sides.values():
        run()
        run()
    names, clocks = list(sides), (time.perf_counter, time.process_time)
    found = {name: [] for name in names}
    began, i = time.perf_counter(), 0
    while time.perf_counter() - began < seconds:
        for name in names[i % len(names) :] + names[: i % len(names)]:
            start = [clock() for clock in clocks]
            sides[name]()
            found[name].append([clock() - t for clock, t in zip(clocks, start, strict=True)])
        i += 1
    return {name: np.array(rows).T for name, rows in found.items()}


def ratio(a, b):
    """Medians of the ratio of neighbouring blocks, of the clock and of the processor."""
    wall, processor = np.median(a / b, axis=1)
    return {"wall": float(wall), "processor": float(processor), "blocks": a.shape[1]}


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seconds", type=float, default=90.0, help="for each net")
    parser.add_argument("--net", default="", help="one of them; by default all")
    parser.add_argument("--out", default="")
    options = parser.parse_args()
    jax.config.update("jax_num_cpu_devices", 1)
    results = {}
    for name, (*_, block) in NETS.items():
        if options.net not in ("", name):
            continue
        folder = pathlib.Path(tempfile.mkdtemp(prefix="step_overhead"))
        with watch.Watch([folder], total=10**9, stall_seconds=600.0):
            seconds = alternate(make_sides(name), seconds=options.seconds)
        sides = {side: values / block for side, values in seconds.items()}
        ours, hand = sides["ours"], sides["hand_written"]
        results[name] = {
            "milliseconds": {s: float(np.median(v[0]) * 1e3) for s, v in sides.items()},
            "processor_milliseconds": {s: float(np.median(v[1]) * 1e3) for s, v in sides.items()},
            "step_over_hand_written": ratio(ours, hand),
            "added_microseconds": {
                clock: float(np.median(ours[i] - hand[i]) * 1e6)
                for i, clock in enumerate(("wall", "processor"))
            },
            "noise": ratio(sides["hand_written_again"], hand),
            "watch_over_unwatched": ratio(ours, sides["ours_unwatched"]),
            "loader_over_constant_batch": ratio(ours, sides["ours_constant_batch"]),
        }
        print(name, json.dumps(results[name], indent=1), flush=True)
    report = {
        "results": results,
        "seconds": options.seconds,
        "device": jax.devices()[0].device_kind,
        "cores": os.cpu_count(),
        "load": os.getloadavg()[0],
        "versions": _record.versions("jax", "flax", "optax", "numpy"),
    }
    _record.write(report, options.out)


if __name__ == "__main__":
    main()
