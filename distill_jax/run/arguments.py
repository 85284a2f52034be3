"""Where in the config an argument of the library stands.

Errors of the library name the argument that is at fault, or the part that it belongs to: a network,
a transform, an evaluator, the batch. `located` adds the path of the config that set it.
"""

import contextlib
import inspect
from collections.abc import Collection, Iterator

from distill_jax.core.errors import ArgumentError, ConfigError
from distill_jax.run.config import TRANSFORMS, ConfigDict, role
from distill_jax.run.resolve import available, resolve

PATHS = {
    "batch": "data.train_transforms",
    "control": "weighting.control",
    "damping": "bilevel.damping",
    "corrupt": "data.corrupt",
    "dataset": "data.name",
    "decay_mask": "optim.decay_mask",
    "forget": "bilevel.forget",
    "held_out": "data.held_out",
    "horizon": "bilevel.horizon",
    "jvp_fraction": "bilevel.jvp_fraction",
    "layer_decay": "optim.layer_decay",
    "loss_terms": "weighting.loss_terms",
    "lr_by_layer": "optim.lr_by_layer",
    "method": "bilevel.method",
    "normalize": "data.transform_kwargs.normalize",
    "outer": "data.outer",
    "outer_terms": "bilevel.outer_loss",
    "outer_update": "bilevel.outer_update",
    "resident": "data.resident",
    "rules": "partition.rules",
    "teacher_outputs": "cache.roles",
    "unroll": "bilevel.unroll",
    "weighting": "weighting.name",
}
"""Arguments and parts of the library -> the keys that set them."""


@contextlib.contextmanager
def located(config: ConfigDict) -> Iterator[None]:
    """Gives errors of the library, which name an argument, the path of the config that set it.

    Raises:
      ConfigError: where an `ArgumentError` was raised.
    """
    try:
        yield
    except ArgumentError as error:
        where = path_of(error.where, config)
        raise ConfigError(error.what, where=where, hint=error.hint) from error


def path_of(where: str, config: ConfigDict) -> str:
    """Returns the path of an argument, the argument itself where no key of the config sets it."""
    head, _, rest = where.partition(".")
    name = head.partition("[")[0]
    if head in config.roles and (rest or head != "weighting"):
        if rest in ("", "input", "roles", "rngs", "data"):  # of a network, and no argument of it
            return f"roles.{head}"
        own = rest.partition(".")[0] in role()
        return f"roles.{where}" if own else f"roles.{head}.kwargs.{rest}"
    for transform in (name for key in TRANSFORMS for name in config.data[key]):
        if f"{where}.".startswith((f"{transform}.", f"{transform}[")):
            return f"data.transform_kwargs.{where}"
    if head in config.evaluators:
        return f"evaluators.{where}"
    for package, group in (("objectives", "objective"), ("weighting", "weighting")):
        if name in _arguments(package, config[group]):
            return f"{group}.kwargs.{where}"
    if head in PATHS:
        return PATHS[head] + where[len(head) :]
    return where


def _arguments(package: str, group: ConfigDict) -> Collection[str]:
    """Returns the arguments of a method or a weighting, of one's own those that are set."""
    if group.name not in available(package):
        return tuple(group.kwargs)
    return inspect.signature(resolve(package, group.name, where="")).parameters
