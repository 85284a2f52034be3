"""Runs of a study, and which of them may go side by side."""

import json
import pathlib
import re
from typing import NamedTuple

import jax

from distill_jax.run import config as config_lib
from distill_jax.run.config import ConfigDict

_SCALAR = re.compile(r"optim\.lr|(objective|weighting)\.kwargs\..+")
"""Config paths whose numbers may differ between runs side by side."""

NO_REPLICAS = (NotImplementedError, jax.errors.JAXTypeError)
"""Exceptions that mean that runs cannot be trained side by side."""


class Member(NamedTuple):
    """A run of a study."""

    arm: str
    seed: int
    config: ConfigDict
    workdir: pathlib.Path
    reported: str


def scalars_of(config: ConfigDict) -> dict[str, float]:
    """Returns the numbers in which runs side by side may differ, by path."""
    flat = config_lib.flatten(config)
    return {p: x for p, x in flat.items() if _SCALAR.fullmatch(p) and type(x) in (int, float)}


def kind(config: ConfigDict) -> str:
    """Returns a key that is equal for runs that may be trained side by side.

    Such runs may differ in the runs that they start from, in numbers that may be traced, and in the
    seed, unless their data depend on it.
    """
    flat = config_lib.flatten(config)
    same_data = not config_lib.data_follow_seed(config)
    flat |= dict.fromkeys(scalars_of(config), "a number")
    for path, value in flat.items():
        role = re.fullmatch(r"roles\.(\w+)\.init", path)
        if (path == "seed" and same_data) or (role and value and config.roles[role[1]].model):
            flat[path] = "its own"
    return json.dumps(flat, sort_keys=True, default=str)
