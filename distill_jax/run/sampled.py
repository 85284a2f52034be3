"""Text that a language model writes after training, for the report."""

import functools
import json
import pathlib
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from distill_jax.core import partition, rng, steps
from distill_jax.data import loader
from distill_jax.data.source import Subset
from distill_jax.evaluators._features import spread
from distill_jax.run import build
from distill_jax.trainer.io.files import write_text

FILE = "samples.json"
MOST = 3
"""Number of prompts."""

TEMPERATURE = 0.8


def writes(experiment: build.Experiment) -> bool:
    """Whether the student is a language model whose tokens can be shown as text."""
    student = experiment.models.get("student")
    return experiment.dataset.decode is not None and getattr(student, "decode", None) is not None


def store(
    workdir: pathlib.Path,
    experiment: build.Experiment,
    state: Any,
    frozen: steps.Frozen,
    *,
    seed: int,
    write: bool,
) -> None:
    """Writes `samples.json`, if the student is a language model.

    Prompts are the first quarters of at most three held-out rows (test rows, if nothing is held
    out), spread evenly, from the beginning of their last document. The continuations have at most
    the other three quarters of a row: `greedy` at temperature 0, `sampled` at `TEMPERATURE`.

    Args:
      workdir: the run folder.
      experiment: what was run.
      state: after training.
      frozen: networks that do not learn.
      seed: of the run.
      write: whether this process does; all of them compute.
    """
    decode = experiment.dataset.decode
    if decode is None or not writes(experiment):
        return
    part = "held_out" if len(experiment.dataset.held_out) else "test"
    source = getattr(experiment.dataset, part)
    rows = spread(len(source), MOST)
    some = Subset(source, rows, f"{len(rows)} of them")
    [batch] = loader.eval_batches(some, batch_size=len(rows))
    tokens, segments = (np.asarray(batch["input"][name]) for name in ("tokens", "segments"))
    t = tokens.shape[1] - 1
    p = max(1, t // 4)
    prompt = tokens[:, :p]
    start = np.argmax(segments[:, :p] == segments[:, p - 1 : p], axis=1).astype(np.int32)
    ids = {name: batch[name] for name in ("index", "epoch")}
    key = rng.stream(jax.random.key(seed), "samples")

    @functools.partial(jax.jit, out_shardings=partition.replicated(experiment.mesh))
    def draw(state, frozen, prompt, start, ids):
        nets = experiment.trainer.bind(state, frozen, key, batch=ids)
        sample = functools.partial(nets.sample, "student", prompt, start, steps=t - p)
        return [sample(temperature=x).tokens[:, 0, p:] for x in (0.0, TEMPERATURE)]

    drawn = jax.device_get(draw(state, frozen, jnp.asarray(prompt), jnp.asarray(start), ids))
    if not write:
        return
    samples = [
        {
            "prompt": decode(prompt[i, start[i] :].tolist()),
            "greedy": decode(drawn[0][i].tolist()),
            "sampled": decode(drawn[1][i].tolist()),
        }
        for i in range(len(rows))
    ]
    found = {"part": part, "temperature": TEMPERATURE, "samples": samples}
    write_text(workdir / FILE, json.dumps(found, indent=1))
