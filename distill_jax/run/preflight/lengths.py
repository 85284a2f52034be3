"""What the length of training and the size of batches make pointless."""

from collections.abc import Iterator

from distill_jax.core.steps import check_accumulation
from distill_jax.run import config as config_lib
from distill_jax.run.build import Experiment
from distill_jax.run.preflight.finding import Finding
from distill_jax.run.preflight.trace import label


def findings(experiment: Experiment) -> Iterator[Finding]:
    """Yields parts that would never begin, never move, or have too few examples at a time."""
    config, total = experiment.config, experiment.total_steps
    outer = experiment.outer
    if outer is not None and outer.warmup >= total:
        what = f"the weighting waits for {outer.warmup} of {total} steps, so it would never learn"
        yield Finding("error", what, "bilevel.warmup", "shorten it, or lengthen training")
    if outer is not None and not config.bilevel.optim.lr:
        hint = "a positive number, or weighting.control=frozen"
        yield Finding("comparison", "the weighting would never learn", "bilevel.optim.lr", hint)
    for phase in experiment.phases:
        if phase.start >= total:
            what = (
                f"the phase of {type(phase.objective).__name__} begins at step {phase.start} of "
                f"{total}, so never"
            )
            yield Finding("error", what, "objective.kwargs", "an earlier start, or longer training")
    lengths = {"steps_per_epoch": experiment.steps_per_epoch, "total_steps": total}
    every = config_lib.duration(config, "eval.every", default=total, **lengths)
    if every > total and len(experiment.dataset.held_out):
        due = f"due after {every} steps of {total}"
        yield Finding(
            "warning", f"{due}: only the last state is measured, and is the best", "eval.every"
        )
    yield from _of_averages(experiment)
    yield from _of_batches(experiment)


def _of_averages(experiment: Experiment) -> Iterator[Finding]:
    total = experiment.total_steps
    for role, (_, decay) in experiment.ema.items():
        where = f"roles.{role}.decay"
        if callable(decay):  # it rises, and is 1 at the start only where it always is
            decay = 1 if experiment.config.roles[role].decay == 1 else None
        if decay is None:
            continue
        if decay == 1:
            hint = "below 1; use a frozen role for a network that does not change"
            yield Finding("comparison", "the average would never move", where, hint)
        elif decay == 0:
            hint = "above 0, or one network"
            yield Finding("comparison", "the average would be its source", where, hint)
        elif (left := decay**total) > 0.5:
            what = f"after {total} steps the average is still {left:.0%} of what it started from"
            yield Finding("warning", what, where)


def _of_batches(experiment: Experiment) -> Iterator[Finding]:
    config, objective = experiment.config, experiment.objective
    check_accumulation(objective, config.accum_steps)
    if config.batch_size // config.accum_steps != 1:
        return
    for role in experiment.trainable:
        if "batch_stats" in experiment.shapes.roles[role].state:
            yield Finding(
                "error",
                f"{role} normalizes by the statistics of one example",
                "batch_size" if config.accum_steps == 1 else "accum_steps",
                "at least two examples a micro-batch, or a network without batch norm",
            )
    if objective.couples_batch and "views" not in experiment.shapes.batch:
        what = f"{label(objective)} compares the examples of a batch, and the batch has one"
        yield Finding("error", what, "batch_size", "two or more")
