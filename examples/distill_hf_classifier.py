"""Distil a text classifier of Hugging Face, a local folder, into a small NNX module of your own."""

import sys

import jax
import numpy as np
import optax
from flax import nnx

import distill_jax as dj
from distill_jax.models import pretrained

teacher = pretrained.language_model(sys.argv[1] if len(sys.argv) > 1 else "runs/bert")
vocabulary, classes = (teacher.arguments[name] for name in ("vocabulary", "num_classes"))


class BagOfTokens(nnx.Module):
    def __init__(self, width: int, rngs: nnx.Rngs):
        self.embed = nnx.Embed(vocabulary, width, rngs=rngs)
        self.out = nnx.Linear(width, classes, rngs=rngs)

    def __call__(self, x):
        mask = x["mask"][..., None]
        return self.out((self.embed(x["tokens"]) * mask).sum(1) / mask.sum(1))


tokens = np.random.default_rng(0).integers(0, vocabulary, (512, 16))  # or docs/language.md's
inputs = {"tokens": tokens, "mask": np.ones((512, 16), np.int32)}
answer = jax.jit(lambda x: teacher.model.apply(teacher.params, {}, x, train=False)[0]["logits"])
trainer = dj.Trainer(
    dj.objectives.KD(temperature=2.0, alpha=1.0),  # no labels: the teacher alone
    student=dj.from_nnx(BagOfTokens(16, nnx.Rngs(0))),
    frozen={"teacher": (teacher.model, teacher.params, {})},
    optimizer=optax.adam(1e-2),
)
parts = [jax.tree.map(lambda x, i=i: x[i::8], inputs) for i in range(8)]
batches = [{"input": part, "label": np.zeros(64, np.int32)} for part in parts]
state = trainer.init(jax.random.key(0), batches[0])
for batch in batches * 20:
    state, metrics = trainer.step(state, batch)
same = trainer.predict(state, inputs)["logits"].argmax(1) == answer(inputs).argmax(1)
print(f"loss {float(metrics['loss']):.4f}, agreement with the teacher {float(same.mean()):.3f}")
