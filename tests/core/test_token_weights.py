"""A weight for each token: its hypergradient, and what divides the batch, in float64."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from distill_jax.core import bilevel, partition, state, steps
from distill_jax.core.api import ExampleWeighting, Objective, Terms
from distill_jax.core.bilevel import Bilevel
from distill_jax.core.errors import ConfigError
from distill_jax.core.weighted_objective import WeightedObjective
from distill_jax.losses.classification import cross_entropy
from distill_jax.losses.divergences import kl
from distill_jax.models import ratio_mlp
from distill_jax.weighting import _evidence, meta_weight_net, reweight, trilateral
from tests import harness

LOSS_TERMS = ("cross_entropy", "distillation")
FORMS = ("sums", "tokens", "mixed")
TOKENS = ["tokens", *(pytest.param(form, marks=pytest.mark.slow) for form in FORMS[::2])]


@dataclasses.dataclass(frozen=True)
class TokenKD(Objective):
    """Labels and a teacher at each token; the teacher is asked at every second token."""

    form: str = "tokens"
    roles = ("student", "teacher")

    def loss(self, nets, batch, memory, step):
        logits = {"student": nets("student", batch["input"], train=True)[0]["logits"]}
        logits["teacher"] = nets("teacher", batch["input"])[0]["logits"]
        mask = batch["target_mask"]
        every_second = mask * (jnp.arange(mask.shape[1]) % 2 == 0)[None]
        log_s, log_t = (jax.nn.log_softmax(logits[r]) for r in ("student", "teacher"))
        values = {
            "cross_entropy": mask * cross_entropy(logits["student"], batch["target"]),
            "distillation": every_second * kl(log_t, log_s),
        }
        counts = {"cross_entropy": mask, "distillation": every_second}
        if self.form == "sums":
            values, counts = ({k: x.sum(1) for k, x in d.items()} for d in (values, counts))
            logits = {}
        if self.form == "mixed":
            values["size"] = 0.1 * jnp.square(logits["student"]).mean((1, 2))
        return Terms(values=values, counts=counts, logits=logits)


class Problem:
    """Student, teacher and a network of weights; the outer optimizer is SGD with rate 1."""

    def __init__(self, form, *, weighting=None, **weighted):
        by_losses = form == "sums"
        rule = meta_weight_net.make() if by_losses else trilateral.make(blocks=("sg", "st", "t"))
        rule = rule if weighting is None else weighting
        self.weighted = WeightedObjective(
            objective=TokenKD(form), weighting=rule, loss_terms=LOSS_TERMS, **weighted
        )
        net = harness.tiny_decoder()
        weigher = ratio_mlp.make(outputs=1 + by_losses, hidden=(6,), zero_init=False)
        self.models = {"student": net, "teacher": net} | dict.fromkeys(rule.roles, weigher)
        self.inner = optax.sgd(0.5, momentum=0.9)
        self.optimizers = bilevel.Optimizers(self.inner, optax.sgd(1.0), tuple(rule.roles))
        self.batch = harness.make_token_batch(16)
        self.held_out = harness.make_token_batch(8, seed=1)
        shapes = state.infer_shapes(self.weighted, self.models, self.batch)
        self.init = state.make_init(
            self.weighted,
            self.models,
            self.optimizers,
            shapes,
            trainable=("student", *rule.roles),
            ema={},
        )
        self.frozen = {"teacher": net.init(jax.random.key(7), self.batch["input"])}

    def begin(self):
        """The state before the first step, in float64."""
        wide = lambda x: x.astype(float) if x.dtype == jnp.float32 else x  # noqa: E731
        return jax.tree.map(wide, jax.jit(self.init)(jax.random.key(0)))

    def step(self, options=None, *, outer=True):
        given = self.weighted, self.models, self.optimizers, options or Bilevel()
        return bilevel.make_bilevel_step(*given, outer=outer)

    def fed(self, batch=None):
        return {"train": self.batch if batch is None else batch, "held_out": self.held_out}


def token_mean(params, batch):
    """The held-out loss by itself: the mean over all tokens."""
    logits = harness.tiny_decoder().apply(params, {}, batch["input"], train=True, rngs={})[0]
    mask = batch["target_mask"] * batch["mask"][:, None]
    loss = cross_entropy(logits["logits"], batch["target"])
    return (mask * loss).sum() / mask.sum()


@functools.cache
def solved(form):
    with jax.enable_x64(True):
        problem = Problem(form)
        start = problem.begin()
        step = jax.jit(problem.step())
        return (
            problem,
            start,
            jax.device_get(step(start, problem.frozen, problem.fed(), jax.random.key(3))),
        )


@pytest.mark.parametrize("form", TOKENS)
def test_hypergradient_against_finite_differences(form):
    """The held-out loss after a step, along a direction of the weighting's parameters."""
    with jax.enable_x64(True):
        problem, start, (new, metrics) = solved(form)
        omega = start.params["weighting"]
        found = jax.tree.map(np.subtract, omega, new.params["weighting"])
        inner = problem.step(outer=False)

        @jax.jit
        def outer_loss(omega):
            moved = start.replace(params={**start.params, "weighting": omega})
            moved, _ = inner(moved, problem.frozen, problem.batch, jax.random.key(3))
            return token_mean(moved.params["student"], problem.held_out)

        draw = np.random.default_rng(0)
        along = jax.tree.map(lambda x: draw.normal(size=x.shape), omega)
        at = lambda h: outer_loss(jax.tree.map(lambda x, d: x + h * d, omega, along))  # noqa: E731
        want = (at(1e-4) - at(-1e-4)) / 2e-4
        got = sum(jax.tree.leaves(jax.tree.map(lambda g, d: (g * d).sum(), found, along)))
        assert abs(want) > 1e-6
        np.testing.assert_allclose(got, want, rtol=1e-6)
        np.testing.assert_allclose(metrics["outer_loss"], outer_loss(omega), rtol=1e-12)


@pytest.mark.slow
@pytest.mark.parametrize(
    "options",
    [
        Bilevel(low_memory=True),
        Bilevel(method="neumann"),
        Bilevel(jvp_fraction=0.5),
    ],
    ids=["low_memory", "neumann", "half"],
)
def test_other_ways_find_the_same_gradient(options):
    with jax.enable_x64(True):
        problem, start, (new, _) = solved("tokens")
        step = jax.jit(problem.step(options))
        keys = [jax.random.key(3)]
        if options.jvp_fraction < 1:  # keys of both halves
            keys = [jax.random.key(seed) for seed in range(8)]
        after = [step(start, problem.frozen, problem.fed(), key)[0] for key in keys]
        kinds = {float(jax.tree.leaves(x.params["weighting"])[0].sum()): x for x in after}
        assert len(kinds) == (2 if options.jvp_fraction < 1 else 1)
        mean = jax.tree.map(lambda *x: sum(x) / len(x), *(x.params for x in kinds.values()))
        assert harness.max_relative(new.params, mean) < 1e-12


@pytest.mark.parametrize("form", TOKENS)
def test_padding_changes_nothing(form):
    with jax.enable_x64(True):
        problem, start, (want, metrics) = solved(form)
        fed = problem.fed(harness.padded(problem.batch, 8))
        fed["held_out"] = harness.padded(fed["held_out"], 8)
        got, other = jax.jit(problem.step())(start, problem.frozen, fed, jax.random.key(3))
        assert harness.max_relative(want.params, got.params) < 1e-12
        assert harness.max_relative(metrics, other) < 1e-12


@pytest.mark.slow
@pytest.mark.parametrize("form", FORMS)
def test_one_device_equals_a_mesh_of_eight(form):
    with jax.enable_x64(True):
        problem = solved(form)[0]
        made = harness.Setup(
            problem.weighted, problem.models, None, problem.begin, problem.step(), problem.frozen
        )
        made = made._replace(init=lambda key: jax.tree.map(jnp.asarray, problem.init(key)))
        one, alone = harness.run(made, problem.fed())
        mesh = partition.make_mesh(data=2, fsdp=4)
        eight, split = harness.run(made, problem.fed(), mesh=mesh)
        assert harness.max_relative(one.params, eight.params) < 1e-12
        assert harness.max_relative(alone[-1], split[-1]) < 1e-12


@pytest.mark.parametrize("form", TOKENS)
@pytest.mark.parametrize("accum_steps", [2, pytest.param(8, marks=pytest.mark.slow)])
def test_jointly_learned_weights_accumulate_exactly(form, accum_steps):
    with jax.enable_x64(True):
        problem, tx = solved(form)[0], optax.sgd(0.5)
        given = problem.weighted, problem.models
        shapes = state.infer_shapes(*given, problem.batch)
        init = state.make_init(*given, tx, shapes, trainable=("student", "weighting"), ema={})
        start, key = jax.jit(init)(jax.random.key(0)), jax.random.key(3)
        whole, parts = (
            jax.jit(steps.make_train_step(*given, tx, accum_steps=n, unroll=False))(
                start, problem.frozen, problem.batch, key
            )
            for n in (1, accum_steps)
        )
        assert harness.max_relative(whole[0].params, parts[0].params) < 1e-12
        assert harness.max_relative(whole[1], parts[1]) < 1e-12


@pytest.mark.slow
def test_two_speeds_find_the_gradient_of_the_ratio_that_tokens_share():
    """In the first step, tangents give the output bias the one-step gradient, on unequal masks."""
    with jax.enable_x64(True):
        _, start, (new, _) = solved("tokens")
        problem = Problem("tokens")
        problem.optimizers = problem.optimizers._replace(method="two_speed")
        opt_state = problem.optimizers.init(start.params)
        step = jax.jit(problem.step(Bilevel(method="two_speed")))
        found, _ = step(
            start.replace(opt_state={**opt_state, "inner": start.opt_state["inner"]}),
            problem.frozen,
            problem.fed(),
            jax.random.key(3),
        )
        before, *after = (
            np.asarray(x.params["weighting"]["Dense_1"]["bias"]) for x in (start, new, found)
        )
        biases = [x - before for x in after]
        assert np.abs(biases[0]).min() > 0
        np.testing.assert_allclose(*biases, rtol=1e-9)


def test_weights_from_the_gradient_of_each_token():
    """`Reweight` on tokens: the gradient in the weights by autodiff of the loss after a step."""
    with jax.enable_x64(True):
        seen = {}

        @dataclasses.dataclass(frozen=True, kw_only=True)
        class Recording(reweight.Reweight):
            def from_gradient(self, gradient, mask):
                seen.update(gradient=gradient, mask=mask)
                return super().from_gradient(gradient, mask)

        problem = Problem("tokens", weighting=Recording())
        start, batch = problem.begin(), problem.batch

        def recorded(start, frozen, fed, key):
            new, _ = problem.step()(start, frozen, fed, key)
            return new.params["student"], seen["gradient"], seen["mask"]

        given = start, problem.frozen, problem.fed(), jax.random.key(3)
        _, gradient, mask = jax.jit(recorded)(*given)

        @jax.jit
        @jax.grad
        def want(weights):
            def inner(params):
                nets = steps.BoundNets(
                    problem.models,
                    {"student": params, "teacher": problem.frozen["teacher"][0]},
                    {"student": {}, "teacher": {}},
                    key=jax.random.key(0),
                )
                terms = TokenKD().loss(nets, batch, {}, 0)
                total = 0.0
                for j, name in enumerate(LOSS_TERMS):
                    real = batch["mask"][:, None]
                    mean = (real * weights[..., j] * terms.values[name]).sum()
                    total += mean / (real * terms.counts[name]).sum()
                return total

            params = start.params["student"]
            moved = jax.tree.map(lambda p, g: p - 0.5 * g, params, jax.grad(inner)(params))
            return token_mean(moved, problem.held_out)

        expected = want(jnp.zeros((*batch["target_mask"].shape, 2))).reshape(-1, 2)
        np.testing.assert_allclose(gradient, expected, rtol=1e-9, atol=1e-16)
        real = (batch["mask"][:, None] * batch["target_mask"]).reshape(-1)
        np.testing.assert_array_equal(mask, real)


@dataclasses.dataclass(frozen=True)
class Looking(ExampleWeighting):
    """Keeps what it is shown."""

    shown: dict = dataclasses.field(default_factory=dict)

    def __call__(self, nets, evidence, step):
        self.shown.update(evidence=evidence)
        return jnp.full((len(evidence.mask), len(evidence.loss_terms)), 0.5)


@pytest.mark.parametrize("form", ["sums", "tokens"])
def test_rows_that_a_weighting_sees(form):
    """Sums are shown as means; rows are masked where nothing counts."""
    look = Looking()
    problem = Problem(form, weighting=look)

    @jax.jit
    def seen(batch):
        nets = state.ShapeNets(problem.models)
        problem.weighted.loss(nets, batch, {"objective": {}}, jnp.int32(0))
        return look.shown["evidence"]

    batch = jax.device_get(problem.batch)
    evidence = jax.device_get(seen(batch))
    mask = np.asarray(batch["mask"])[:, None] * np.asarray(batch["target_mask"])
    log_v = np.log(harness.VOCABULARY)  # outputs are zeros
    if form == "sums":
        np.testing.assert_array_equal(evidence.mask, mask.any(1))
        want = np.where(np.asarray(batch["target_mask"]).any(1), log_v, 0)
        np.testing.assert_allclose(evidence.loss_terms["cross_entropy"], want, rtol=1e-6)
        return
    np.testing.assert_array_equal(evidence.mask, mask.reshape(-1))
    want = np.asarray(batch["target_mask"]).reshape(-1) * log_v
    np.testing.assert_allclose(evidence.loss_terms["cross_entropy"], want, rtol=1e-6)
    assert evidence.logits["teacher"].shape == (mask.size, harness.VOCABULARY)
    np.testing.assert_array_equal(
        evidence.label_probs.argmax(-1), np.asarray(batch["target"]).reshape(-1)
    )


@dataclasses.dataclass(frozen=True)
class PooledLogits(TokenKD):
    """Loss terms of tokens beside logits of examples."""

    def loss(self, nets, batch, memory, step):
        terms = super().loss(nets, batch, memory, step)
        return terms.replace(logits={role: x.mean(1) for role, x in terms.logits.items()})


@dataclasses.dataclass(frozen=True)
class SumsBesideLogits(TokenKD):
    def loss(self, nets, batch, memory, step):
        sums = TokenKD("sums").loss(nets, batch, memory, step)
        return sums.replace(logits=super().loss(nets, batch, memory, step).logits)


@dataclasses.dataclass(frozen=True)
class ReadingLogits(ExampleWeighting):
    def __call__(self, nets, evidence, step):
        return _evidence.probs(evidence, "student")[:, :2]


@dataclasses.dataclass(frozen=True)
class TwoShapes(TokenKD):
    def loss(self, nets, batch, memory, step):
        terms = super().loss(nets, batch, memory, step)
        for part in (terms.values, terms.counts):
            part["distillation"] = part["distillation"].sum(1)
        return terms


@pytest.mark.parametrize(
    ("objective", "weighting", "classes", "message"),
    [
        (PooledLogits(), ReadingLogits(), 0, r"(?s)logits of 'student'.*tokens \[b, t\] need"),
        (PooledLogits(), trilateral.make(blocks=("s",)), 0, r"(?s)labels.*logits \[b, t, k\]"),
        (SumsBesideLogits(), ReadingLogits(), 0, r"(?s)logits of 'student'.*\[b\] need"),
        (TwoShapes(), meta_weight_net.make(), 0, r"cross_entropy \(16, 6\), distillation \(16,\)"),
        (TokenKD(), trilateral.make(), 5, "Trilateral compares with class means.*of tokens"),
    ],
)
def test_what_cannot_be_weighted_is_refused(objective, weighting, classes, message):
    problem = Problem("tokens")
    weighted = dataclasses.replace(
        problem.weighted, objective=objective, weighting=weighting, num_classes=classes
    )
    with pytest.raises(ConfigError, match=message):
        state.infer_shapes(weighted, problem.models, problem.batch)


def test_shuffled_weights_stay_among_real_rows():
    weighted = dataclasses.replace(Problem("tokens").weighted, control="shuffled")
    mask = jnp.asarray(np.arange(20) % 3 > 0, float)
    weights = jnp.arange(20.0)[:, None]
    found = np.asarray(weighted.used(weights, mask, jnp.int32(1)))[:, 0]
    real = np.flatnonzero(mask)
    assert set(found[real]) == set(real.astype(float)) and not np.array_equal(found[real], real)
    every = weighted.used(weights, jnp.ones(20), jnp.int32(1))[:, 0]
    key = jax.random.fold_in(jax.random.key(0), 1)
    np.testing.assert_array_equal(every, weights[jax.random.permutation(key, 20)][:, 0])
