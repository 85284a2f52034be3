"""Cost and accuracy of the outer gradient: compiler counts, times, and errors of what is cheaper.

  python benchmarks/hypergradient.py --out=benchmarks/results/hypergradient.json
  python benchmarks/hypergradient.py --parts=times --rounds=15  # the rest of the file stays

Counts and times are multiples of a plain distillation step of a ResNet-20 on 32x32x3, batch 128,
from stored teacher logits, so that the unit is the student's alone. "counts" are XLA's FLOPs and
temporary bytes of the whole compiled step, with XLA's own convolutions in place of ours, of whose
loops it counts the body once; they do not depend on the machine's load. "times" are medians over
rounds in which all variants take turns in one process, with our convolutions. "accuracy" compares
with the exact gradient in float64, on the digits of scikit-learn, after some steps of training.
"brute_force" compares the exact gradient with autodiff through the whole inner step, in float64, on
the problem of `tests/core/test_hypergradient.py`.

Everything is per step in which the weighting learns; "every_4" is the mean of one such step and
three in which only the student does.
"""

import argparse
import contextlib
import json
import os
import pathlib
import statistics
import sys
import time
from typing import Any, NamedTuple

import _record
import jax
import jax.numpy as jnp
import numpy as np
import optax

from distill_jax.core import bilevel, state, steps, weighted_objective
from distill_jax.core.api import Dataset, Model
from distill_jax.core.bilevel import Bilevel, Optimizers
from distill_jax.core.weighted_objective import WeightedObjective
from distill_jax.data import digits
from distill_jax.models import convolution, layers, mlp, ratio_mlp, resnet
from distill_jax.objectives import kd, supervised
from distill_jax.run import environment
from distill_jax.weighting import trilateral

K, BATCH, SHAPE = 10, 128, (32, 32, 3)
LOSS_TERMS = ("cross_entropy", "distillation")
HELD_OUT = (128, 32)
OPTIONS = {
    "exact": Bilevel(),
    "low_memory": Bilevel(low_memory=True),
    "finite_difference": Bilevel(method="finite_difference"),
    "last_layer": Bilevel(method="last_layer"),
    "quarter": Bilevel(jvp_fraction=0.25),
    "quarter_finite_difference": Bilevel(jvp_fraction=0.25, method="finite_difference"),
    "lookahead": Bilevel(outer_update="lookahead"),
}
UNROLL = (1, 2, 4, 8)


class Problem(NamedTuple):
    """A bilevel problem: all that its steps and its state are made of."""

    weighted: WeightedObjective
    models: dict[str, Model]
    optimizers: Optimizers

    def step(self, options: Bilevel, *, outer: bool = True) -> steps.StepFn:
        return bilevel.make_bilevel_step(
            self.weighted, self.models, self.optimizers, options, outer=outer
        )

    def init(self, batch: Any) -> Any:
        shapes = state.infer_shapes(self.weighted, self.models, batch)
        trainable = ("student", *self.optimizers.outer_roles)
        return state.make_init(
            self.weighted, self.models, self.optimizers, shapes, trainable=trainable, ema={}
        )


def make_problem(
    student: Model,
    teacher: Model,
    tx: optax.GradientTransformation,
    outer_tx: optax.GradientTransformation,
) -> Problem:
    """A student, a frozen teacher and a ratio network over trilateral features."""
    weighted = WeightedObjective(
        objective=kd.make(temperature=4.0),
        weighting=trilateral.make(),
        loss_terms=LOSS_TERMS,
        num_classes=K,
    )
    models = {"student": student, "teacher": teacher, "weighting": ratio_mlp.make()}
    return Problem(weighted, models, Optimizers(tx, outer_tx, ("weighting",)))


def stored_teacher() -> Model:
    """A "network" whose parameters are the logits of the one batch that there is, `[b, k]`."""

    def apply(params, state, x, *, train, rngs):
        del train, rngs
        # Indexing would trace to nothing for the whole batch, and `replay` compares two traces.
        return {"logits": jax.lax.dynamic_slice(params, (0, 0), (x.shape[0], K))}, state

    return Model(lambda key, x: (jnp.zeros((x.shape[0], K)), {}), apply)


def random_batch(b: int, seed: int) -> dict[str, Any]:
    r = np.random.default_rng(seed)
    return as_batch(r.standard_normal((b, *SHAPE), np.float32), r.integers(0, K, b))


def as_batch(images: np.ndarray, labels: np.ndarray) -> dict[str, Any]:
    b = len(labels)
    return {
        "input": jnp.asarray(images),
        "label": jnp.asarray(labels, jnp.int32),
        "mask": jnp.ones(b),
        "index": jnp.arange(b, dtype=jnp.int32),
        "epoch": jnp.zeros(b, jnp.int32),
    }


def recording(tx: optax.GradientTransformation) -> optax.GradientTransformation:
    """The same optimizer; its state ends with the last gradient."""

    def init(params):
        return tx.init(params), jax.tree.map(jnp.zeros_like, params)

    def update(grads, state, params=None):
        updates, new = tx.update(grads, state[0], params)
        return updates, (new, grads)

    return optax.GradientTransformation(init, update)


class Variant(NamedTuple):
    """One step to be counted or timed."""

    step: steps.StepFn
    init: Any
    fed: Any


def cost_variants() -> dict[str, Variant]:
    """The plain step, the bilevel step without the outer part, and every way of the outer part."""
    student, teacher = resnet.make(num_classes=K, depth=20), stored_teacher()
    tx = optax.sgd(0.01, momentum=0.9)
    problem = make_problem(student, teacher, tx, optax.adam(1e-3))
    train = random_batch(BATCH, 0)
    init = problem.init(train)
    models = {"student": student, "teacher": teacher}
    plain = kd.make(temperature=4.0)
    shapes = state.infer_shapes(plain, models, train)
    plain_init = state.make_init(plain, models, tx, shapes, trainable=("student",), ema={})
    found = {
        "plain": Variant(steps.make_train_step(plain, models, tx), plain_init, train),
        "inner": Variant(problem.step(Bilevel(), outer=False), init, train),
    }
    for name, options in OPTIONS.items():
        for b in HELD_OUT:
            fed = {"train": train, "held_out": random_batch(b, 1)}
            found[f"{name}/{b}"] = Variant(problem.step(options), init, fed)
    for k in UNROLL:
        batches = [random_batch(BATCH, 2 + i) for i in range(k)]
        ahead = jax.tree.map(lambda *x: jnp.stack(x), *batches) if k > 1 else batches[0]
        fed = {"train": ahead, "held_out": random_batch(BATCH, 1)}
        options = Bilevel(outer_update="lookahead", unroll=k)
        found[f"unroll/{k}"] = Variant(problem.step(options), init, fed)
    return found


def stored_logits() -> dict[str, Any]:
    logits = np.random.default_rng(9).standard_normal((BATCH, K), np.float32)
    return {"teacher": (jnp.asarray(logits), {})}


def compiled(variant: Variant, current: Any, frozen: Any, **options: Any) -> Any:
    jitted = jax.jit(variant.step, donate_argnums=0)
    lowered = jitted.lower(current, frozen, variant.fed, jax.random.key(0))
    return lowered.compile(compiler_options=options)


@contextlib.contextmanager
def xla_convolutions():
    ours, layers.conv2d = layers.conv2d, convolution._conv
    try:
        yield
    finally:
        layers.conv2d = ours


def counts() -> dict[str, Any]:
    """FLOPs and temporary memory of every variant, as multiples of the plain step."""
    found: dict[str, tuple[float, float]] = {}
    with xla_convolutions():
        for name, variant in cost_variants().items():
            current = jax.eval_shape(variant.init, jax.random.key(0))
            # The counts are final before LLVM, whose optimization is left out.
            program = compiled(variant, current, stored_logits(), xla_backend_optimization_level=0)
            memory = program.memory_analysis().temp_size_in_bytes
            found[name] = program.cost_analysis()["flops"], memory
            print(name, found[name], flush=True)
    unit = found.pop("plain")
    multiples = {name: (f / unit[0], m / unit[1]) for name, (f, m) in found.items()}
    result: dict[str, Any] = {
        "unit": {"gflops": round(unit[0] / 1e9, 3), "temporary_mib": round(unit[1] / 2**20, 1)}
    }
    for name, (flops, memory) in multiples.items():
        row = {"flops": round(flops, 3), "memory": round(memory, 3)}
        if name != "inner":
            row["flops_every_4"] = round((flops + 3 * multiples["inner"][0]) / 4, 3)
        result[name] = row
    for k in (1, 2):  # one step shares its linearization, more make their passes anew
        share = found["unroll/8"][1] / found[f"unroll/{k}"][1]
        result[f"unroll_memory_8_over_{k}"] = round(share, 3)
    return result


TIMED = "exact/128,exact/32,low_memory/128,last_layer/128,quarter/32,finite_difference/128"


def times(rounds: int, names: list[str]) -> dict[str, Any]:
    """Wall-clock time of some variants, as multiples of the plain step."""
    variants = cost_variants()
    chosen = {name: variants[name] for name in ("plain", "inner", *names)}
    frozen, key = stored_logits(), jax.random.key(0)
    programs, current = {}, {}
    for name, variant in chosen.items():
        current[name] = jax.jit(variant.init)(key)
        programs[name] = compiled(variant, current[name], frozen)
        print("compiled", name, flush=True)

    def run(name: str) -> float:
        start = time.perf_counter()
        current[name], metrics = programs[name](current[name], frozen, chosen[name].fed, key)
        jax.block_until_ready((current[name], metrics))
        return time.perf_counter() - start

    names = list(chosen)
    for name in names:
        run(name)
    found: dict[str, list[float]] = {name: [] for name in names}
    for i in range(rounds):
        for name in names[i % len(names) :] + names[: i % len(names)]:
            found[name].append(run(name))
    plain, inner = np.array(found["plain"]), np.array(found["inner"])
    result: dict[str, Any] = {
        "rounds": rounds,
        "unit_ms": round(1e3 * statistics.median(found["plain"]), 1),
        "load_average": os.getloadavg(),
    }
    for name in names[1:]:
        mine = np.array(found[name])
        result[name] = {"time": round(float(np.median(mine / plain)), 3)}
        if name != "inner":
            every_4 = float(np.median((mine + 3 * inner) / 4 / plain))
            result[name]["time_every_4"] = round(every_4, 3)
    return result


# Accuracy.

NETS = {
    "resnet8": lambda: resnet.make(num_classes=K, depth=8),
    "mlp": lambda: mlp.make(num_classes=K, hidden=(64, 64)),
    "mlp_batch_norm": lambda: mlp.make(num_classes=K, hidden=(64, 64), batch_norm=True),
}
OPTIMIZERS = {
    "heavy_ball": lambda: optax.sgd(0.05, momentum=0.9),
    "adamw": lambda: optax.adamw(1e-3),
}
SMALL_BATCH, WARM_STEPS, PROBES = 128, 20, 5


def flat(tree: Any) -> np.ndarray:
    return np.concatenate([np.ravel(np.asarray(x, np.float64)) for x in jax.tree.leaves(tree)])


def relative(found: np.ndarray, want: np.ndarray) -> float:
    return float(np.linalg.norm(found - want) / np.linalg.norm(want))


def cosine(a: np.ndarray, b: np.ndarray) -> float:
    return float(a @ b / (np.linalg.norm(a) * np.linalg.norm(b)))


def digit_batches(part: Any) -> Any:
    """Returns `(i, size) -> batch`, consecutive rows of a fixed order."""
    data = part.read(np.random.default_rng(0).permutation(len(part)))
    images = data["input"].astype(np.float32) / 255 - 0.5

    def get(i: int, size: int = SMALL_BATCH) -> dict[str, Any]:
        rows = np.arange(i * size, (i + 1) * size) % len(part)
        return as_batch(images[rows], data["label"][rows])

    return get


def trained_teacher(get: Any) -> tuple[Model, Any]:
    model = mlp.make(num_classes=K, hidden=(128,))
    models, objective, tx = {"student": model}, supervised.make(), optax.adam(3e-3)
    shapes = state.infer_shapes(objective, models, get(0))
    init = state.make_init(objective, models, tx, shapes, trainable=("student",), ema={})
    current, step = init(jax.random.key(1)), jax.jit(steps.make_train_step(objective, models, tx))
    for i in range(100):
        current, _ = step(current, {}, get(i), jax.random.key(2))
    return model, (current.params["student"], current.model_state["student"])


def accuracy() -> dict[str, Any]:
    """Errors of every approximation against the exact gradient in float64."""
    data = digits.make(held_out=0.2)
    teacher, weights = trained_teacher(digit_batches(data.train))
    frozen = {"teacher": weights}
    result: dict[str, Any] = {"batch": SMALL_BATCH, "warm_steps": WARM_STEPS, "probes": PROBES}
    for net, make in NETS.items():
        for optimizer, make_tx in OPTIMIZERS.items():
            problem = make_problem(make(), teacher, make_tx(), optax.adam(1e-3))
            name = f"{net}/{optimizer}"
            result[name] = approximations(problem, frozen, data)
            print(name, json.dumps(result[name]), flush=True)
    return result


def approximations(problem: Problem, frozen: Any, data: Dataset) -> dict[str, float]:
    """Medians over batches after some steps of training with the exact gradient."""
    train, held_out = digit_batches(data.train), digit_batches(data.held_out)
    key = jax.random.key(3)
    current = problem.init(train(0))(key)
    everything = train(0, len(data.train))
    sums = problem.weighted.class_sums(_nets(problem, current, frozen), everything, current.memory)
    current = current.replace(
        memory={**current.memory, "class_means": weighted_objective.class_means(*sums)}
    )
    learn = jax.jit(problem.step(Bilevel()))
    for i in range(WARM_STEPS):
        current, _ = learn(current, frozen, {"train": train(i), "held_out": held_out(i)}, key)
    probe = problem._replace(optimizers=problem.optimizers._replace(outer=recording(optax.sgd(0))))
    silent = probe.optimizers.outer.init({"weighting": current.params["weighting"]})
    current = current.replace(opt_state={**current.opt_state, "outer": silent})
    names = ("exact", "finite_difference", "last_layer", "quarter")
    gradients = {name: jax.jit(probe.step(OPTIONS[name])) for name in names}

    def gradient(name: str, i: int, seed: int = 0) -> np.ndarray:
        fed = {"train": train(WARM_STEPS + i), "held_out": held_out(WARM_STEPS + i)}
        args = (current, frozen, fed)
        if jax.config.jax_enable_x64:  # pyright: ignore[reportAttributeAccessIssue]
            args = jax.tree.map(widen, args)
        new, _ = gradients[name](*args, jax.random.key(seed))
        return flat(new.opt_state["outer"][-1])

    rows: list[dict[str, float]] = []
    for i in range(PROBES):
        with jax.enable_x64(True):
            want, wide = gradient("exact", i), gradient("finite_difference", i)
        exact, difference, last = (gradient(name, i) for name in names[:3])
        parts: dict[bytes, np.ndarray] = {}
        seed = 0
        while len(parts) < 4:
            part = gradient("quarter", i, seed)
            parts[part.tobytes()] = part
            seed += 1
        quarters = np.stack(list(parts.values()))
        mean = quarters.mean(0)
        spread = np.sqrt(((quarters - mean) ** 2).sum(1).mean())
        rows.append(
            {
                "exact_float32_error": relative(exact, want),
                "finite_difference_error": relative(difference, want),
                "finite_difference_cosine": cosine(difference, want),
                "finite_difference_float64_error": relative(wide, want),
                "last_layer_error": relative(last, want),
                "last_layer_cosine": cosine(last, want),
                "quarter_deviation": float(spread / np.linalg.norm(want)),
                "quarter_bias": relative(mean, want),
                "quarter_cosine": float(np.mean([cosine(q, want) for q in quarters])),
                "gradient_norm": float(np.linalg.norm(want)),
            }
        )
    return {k: float(f"{statistics.median(row[k] for row in rows):.6g}") for k in rows[0]}


def _nets(problem: Problem, current: Any, frozen: Any) -> steps.BoundNets:
    params = {role: p for role, (p, _) in frozen.items()} | dict(current.params)
    model_state = {role: s for role, (_, s) in frozen.items()} | dict(current.model_state)
    return steps.BoundNets(problem.models, params, model_state, key=jax.random.key(0))


def widen(x: Any) -> Any:
    return x.astype(jnp.float64) if jnp.issubdtype(x.dtype, jnp.floating) else x


CHECKED = {
    "after_step": Bilevel(),
    "lookahead": Bilevel(outer_update="lookahead"),
    "low_memory": Bilevel(low_memory=True),
    "finite_difference": Bilevel(method="finite_difference"),
}


def brute_force() -> dict[str, Any]:
    """Largest relative error of the exact gradient for every optimizer of the test."""
    sys.path.insert(0, str(pathlib.Path(__file__).resolve().parents[1]))
    from tests import harness
    from tests.core import test_hypergradient as test

    result: dict[str, Any] = {}
    with jax.enable_x64(True):
        for name in test.CHAINS:
            problem = test.Problem(test.chain(name))
            want = problem.brute_force([problem.train])
            row = {
                key: harness.max_relative(want, problem.gradient(options)[0])
                for key, options in CHECKED.items()
            }
            batches = [problem.train, harness.make_batch(16, seed=20)]
            want = problem.brute_force(batches)
            stacked = jax.tree.map(lambda *x: jnp.stack(x), *batches)
            got, _, _ = problem.gradient(Bilevel(outer_update="lookahead", unroll=2), train=stacked)
            row["unroll_2"] = harness.max_relative(want, got)
            result[name] = {k: float(f"{v:.3g}") for k, v in row.items()}
            print(name, json.dumps(result[name]), flush=True)
    return result


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--parts", default="counts,accuracy,brute_force,times")
    parser.add_argument("--skip-time", action="store_true", help="all parts but the last")
    parser.add_argument("--rounds", type=int, default=9, help="of the times")
    parser.add_argument("--timed", default=TIMED, help="variants of which times are taken")
    parser.add_argument("--out", default="benchmarks/results/hypergradient.json")
    args = parser.parse_args()
    jax.config.update("jax_num_cpu_devices", 1)
    environment.keep_freed_memory()
    out = pathlib.Path(args.out)
    result = json.loads(out.read_text()) if out.exists() else {}
    result |= {
        "net": "ResNet-20, 32x32x3, batch 128",
        "device": jax.devices()[0].device_kind,
        "cores": os.cpu_count(),
        "versions": _record.versions("jax", "jaxlib", "flax", "optax"),
    }
    measure = {"counts": counts, "accuracy": accuracy, "brute_force": brute_force}
    measure["times"] = lambda: times(args.rounds, args.timed.split(","))
    for name in args.parts.split(","):
        if name == "times" and args.skip_time:
            continue
        result[name] = measure[name]()
        _record.write(result, out)


if __name__ == "__main__":
    main()
