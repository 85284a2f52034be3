"""Use one loss in a training loop of your own: one value for each example."""

import jax

import distill_jax as dj

student = jax.random.normal(jax.random.key(0), (8, 10))
teacher = jax.random.normal(jax.random.key(1), (8, 10))
loss = dj.losses.distillation_kl(student, teacher, temperature=4.0)
print(loss.shape, float(loss.mean()))
