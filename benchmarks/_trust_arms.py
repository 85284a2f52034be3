"""Programs of the suite of learned trust: many runs of one method side by side (`trust_suite.py`).

A program is the package's step of a method, mapped over runs that differ in seed, situation,
numbers and initial ratio, and scanned over steps.
"""

import dataclasses
import functools
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from _trust_situations import BATCH, Domain, Tables

from distill_jax.core import bilevel, state, steps
from distill_jax.core.bilevel import Bilevel, Optimizers
from distill_jax.core.weighted_objective import WeightedObjective
from distill_jax.models import ratio_mlp
from distill_jax.objectives import kd
from distill_jax.weighting import meta_weight_net, reweight, teacher_margin, trilateral, wsl

LENGTH, CHUNK, WARMUP, EVALUATE = 400, 40, 40, 200
"""Steps of a run, of a compiled piece, before the weighting learns, and between evaluations."""
TERMS = ("cross_entropy", "distillation")
NUMBERS = {
    "lr": 1.0,
    "length": float(LENGTH),
    "temperature": 4.0,
    "outer_lr": 1e-2,
    "scale": 2.5,
    "centre": 0.5,
}
"""Numbers of a run and their defaults, `lr` as a factor of the domain's rate."""


class GivenRatio(kd.KD):
    """Distillation at the ratio that each example brings."""

    def loss(self, nets, batch, memory, step):
        terms, ratio = super().loss(nets, batch, memory, step), batch["ratio"]
        weights = {"cross_entropy": 1 - ratio, "distillation": ratio}
        return dataclasses.replace(terms, weights=weights, coef={})


@dataclasses.dataclass(frozen=True)
class Method:
    """A way to weight.

    Attributes:
      weighting: `numbers -> weighting`; None for a ratio that is given.
      outputs: logits of its network; 0 for none.
      control: as in `WeightedObjective`.
      options: of the outer gradient; None where nothing is learned from outer examples.
      zero_init: whether the network starts at one ratio for all examples.
    """

    weighting: Callable[[Mapping[str, Any]], Any] | None = None
    outputs: int = 0
    control: str = "none"
    options: Bilevel | None = None
    zero_init: bool = True


def _wsl(numbers):
    made = wsl.make()
    object.__setattr__(made, "scale", numbers["scale"])
    return made


def _around(numbers):
    made = trilateral.make(centre=0.5)
    object.__setattr__(made, "centre", numbers["centre"])
    return made


TGEO = lambda _: trilateral.make()  # noqa: E731
METHODS = {
    "given": Method(),
    "wsl": Method(_wsl),
    "ada_class": Method(lambda _: teacher_margin.make(granularity="class")),
    "ada_sample": Method(lambda _: teacher_margin.make(granularity="sample")),
    "l2rw": Method(lambda _: reweight.make(normalize="batch"), options=Bilevel()),
    "mwn": Method(lambda _: meta_weight_net.make(), 2, options=Bilevel()),
    "joint": Method(TGEO, 1, control="joint"),
    "tgeo": Method(TGEO, 1, options=Bilevel()),
    "around": Method(_around, 1, options=Bilevel()),
    "two_speed": Method(TGEO, 1, options=Bilevel(method="two_speed")),
    "shuffled": Method(TGEO, 1, control="shuffled", options=Bilevel()),
    "frozen": Method(TGEO, 1, control="frozen", zero_init=False),
    "frozen_around": Method(_around, 1, control="frozen", zero_init=False),
}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Run:
    """One run of a program.

    Attributes:
      table: number of its tables.
      seed: of initial weights and of the order of examples.
      use: the ids of `Tables` that it trains on.
      numbers: replacements of `NUMBERS`.
      start: initial ratio of the network, in (0, 1).
      ratio: `[n]`, for "given".
      omega: parameters of the weighting's network, for "frozen"; None draws them.
    """

    table: int
    seed: int
    use: str = "train"
    numbers: Mapping[str, float] = dataclasses.field(default_factory=dict)
    start: float = 0.5
    ratio: np.ndarray | None = None
    omega: Any = None


class Program:
    """The compiled runs of a method in a domain."""

    def __init__(self, name: str, data: Domain):
        self.method, self.data = METHODS[name], data
        self.models = {"student": data.student, "teacher": data.teacher}
        if self.method.outputs:
            self.models["weighting"] = ratio_mlp.make(
                outputs=self.method.outputs, hidden=(32,), zero_init=self.method.zero_init
            )
        self.learned = bool(self.method.outputs) and self.method.control != "frozen"
        self.trainable = ("student", "weighting") if self.learned else ("student",)
        self.x = jnp.asarray(data.x)
        self.init = jax.jit(jax.vmap(self._init))
        self.chunks = {
            outer: jax.jit(
                jax.vmap(functools.partial(self._chunk, outer=outer), (None, 0, 0, 0, 0)),
                donate_argnums=1,
            )
            for outer in (False, True)
        }
        self.predict = jax.jit(jax.vmap(self._predict, (0, None)))

    def objective(self, numbers: Mapping[str, Any]) -> Any:
        own = GivenRatio() if self.method.weighting is None else kd.make()
        object.__setattr__(own, "temperature", numbers["temperature"])
        if self.method.weighting is None:
            return own
        return WeightedObjective(
            objective=own,
            weighting=self.method.weighting(numbers),
            loss_terms=TERMS,
            num_classes=self.data.k,
            control=self.method.control,
        )

    def optimizer(self, numbers: Mapping[str, Any]) -> Any:
        data_lr = self.data.lr

        def rate(t):
            warm, length = 0.04 * numbers["length"], numbers["length"]
            along = jnp.clip((t - warm) / (length - warm), 0, 1)
            return (
                data_lr
                * numbers["lr"]
                * jnp.minimum(t / warm, 1)
                * (1 + jnp.cos(jnp.pi * along))
                / 2
            )

        kernels = lambda p: jax.tree.map(lambda x: x.ndim > 1, p)  # noqa: E731
        decay = optax.add_decayed_weights(5e-4, mask=kernels)
        inner = optax.chain(decay, optax.sgd(rate, momentum=0.9, nesterov=True))
        options = self.method.options
        if options is None:
            return inner
        outer = optax.adamw(numbers["outer_lr"], weight_decay=1e-4, mask=kernels)
        roles = ("weighting",) if self.method.outputs else ()
        return Optimizers(inner, outer, roles, options.method)

    def _batch(self, tables: Any, run: Any, rows: Any) -> dict[str, Any]:
        at = run["table"], rows
        known = tables["labelled"][run["table"], run["added"]][rows]
        return {
            "input": self.x[rows],
            "label": tables["label"][at],
            "labelled": jnp.where(run["all_known"] > 0, jnp.minimum(known, 1.0), known),
            "ratio": run["ratio"][rows],
            "mask": jnp.ones(rows.shape),
            "index": rows,
            "epoch": jnp.zeros_like(rows),
            "teacher_outputs": {"teacher": {"logits": tables["teacher"][at]}},
        }

    def _init(self, key: Any, start: Any, means: Any) -> Any:
        k, b = self.data.k, BATCH
        batch = {
            "input": self.x[:b], "label": jnp.zeros(b, jnp.int32), "labelled": jnp.ones(b),
            "ratio": jnp.ones(b), "mask": jnp.ones(b), "index": jnp.zeros(b, jnp.int32),
            "epoch": jnp.zeros(b, jnp.int32),
        }  # fmt: skip
        numbers = {name: jnp.float32(x) for name, x in NUMBERS.items()}
        objective = self.objective(NUMBERS)
        models = {**self.models, "teacher": _answers(k)}
        shapes = state.infer_shapes(objective, models, batch)
        trained = (*self.trainable, "weighting") if self.method.outputs else self.trainable
        tx = self.optimizer(numbers)
        split = tx if self.learned or not self.method.outputs else optax.identity()
        make = state.make_init(
            objective, models, split, shapes, trainable=tuple(dict.fromkeys(trained)), ema={}
        )
        now = make(key)
        params, frozen = dict(now.params), {}
        if self.method.outputs:
            leaf = params["weighting"]
            shift = jnp.log(start / (1 - start))
            params["weighting"] = _with_bias(leaf, shift)
        now = now.replace(params=params)
        if self.method.outputs and not self.learned:
            model_state = dict(now.model_state)
            frozen = {"weighting": (params.pop("weighting"), model_state.pop("weighting"))}
            now = now.replace(params=params, model_state=model_state, opt_state=tx.init(params))
        if isinstance(now.memory, dict) and "class_means" in now.memory:
            now = now.replace(memory={**now.memory, "class_means": means})
        return now, frozen

    def _chunk(self, tables, now, run, rows, held, *, outer):
        numbers, frozen = run["numbers"], {**run["frozen"], "teacher": ({}, {})}
        made = (self.objective(numbers), self.models, self.optimizer(numbers))
        options = self.method.options
        if options is None:
            step = steps.make_train_step(*made)
        else:
            step = bilevel.make_bilevel_step(*made, options, outer=outer)

        def one(now, ids):
            batch = self._batch(tables, run, ids[0])
            if outer and options is not None:
                clean = self._batch(tables, {**run, "added": 1, "all_known": 1}, ids[1])
                batch = {"train": batch, "held_out": clean}
            now, metrics = step(now, frozen, batch, run["key"])
            return now, metrics.get("weight/distillation", 0.0)

        return jax.lax.scan(one, now, (rows, held))

    def flops(self) -> float:
        """Operations of a step of one run; of an outer step where the weighting learns."""
        n, k = len(self.data.y), self.data.k
        keys = jax.vmap(jax.random.key)(jnp.zeros(1, jnp.int32))
        now, frozen = self.init(keys, jnp.full(1, 0.5), jnp.full((1, k, k), 1 / k))
        tables = {"label": jnp.zeros((1, n), jnp.int32), "labelled": jnp.ones((1, 2, n)),
                  "teacher": jnp.zeros((1, n, k))}  # fmt: skip
        zero, rows = jnp.zeros(1, jnp.int32), jnp.zeros((1, CHUNK, BATCH), jnp.int32)
        numbers = {name: jnp.full(1, x) for name, x in NUMBERS.items()}
        flags = dict.fromkeys(("table", "added", "all_known"), zero)
        run = {**flags, "ratio": jnp.ones((1, n)), "numbers": numbers, "key": keys,
               "frozen": frozen}  # fmt: skip
        chunk = self.chunks[self.method.options is not None]
        analysis = chunk.lower(tables, now, run, rows, rows).compile().cost_analysis()
        return float(analysis["flops"])  # XLA counts the body of the scan once

    def _predict(self, now: Any, x: Any) -> Any:
        params, model_state = now.params["student"], now.model_state["student"]
        out, _ = self.models["student"].apply(params, model_state, x, train=False, rngs={})
        return out["logits"]

    def __call__(self, runs: Sequence[Run], tables: Sequence[Tables]) -> list[dict[str, Any]]:
        """Trains; returns for each run the measures at every evaluation, and the network."""
        data, length = self.data, int(runs[0].numbers.get("length", LENGTH))
        shared = {
            "label": np.stack([t.label for t in tables]),
            "labelled": np.stack([t.labelled for t in tables]),
            "teacher": np.stack([t.teacher for t in tables]),
        }
        shared = jax.tree.map(jnp.asarray, shared)
        n, ids = len(data.y), [tables[r.table].ids for r in runs]
        rows = np.stack([order(i[r.use], r.seed, length) for i, r in zip(ids, runs, strict=True)])
        held = np.stack([order(i["outer"], r.seed + 10**6, length)
                         for i, r in zip(ids, runs, strict=True)])  # fmt: skip
        numbers = {
            name: jnp.asarray([r.numbers.get(name, x) for r in runs], jnp.float32)
            for name, x in NUMBERS.items()
        }
        keys = jax.vmap(jax.random.key)(jnp.asarray([r.seed for r in runs]))
        start = jnp.asarray([r.start for r in runs], jnp.float32)
        means = jnp.asarray(np.stack([tables[r.table].class_means for r in runs]))
        now, frozen = self.init(keys, start, means)
        if frozen and runs[0].omega is not None:
            given = jax.tree.map(lambda *x: jnp.stack(x), *[r.omega for r in runs])
            frozen = {"weighting": (given, frozen["weighting"][1])}
        ratio = [np.full(n, r.start, np.float32) if r.ratio is None else r.ratio for r in runs]
        run = {
            "table": jnp.asarray([r.table for r in runs]),
            "added": jnp.asarray([int(r.use != "train") for r in runs]),
            "all_known": jnp.asarray([int(r.use in ("shown", "outer")) for r in runs]),
            "ratio": jnp.asarray(np.stack(ratio), jnp.float32),
            "numbers": numbers, "key": keys, "frozen": frozen,
        }  # fmt: skip
        found: list[dict[str, Any]] = [{} for _ in runs]
        for begin in range(0, length, CHUNK):
            piece = slice(begin, begin + CHUNK)
            learning = self.method.options is not None and (begin >= WARMUP or not self.learned)
            chunk = self.chunks[learning]
            now, share = chunk(shared, now, run, rows[:, piece], held[:, piece])
            end = begin + CHUNK
            if end % EVALUATE == 0 or end == length:
                self._evaluate(now, ids, found, np.asarray(share).mean(1))
        omega = now.params.get("weighting", {}) if self.learned else {}
        for i, one in enumerate(found):
            one["omega"] = jax.tree.map(lambda x, i=i: np.asarray(x[i]), omega)
        return found

    def _evaluate(self, now: Any, ids: Any, found: list[dict[str, Any]], share: Any) -> None:
        data = self.data
        whole = np.concatenate([data.x, data.x_test])
        need = np.unique(np.concatenate([i["select"] for i in ids]))
        x = np.concatenate([whole[need], data.x_test])
        log_probs = np.asarray(jax.nn.log_softmax(self.predict(now, jnp.asarray(x))))
        place = np.full(len(data.y), -1)
        place[need] = np.arange(len(need))
        for i, (own, one) in enumerate(zip(ids, found, strict=True)):
            mine, label = log_probs[i, place[own["select"]]], data.y[own["select"]]
            test = log_probs[i, len(need) :]
            row = {
                "right": mine.argmax(1) == label,
                "loss": -mine[np.arange(len(label)), label],
                "test": (test.argmax(1) == data.y_test).mean(),
                "share": share[i],
            }
            for name, value in row.items():
                one.setdefault(name, []).append(value)


def order(ids: np.ndarray, seed: int, length: int) -> np.ndarray:
    """Rows `[length, batch]`: epochs of `ids`, each in an order of its own."""
    draw, count = np.random.default_rng(seed), length * BATCH
    epochs = [draw.permutation(ids) for _ in range(math.ceil(count / len(ids)))]
    return np.concatenate(epochs)[:count].reshape(length, BATCH).astype(np.int32)


def _answers(k: int) -> Any:
    """A teacher of the right shape; its answers come with the batch."""
    from distill_jax.core.api import Model

    def apply(params, state, x, *, train, rngs):
        del params, train, rngs
        return {"logits": jnp.zeros((x.shape[0], k))}, state

    return Model(lambda key, x: ({}, {}), apply)


def _with_bias(params: Any, shift: Any) -> Any:
    """Adds to the last bias of a ratio network."""
    last = max(params)
    return {**params, last: {**params[last], "bias": params[last]["bias"] + shift}}
