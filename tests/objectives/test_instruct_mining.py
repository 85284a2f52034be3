"""InstructMining: indicators, the fitted rule and the selection against NumPy."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from distill_jax.core.errors import ConfigError
from distill_jax.objectives import instruct_mining
from tests import harness
from tests.reference import softmax

KEY = jax.random.key(0)
RULE = {"length": -0.1, "nll": 0.7, "learnable": -0.4, "novelty": 0.5, "parses": 0.3}


def answering(batch) -> tuple[Any, np.ndarray]:
    r = np.random.default_rng(0)
    logits = r.normal(size=(*batch["target"].shape, harness.VOCABULARY)).astype(np.float32)

    def nets(role, view, *, train=False):
        outputs = {"logits": jnp.asarray(logits)}
        if isinstance(view, dict):
            logs = jax.nn.log_softmax(outputs["logits"])
            outputs["log_probs"] = jnp.take_along_axis(logs, view["ask"], -1)
        return outputs, {}

    return nets, logits


def indicators(batch, logits):
    """The indicators, row by row."""
    target, mask, p = np.asarray(batch["target"]), np.asarray(batch["target_mask"]), softmax(logits)
    found = {name: [] for name in RULE}
    bags = []
    for b in range(len(target)):
        at = np.flatnonzero(mask[b])
        own = [-np.log(p[b, t, target[b, t]]) for t in at]
        known = [
            x for t, x in zip(at, own, strict=True) if target[b, t] in np.argsort(-p[b, t])[:3]
        ]
        found["length"].append(len(at))
        found["nll"].append(np.mean(own) if len(at) else 0)
        found["learnable"].append(np.median(known) if known else np.nan)
        bag = np.zeros(256)
        for t in at[:-2]:
            x, y, z = target[b, t : t + 3]
            bag[(961 * x + 31 * y + z) % 256] += 1
        bags.append(bag / max(np.linalg.norm(bag), 1e-6))
    for b, bag in enumerate(bags):
        found["novelty"].append(1 - max(bag @ other for i, other in enumerate(bags) if i != b))
    found["parses"] = np.asarray(batch["parses"])
    learnable = np.array(found["learnable"])
    found["learnable"] = np.where(np.isnan(learnable), np.nanmean(learnable), learnable)
    return {name: np.array(column) for name, column in found.items()}


def test_rows_with_the_lowest_sum_are_selected():
    batch = {**harness.make_token_batch(), "mask": jnp.ones(16)}
    batch["parses"] = jnp.asarray(np.arange(16) % 2, jnp.float32)
    nets, logits = answering(batch)
    made = instruct_mining.make(num_examples=20, rule=RULE, share=0.4, top=3)
    assert made.roles == ("student", "teacher", "teacher_scout")
    rows = made.dataset_pass(nets, batch, {}, jnp.int32(0))
    ids, memory = np.arange(2, 18), made.memory(KEY, batch)
    memory = made.init_memory(
        {k: np.asarray(x) for k, x in rows.items()}, ids, memory, np.random.default_rng(0)
    )
    wanted = indicators(batch, logits)
    for name in ("length", "nll", "parses"):
        np.testing.assert_allclose(rows[name], wanted[name], rtol=1e-5)
    np.testing.assert_allclose(
        instruct_mining.novelty(np.asarray(rows["novelty"]), np.arange(16)),
        wanted["novelty"],
        atol=1e-6,
    )
    score = sum(a * wanted[name] for name, a in RULE.items())
    chosen = np.zeros(20)
    chosen[ids[np.argsort(score, kind="stable")[:7]]] = 1
    np.testing.assert_array_equal(memory["selected"], chosen)
    batch["index"] = jnp.asarray(ids)
    terms = made.loss(nets, batch, memory, jnp.int32(0))
    left_out = chosen[ids] == 0
    assert not np.asarray(terms.counts["cross_entropy"])[left_out].any()
    kept = np.asarray(batch["target_mask"])[~left_out]
    np.testing.assert_array_equal(np.asarray(terms.counts["cross_entropy"])[~left_out], kept)


def test_the_rule_is_the_least_squares_fit():
    r = np.random.default_rng(1)
    x = {name: r.normal(size=30) for name in ("length", "nll")} | {"parses": np.full(30, 2.0)}
    loss = np.exp(0.4 - 0.2 * x["length"] + 0.1 * x["nll"])
    rule = instruct_mining.fit_rule(x, loss)
    np.testing.assert_allclose(rule.coefficients["length"], -0.2, rtol=1e-6)
    np.testing.assert_allclose(rule(x), np.log(loss), rtol=1e-6)
    noisy = loss * np.exp(0.1 * r.normal(size=30))
    a = np.linalg.lstsq(np.stack([np.ones(30), x["length"], x["nll"]], 1), np.log(noisy))[0]
    found = instruct_mining.fit_rule({k: x[k] for k in ("length", "nll")}, noisy)
    np.testing.assert_allclose([found.intercept, *found.coefficients.values()], a, rtol=1e-6)
    for losses in (loss[:2], -loss):
        with pytest.raises(ConfigError, match="more subsets than coefficients"):
            instruct_mining.fit_rule(x, losses)


@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        ({"share": 0}, "share is 0"),
        ({"top": 0}, "top is 0"),
        ({"references": 0}, "references is 0"),
        ({"rule": {}}, "rule is"),
        ({"rule": {"nll": "x"}}, "nll is 'x'"),
    ],
)
def test_arguments_out_of_range(kwargs, message):
    with pytest.raises(ConfigError, match=message):
        instruct_mining.make(num_examples=4, **kwargs)


def test_an_unknown_indicator():
    batch = harness.make_token_batch()
    made = instruct_mining.make(num_examples=16, rule={"lenght": 1.0})
    with pytest.raises(ConfigError, match="no indicator 'lenght'"):
        made.dataset_pass(answering(batch)[0], batch, {}, jnp.int32(0))
