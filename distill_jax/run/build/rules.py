"""Partition rules of a config."""

import contextlib
import sys
from collections.abc import Collection, Iterator

from jax.sharding import Mesh

from distill_jax.core import partition
from distill_jax.core.errors import ConfigError
from distill_jax.run.build.networks import role_spec
from distill_jax.run.config import ConfigDict
from distill_jax.run.resolve import resolve

NETWORKS = "networks"
"""The rules that the modules of the networks offer for them, as `models.transformer` does."""


def rules_of(
    config: ConfigDict, name: str, mesh: Mesh, *, trusted: Collection[str]
) -> partition.Rules:
    """Returns the partition rules of that name, "rules" or "frozen_rules".

    Raises:
      ConfigError: an entry is neither a rule nor a name, or no network offers rules.
    """
    where, rules = f"partition.{name}", {}
    for entry in config.partition[name]:
        if entry == NETWORKS:
            rules |= _of_networks(config, mesh, where=where, trusted=trusted)
        else:
            rules |= partition.read_rules([entry], where=where)
    return rules


def _of_networks(
    config: ConfigDict, mesh: Mesh, *, where: str, trusted: Collection[str]
) -> partition.Rules:
    """Returns the rules of the roles that are frozen, or of all others, each below its name."""
    frozen, devices, rules = where.endswith("frozen_rules"), mesh.shape["model"], {}
    for role, spec in config.roles.items():
        if spec.frozen != frozen:
            continue
        model, kwargs = role_spec(config, role)
        make = resolve("models", model, where=f"roles.{role}.model", trusted=trusted)
        offered = getattr(sys.modules[make.__module__], "partition_rules", None)
        if offered is None:
            continue
        given = {argument: value for argument, value in kwargs.items() if value is not None}
        for pattern, axes in offered(devices=devices, **given).items():
            rules[rf"(^|/){role}/.*{pattern}"] = axes
    if not rules:
        kind = "frozen" if frozen else "trained"
        raise ConfigError(
            f"no {kind} network of this config offers partition rules",
            where=where,
            hint=f"networks that do: transformer; sets of rules: {', '.join(partition.RULE_SETS)}",
        )
    return rules


@contextlib.contextmanager
def rules_of_config() -> Iterator[None]:
    """Gives errors about `Options` of partitions the path of the rules in the config."""
    try:
        yield
    except ConfigError as e:
        if "partition_" not in e.where:
            raise
        kind, _, name = e.where.partition("partition_")
        raise ConfigError(e.what, where=f"partition.{kind}{name}", hint=e.hint) from e
