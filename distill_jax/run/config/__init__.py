"""The config of a run: every key with its default, durations, overrides and checks.

One locked `ml_collections.ConfigDict`. Optional leaves are placeholders, so that a later value is
still checked for its type. Open groups (keyword arguments, roles, evaluators, arms) take new keys;
everything else refuses them. This package needs neither JAX nor data, which keeps `--help` fast.

Values on the command line and in the arms of a study (`override`):

    --config.optim.lr=3e-4                       a number for a number, text for text
    --config.total="20 epochs"                   a duration: steps, epochs, examples or %
    --config.total=500                           a number alone counts steps
    --config.data.kwargs.classes=cat,dog         commas make a tuple, in open groups too
    --config.data.kwargs.name="'a, b'"           quotes keep commas: one string
    --config.optim.clip_norm=none                an optional value is unset, a duration too
    --config.data.train_transforms=              an empty tuple
    --config.data.corrupt={}                     an open group is emptied
    --config.evaluators.calibration=none         a role, an evaluator or an arm is deleted

An arm writes the last two as `{"data": {"corrupt": {}}, "evaluators": {"calibration": None}}`.
"""

from distill_jax.run.config.durations import duration, refuse_old_keys, total_steps
from distill_jax.run.config.files import from_json, to_json
from distill_jax.run.config.overrides import (
    arms,
    data_arguments,
    data_follow_seed,
    override,
    without_study,
)
from distill_jax.run.config.schema import (
    DURATIONS,
    LONGEST_NAME,
    SPLITS,
    TRANSFORMS,
    ConfigDict,
    base,
    role,
)
from distill_jax.run.config.smoke import MOST_RUNS, smoke
from distill_jax.run.config.tree import changed, default, differences, flatten, lookup, tuples
from distill_jax.run.config.validate import validate

__all__ = [
    "DURATIONS",
    "LONGEST_NAME",
    "MOST_RUNS",
    "SPLITS",
    "TRANSFORMS",
    "ConfigDict",
    "arms",
    "base",
    "changed",
    "data_arguments",
    "data_follow_seed",
    "default",
    "differences",
    "duration",
    "flatten",
    "from_json",
    "lookup",
    "override",
    "refuse_old_keys",
    "role",
    "smoke",
    "to_json",
    "total_steps",
    "tuples",
    "validate",
    "without_study",
]
