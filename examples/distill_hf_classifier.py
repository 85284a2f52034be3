"""Distil a Hugging Face classifier, a local folder, into your own NNX module (on random tokens)."""

import sys

import jax
import numpy as np
import optax
from flax import nnx

import distill_jax as dj

teacher = dj.models.pretrained.language_model(sys.argv[1] if len(sys.argv) > 1 else "runs/bert")


class BagOfTokens(nnx.Module):
    def __init__(self, width: int, rngs: nnx.Rngs):
        self.embed = nnx.Embed(teacher.arguments["vocabulary"], width, rngs=rngs)
        self.out = nnx.Linear(width, teacher.arguments["num_classes"], rngs=rngs)

    def __call__(self, x):
        mask = x["mask"][..., None]
        return self.out((self.embed(x["tokens"]) * mask).sum(1) / mask.sum(1))


tokens = np.random.default_rng(0).integers(0, teacher.arguments["vocabulary"], (512, 16))
inputs = {"tokens": tokens, "mask": np.ones((512, 16), np.int32)}
wanted = teacher.model.apply(teacher.params, {}, inputs, train=False)[0]["logits"]
trainer = dj.Trainer(
    dj.objectives.KD(temperature=2.0, alpha=1.0),  # no labels: the teacher alone
    student=dj.from_nnx(BagOfTokens(16, nnx.Rngs(0))),
    frozen={"teacher": (teacher.model, teacher.params, {})},
    optimizer=optax.adam(1e-2),
)
parts = ({name: x[i::8] for name, x in inputs.items()} for i in range(8))
batches = [{"input": part, "label": np.zeros(64, np.int32)} for part in parts]
state = trainer.init(jax.random.key(0), batches[0])
for batch in batches * 20:
    state, metrics = trainer.step(state, batch)
same = trainer.predict(state, inputs)["logits"].argmax(1) == wanted.argmax(1)
print(f"loss {float(metrics['loss']):.4f}, agreement with the teacher {float(same.mean()):.3f}")
