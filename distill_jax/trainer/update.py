"""The update of a trainer, built from the parts of the core that its options select."""

from collections.abc import Mapping
from typing import Any

from distill_jax.core import bilevel, collapse, lookahead, steps
from distill_jax.core.api import Model, Objective, Role, Terms
from distill_jax.core.weighted_objective import WeightedObjective
from distill_jax.trainer.options import Options


def make_update(
    objective: Objective,
    models: Mapping[Role, Model],
    optimizer: Any,
    options: Options,
    *,
    averages: Mapping[Role, tuple[Role, steps.Decay]],
    two_level: bilevel.Bilevel | None = None,
    outer: bool = False,
) -> steps.StepFn:
    """Returns the pure `(train_state, frozen, batch, key) -> (train_state, metrics)`.

    Args:
      objective: the training method.
      models: a network for each role.
      optimizer: an optax optimizer, or `bilevel.Optimizers`.
      options: of the step.
      averages: `{role: (source, decay)}`.
      two_level: options of the outer gradient, if the optimizer has two levels.
      outer: whether the weighting learns in this step, which then takes
        `{"train": batch, "held_out": batch}`.
    """
    shared: dict[str, Any] = {
        "precision": options.precision,
        "ema": averages,
        "grad_norm": options.grad_norm,
        "skip_nonfinite": options.nonfinite == "skip",
        "report_nonfinite": options.nonfinite == "report",
    }
    if isinstance(optimizer, bilevel.Optimizers):
        assert isinstance(objective, WeightedObjective)
        how = two_level or bilevel.Bilevel()
        update = bilevel.make_bilevel_step(objective, models, optimizer, how, outer=outer, **shared)
    else:
        update = steps.make_train_step(
            objective,
            models,
            optimizer,
            accum_steps=options.accum_steps,
            watch_every=options.watch_every,
            **shared,
        )
    if options.lookahead is None:
        return update
    return lookahead.make_lookahead_step(update, ema=averages, **options.lookahead._asdict())


def metric_names(
    terms: Terms, options: Options, *, two_levels: bool = False, outer: bool = False
) -> tuple[str, ...]:
    """Returns the names of the metrics of an update: loss, terms, weights, counts, and the rest.

    Args:
      terms: terms of the objective, as shapes.
      options: options of the step.
      two_levels: whether the weighting has its own optimizer.
      outer: whether the weighting learns in this step.
    """
    names = (
        "loss",
        *terms.values,
        *(f"weight/{name}" for name in terms.weights),
        *(f"counts/{name}" for name in terms.counts),
        *terms.metrics,
    )
    names += ("outer_loss", "outer_grad_norm") if outer else ()
    names += ("grad_norm",) if options.grad_norm else ()
    names += {"keep": (), "report": ("nonfinite",), "skip": ("skipped",)}[options.nonfinite]
    watches = options.watch_every > 0 and not two_levels
    return (*names, *collapse.names(terms.embeddings)) if watches else names
