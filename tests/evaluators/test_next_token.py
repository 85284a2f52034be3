"""Bits per byte and accuracy of a language model, against NumPy and through a trainer."""

import jax
import numpy as np
import optax
import pytest

import distill_jax as dj
from distill_jax.evaluators import next_token
from distill_jax.objectives.next_token import NextToken
from tests import harness


def test_sums_over_all_targets_of_a_split():
    net, batch = harness.answering(harness.tiny_decoder()), harness.make_token_batch()
    batch = {**batch, "bytes": np.arange(16, dtype=np.float32), "mask": np.ones(16, np.float32)}
    trainer = dj.Trainer(NextToken(), networks={"student": net}, optimizer=optax.sgd(0.1))
    state = trainer.init(jax.random.key(0), batch)
    parts = [jax.tree.map(lambda x, i=i: x[i : i + 8], batch) for i in (0, 8)]
    found = trainer.evaluate(state, parts, {"next_token": next_token.make()})
    z = np.asarray(
        net.apply(state.train.params["student"], {}, batch["input"], train=False, rngs={})[0][
            "logits"
        ],
        np.float64,
    )
    log_p = z - np.log(np.exp(z).sum(-1, keepdims=True))
    mask, target = np.asarray(batch["target_mask"]), np.asarray(batch["target"])
    bits = -(mask * np.take_along_axis(log_p, target[..., None], -1)[..., 0]).sum() / np.log(2)
    assert found["bits_per_byte"] == pytest.approx(bits / np.arange(16).sum(), rel=1e-5)
    assert found["bits_per_token"] == pytest.approx(bits / mask.sum(), rel=1e-5)
    right = (mask * (z.argmax(-1) == target)).sum() / mask.sum()
    assert found["token_accuracy"] == pytest.approx(right, rel=1e-6)
    del batch["bytes"]
    assert "bits_per_byte" not in trainer.evaluate(
        state, [batch], {"next_token": next_token.make()}
    )
