"""Outer gradients over a horizon: bias, cosine, cost and memory against brute force.

  python benchmarks/outer_gradients.py --out=benchmarks/results/outer_gradients.json
  python benchmarks/outer_gradients.py --parts=learned --seeds=2  # the rest of the file stays

"gradients", in float64, on the digits of scikit-learn at 8x8, trained for `STEPS` steps: the outer
variables are a linear map from the probabilities of student and teacher and the label to the logit
of an example's ratio, and its bias. The truth at K is autodiff of the held-out loss K steps ahead,
all with the same outer variables, from each of five times in training. Reported are the cosine of
the whole gradient with the truth, and for the bias, the direction in which all ratios move
together, the share of times with the right sign and the ratio of sums of estimate and truth.
What the weighting sees has no derivative; "seen_followed" has it, and tells what that leaves out.
"clean": labels and teacher as they are; "two_sources": 45 % of the training labels name the next
class, and the teacher is wrong on two classes.

"cost": XLA's operations of an estimate as multiples of a plain step, without the held-out part, and
temporary memory of the compiled function. Operations are a line in K through K = 1 and K = 2, since
XLA counts the body of a loop once.

"learned": the last mean ratio of TGeo-KD on clean Fashion-MNIST-5k at 14x14, perceptron of 128
units, 1,000 steps of 128, against constant ratios chosen on the other half of the held-out images.
"""

import argparse
import functools
import json
import pathlib
from collections.abc import Iterator
from typing import Any

import _outer_learned
import _outer_report
import jax
import jax.numpy as jnp
import numpy as np
import optax

from distill_jax.core import horizon, hypergradient
from distill_jax.data import digits
from distill_jax.models import convnet, mlp, vit
from distill_jax.run import environment

K, STEPS, BATCH, TEMPERATURE = 10, 200, 64, 4.0
STARTS = (20, 40, 60, 80, 99)
DAMPING = 0.1
AVERAGED, FEW = 20, 32  # steps of an average, and held-out examples of a small draw
SETTINGS = ("clean", "two_sources")
HORIZONS = (1, 5, 20, 100)
NETS = {
    "mlp": lambda: mlp.make(num_classes=K, hidden=(32,)),
    "convnet_batch_norm": lambda: convnet.make(num_classes=K, widths=(4, 8)),
    "transformer": lambda: vit.make(num_classes=K, patch_size=4, width=16, depth=1, heads=2),
}
RATES = {"mlp": 0.1, "convnet_batch_norm": 0.1, "transformer": 0.05}


def teacher_logits(images: np.ndarray, labels: np.ndarray, every: np.ndarray) -> np.ndarray:
    """Logits of a perceptron that has learned from `images`, of `every` image."""
    model = mlp.make(num_classes=K, hidden=(64,))
    params, _ = model.init(jax.random.key(9), jnp.asarray(images[:1]))
    tx = optax.adam(1e-3)

    @jax.jit
    def fit(params):
        def loss(p):
            out, _ = model.apply(p, {}, images, train=True, rngs={})
            return optax.softmax_cross_entropy_with_integer_labels(out["logits"], labels).mean()

        def step(carry, _):
            updates, opt = tx.update(jax.grad(loss)(carry[0]), carry[1])
            return (optax.apply_updates(carry[0], updates), opt), None

        return jax.lax.scan(step, (params, tx.init(params)), length=100)[0][0]

    out, _ = model.apply(fit(params), {}, jnp.asarray(every), train=False, rngs={})
    return np.asarray(out["logits"])


def digit_data(*, faults: bool) -> tuple[Any, Any]:
    """Returns batches `[STEPS, BATCH, ...]` of images, labels and teacher logits; held-out data."""
    data = digits.make(held_out=0.2)
    train, held = (p.read(np.arange(len(p))) for p in (data.train, data.held_out))
    images, held_images = (x["input"].astype(float) / 255 - 0.5 for x in (train, held))
    labels = train["label"]
    logits = teacher_logits(images, labels, images)
    draw = np.random.default_rng(0)
    if faults:
        logits = np.where((labels < 2)[:, None], np.roll(logits, 3, axis=1), logits)
        labels = np.where(draw.random(len(labels)) < 0.45, (labels + 1) % K, labels)
    rows = np.concatenate([draw.permutation(len(labels)) for _ in range(12)])
    rows = rows[: STEPS * BATCH].reshape(STEPS, BATCH)
    batches = images[rows], labels[rows].astype(np.int32), logits[rows].astype(float)
    return jax.tree.map(jnp.asarray, (batches, (held_images, held["label"])))


class Problem:
    """A student with a stored teacher, and outer gradients; `data` is from `digit_data`."""

    def __init__(self, net: str, data: Any):
        self.model = NETS[net]()
        self.tx = optax.sgd(RATES[net], momentum=0.9, nesterov=True)
        params, self.model_state = self.model.init(jax.random.key(0), data[1][0][:1])
        self.params = jax.tree.map(lambda x: x.astype(float), params)
        kernel = 0.1 * np.random.default_rng(1).normal(size=3 * K)
        self.omega = {"kernel": jnp.asarray(kernel), "bias": jnp.zeros(1)}

    def logits(self, params: Any, images: Any) -> Any:
        out, _ = self.model.apply(params, self.model_state, images, train=True, rngs={})
        return out["logits"]

    def ratio(self, params: Any, omega: Any, batch: Any) -> Any:
        images, labels, teacher = batch
        probs = [jax.nn.softmax(x) for x in (self.logits(params, images), teacher)]
        features = jnp.concatenate([*probs, jax.nn.one_hot(labels, K)], axis=1)
        return jax.nn.sigmoid(features @ omega["kernel"] + omega["bias"])

    def weighted(self, params: Any, ratio: Any, batch: Any) -> Any:
        images, labels, teacher = batch
        logits = self.logits(params, images)
        log_probs = jax.nn.log_softmax(logits / TEMPERATURE)
        soft = jax.nn.softmax(teacher / TEMPERATURE)
        distilled = TEMPERATURE**2 * optax.kl_divergence(log_probs, soft)
        plain = optax.softmax_cross_entropy(logits, jax.nn.one_hot(labels, K))
        return ((1 - ratio) * plain + ratio * distilled).mean()

    def inner_loss(self, params: Any, omega: Any, batch: Any) -> Any:
        ratio = self.ratio(jax.lax.stop_gradient(params), omega, batch)
        return self.weighted(params, ratio, batch)

    def step(self, carry: Any, omega: Any, batch: Any, *, followed: bool = False) -> Any:
        seen = carry[0] if followed else jax.lax.stop_gradient(carry[0])
        ratio = self.ratio(seen, omega, batch)
        grads = jax.grad(self.weighted)(carry[0], ratio, batch)
        return hypergradient.apply(self.tx, grads, carry[1], carry[0])

    def outer(self, params: Any, held: Any) -> Any:
        logits = self.logits(params, held[0])
        return optax.softmax_cross_entropy_with_integer_labels(logits, held[1]).mean()

    def truth(self, states: Any, data: Any, t: Any, count: Any, *, followed: bool = False) -> Any:
        """Autodiff of the loss after steps t to t + count - 1, backwards over the states."""
        batches, held = data
        last = jax.tree.map(lambda x: x[t + count], states)
        adjoint = jax.grad(self.outer)(last[0], held), jax.tree.map(jnp.zeros_like, last[1])

        def back(i, carry):
            adjoint, total = carry
            k = t + count - 1 - i
            now, batch = jax.tree.map(lambda x: x[k], (states, batches))
            step = lambda c, w: self.step(c, w, batch, followed=followed)  # noqa: E731
            adjoint, share = jax.vjp(step, now, self.omega)[1](adjoint)
            return adjoint, jax.tree.map(jnp.add, total, share)

        none = jax.tree.map(jnp.zeros_like, self.omega)
        return jax.lax.fori_loop(0, count, back, (adjoint, none))[1]

    def estimates(self, states: Any, data: Any, t: Any) -> dict[str, Any]:
        """Returns those that see the state and the batch of step t alone, by name."""
        given, cg = self._given(states, data, t, data[1]), horizon.conjugate_gradient
        return {
            "one_step": horizon.neumann(*given, steps=1)[1],
            **{f"neumann_{k}": horizon.neumann(*given, steps=k)[1] for k in (5, 20, 100)},
            **{f"cg_{k}": cg(*given, steps=k, damping=DAMPING)[1] for k in (5, 20)},
        }

    def recent(self, states: Any, data: Any, t: Any, rows: Any) -> dict[str, Any]:
        """Returns estimates of the last steps to t; of some on `rows` `[steps, few]` held out."""

        def of(i):
            now = t - AVERAGED + 1 + i
            some = jax.tree.map(lambda x: x[rows[i]], data[1])
            whole, few = (self._given(states, data, now, held) for held in (data[1], some))
            cg = functools.partial(horizon.conjugate_gradient, steps=5, damping=DAMPING)
            return {
                "one_step": horizon.neumann(*whole, steps=1)[1],
                "cg_5": cg(*whole)[1],
                f"one_step_held_{FEW}": horizon.neumann(*few, steps=1)[1],
                f"cg_5_held_{FEW}": cg(*few)[1],
            }

        return jax.lax.map(of, jnp.arange(AVERAGED))

    def _given(self, states: Any, data: Any, t: Any, held: Any) -> Any:
        now, batch = jax.tree.map(lambda x: x[t], (states, data[0]))
        grad_fn = lambda p, w, _: jax.grad(self.inner_loss, (0, 1))(p, w, batch)  # noqa: E731
        value = jax.value_and_grad(lambda p: self.outer(p, held))
        return grad_fn, value, self.tx, *now, self.omega

    def trajectory(self, data: Any) -> tuple[Any, Any]:
        """Returns states and tangents in the bias before every step, and after the last."""

        def body(carry, batch):
            now, tangents = carry

            def shifted(params, opt, c):
                omega = {**self.omega, "bias": self.omega["bias"] + c}
                return self.step((params, opt), omega, batch)

            new = horizon.carry(shifted, *now, tangents)
            return (self.step(now, self.omega, batch), new), carry

        start = self.params, self.tx.init(self.params)
        start = start, horizon.zero_tangents(*start, count=1)
        last, before = jax.lax.scan(body, start, data[0])
        return jax.tree.map(lambda x, y: jnp.concatenate([x, y[None]]), before, last)


def flat(tree: Any) -> np.ndarray:
    return np.concatenate([np.ravel(np.asarray(tree[k])) for k in ("bias", "kernel")])


def cosine(a: np.ndarray, b: np.ndarray) -> float:
    return float(a @ b / max(np.linalg.norm(a) * np.linalg.norm(b), 1e-300))


def gradients_of(net: str) -> dict[str, Any]:
    settings = {name: digit_data(faults=name == "two_sources") for name in SETTINGS}
    problem = Problem(net, settings["clean"])
    trajectory, estimates = jax.jit(problem.trajectory), jax.jit(problem.estimates)
    truth_of = jax.jit(problem.truth, static_argnames=("followed",))
    recent, slope = jax.jit(problem.recent), jax.jit(jax.grad(problem.outer))
    result: dict[str, Any] = {}
    for name, data in settings.items():
        states, tangents = trajectory(data)
        draw = np.random.default_rng(2)
        truth: dict[str, list[np.ndarray]] = {}
        found: dict[str, list[np.ndarray]] = {}
        for t in STARTS:
            for k in (*HORIZONS, STEPS - t):
                target = str(k) if k in HORIZONS else "end"
                truth.setdefault(target, []).append(flat(truth_of(states, data, t, k)))
            followed = flat(truth_of(states, data, t, 20, followed=True))
            found.setdefault("seen_followed_20", []).append(followed)
            for key, value in estimates(states, data, t).items():
                found.setdefault(key, []).append(flat(value))
            rows = draw.integers(0, len(data[1][1]), (AVERAGED, FEW))
            for key, values in recent(states, data, t, rows).items():
                mean = jax.tree.map(lambda x: x.mean(0), values)
                found.setdefault(f"{key}_mean_{AVERAGED}", []).append(flat(mean))
                if key.endswith(f"held_{FEW}"):
                    last = jax.tree.map(lambda x: x[-1], values)
                    found.setdefault(key, []).append(flat(last))
            for k in (5, 20):  # through the last k steps taken, judged now
                past = flat(truth_of(states, data, t - k, k))
                found.setdefault(f"truncated_{k}", []).append(past)
            now = jax.tree.map(lambda x, t=t: x[t], (states[0], tangents))
            forward = np.asarray(horizon.along(slope(now[0], data[1]), now[1]))
            whole = flat(truth_of(states, data, 0, t))[:1]
            np.testing.assert_allclose(forward, whole, rtol=1e-8)  # exact from the first step on
            found.setdefault("forward", []).append(forward)
        result[f"{net}/{name}"] = {
            "truth_of_bias": {k: [round(float(x[0]), 6) for x in v] for k, v in truth.items()},
            "estimates": {key: compared(values, truth) for key, values in found.items()},
        }
    result[f"{net}/clean"]["cost"] = cost(problem, settings["clean"])
    return result


def compared(values: list[np.ndarray], truth: dict[str, list[np.ndarray]]) -> dict[str, Any]:
    """Returns `{horizon of the truth: measures}` of one estimate over the start times."""
    rows: dict[str, Any] = {}
    for target, wanted in truth.items():
        bias = [(a[0], b[0]) for a, b in zip(values, wanted, strict=True)]
        row = {
            "bias_sign": np.mean([a * b > 0 for a, b in bias]),
            "bias_ratio": sum(a for a, _ in bias) / sum(b for _, b in bias),
        }
        if len(values[0]) > 1:
            pairs = list(zip(values, wanted, strict=True))
            row["cosine"] = np.mean([cosine(a, b) for a, b in pairs])
            row["cosine_kernel"] = np.mean([cosine(a[1:], b[1:]) for a, b in pairs])
        rows[target] = {key: round(float(x), 3) for key, x in row.items()}
    return rows


def cost(problem: Problem, data: Any) -> dict[str, Any]:
    """Operations in plain steps, and temporary memory of the compiled function in plain steps."""
    carry, omega = (problem.params, problem.tx.init(problem.params)), problem.omega
    batch = jax.tree.map(lambda x: x[0], data[0])

    def measure(fn, *args):
        program = jax.jit(fn).lower(*args).compile()
        return program.cost_analysis()["flops"], program.memory_analysis().temp_size_in_bytes

    unit, plain = measure(problem.step, carry, omega, batch)
    held, _ = measure(jax.grad(problem.outer), carry[0], data[1])

    def of(fn, **kwargs):
        def estimate(carry, omega, batch, held):
            grad_fn = lambda p, w, _: jax.grad(problem.inner_loss, (0, 1))(p, w, batch)  # noqa: E731
            value = jax.value_and_grad(lambda p: problem.outer(p, held))
            return fn(grad_fn, value, problem.tx, *carry, omega, **kwargs)[1]

        return measure(estimate, carry, omega, batch, data[1])

    cg = functools.partial(horizon.conjugate_gradient, damping=DAMPING)
    ways = {"neumann": horizon.neumann, "cg": cg, "unrolled": hypergradient.unrolled}
    slope = 0.0
    result: dict[str, Any] = {"plain_step": {"mflop": unit / 1e6, "kib": round(plain / 1024, 1)}}
    for name, fn in ways.items():
        measured = {k: of(fn, steps=k) for k in (1, 2, 8)}
        if name != "cg":  # whose first step has a product; further ones cost what terms cost
            slope = measured[2][0] - measured[1][0]
        for k in (1, 5, 20, 100):
            flops = measured[1][0] + (k - 1) * slope - held
            result[f"{name}_{k}"] = {"plain_steps": round(flops / unit, 2)}
        for k in (1, 8):
            result[f"{name}_{k}"] = {
                **result.get(f"{name}_{k}", {}),
                "memory": round(measured[k][1] / plain, 2),
            }

    def carried(carry, omega, batch, tangents):
        def shifted(p, o, c):
            return problem.step((p, o), {**omega, "bias": omega["bias"] + c}, batch)

        return problem.step(carry, omega, batch), horizon.carry(shifted, *carry, tangents)

    flops, memory = measure(carried, carry, omega, batch, horizon.zero_tangents(*carry, count=1))
    row = {"plain_steps": round(flops / unit - 1, 2), "memory": round(memory / plain, 2)}
    result["forward_every_step"] = row
    return result


def gradients(nets: list[str], found: dict[str, Any]) -> Iterator[dict[str, Any]]:
    """Yields what is known after each network, `found` included."""
    with jax.enable_x64(True):
        for net in nets:
            found = {**found, **gradients_of(net)}
            print(net, flush=True)
            yield found


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=pathlib.Path)
    parser.add_argument("--page", type=pathlib.Path)
    parser.add_argument("--parts", default="gradients,learned,rates")
    parser.add_argument("--nets", default=",".join(NETS))
    parser.add_argument("--arms", default=",".join((*_outer_learned.WAYS, *_outer_learned.RATIOS)))
    parser.add_argument("--seeds", type=int, default=3)
    options = parser.parse_args()
    environment.keep_freed_memory()
    result: dict[str, Any] = {}
    if options.out and options.out.exists():
        result = json.loads(options.out.read_text())

    def store() -> None:
        text = json.dumps(result, indent=1, sort_keys=True) + "\n"
        if options.out:
            options.out.write_text(text)
        else:
            print(text)

    parts = options.parts.split(",")
    if "gradients" in parts:
        for found in gradients(options.nets.split(","), result.get("gradients", {})):
            result["gradients"] = found
            store()
    if "learned" in parts:
        arms, known = options.arms.split(","), result.get("learned", {})
        for found in _outer_learned.learned(options.seeds, arms, known):
            result["learned"] = found
            store()
    if "rates" in parts:
        for found in _outer_learned.rates(options.seeds, result.get("rates", {})):
            result["rates"] = found
            store()
    if options.page:
        _outer_report.write(options.page, result)


if __name__ == "__main__":
    main()
