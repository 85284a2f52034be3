"""MCL against loops over positions, with networks that look tokens up in tables."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from distill_jax.core.errors import ConfigError
from distill_jax.data.transforms import tokens
from distill_jax.objectives import mcl

B, T, V, D, MASK = 4, 12, 7, 3, 0
R = np.random.default_rng(0)
GENERATOR, STUDENT, DETECTOR = R.normal(size=(V, V)), R.normal(size=(V, D)), R.normal(size=(D, 3))
X = R.integers(1, V, (B, T))
SEGMENTS = np.where(np.arange(T) < np.array([[12], [9], [12], [5]]), 0, -1)


def nets(role, view, *, train=False):
    if role == "detector":
        return {"output": view @ jnp.asarray(DETECTOR, jnp.float32)}, {}
    table = {"generator": GENERATOR, "student": STUDENT}[role]
    looked_up = jnp.asarray(table, jnp.float32)[view["tokens"]]
    return {"logits" if role == "generator" else "tokens": looked_up}, {}


def batch_of(**more):
    view = {"tokens": jnp.asarray(X), "segments": jnp.asarray(SEGMENTS)}
    batch = {"input": view, "target": view["tokens"], "index": jnp.arange(B)}
    batch["epoch"] = jnp.zeros(B, int)
    made = tokens.make_token_courses(rate=0.3)(jax.random.key(0), batch, jnp.int32(0))
    return {**made, **more}


def test_what_is_corrupted():
    made = {name: np.asarray(x) for name, x in batch_of().items() if name.startswith("course")}
    valid = SEGMENTS >= 0
    np.testing.assert_array_equal(made["course_valid"], valid)
    wanted = np.minimum(4, valid.sum(1))
    np.testing.assert_array_equal(made["course_masked"].sum(1), wanted)
    assert not (made["course_masked"] & ~valid).any()
    for order, real in zip(made["course_order"], valid, strict=True):
        np.testing.assert_array_equal(np.sort(order), np.arange(T))
        moved = order != np.arange(T)
        assert moved.sum() == 4 and real[moved].all() and real[order[moved]].all()
    for source in made["course_inserted"]:
        kept = source[source >= 0]
        np.testing.assert_array_equal(kept, np.arange(len(kept)))
        assert (source < 0).sum() == 4 and source[0] == 0
    other = batch_of()["course_masked"]
    np.testing.assert_array_equal(other, made["course_masked"])


def softmax(z):
    return np.exp(z) / np.exp(z).sum(-1, keepdims=True)


def drawn(token, u):
    return int(min((np.cumsum(softmax(GENERATOR[token])) <= u).sum(), V - 1))


def bce(z, y):
    p = 1 / (1 + np.exp(-z))
    return -np.log(p) if y else -np.log(1 - p)


def lesson(b, batch):
    """All terms of one row as sums and counts."""
    x, valid, u = X[b], SEGMENTS[b] >= 0, np.asarray(batch["course_draws"][b], np.float64)
    found = {}

    def restore(name, seen, at):
        losses = [-np.log(softmax(GENERATOR[seen[t]])[x[t]]) for t in range(T) if at[t]]
        found[name] = sum(losses), len(losses)

    def detect(name, seen, altered, course, real=valid):
        z = STUDENT[seen] @ DETECTOR[:, course]
        found[name] = sum(bce(z[t], altered[t]) for t in range(T) if real[t]), real.sum()
        found[f"altered_{name}"] = (altered & real).sum(), real.sum()
        return ((z > 0) != altered) & real

    def rotated(seen, at):
        places = list(np.flatnonzero(at))
        moved = seen.copy()
        for here, there in zip(places, places[1:] + places[:1], strict=True):
            moved[here] = seen[there]
        return moved

    def filled(name, at, row):
        restore(name, np.where(at, MASK, x), at)
        return np.array([drawn(MASK, u[row, t]) if at[t] else x[t] for t in range(T)])

    masked = np.asarray(batch["course_masked"][b])
    replaced = filled("mlm", masked, 0)
    found["unchanged"] = (masked & (replaced == x)).sum(), masked.sum()
    wrong = detect("rtd", replaced, replaced != x, 0)
    again = filled("re_mlm", wrong, 2)
    detect("re_rtd", again, again != x, 0)
    swapped = x[np.asarray(batch["course_order"][b])]
    restore("slm", swapped, swapped != x)
    wrong = detect("std", swapped, swapped != x, 1)
    swapped = rotated(x, wrong)
    restore("re_slm", swapped, swapped != x)
    detect("re_std", swapped, swapped != x, 1)
    source, seen, real, last = np.asarray(batch["course_inserted"][b]), [], [], 0
    for t in range(T):
        last = last if source[t] < 0 else source[t]
        seen.append(drawn(MASK, u[1, t]) if source[t] < 0 else x[source[t]])
        real.append(valid[last])
    detect("itd", np.array(seen), source < 0, 2, np.array(real))
    return found


def test_all_courses_are_their_equations():
    batch = batch_of()
    terms = mcl.make(detection_weight=20.0).loss(nets, batch, {}, jnp.int32(0))
    rows = [lesson(b, batch) for b in range(B)]
    assert set(terms.values) == set(rows[0])
    for name in terms.values:
        np.testing.assert_allclose(
            terms.values[name], [row[name][0] for row in rows], rtol=2e-5, atol=1e-6
        )
        np.testing.assert_array_equal(terms.counts[name], [row[name][1] for row in rows])
        logged = name == "unchanged" or name.startswith("altered_")
        weight = 0.0 if logged else 20.0 if name.endswith("td") else 1.0
        assert terms.coef.get(name, 1.0) == weight
    altered = sum(row["altered_re_rtd"][0] for row in rows)
    assert 0 < altered < B * T


def test_fewer_courses():
    batch, every = batch_of(), mcl.make().loss(nets, batch_of(), {}, jnp.int32(0))
    for courses, correction, names in (
        (("replaced",), False, {"mlm", "rtd", "altered_rtd", "unchanged"}),
        (("swapped",), False, {"mlm", "slm", "std", "altered_std", "unchanged"}),
        (("inserted",), True, {"mlm", "itd", "altered_itd", "unchanged"}),
    ):
        made = mcl.make(courses=courses, correction=correction)
        terms = made.loss(nets, batch, {}, jnp.int32(0))
        assert set(terms.values) == names
        for name in names:
            np.testing.assert_array_equal(terms.values[name], every.values[name])


def test_without_courses_the_student_restores():
    made = mcl.make(courses=())
    assert made.roles == ("student",)

    def alone(role, view, **kwargs):
        assert role == "student"
        return nets("generator", view, **kwargs)

    batch = batch_of()
    terms = made.loss(alone, batch, {}, jnp.int32(0))
    wanted = [lesson(b, batch)["mlm"][0] for b in range(B)]
    assert set(terms.values) == {"mlm"}
    np.testing.assert_allclose(terms.values["mlm"], wanted, rtol=2e-5)


def test_tokens_are_drawn_with_their_probabilities():
    n = 20_000
    z = jnp.asarray(GENERATOR[2], jnp.float32)
    u = jax.random.uniform(jax.random.key(0), (1, n))
    found = np.bincount(mcl.draw(jnp.tile(z[None, None], (1, n, 1)), u)[0], minlength=V) / n
    p = softmax(GENERATOR[2])
    assert (np.abs(found - p) < 4.5 * np.sqrt(p * (1 - p) / n)).all()


@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        ({"courses": ("swaped",)}, "swapped"),
        ({"detection_weight": -1}, "detection_weight is -1"),
        ({"mask_token": -1}, "mask_token is -1"),
    ],
)
def test_arguments_out_of_range(kwargs, message):
    with pytest.raises(ConfigError, match=message):
        mcl.make(**kwargs)


def test_batches_without_courses():
    with pytest.raises(ConfigError, match="token_courses"):
        mcl.make().loss(nets, {"input": jnp.asarray(X)}, {}, jnp.int32(0))
    for rate in (0, 1):
        with pytest.raises(ConfigError, match=f"rate is {rate}"):
            tokens.make_token_courses(rate=rate)
    with pytest.raises(ConfigError, match="next_token comes before"):
        tokens.make_token_courses()(jax.random.key(0), {"input": jnp.asarray(X)}, jnp.int32(0))
