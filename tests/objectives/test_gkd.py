"""Generalized distillation against a transcription of its equation; prompts; what is refused."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from distill_jax.core import sampling, sequences, state, steps
from distill_jax.core.api import Model
from distill_jax.core.errors import ConfigError
from distill_jax.losses.sequence import DIVERGENCES
from distill_jax.models import transformer
from distill_jax.objectives import gkd
from tests import harness

V, P, STEPS, B, T = 5, 3, 4, 6, 7
KEY = jax.random.key(0)


def bigram(*, top=0):
    """Logits of the next token from a table `[v, v]`, read by the last token."""

    def tokens_of(x):
        return x["tokens"] if isinstance(x, dict) else x

    def apply(params, model_state, x, *, train=False, rngs=None):
        logits = params["table"][tokens_of(x)]
        outputs = {"logits": logits}
        if top:
            found = sequences.top_log_probs(logits, top)
            outputs = {"top_index": found.index, "top_log_probs": found.log_probs}
            outputs["tail_log_prob"] = found.tail
        if isinstance(x, dict) and "ask" in x:
            logs = jax.nn.log_softmax(logits)
            outputs["log_probs"] = jnp.take_along_axis(logs, x["ask"], axis=-1)
        return outputs, model_state

    def init(key, x):
        return {"table": 2 * jax.random.normal(key, (V, V))}, {}

    def logits(params, tokens, mask):
        return params["table"][tokens]

    return Model(init, apply, sampling.uncached(logits, V))


def batch_of():
    r = np.random.RandomState(0)
    ids = r.randint(0, V, (B, T + 1))
    batch = {
        "input": ids[:, :-1],
        "target": ids[:, 1:],
        "target_mask": (np.arange(T) < np.array([7, 0, 3, 5, 7, 1])[:, None]).astype(np.float32),
        "prompt": ids[:, :P],
        "mask": np.array([1, 1, 1, 0, 1, 1], np.float32),
        "index": np.arange(B),
        "epoch": np.zeros(B, int),
    }
    return {k: jnp.asarray(x.astype(np.int32) if x.dtype == int else x) for k, x in batch.items()}


def nets_of(student=None, *, top=0, batch=None):
    models = {"student": bigram(), "teacher": bigram(top=top)}
    params = {r: m.init(jax.random.key(i), None)[0] for i, (r, m) in enumerate(models.items())}
    params["student"] = params["student"] if student is None else student
    none = {role: {} for role in models}
    batch = batch_of() if batch is None else batch
    return steps.BoundNets(models, params, none, key=KEY, batch=batch), params


def divergence(kind, p, q, s):
    """The six divergences of two distributions `[v]`, from their definitions."""

    def kl(a, b):
        return (a * np.log(a / b)).sum()

    m = (1 - s) * p + s * q
    return {
        "forward": lambda: kl(p, q),
        "reverse": lambda: kl(q, p),
        "jeffreys": lambda: (kl(p, q) + kl(q, p)) / 2,
        "skew_forward": lambda: kl(p, s * p + (1 - s) * q),
        "skew_reverse": lambda: kl(q, s * q + (1 - s) * p),
        "jensen_shannon": lambda: (1 - s) * kl(p, m) + s * kl(q, m),
    }[kind]()


def softmax_rows(z):
    z = np.exp(np.asarray(z, np.float64))
    return z / z.sum(-1, keepdims=True)


def expected(rows, params, kind, share):
    """The mean over sequences of the mean over their tokens; rows of (previous, counted) tokens."""
    means = []
    for previous, counted in rows:
        p, q = (softmax_rows(params[role]["table"]) for role in ("teacher", "student"))
        pairs = zip(previous, counted, strict=True)
        at = [divergence(kind, p[x], q[x], share) for x, counts in pairs if counts]
        means += [np.mean(at)] if at else []
    return np.mean(means)


def loss_of(objective, nets, batch):
    return steps.mean_loss(objective.loss(nets, batch, {}, jnp.int32(0)), batch["mask"])


def drawn(batch, **options):
    samples = nets_of(batch=batch)[0].sample("student", batch["prompt"], steps=STEPS, **options)
    return np.asarray(samples.tokens[:, 0]), np.asarray(samples.mask[:, 0])


FAST = ("reverse", "jensen_shannon")
KINDS = [k if k in FAST else pytest.param(k, marks=pytest.mark.slow) for k in DIVERGENCES]


@pytest.mark.parametrize("kind", KINDS)
def test_the_equation(kind):
    batch, weight = batch_of(), 0.3
    objective = gkd.make(on_policy=weight, divergence=kind, share=0.2, new_tokens=STEPS, end=1)
    nets, params = nets_of()
    loss, metrics = jax.jit(lambda: loss_of(objective, nets, batch))()
    tokens, mask = drawn(batch, end=1)
    assert 0 < mask[:, P:].mean() < 1  # some have ended
    real = [i for i in range(B) if batch["mask"][i]]
    own = expected([(tokens[i, :-1], mask[i, 1:]) for i in real], params, kind, 0.2)
    data = expected(
        [(np.asarray(batch["input"][i]), np.asarray(batch["target_mask"][i])) for i in real],
        params,
        kind,
        0.2,
    )
    np.testing.assert_allclose(metrics["on_policy"], own, rtol=1e-5)
    np.testing.assert_allclose(metrics["off_policy"], data, rtol=1e-5)
    np.testing.assert_allclose(loss, (1 - weight) * data + weight * own, rtol=1e-5)


@pytest.mark.parametrize("top", [0, pytest.param(2, marks=pytest.mark.slow)])
def test_samples_are_given_data_to_the_gradient(top):
    """On-policy distillation has the gradient of distillation on rows with these tokens."""
    batch = batch_of()
    tokens, mask = drawn(batch)
    fixed = {**batch, "input": tokens[:, :-1], "target": tokens[:, 1:], "target_mask": mask[:, 1:]}

    @jax.jit
    def gradients(student):
        def loss(student, weight, batch):
            objective = gkd.make(on_policy=weight, divergence="reverse", new_tokens=STEPS)
            return loss_of(objective, nets_of(student, top=top)[0], batch)[0]

        return [jax.grad(loss)(student, *x) for x in ((1.0, batch), (0.0, fixed))]

    own, given = gradients(nets_of()[1]["student"])
    np.testing.assert_allclose(own["table"], given["table"], atol=1e-6)
    assert np.abs(own["table"]).max() > 1e-3


def test_an_end_of_the_mixture_leaves_the_other_term_out():
    calls = []

    class Nets(steps.BoundNets):
        def sample(self, *args, **options):
            calls.append("sample")
            return super().sample(*args, **options)

    for weight, terms in ((0.0, {"off_policy"}), (1.0, {"on_policy"})):
        models = {"student": bigram(), "teacher": bigram()}
        _, params = nets_of()
        nets = Nets(models, params, {r: {} for r in models}, key=KEY, batch=batch_of())
        objective = gkd.make(on_policy=weight, new_tokens=1)
        made = jax.eval_shape(lambda n=nets, o=objective: o.loss(n, batch_of(), {}, jnp.int32(0)))
        assert made.values.keys() == terms
    assert calls == ["sample"]


def test_prompts_are_the_beginnings_of_rows():
    segments = np.array([[0] * 6, [0, 0, 1, 1, 1, 2], [0, -1, -1, -1, -1, -1], [0, 1, 2, 3, 3, 3]])
    view = {"tokens": jnp.arange(24).reshape(4, 6), "segments": jnp.asarray(segments)}
    found = gkd.make(prompt=4).prompts({"input": view})
    np.testing.assert_array_equal(found.tokens, view["tokens"][:, :4])
    np.testing.assert_array_equal(found.start, [0, 2, 1, 3])
    np.testing.assert_array_equal(found.valid, [1, 1, 0, 1])
    plain = gkd.make(prompt=6).prompts({"input": view["tokens"]})
    assert plain.start is None and plain.tokens.shape == (4, 6)


@pytest.mark.slow
def test_rows_of_documents_with_a_transformer():
    """The student continues the last document of a prompt as if it were alone."""
    sizes = {"layout": "smollm", "vocabulary": V, "width": 8, "depth": 1, "heads": 2}
    model, other = transformer.make(**sizes), transformer.make(**{**sizes, "width": 12})
    batch = {k: x for k, x in batch_of().items() if k != "prompt"}
    segments = jnp.asarray(np.repeat([[0, 0, 1, 1, 1, 1, 1]], B, 0)).at[2].set(-1)
    packed = {**batch, "input": {"tokens": batch["input"], "segments": segments}}
    alone = {**batch, "prompt": batch["input"][:, 2:4]}
    models = {"student": model, "teacher": other}
    params = {r: m.init(KEY, batch["input"])[0] for r, m in models.items()}
    objective = gkd.make(on_policy=1.0, prompt=4, new_tokens=STEPS, divergence="forward")

    @jax.jit
    def terms(batch):
        nets = steps.BoundNets(models, params, {r: {} for r in models}, key=KEY, batch=batch)
        return objective.loss(nets, batch, {}, jnp.int32(0))

    one, two = terms(packed), terms(alone)
    counts = np.asarray(one.counts["on_policy"])
    assert not counts[2].any() and (counts[0] > 0).sum() == STEPS
    kept = np.array([0, 1, 3, 4, 5])
    np.testing.assert_allclose(
        one.values["on_policy"].sum(1)[kept], two.values["on_policy"].sum(1)[kept], rtol=1e-4
    )


@pytest.mark.slow
def test_a_student_comes_near_on_its_own_samples():
    batch, objective = batch_of(), gkd.make(on_policy=1.0, divergence="reverse", new_tokens=STEPS)
    models = {"student": bigram(), "teacher": bigram()}
    shapes = state.infer_shapes(objective, models, batch)
    tx = optax.adam(0.1)
    init = state.make_init(objective, models, tx, shapes, trainable=("student",), ema={})
    step = jax.jit(steps.make_train_step(objective, models, tx))
    frozen = {"teacher": (nets_of()[1]["teacher"], {})}
    current, losses = jax.jit(init)(KEY), []
    for _ in range(60):
        current, metrics = step(current, frozen, batch, KEY)
        losses.append(float(metrics["on_policy"]))
    assert np.mean(losses[-5:]) < 0.1 * np.mean(losses[:5])


@pytest.mark.parametrize(
    ("kwargs", "where"),
    [
        ({"on_policy": 1.5}, "on_policy"),
        ({"divergence": "jensen"}, "divergence"),
        ({"share": 1.0}, "share"),
        ({"prompt": 0}, "prompt"),
        ({"new_tokens": 0}, "new_tokens"),
        ({"temperature": -1.0}, "temperature"),
        ({"end": -2}, "end"),
        ({"end": V}, "end"),
        ({"prompt": T + 1}, "prompt"),
    ],
    ids=str,
)
def test_bad_arguments(kwargs, where):
    batch = {k: x for k, x in batch_of().items() if k != "prompt"}
    with pytest.raises(ConfigError) as error:
        objective = gkd.make(**{"prompt": P, **kwargs})
        state.infer_shapes(objective, {"student": bigram(), "teacher": bigram()}, batch)
    assert error.value.where == where


def test_two_vocabularies_and_absent_targets_are_refused():
    decoder = harness.answering(harness.tiny_decoder())
    objective, batch = gkd.make(prompt=P, new_tokens=2), batch_of()
    with pytest.raises(ConfigError, match="same tokenizer"):
        state.infer_shapes(objective, {"student": bigram(), "teacher": decoder}, batch)
    bare = {k: x for k, x in batch.items() if k != "target"}
    with pytest.raises(ConfigError, match="no target"):
        state.infer_shapes(objective, {"student": bigram(), "teacher": bigram()}, bare)
