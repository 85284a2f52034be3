"""What a weighting learns, for `outer_gradients.py`: runs of several seeds and rates at once.

A program is the package's step of one estimate, mapped over runs and scanned over steps. Every seed
draws initial weights, the order of examples and the halves of the held-out images.
"""

import dataclasses
import functools
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from distill_jax.core import bilevel, state, steps, weighted_objective
from distill_jax.core.api import Model
from distill_jax.core.bilevel import Bilevel, Optimizers
from distill_jax.core.weighted_objective import WeightedObjective
from distill_jax.data import fashion_mnist_5k
from distill_jax.models import convnet, mlp, ratio_mlp
from distill_jax.objectives import kd, supervised
from distill_jax.weighting import constant, trilateral

K, WIDE, TEMPERATURE = 10, 14 * 14, 4.0
LENGTH, SIZE, OUTER, HIDDEN = 1000, 128, 250, 128
OUTER_RATE = 1e-2
LANES = 12  # runs of one call, which bounds its memory


@dataclasses.dataclass(frozen=True, kw_only=True)
class Way:
    """How a ratio comes about.

    Attributes:
      options: of the outer gradient; None for a constant ratio.
      every: steps between two outer steps.
      optimizer: of the outer level, "adamw" or "sgd".
      average: decay of an average of the outer gradients, `optax.ema`; 0 takes none.
      momentum: b1 of "adamw".
      scalar: whether the network sees nothing, so that one ratio for all examples is learned.
      rate: outer learning rate, where a run brings none.
      start: initial ratio of every example.
    """

    options: Bilevel | None = None
    every: int = 1
    optimizer: str = "adamw"
    average: float = 0.0
    momentum: float = 0.9
    scalar: bool = False
    rate: float = OUTER_RATE
    start: float = 0.5

    def outer(self, rate: Any) -> optax.GradientTransformation:
        if self.optimizer == "sgd":
            last = optax.sgd(rate)
        else:
            last = optax.adamw(rate, b1=self.momentum, weight_decay=1e-4)
        return optax.chain(optax.ema(self.average), last) if self.average else last

    @property
    def first(self) -> int:
        """The first step in which the weighting learns."""
        return max(39, self.options.batches - 1 if self.options else 0)


def truncated(steps_back: int, **kwargs: Any) -> Way:
    first = max(39, steps_back - 1)
    options = Bilevel(method="truncated", horizon=steps_back, every=steps_back, warmup=first)
    return Way(options=options, every=steps_back, **kwargs)


ONE_STEP, CG = Bilevel(), Bilevel(method="cg", horizon=5, damping=0.1)
WAYS = {
    "one_step": Way(options=ONE_STEP),
    "one_step_no_average": Way(options=ONE_STEP, momentum=0.0),
    "one_step_average_100": Way(options=ONE_STEP, momentum=0.99),
    "neumann_20": Way(options=Bilevel(method="neumann", horizon=20), every=20),
    "cg_5": Way(options=CG),
    "cg_5_no_average": Way(options=CG, momentum=0.0),
    "cg_5_average_100": Way(options=CG, momentum=0.99),
    "truncated_20": truncated(20),
    "one_step_scalar": Way(options=ONE_STEP, scalar=True),
    "cg_5_scalar": Way(options=CG, scalar=True),
    "truncated_20_scalar": truncated(20, scalar=True),
    "truncated_20_scalar_fast": truncated(20, scalar=True, rate=0.1),
    "two_speed_scalar": Way(options=Bilevel(method="two_speed"), scalar=True),
    "unrolled_20": Way(options=Bilevel(outer_update="lookahead", unroll=20), every=20),
    "two_speed": Way(options=Bilevel(method="two_speed")),
    "two_speed_every_4": Way(options=Bilevel(method="two_speed"), every=4),
}
FROM = "_from_0.1"
WAYS |= {
    name + FROM: dataclasses.replace(WAYS[name], start=0.1)
    for name in WAYS
    if name in ("one_step", "truncated_20", "two_speed")
    or name in ("one_step_scalar", "cg_5_scalar", "truncated_20_scalar_fast", "two_speed_scalar")
}
RATIOS = ("0.1", "0.2", "0.3", "0.4", "0.5", "0.6", "0.7", "0.8", "0.9")


def seen(model: Model, part: slice) -> Model:
    """The network, on some columns of the input."""

    def init(key, x):
        return model.init(key, x[:, part])

    def apply(params, state, x, *, train, rngs):
        return model.apply(params, state, x[:, part], train=train, rngs=rngs)

    return Model(init, apply)


def blind(model: Model) -> Model:
    """The network, on zeros in place of the input."""

    def apply(params, state, x, *, train, rngs):
        return model.apply(params, state, jnp.zeros_like(x), train=train, rngs=rngs)

    return Model(model.init, apply)


def answers() -> Model:
    """The teacher: its logits are the last columns of the input."""

    def apply(params, state, x, *, train, rngs):
        del params, train, rngs
        return {"logits": x[:, WIDE:]}, state

    return Model(lambda key, x: ({}, {}), apply)


def batch_of(x: Any, y: Any) -> dict[str, Any]:
    rows = jnp.arange(len(y), dtype=jnp.int32)
    given = {"input": jnp.asarray(x, jnp.float32), "label": jnp.asarray(y, jnp.int32)}
    return {**given, "mask": jnp.ones(len(y)), "index": rows, "epoch": jnp.zeros_like(rows)}


@functools.cache
def fashion() -> dict[str, tuple[np.ndarray, np.ndarray]]:
    """Parts of pixels at 14x14 and teacher logits `[n, 196 + 10]`."""
    data = fashion_mnist_5k.make(held_out=0.1)
    parts = {}
    for name, part in data.parts.items():
        rows = part.read(np.arange(len(part)))
        x = rows["input"].astype(np.float32).reshape(-1, 14, 2, 14, 2).mean((2, 4)) / 255
        parts[name] = (x - 0.2861) / 0.33, rows["label"]
    model = convnet.make(num_classes=K, widths=(16, 32, 64))
    x, y = parts["train"]
    objective, models = supervised.make(), {"student": model}
    tx = optax.sgd(optax.cosine_decay_schedule(0.1, 600), momentum=0.9, nesterov=True)
    shapes = state.infer_shapes(objective, models, batch_of(x[:SIZE, ..., None], y[:SIZE]))
    init = state.make_init(objective, models, tx, shapes, trainable=("student",), ema={})
    now, step = init(jax.random.key(5)), jax.jit(steps.make_train_step(objective, models, tx))
    draw = np.random.default_rng(5)
    for _ in range(600):
        rows = draw.integers(0, len(y), SIZE)
        now, _ = step(now, {}, batch_of(x[rows][..., None], y[rows]), jax.random.key(0))
    params, model_state = now.params["student"], now.model_state["student"]
    ask = jax.jit(lambda x: model.apply(params, model_state, x, train=False, rngs={})[0]["logits"])
    result = {}
    for name, (x, y) in parts.items():
        logits = np.concatenate(
            [np.asarray(ask(x[i : i + 500, ..., None])) for i in range(0, len(y), 500)]
        )
        print(name, "teacher", round(float((logits.argmax(1) == y).mean()), 4), flush=True)
        result[name] = np.concatenate([x.reshape(len(y), -1), logits], axis=1), y
    return result


def data_of(setting: str) -> dict[str, tuple[np.ndarray, np.ndarray]]:
    """Returns "clean" or "two_sources": 45 % wrong labels, and a teacher wrong on two classes."""
    parts = dict(fashion())
    if setting == "two_sources":
        x, y = parts["train"]
        logits = np.where((y < 2)[:, None], np.roll(x[:, WIDE:], 3, axis=1), x[:, WIDE:])
        wrong = np.random.default_rng(0).random(len(y)) < 0.45
        parts["train"] = np.concatenate([x[:, :WIDE], logits], 1), np.where(wrong, (y + 1) % K, y)
    return parts


class Program:
    """The compiled runs of a way; `run` is `lane -> (student, ratios, norms)` of one of them."""

    def __init__(self, way: Way, parts: Mapping[str, Any], length: int = LENGTH):
        self.way, self.length = way, length
        self.parts = jax.tree.map(jnp.asarray, dict(parts))
        self.student = seen(mlp.make(num_classes=K, hidden=(HIDDEN,)), slice(0, WIDE))
        self.models = {"student": self.student, "teacher": answers()}
        if way.options is not None:
            net = ratio_mlp.make(hidden=(HIDDEN,), ratio=way.start)
            self.models["weighting"] = blind(net) if way.scalar else net
        self.roles = ("weighting",) if way.options is not None else ()
        self.means = self._class_means() if way.options is not None else None
        self.runs = jax.jit(jax.vmap(self._run))

    def _objective(self, ratio: Any) -> WeightedObjective:
        if self.way.options is not None:
            weighting: Any = trilateral.make()
        else:
            weighting = constant.make()
            object.__setattr__(weighting, "ratio", ratio)  # may be traced
        return WeightedObjective(
            objective=kd.make(temperature=TEMPERATURE),
            weighting=weighting,
            loss_terms=("cross_entropy", "distillation"),
            num_classes=K,
        )

    def _optimizers(self, rate: Any) -> Any:
        along = optax.warmup_cosine_decay_schedule(0, 0.05, 40, self.length)
        inner = optax.sgd(along, momentum=0.9, nesterov=True)
        if self.way.options is None:
            return inner
        return Optimizers(inner, self.way.outer(rate), self.roles, self.way.options.method)

    def _start(self, objective: Any, tx: Any, key: Any) -> Any:
        x, y = self.parts["train"]
        shapes = state.infer_shapes(objective, self.models, batch_of(x[:SIZE], y[:SIZE]))
        trainable = ("student", *self.roles)
        init = state.make_init(objective, self.models, tx, shapes, trainable=trainable, ema={})
        return init(key)

    def _class_means(self) -> Any:
        objective, key = self._objective(0.5), jax.random.key(0)
        now = self._start(objective, self._optimizers(OUTER_RATE), key)
        nets = steps.bind_networks(self.models, now, {"teacher": ({}, {})}, key=key)
        sums = objective.class_sums(nets, batch_of(*self.parts["train"]), now.memory)
        return weighted_objective.class_means(*sums)

    def _run(self, lane: Mapping[str, Any]) -> Any:
        way, (x, y) = self.way, self.parts["train"]
        objective, tx = self._objective(lane["ratio"]), self._optimizers(lane["rate"])
        key = jax.random.key(lane["seed"])
        now, frozen = self._start(objective, tx, key), {"teacher": ({}, {})}
        batch_at = lambda t: batch_of(x[lane["rows"][t]], y[lane["rows"][t]])  # noqa: E731
        if way.options is None:
            plain = outer = steps.make_train_step(objective, self.models, tx)
        else:
            now = now.replace(memory={**now.memory, "class_means": self.means})
            made = objective, self.models, tx, way.options
            plain, outer = (bilevel.make_bilevel_step(*made, outer=o) for o in (False, True))
        held = jax.tree.map(lambda a: a[lane["outer"]], self.parts["held_out"])
        held = batch_of(*held)

        def one(now, t):
            now, metrics = plain(now, frozen, batch_at(t), key)
            return now, metrics["weight/distillation"]

        def period(now, t):
            options = way.options
            if options is None:
                return one(now, t)[0], jnp.zeros(2)
            if options.batches > 1:
                shift = jnp.arange(options.batches) - options.back
                train = jax.vmap(batch_at)(jnp.minimum(t + shift, self.length - 1))
            else:
                train = batch_at(t)
            now, metrics = outer(now, frozen, {"train": train, "held_out": held}, key)
            now, ratios = jax.lax.scan(one, now, t + 1 + jnp.arange(way.every - 1))
            ratio = (ratios.sum() + metrics["weight/distillation"]) / way.every
            return now, jnp.stack([ratio, metrics["outer_grad_norm"]])

        first = way.first
        count = (self.length - first) // way.every
        now, _ = jax.lax.scan(one, now, jnp.arange(first))
        now, along = jax.lax.scan(period, now, first + way.every * jnp.arange(count))
        now, _ = jax.lax.scan(one, now, jnp.arange(first + way.every * count, self.length))
        student = now.params["student"], now.model_state["student"]
        tail = max(1, round(100 / way.every))
        learned = way.options is not None
        ratio = along[-tail:, 0].mean() if learned else lane["ratio"]
        found = {"ratio": ratio, "grad_norm": along[:, 1].mean()}
        return {**found, **self._measures(student, lane)}

    def _measures(self, student: Any, lane: Mapping[str, Any]) -> dict[str, Any]:
        found = {}
        for name in ("outer", "select", "test"):
            x, y = self.parts["test"]
            if name != "test":
                x, y = (a[lane[name]] for a in self.parts["held_out"])
            out, _ = self.student.apply(*student, x, train=False, rngs={})
            loss = optax.softmax_cross_entropy_with_integer_labels(out["logits"], y).mean()
            found |= {name: (out["logits"].argmax(1) == y).mean(), f"{name}_loss": loss}
        return found

    def __call__(self, lanes: Sequence[Mapping[str, float]]) -> list[dict[str, float]]:
        """Trains runs of `seed`, `rate` and `ratio`; returns their measures."""
        found: list[dict[str, float]] = []
        for at in range(0, len(lanes), LANES):
            some = [{"rate": self.way.rate, **lane} for lane in lanes[at : at + LANES]]
            filled = [lane_of(lane, self.parts, self.length) for lane in some]
            stacked = jax.tree.map(lambda *leaves: np.stack(leaves), *filled)
            values = jax.device_get(self.runs(stacked))
            found += [{k: float(v[i]) for k, v in values.items()} for i in range(len(filled))]
        return found


def lane_of(lane: Mapping[str, float], parts: Mapping[str, Any], length: int) -> dict[str, Any]:
    seed = int(lane["seed"])
    draw, count = np.random.default_rng(seed), len(parts["train"][1])
    epochs = [draw.permutation(count) for _ in range(length * SIZE // count + 2)]
    rows = np.concatenate(epochs)[: length * SIZE].reshape(length, SIZE).astype(np.int32)
    half = draw.permutation(len(parts["held_out"][1])).astype(np.int32)
    return {
        "seed": np.uint32(seed),
        "rate": np.float32(lane["rate"]),
        "ratio": np.float32(lane.get("ratio", 0.5)),
        "rows": rows,
        "outer": half[:OUTER],
        "select": half[OUTER:],
    }


def summary(runs: Sequence[Mapping[str, float]]) -> dict[str, Any]:
    return {
        k: {
            "mean": round(float(np.mean([run[k] for run in runs])), 4),
            "runs": [round(run[k], 4) for run in runs],
        }
        for k in runs[0]
    }


def learned(seeds: int, arms: Sequence[str], found: dict[str, Any]) -> Iterator[dict[str, Any]]:
    """Yields what is known after each arm, with the arms of `found` that had as many seeds."""
    parts = data_of("clean")
    rows = dict(found.get("arms", {})) if found.get("seeds") == seeds else {}
    constants = Program(Way(), parts)
    for name in arms:
        if name in WAYS:
            runs = Program(WAYS[name], parts)([{"seed": s} for s in range(seeds)])
        else:
            runs = constants([{"seed": s, "ratio": float(name)} for s in range(seeds)])
        rows[name] = summary(runs)
        print(name, {k: v["mean"] for k, v in rows[name].items()}, flush=True)
        tried = [name for name in rows if name not in WAYS]
        best = {
            by: max(tried, key=lambda name: sign * rows[name][by]["mean"])
            for by, sign in (("select", 1), ("select_loss", -1), ("outer_loss", -1))
            if tried
        }
        yield {"seeds": seeds, "best_constant": best, "arms": rows}


# The outer learning rate.

HORIZONS = (1, 5, 20, 100)
RATES = {
    "adamw": (1e-3, 3e-3, 1e-2, 3e-2, 1e-1, 3e-1),
    "sgd": (0.1, 0.3, 1.0, 3.0, 10.0, 30.0),
}


def rates(seeds: int, found: dict[str, Any]) -> Iterator[dict[str, Any]]:
    """Yields `{setting/K/optimizer: {rate: measures}}` after each program that `found` lacks."""
    for setting in ("clean", "two_sources"):
        parts = data_of(setting)
        for steps_back in HORIZONS:
            for optimizer, grid in RATES.items():
                name = f"{setting}/{steps_back}/{optimizer}"
                known = found.get(name, {}).values()
                if known and all(len(row["test"]["runs"]) == seeds for row in known):
                    continue
                program = Program(truncated(steps_back, optimizer=optimizer), parts)
                lanes = [{"seed": s, "rate": rate} for rate in grid for s in range(seeds)]
                runs = program(lanes)
                rows = {
                    f"{rate:g}": summary(runs[i * seeds : (i + 1) * seeds])
                    for i, rate in enumerate(grid)
                }
                found = {**found, name: rows}
                best = min(rows, key=lambda rate: rows[rate]["select_loss"]["mean"])
                print(name, best, {k: v["mean"] for k, v in rows[best].items()}, flush=True)
                yield found
