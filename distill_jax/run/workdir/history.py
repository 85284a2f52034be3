"""Configs and environments of the starts of a run."""

import json
import pathlib
from collections.abc import Mapping
from typing import Any

from distill_jax.run import config as config_lib
from distill_jax.run.config import ConfigDict
from distill_jax.run.workdir.results import write_json
from distill_jax.trainer.io.files import peek


def arithmetic(environment: Mapping[str, Any]) -> dict[str, Any]:
    """Returns the properties of an environment that may change the bits of results, by name."""
    fields = ("platform", "device", "devices", "processes", "x64")
    chosen = {name: environment[name] for name in fields if name in environment}
    versions = environment.get("versions")
    return (dict(versions) if isinstance(versions, Mapping) else {}) | chosen


def environment_changes(before: Any, now: Mapping[str, Any]) -> list[str]:
    """Returns `"name: old -> new"` for each change that may affect the bits that a run computes.

    Args:
      before: `arithmetic` of the previous start; None if it is not known.
      now: that of this start.
    """
    if not isinstance(before, Mapping):
        return []
    old, new = before, now
    names = [name for name in old if name in new and old[name] != new[name]]
    return [f"{name}: {old[name]} -> {new[name]}" for name in names]


def describe(config: ConfigDict, folder: pathlib.Path, environment: Mapping, step: int) -> None:
    """Writes `config.json` and `env.json`, in which earlier starts stay listed as "history"."""
    before = peek(folder / "env.json")
    history = []
    if isinstance(before, dict) and step:
        history = [*before.pop("history", []), before]
    write_json(folder / "env.json", {**environment, "step": step, "history": history})
    write_json(folder / "config.json", json.loads(config_lib.to_json(config)))
