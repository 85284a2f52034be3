"""Networks, objectives and data of which each commits a fault; `silent_faults` names them."""

import dataclasses
from collections.abc import Mapping
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
import numpy as np

from distill_jax.core.api import Dataset, Model, Objective, Provenance, Terms
from distill_jax.data import synthetic
from distill_jax.data.source import ArraySource, Subset
from distill_jax.losses.classification import cross_entropy
from distill_jax.objectives._distillation import ask_teacher
from distill_jax.objectives.kd import KD as Hinton

# Networks.


def _linear(out: int = 4, *, extra: Mapping[str, Any] | None = None, state: bool = False):
    def init(key, x):
        d = int(np.prod(x.shape[1:]))
        params = {"kernel": jax.random.normal(key, (d, out)) / d**0.5, **(extra or {})}
        return params, {"batch_stats": {"mean": jnp.zeros(d)}} if state else {}

    def centre(params, model_state, x, train):
        flat = x.reshape(x.shape[0], -1).astype(jnp.float32)
        if state:
            old = model_state["batch_stats"]["mean"]
            mean = flat.mean(0) if train else old
            flat = flat - mean[None]
            if train:
                model_state = {"batch_stats": {"mean": 0.9 * old + 0.1 * mean}}
        return flat @ params["kernel"], model_state

    return init, centre


def plain() -> Model:
    """A linear classifier `[b, ...] -> logits [b, 4]`."""
    init, apply = _linear()
    return Model(init, lambda p, s, x, *, train, rngs: ({"logits": apply(p, s, x, train)[0]}, s))


def probabilities() -> Model:
    """Returns probabilities where logits are asked for."""
    init, apply = _linear()

    def run(p, s, x, *, train, rngs):
        return {"logits": jax.nn.softmax(apply(p, s, x, train)[0])}, s

    return Model(init, run)


def unscaled() -> Model:
    """Scales its features and passes those without the scale on."""
    init, apply = _linear(extra={"scale": jnp.ones(4)})

    def run(p, s, x, *, train, rngs):
        logits = apply(p, s, x, train)[0]
        scaled = logits * p["scale"][None]
        del scaled
        return {"logits": logits}, s

    return Model(init, run)


def quantized() -> Model:
    """Rounds its kernel and forgets the straight-through gradient."""
    init, _ = _linear(extra={"bias": jnp.zeros(4)})

    def run(p, s, x, *, train, rngs):
        kernel = jnp.round(p["kernel"] * 8) / 8
        return {"logits": x.reshape(x.shape[0], -1) @ kernel + p["bias"][None]}, s

    return Model(init, run)


def implicit() -> Model:
    """Solves for a fixed point and cuts the gradient through it, without the implicit one."""
    init, apply = _linear(extra={"pull": jnp.full(4, 0.5), "bias": jnp.zeros(4)})

    def run(p, s, x, *, train, rngs):
        start = apply(p, s, x, train)[0]

        def closer(_, z):
            return start + jnp.tanh(z) * p["pull"][None]

        fixed = jax.lax.stop_gradient(jax.lax.fori_loop(0, 5, closer, start))
        return {"logits": fixed + start * 0 + p["bias"][None]}, s

    return Model(init, run)


def normalized() -> Model:
    """A linear classifier of inputs less their running mean."""
    init, apply = _linear(state=True)

    def run(p, s, x, *, train, rngs):
        logits, s = apply(p, s, x, train)
        return {"logits": logits}, s

    return Model(init, run)


def blind_ratio() -> Model:
    """A weighting's network whose answer is the same for every example and every parameter."""

    def init(key, x):
        return {"kernel": jax.random.normal(key, (x.shape[-1], 1))}, {}

    def run(p, s, x, *, train, rngs):
        said = x.reshape(x.shape[0], -1, x.shape[-1]).mean(1) @ p["kernel"]
        return {"logits": jax.lax.stop_gradient(said)}, s

    return Model(init, run)


# Objectives.


@dataclasses.dataclass(frozen=True, kw_only=True)
class Own(Objective):
    """Cross-entropy, and one fault of the field `fault`."""

    fault: str = ""
    roles: ClassVar[tuple[str, ...]] = ("student",)

    def loss(self, nets, batch, memory, step) -> Terms:
        outputs, state = nets("student", batch["input"], train=self.fault != "evaluating")
        logits, states, coef = outputs["logits"], {"student": state}, {}
        if self.fault == "softmax":
            logits = jax.nn.softmax(logits)
        if self.fault == "state dropped":
            states = {}
        value = cross_entropy(logits, batch["label"])
        values = {"cross_entropy": value}
        if self.fault == "column":
            values = {"cross_entropy": value[:, None]}
        if self.fault == "hard":
            values = {"cross_entropy": (logits.argmax(-1) != batch["label"]).astype(jnp.float32)}
        if self.fault == "late":
            values["late"] = (logits**2).mean(-1)
            coef = {"late": jnp.maximum(step - 1000, 0) / 1000}
        return Terms(values=values, state=states, coef=coef)


@dataclasses.dataclass(frozen=True, kw_only=True)
class OwnKD(Hinton):
    """Distillation with a fault in how it asks the teacher."""

    fault: str = ""

    def loss(self, nets, batch, memory, step) -> Terms:
        student, state = nets("student", batch["input"], train=True)
        if self.fault == "training mode":
            teacher = jax.lax.stop_gradient(nets("teacher", batch["input"], train=True)[0])
        elif self.fault == "student's view":
            teacher = jax.lax.stop_gradient(nets("teacher", batch["input"])[0])
        else:
            teacher = ask_teacher(nets, batch)
        distance = ((student["logits"] - teacher["logits"]) ** 2).mean(-1)
        values = {"cross_entropy": cross_entropy(student["logits"], batch["label"])}
        if self.fault != "unused":
            values["distillation"] = distance
        return Terms(values=values, state={"student": state})


@dataclasses.dataclass(frozen=True, kw_only=True)
class SkippingQueue(Own):
    """A queue whose pointer moves on by two batches: every other stripe stays random."""

    def memory(self, key, batch):
        rows = jax.random.normal(key, (256, 4))
        return {"rows": rows, "at": jnp.int32(0)}

    def loss(self, nets, batch, memory, step) -> Terms:
        outputs, state = nets("student", batch["input"], train=True)
        logits, b = outputs["logits"], batch["mask"].shape[0]
        near = (logits[:, None] - memory["rows"][None]) ** 2
        rows = jax.lax.dynamic_update_slice(
            memory["rows"], jax.lax.stop_gradient(logits), (memory["at"], 0)
        )
        return Terms(
            values={"near": near.mean((1, 2)) + cross_entropy(logits, batch["label"])},
            state={"student": state},
            memory={"rows": rows, "at": (memory["at"] + 2 * b) % 256},
        )


@dataclasses.dataclass(frozen=True, kw_only=True)
class SameMasks(Own):
    """Four target masks that are all the last one drawn."""

    def loss(self, nets, batch, memory, step) -> Terms:
        keys = [jax.random.fold_in(jax.random.key(0), step)] * 4
        masks = [jax.random.bernoulli(k, 0.5, batch["input"].shape[1:]) for k in keys]
        found = [nets("student", batch["input"] * m[None], train=True) for m in masks]
        values = jnp.stack([cross_entropy(o["logits"], batch["label"]) for o, _ in found])
        return Terms(values={"cross_entropy": values.mean(0)}, state={"student": found[-1][1]})


# Data.


def _parts() -> tuple[Any, Any, Any]:
    made = synthetic.make(n_train=128, n_test=64)
    return made.train, made.held_out, made.test


def held_out_is_test() -> Dataset:
    train, _, test = _parts()
    return Dataset(train, test, test, ("a", "b", "c", "d"))


def held_out_in_train() -> Dataset:
    train, _, test = _parts()
    return Dataset(train, Subset(train, np.arange(32), "the first"), test, ("a", "b", "c", "d"))


def test_copied_from_train() -> Dataset:
    train, held_out, _ = _parts()
    rows = train.read(np.arange(64))
    test = ArraySource(rows["input"], rows["label"], Provenance("copy", "", 64, ""))
    return Dataset(train, held_out, test, ("a", "b", "c", "d"))


def shifted_labels() -> Dataset:
    train, held_out, test = _parts()
    rows = train.read(np.arange(len(train)))
    labels = rows["label"] + 1
    moved = ArraySource(rows["input"], labels, Provenance("shifted", "", len(labels), ""))
    return Dataset(moved, held_out, test, ("a", "b", "c", "d"))


def some_repeated() -> Dataset:
    train, held_out, test = _parts()
    rows, again = test.read(np.arange(64)), train.read(np.arange(8))
    inputs = np.concatenate([again["input"], rows["input"][8:]])
    labels = np.concatenate([again["label"], rows["label"][8:]])
    mixed = ArraySource(inputs, labels, Provenance("mixed", "", 64, ""))
    return Dataset(train, held_out, mixed, ("a", "b", "c", "d"))
