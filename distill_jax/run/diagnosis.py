"""Diagnoses why a loss, gradient or output is not finite, from what is still available.

The batch of a step is a function of the seed and the step, so it is read again. The parameters of
that step are gone. A cause is named only if it is observed: inputs that are not finite, inputs that
are not scaled, a loss that had grown. No message promises a checkpoint that does not exist.
"""

import contextlib
from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from distill_jax.core import rng
from distill_jax.core.errors import NonFiniteError, UserError
from distill_jax.data import loader
from distill_jax.data.source import example_ids
from distill_jax.run.config import ConfigDict

if TYPE_CHECKING:
    from distill_jax.run.build import Experiment

KEPT = 8
"""So many of the last finite losses are kept to be shown."""

EXPLODED = 10.0
"""A loss of so many times the smallest of those before it has exploded."""

UNSCALED = 30.0
"""Inputs whose root mean square is above this count as not scaled."""

RATE = "lower optim.lr, set optim.clip_norm, or lengthen optim.warmup"


class Cause(NamedTuple):
    """A cause: the observation, a clause without a full stop, and the remedy."""

    what: str
    hint: str


def of_step(
    experiment: "Experiment",
    config: ConfigDict,
    *,
    step: int,
    updates: int,
    what: str,
    loss: float,
    losses: Sequence[float],
    saved: Sequence[int],
    where: str,
) -> NonFiniteError:
    """Returns the error that ends a run whose step was not finite.

    Args:
      experiment: what is run.
      config: of the run, with its seed.
      step: the number of the step, counted from 1.
      updates: how many updates the parameters had seen.
      what: which numbers are not finite, a sentence without a full stop.
      loss: of that step.
      losses: the finite ones before it, in order.
      saved: steps of the checkpoints that exist.
      where: the run folder.
    """
    cause = of_batch(experiment, config, step) or of_losses(updates, loss, losses)
    shown = ", ".join(f"{value:.4g}" for value in losses[-KEPT:])
    before = f"the last finite losses were {shown}" if losses else "no loss was finite before"
    kept = (
        f"the checkpoint of step {max(saved)} is intact" if saved else "no checkpoint was saved yet"
    )
    return NonFiniteError(
        f"{what}; {cause.what}; {before}", where=where, hint=f"{cause.hint}; {kept}"
    )


def of_losses(updates: int, loss: float, losses: Sequence[float]) -> Cause:
    """Returns the cause that the losses show after so many updates on finite inputs."""
    if updates == 0:
        return Cause(
            "no update came before, and the inputs are finite",
            "check the method and its initial networks: a logarithm, a root or a division "
            "at 0, an overflow of precision, or parameters of roles.*.init; the learning rate has "
            "not acted yet",
        )
    grown = [*losses, loss] if np.isfinite(loss) else list(losses)
    if len(grown) > 1 and grown[-1] > EXPLODED * max(min(map(abs, grown[:-1])), 1e-12):
        return Cause("the loss exploded while its inputs were finite", RATE)
    if len(grown) >= 4 and np.isfinite(loss):
        return Cause(
            "the loss is finite and had not grown, and the inputs are finite",
            "check the loss terms of the method: the derivative of a root, a norm or a "
            "logarithm at 0 "
            "is not finite where its value is; watch.nonfinite=skip leaves such steps out",
        )
    return Cause(f"the inputs are finite, and {updates} updates came before", RATE)


def of_batch(experiment: "Experiment", config: ConfigDict, step: int) -> Cause | None:
    """Returns the cause that the batch of a step, counted from 1, shows; None where it is fine."""
    source, size = experiment.dataset.train, config.batch_size
    position, epoch = loader.batch_rows(step - 1, batch_size=size, seed=config.seed, n=len(source))
    try:
        batch = {
            **source.read(position),
            "index": example_ids(source)[position],
            "epoch": epoch,
            "mask": np.ones(size, np.float32),
        }
        key = rng.stream(jax.random.key(config.seed), "transform")
        transform = jax.jit(experiment.transform(train=True))
        return of_inputs(batch, lambda raw: transform(key, raw, jnp.int32(step - 1)), "train")
    except UserError as error:  # the source itself refuses what it has read
        return Cause(error.what, error.hint)


def of_inputs(batch: Mapping[str, Any], transform: Any, split: str) -> Cause | None:
    """Returns the cause that a batch shows before or after its transforms.

    Args:
      batch: as the source gives it, with `index`.
      transform: `batch -> batch`.
      split: name of the part.
    """
    bad = ~_finite(batch["input"], len(batch["mask"]))
    if bad.any():
        first = int(np.asarray(batch["index"])[np.argmax(bad)])
        return Cause(
            f"{int(bad.sum())} of {len(bad)} examples of its batch have values that are NaN or "
            f"infinite, the first is example {first} of the {split} part",
            "leave those examples out or fill them in",
        )
    seen = jax.device_get(transform(batch))
    for name in ("input", "views", "local_views", "teacher_input"):
        if name not in seen:
            continue
        bad = ~_finite(seen[name], len(batch["mask"]))
        if bad.any():
            first = int(np.asarray(batch["index"])[np.argmax(bad)])
            return Cause(
                f"the transforms of the {split} part turn finite values into NaN or "
                f"infinity; the first is example {first}",
                "check data.train_transforms and data.eval_transforms",
            )
        numbers = [np.asarray(x) for x in jax.tree.leaves(seen[name])]
        numbers = [x.astype(np.float64) for x in numbers if x.dtype.kind == "f" and x.size]
        size = max((float(np.sqrt((x**2).mean())) for x in numbers), default=0.0)
        if size > UNSCALED:
            low, high = min(x.min() for x in numbers), max(x.max() for x in numbers)
            return Cause(
                f"inputs of the networks are unscaled, from {low:.4g} to {high:.4g}",
                "add normalize to data.train_transforms and data.eval_transforms; without mean and "
                "std it uses those of the training part",
            )
    return None


def _finite(inputs: Any, b: int) -> np.ndarray:
    """Returns bool `[b]`: which examples have finite values only."""
    finite = np.ones(b, bool)
    for leaf in map(np.asarray, jax.tree.leaves(inputs)):
        if jnp.issubdtype(leaf.dtype, jnp.floating):
            finite &= np.isfinite(leaf).reshape(b, -1).all(1)
    return finite


@contextlib.contextmanager
def evaluating(experiment: "Experiment", split: str) -> Iterator[None]:
    """Gives errors about outputs of a split that are not finite their cause."""
    try:
        yield
    except NonFiniteError as error:
        cause = of_split(experiment, split)
        raise NonFiniteError(
            f"evaluation of the {split} part: {error.what}; {cause.what}",
            where=error.where,
            hint=cause.hint,
        ) from error


def of_split(experiment: "Experiment", split: str) -> Cause:
    """Returns why outputs of a split are not finite, from its inputs."""
    transform = jax.jit(experiment.transform(train=False))
    key = jax.random.key(0)
    try:
        source = getattr(experiment.dataset, split)
        for batch in loader.eval_batches(source, batch_size=experiment.eval_batch_size):
            cause = of_inputs(batch, lambda raw: transform(key, raw, jnp.int32(0)), split)
            if cause is not None:
                return cause
    except UserError as error:
        return Cause(error.what, error.hint)
    return Cause(
        "its inputs are finite, so the network is at fault",
        "check the training loss and the precision; averages of batch statistics diverge with it",
    )
