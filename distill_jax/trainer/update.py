"""The step of a trainer: the pieces of the core that its options ask for."""

from collections.abc import Mapping
from typing import Any

from distill_jax.core import bilevel, lookahead, steps
from distill_jax.core.api import Model, Objective, Role
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
    """Returns the pure step `(train_state, frozen, batch, key) -> (train_state, metrics)`.

    Args:
      objective: the training method.
      models: a network for each role.
      optimizer: an optax optimizer, or `bilevel.Optimizers`.
      options: of the step.
      averages: `{role: (source, decay)}`.
      two_level: how the outer gradient is taken, where the optimizer has two levels.
      outer: whether the weighting learns in this step, which then takes
        `{"train": batch, "held_out": batch}`.

    Raises:
      ConfigError: accumulation is asked of an objective that couples the examples of a batch.
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
