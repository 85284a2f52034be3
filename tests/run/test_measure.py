"""Evaluators that compute with the networks, on the device, in a run and in the library."""

import dataclasses
from types import MappingProxyType

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import distill_jax as dj
from distill_jax.core.errors import ConfigError
from distill_jax.losses.classification import cross_entropy
from distill_jax.run import build
from distill_jax.run.build import evaluators
from distill_jax.run.train import evaluation
from tests import harness
from tests.core.test_counts import NextToken
from tests.reference import softmax
from tests.run.test_evaluation import make_config


@dataclasses.dataclass(frozen=True)
class Nats:
    """Sums over the targets of each row."""

    wrong: bool = False
    outputs = MappingProxyType({})

    def measure(self, nets, batch, step):
        logits = nets("student", batch["input"])[0]["logits"]
        loss = batch["target_mask"] * cross_entropy(logits, batch["target"])
        return {"nats": loss if not self.wrong else loss.sum(), "step": jnp.full(len(loss), step)}

    def __call__(self, outputs, batch):
        assert outputs["nats"]["nats"].shape == (len(batch["index"]), harness.TOKENS)
        return {"nats": outputs["nats"]["nats"].sum(), "step": outputs["nats"]["step"].max()}


def trained():
    trainer = dj.Trainer(NextToken(), student=harness.tiny_decoder(), optimizer=optax.sgd(0.1))
    batch = harness.make_token_batch(16)
    state, _ = trainer.step(trainer.init(jax.random.key(0), batch), batch)
    return trainer, state


def test_library_measures_ragged_batches():
    trainer, state = trained()
    batches = [harness.make_token_batch(b, seed=b) for b in (8, 3)]
    found = trainer.evaluate(state, batches, {"nats": Nats()})
    want = 0.0
    for batch in batches:
        logits = np.asarray(trainer.predict(state, batch["input"])["logits"], float)
        log_p = np.log(softmax(logits))
        own = np.take_along_axis(log_p, np.asarray(batch["target"])[..., None], -1)[..., 0]
        want -= (np.asarray(batch["mask"])[:, None] * np.asarray(batch["target_mask"]) * own).sum()
    np.testing.assert_allclose(found["nats"], want, rtol=1e-5)
    assert found["step"] == 1


@pytest.mark.parametrize(
    ("name", "evaluator", "message"),
    [
        ("nats", Nats(wrong=True), r"(?s)'nats' measures 'nats' of shape \(\).*one row for each"),
        ("student", Nats(), "'student' has the name of an output"),
    ],
)
def test_library_refuses_what_is_no_measurement(name, evaluator, message):
    trainer, state = trained()
    with pytest.raises(ConfigError, match=message):
        trainer.evaluate(state, [harness.make_token_batch(8)], {name: evaluator})


@dataclasses.dataclass(frozen=True)
class Margin:
    """The accuracy from a margin that is computed on the device; `student` is read nowhere."""

    scale: float = 1.0
    controls = ()
    outputs = MappingProxyType({})

    def measure(self, nets, batch, step):
        logits = self.scale * nets("student", batch["input"])[0]["logits"]
        own = jnp.take_along_axis(logits, batch["label"][:, None], axis=1)[:, 0]
        return {"margin": own - logits.max(1), "count": jnp.ones(len(own), jnp.int32)}

    def __call__(self, outputs, batch):
        measured = outputs["margin"]
        return {"right": float((measured["margin"] >= 0).sum() / measured["count"].sum().clip(1))}


@dataclasses.dataclass(frozen=True)
class Controlled(Margin):
    controls = ("raw",)


@pytest.fixture
def by_name(monkeypatch):
    """Makes evaluators of this file known by short names."""
    known = {"margin": Margin, "controlled": Controlled}

    def resolve(package, name, **kwargs):
        return known.get(name) or find(package, name, **kwargs)

    find = evaluators.resolve
    monkeypatch.setattr(evaluators, "resolve", resolve)


def test_run_measures_what_the_host_would(by_name):
    """In a split that does not divide into batches; the metric can select a checkpoint."""
    config = make_config(**{"eval.metric": "held_out/right"})
    config.data.kwargs.n_test, config.eval.batch_size = 45, 32
    config.evaluators = {"classification": {}, "margin": {"scale": 2.0}}
    experiment = build.build(config)
    build.check_metric(experiment, "held_out/right", where="eval.metric")
    state = build.initial_state(experiment, jax.random.key(0), config)
    metrics, collected = evaluation.evaluate(experiment, state, {}, "test")
    np.testing.assert_allclose(metrics["test/right"], metrics["test/accuracy"], rtol=1e-6)
    assert collected["outputs"]["margin"]["margin"].shape == (45,)


def test_run_refuses_controls_of_what_is_measured(by_name):
    config = make_config()
    config.evaluators = {"controlled": {}}
    with pytest.raises(ConfigError, match="controls replace outputs"):
        build.build(config)
