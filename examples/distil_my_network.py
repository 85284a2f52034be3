"""Distil a teacher into a network of your own, both NNX modules."""

import jax
import numpy as np
import optax
from flax import nnx

import distill_jax as dj


class Net(nnx.Module):
    def __init__(self, width: int, rngs: nnx.Rngs):
        self.hidden = nnx.Linear(64, width, rngs=rngs)
        self.out = nnx.Linear(width, 10, rngs=rngs)

    def __call__(self, x):
        return self.out(nnx.relu(self.hidden(x)))


rng = np.random.default_rng(0)
inputs = rng.normal(size=(1024, 64)).astype(np.float32)
labels = (inputs[:, :10].argmax(1)).astype(np.int32)
net, teacher = Net(32, nnx.Rngs(0)), Net(256, nnx.Rngs(1))

trainer = dj.Trainer(
    dj.objectives.KD(temperature=4.0, alpha=0.5),
    student=dj.from_nnx(net),
    frozen={"teacher": dj.from_nnx(teacher)},
    optimizer=optax.adamw(1e-3),
)
batches = [{"input": inputs[i::8], "label": labels[i::8]} for i in range(8)] * 10
state = trainer.init(jax.random.key(0), batches[0])
for batch in batches:
    state, metrics = trainer.step(state, batch)
print({name: round(float(value), 4) for name, value in metrics.items()})

net = dj.to_nnx(trainer.student(state), like=net)
print("accuracy", float((net(inputs).argmax(1) == labels).mean()))
