"""The outer gradient against brute force: autodiff through the whole inner step, in float64."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from distill_jax.core import bilevel, hypergradient, rng, state, steps
from distill_jax.core.api import ExampleWeighting, Model
from distill_jax.core.bilevel import Bilevel, Optimizers
from distill_jax.core.errors import ConfigError
from distill_jax.core.optim import make_schedule
from distill_jax.core.weighted_objective import WeightedObjective
from distill_jax.objectives.kd import KD
from tests import harness

LOSS_TERMS = ("cross_entropy", "distillation")


@dataclasses.dataclass(frozen=True)
class ByProbabilities(ExampleWeighting):
    """A small network over student and teacher probabilities and the label."""

    roles = ("weighting",)

    def __call__(self, nets, evidence, step):
        del step
        s, t = (jax.nn.softmax(evidence.logits[r]) for r in ("student", "teacher"))
        found, _ = nets("weighting", jnp.concatenate([s, t, evidence.label_probs], axis=-1))
        ratio = jax.nn.sigmoid(found["logits"][:, 0])
        return jnp.stack([1 - ratio, ratio], axis=1)


def weigher_model() -> Model:
    def init(key, x):
        k1, k2 = jax.random.split(key)
        return {
            "first": {"kernel": jax.random.normal(k1, (x.shape[-1], 7))},
            "last": {"kernel": jax.random.normal(k2, (7, 1))},
        }, {}

    def apply(params, state, x, *, train, rngs):
        del train, rngs
        h = jnp.tanh(x @ params["first"]["kernel"])
        bias = params["last"].get("bias", jnp.zeros(1))[None]
        return {"logits": h @ params["last"]["kernel"] + bias}, state

    return Model(init, apply)


def chain(name):
    rate = make_schedule("cosine", lr=0.2, total_steps=20, warmup_steps=3)
    return {
        "sgd": optax.sgd(0.3),
        "heavy_ball": optax.sgd(0.3, momentum=0.9),
        "nesterov": optax.sgd(0.3, momentum=0.9, nesterov=True),
        "adamw": optax.adamw(0.05, weight_decay=0.1),
        "clip_adamw": optax.chain(optax.clip_by_global_norm(0.1), optax.adamw(0.05)),
        "decayed_momentum": optax.chain(
            optax.add_decayed_weights(0.05), optax.sgd(0.3, momentum=0.9)
        ),
        "schedule": optax.adam(rate),
        "lamb": optax.lamb(0.05),
    }[name]


CHAINS = (
    "sgd",
    "heavy_ball",
    "nesterov",
    "adamw",
    "clip_adamw",
    "decayed_momentum",
    "schedule",
    "lamb",
)


def stacked(batches):
    return jax.tree.map(lambda *x: np.stack(x), *batches)


class Problem:
    """A student with batch norm, an optimizer after some steps, and the brute-force gradient."""

    def __init__(self, tx, *, b=16, warm_steps=3, **weighted):
        self.tx = tx
        self.weighted = WeightedObjective(
            objective=KD(temperature=2.0),
            weighting=ByProbabilities(),
            loss_terms=LOSS_TERMS,
            num_classes=harness.K,
            **weighted,
        )
        net = harness.tiny_model(batch_norm=True)
        self.models = {"student": net, "teacher": net, "weighting": weigher_model()}
        self.outer_tx = optax.sgd(1.0)
        self.optimizers = Optimizers(tx, self.outer_tx, ("weighting",))
        self.train = harness.make_batch(b)
        self.train["mask"] = jnp.asarray(np.arange(b) != 3, float)
        self.held_out = harness.make_batch(12, seed=1)
        shapes = state.infer_shapes(self.weighted, self.models, self.train)
        make = state.make_init(
            self.weighted,
            self.models,
            self.optimizers,
            shapes,
            trainable=("student", "weighting"),
            ema={},
        )
        self.key = jax.random.key(3)
        draw, wide = np.random.default_rng(0), jnp.result_type(float)
        like = jax.eval_shape(make, self.key)
        trained = {"student": like.params["student"]}
        steps_taken = jax.tree.map(
            lambda x: 0.1 * draw.normal(size=(warm_steps, *x.shape)).astype(wide), trained
        )
        statistics = {"student": {"mean": 0.1 * draw.normal(size=8).astype(wide)}}

        @jax.jit
        def begin(key, steps_taken):
            start = jax.tree.map(
                lambda x: x.astype(wide) if x.dtype == jnp.float32 else x, make(key)
            )

            def advance(carry, grads):
                params, opt_state = carry
                updates, opt_state = tx.update(grads, opt_state, params)
                return (optax.apply_updates(params, updates), opt_state), None

            carry = {"student": start.params["student"]}, start.opt_state["inner"]
            (params, inner), _ = jax.lax.scan(advance, carry, steps_taken)
            start = start.replace(
                step=start.step + warm_steps,
                params={**start.params, **params},
                model_state={**start.model_state, **statistics},
                opt_state={**start.opt_state, "inner": inner},
            )
            return start, {"teacher": net.init(jax.random.key(7), self.train["input"])}

        self.state, self.frozen = begin(jax.random.key(0), steps_taken)

    def make(self, options, **kwargs):
        return bilevel.make_bilevel_step(
            self.weighted, self.models, self.optimizers, options, **kwargs
        )

    def gradient(self, options, *, train=None):
        """What the step takes from the weighting's parameters; the outer optimizer is SGD of 1."""
        return self.gradients(options, train=train)(self.key)

    def gradients(self, options, *, train=None):
        """The same as a function of the key, compiled once."""
        step = jax.jit(self.make(options, outer=True))
        fed = {"train": self.train if train is None else train, "held_out": self.held_out}

        def gradient(key):
            new, metrics = jax.device_get(step(self.state, self.frozen, fed, key))
            before = jax.device_get(self.state.params["weighting"])
            return jax.tree.map(np.subtract, before, new.params["weighting"]), new, metrics

        return gradient

    def brute_force(self, batches):
        """Autodiff of the outer loss through the inner steps on `batches`, weights included."""
        objective = self.weighted.objective
        fixed = {r: p for r, (p, _) in self.frozen.items()}
        fixed_state = {r: s for r, (_, s) in self.frozen.items()} | dict(self.state.model_state)

        def terms_of(params, batch):
            nets = steps.BoundNets(self.models, fixed | params, fixed_state, key=self.key)
            return objective.loss(nets, batch, {}, self.state.step)

        def inner_loss(student, weighting, batch):
            terms = terms_of({"student": student}, batch)
            s, t = (jax.nn.softmax(terms.logits[r]) for r in ("student", "teacher"))
            if self.weighted.stop_features:
                s = jax.lax.stop_gradient(s)
            x = jnp.concatenate([s, t, jax.nn.one_hot(batch["label"], harness.K)], axis=-1)
            h = jnp.tanh(x @ weighting["first"]["kernel"]) @ weighting["last"]["kernel"]
            h += weighting["last"].get("bias", jnp.zeros(1))[None]
            ratio = jax.nn.sigmoid(h[:, 0])
            per_example = (1 - ratio) * terms.values["cross_entropy"]
            per_example += ratio * terms.values["distillation"]
            return (batch["mask"] * per_example).sum() / batch["mask"].sum()

        def outer(weighting):
            def advance(carry, batch):
                student, opt = carry
                grads = jax.grad(inner_loss)(student, weighting, batch)
                updates, opt = self.tx.update({"student": grads}, opt, {"student": student})
                return (optax.apply_updates({"student": student}, updates)["student"], opt), None

            carry = self.state.params["student"], self.state.opt_state["inner"]
            if len(batches) == 1:
                (student, _), _ = advance(carry, batches[0])
            else:  # compiled once
                (student, _), _ = jax.lax.scan(advance, carry, stacked(batches))
            return terms_of({"student": student}, self.held_out).values["cross_entropy"].mean()

        return jax.jit(jax.grad(outer))(self.state.params["weighting"])


@functools.cache
def solved(name):
    """A problem of 64 bits and its brute-force gradient of one step."""
    problem = Problem(chain(name))
    return problem, problem.brute_force([problem.train])


def together(*names, slow=()):
    """Tests of one chain on one worker, which solves its problem once."""
    marks = {n: [pytest.mark.xdist_group(f"brute force {n}")] for n in names}
    for n in slow:
        marks[n].append(pytest.mark.slow)
    return [pytest.param(n, marks=marks[n]) for n in names]


def slow(*values):
    return pytest.param(*values, marks=pytest.mark.slow)


@pytest.mark.parametrize(
    "name", together(*CHAINS, slow=("heavy_ball", "nesterov", "schedule", "lamb"))
)
@pytest.mark.parametrize("order", ["after_step", slow("lookahead")])
def test_one_step_equals_brute_force(name, order):
    with jax.enable_x64(True):
        problem, want = solved(name)
        got, _, metrics = problem.gradient(Bilevel(outer_update=order))
        assert harness.max_relative(want, got) < 1e-10
        assert metrics["outer_grad_norm"] > 0
        if name in ("nesterov", "clip_adamw") and order == "after_step":
            low, _, _ = problem.gradient(Bilevel(outer_update=order, low_memory=True))
            assert harness.max_relative(want, low) < 1e-10


@pytest.mark.slow
@pytest.mark.parametrize("name", together("heavy_ball", "adamw"))
def test_features_with_gradient_equal_brute_force(name):
    with jax.enable_x64(True):
        problem = Problem(chain(name), stop_features=False)
        want = problem.brute_force([problem.train])
        got, _, _ = problem.gradient(Bilevel())
        assert harness.max_relative(want, got) < 1e-10
        _, stopped = solved(name)
        assert harness.max_relative(want, stopped) > 1e-3


@pytest.mark.parametrize("name", together("sgd", "adamw"))
def test_finite_difference_is_close_and_not_exact(name):
    bound = {"sgd": 1e-3, "adamw": 1e-2}[name]
    with jax.enable_x64(True):
        problem, want = solved(name)
        got, _, _ = problem.gradient(Bilevel(method="finite_difference"))
        error = harness.max_relative(want, got)
        assert 1e-9 < error < bound


@pytest.mark.parametrize("name", [slow("nesterov"), "clip_adamw"])
@pytest.mark.parametrize("k", [slow(1), slow(2), 4])
def test_unrolled_steps_equal_brute_force(name, k):
    with jax.enable_x64(True):
        problem = Problem(chain(name))
        batches = [problem.train, *(harness.make_batch(16, seed=20 + i) for i in range(1, k))]
        want = problem.brute_force(batches)
        train = problem.train if k == 1 else stacked(batches)
        got, _, _ = problem.gradient(Bilevel(outer_update="lookahead", unroll=k), train=train)
        assert harness.max_relative(want, got) < 1e-10


def test_last_layer_is_exact_for_a_student_of_one_layer():
    with jax.enable_x64(True):
        masked = optax.masked(
            optax.set_to_zero(),
            {"student": {"first": {"kernel": True, "bias": True}, "last": False}},
        )
        problem = Problem(optax.chain(chain("heavy_ball"), masked))  # what is below is frozen
        chosen = bilevel.last_layer(
            problem.models["student"],
            problem.state.params["student"],
            problem.state.model_state["student"],
            (problem.train["input"],),
        )
        names = list(jax.tree_util.tree_leaves_with_path(problem.state.params["student"]))
        found = [jax.tree_util.keystr(p) for (p, _), c in zip(names, chosen, strict=True) if c]
        assert found == ["['last']['bias']", "['last']['kernel']"]
        want = problem.brute_force([problem.train])
        got, _, _ = problem.gradient(Bilevel(method="last_layer"))
        assert harness.max_relative(want, got) < 1e-10


def test_part_of_the_batch_is_unbiased_without_batch_norm():
    with jax.enable_x64(True):
        problem = Problem(chain("sgd"))
        net = harness.tiny_model(batch_norm=False)
        problem.models["student"] = problem.models["teacher"] = net
        want, _, _ = problem.gradient(Bilevel())
        # With or without a forward pass of its own.
        ways = [
            problem.gradients(Bilevel(jvp_fraction=0.25, low_memory=low)) for low in (False, True)
        ]

        @jax.jit
        def first_row(key):
            folded = jax.random.fold_in(rng.stream(key, "step"), problem.state.step)
            return jax.random.randint(rng.stream(folded, "part"), (), 0, 4)

        starts, found = set(), []
        for key in map(jax.random.key, range(40)):
            if (start := int(first_row(key))) not in starts:
                starts.add(start)
                found.append(ways[len(found) % 2](key)[0])
        assert starts == {0, 1, 2, 3}
        mean = jax.tree.map(lambda *x: sum(x) / 4, *found)
        assert harness.max_relative(want, mean) < 1e-10
        assert harness.max_relative(want, found[0]) > 1e-3


def test_weigher_learns_only_in_outer_steps():
    problem = Problem(chain("adamw"))
    inner, metrics = jax.jit(problem.make(Bilevel(), outer=False))(
        problem.state, problem.frozen, problem.train, problem.key
    )
    same = jax.tree.map(
        lambda a, b: bool((a == b).all()),
        problem.state.params["weighting"],
        inner.params["weighting"],
    )
    assert all(jax.tree.leaves(same)) and "outer_loss" not in metrics
    moved, outer, metrics = problem.gradient(Bilevel())
    assert all(np.any(x) for x in jax.tree.leaves(moved))
    assert np.isfinite(metrics["outer_loss"])
    # After the step the student's step is the same whether or not the weighting learns after it.
    assert harness.max_relative(inner.params["student"], outer.params["student"]) < 1e-6


def test_zero_gradients_under_adam_and_clipping_stay_finite():
    """A student leaf that never had a gradient, and a gradient of norm zero."""
    tx = optax.chain(optax.clip_by_global_norm(1.0), optax.adam(0.1))
    params = {"used": jnp.ones(3), "unused": jnp.ones(2)}
    opt_state = tx.init(params)
    cotangent = jax.tree.map(jnp.ones_like, params)

    @jax.jit
    def pulled(grads):
        _, naive = jax.vjp(lambda g: tx.update(g, opt_state, params)[0], grads)
        return naive(cotangent), hypergradient.pull_back(tx, grads, opt_state, params, cotangent)

    for scale in (1.0, 0.0):
        naive, u = pulled({"used": scale * np.float32([1, 0, 2]), "unused": np.zeros(2, "f")})
        assert not all(np.isfinite(x).all() for x in jax.tree.leaves(naive))
        assert all(np.isfinite(x).all() for x in jax.tree.leaves(u))


def test_regular_leaves_values_and_ordinary_derivatives_alone():
    def fn(x, y):
        return jax.jit(jnp.sqrt)(x) / y + jax.lax.rsqrt(y) * x

    @jax.jit
    def both(x, y):
        pairs = [jax.vjp(f, x, y) for f in (fn, hypergradient.regular(fn))]
        return [(value, pull(x)) for value, pull in pairs]

    want, got = both(jnp.array([1.0, 2.0]), jnp.array([3.0, 0.5]))
    np.testing.assert_allclose(want[0], got[0], rtol=1e-6)
    for a, b in zip(want[1], got[1], strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-5)


def test_adam_slope_at_zero_is_that_of_the_limit():
    with jax.enable_x64(True):
        tx = optax.adam(0.1, eps=1e-3)
        one = {"x": np.ones(1)}

        @jax.jit
        def slopes(zero, tiny):
            u = hypergradient.pull_back(tx, zero, tx.init(zero), zero, one)["x"]
            return u, tx.update(tiny, tx.init(zero), zero)[0]["x"] / tiny["x"]

        np.testing.assert_allclose(*slopes({"x": np.zeros(1)}, {"x": np.full(1, 1e-12)}), rtol=1e-6)


@pytest.mark.parametrize(
    "kwargs, word",
    [
        ({"method": "exactt"}, "did you mean 'exact'"),
        ({"outer_update": "after_stp"}, "did you mean 'after_step'"),
        ({"jvp_fraction": 0.3}, "whole number"),
        ({"unroll": 2}, "outer_update=lookahead"),
        ({"unroll": 0}, "at least 1"),
        ({"method": "last_layer", "jvp_fraction": 0.5}, "set jvp_fraction to 1"),
        ({"horizon": 0}, "at least 1"),
        ({"horizon": 2}, "exact looks ahead by unroll"),
        ({"method": "two_speed", "horizon": 2}, "no horizon"),
        ({"damping": 0.1}, "inverts no Hessian"),
        ({"method": "cg", "damping": -0.1}, "0 or more"),
        ({"method": "neumann", "forget": 0.9}, "carries no tangents"),
        ({"method": "two_speed", "forget": 0.0}, "at most 1"),
        ({"method": "neumann", "jvp_fraction": 0.5}, "whole batch"),
        ({"method": "cg", "low_memory": True}, "low_memory"),
        ({"method": "neumann", "unroll": 2, "outer_update": "lookahead"}, "method=exact"),
        ({"method": "two_speed", "outer_update": "lookahead"}, "after_step"),
        ({"method": "truncated", "horizon": 4, "every": 2}, "one weighting made them all"),
    ],
)
def test_wrong_options_are_refused(kwargs, word):
    with pytest.raises(ConfigError, match=word):
        Bilevel(**kwargs)


def test_a_weight_column_for_one_number_is_refused():
    """A `[b, 1]` ratio against losses `[b]` would broadcast."""

    @dataclasses.dataclass(frozen=True)
    class Column(ExampleWeighting):
        def __call__(self, nets, evidence, step):
            del nets, step
            return jnp.full((evidence.mask.shape[0], 1), 0.5)

    net = harness.tiny_model()
    weighted = WeightedObjective(
        objective=KD(), weighting=Column(), loss_terms=LOSS_TERMS, num_classes=harness.K
    )
    with pytest.raises(ConfigError, match=r"shape \(16, 1\)"):
        state.infer_shapes(weighted, {"student": net, "teacher": net}, harness.make_batch())
