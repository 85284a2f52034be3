"""The durations of a config in steps."""

from collections.abc import Mapping
from typing import Any

from distill_jax.core import durations
from distill_jax.core.errors import ArgumentError, ConfigError
from distill_jax.run import old_configs
from distill_jax.run.config.schema import DURATIONS, ConfigDict
from distill_jax.run.config.tree import lookup


def total_steps(config: ConfigDict, n_train: int) -> int:
    """Returns the length of training in steps, by `total`.

    Batches run on across the end of an epoch, so an epoch is `n_train / batch_size` steps.

    Raises:
      ConfigError: more than 32 bits count.
    """
    per_epoch = n_train / config.batch_size
    total = duration(config, "total", steps_per_epoch=per_epoch, total_steps=0)
    if total >= 2**31:
        raise ConfigError(
            f"training of {total:,} steps",
            where="total",
            hint="below 2**31 steps: they are counted in 32 bits",
        )
    return total


def duration(
    config: ConfigDict,
    path: str,
    *,
    steps_per_epoch: float,
    total_steps: int,
    default: int | None = None,
) -> int:
    """Returns the duration at `path` in steps, at least one.

    Args:
      config: the config.
      path: of a duration, e.g. `"eval.every"`.
      steps_per_epoch: steps that one epoch takes; may be a fraction.
      total_steps: steps that 100 percent are.
      default: steps where no duration is set.

    Raises:
      ConfigError: where it is not positive, or there is none and no default.
    """
    value = read(config, path)
    if value is None:
        if default is None:
            hint = f'such as {path}="20 epochs" or a number of steps'
            raise ConfigError("no duration is set", where=path, hint=hint)
        return default
    units = {"steps_per_epoch": steps_per_epoch, "total_steps": total_steps}
    return max(1, round(durations.steps(value, path, batch_size=config.batch_size, **units)))


def read(config: ConfigDict, path: str) -> str | None:
    """Returns the duration at `path` in its one spelling, None where there is none.

    Raises:
      ConfigError: it is no duration, not positive, or a share of itself.
    """
    value = lookup(config, path)
    if value is None:
        return None
    if isinstance(value, (Mapping, ConfigDict)):
        refuse_units(path, dict(value.items()))
    return spelled(value, path)


def spelled(value: Any, path: str) -> str:
    """Returns a duration in its one spelling."""
    try:
        number, unit = durations.parse(value, path)
    except ArgumentError as error:
        raise ConfigError(error.what, where=path, hint=error.hint) from None
    if not number:
        hint = "leave it out" if path == "total" else "none for none"
        raise ConfigError(f"{value!r} is not positive", where=path, hint=hint)
    if path == "total" and unit == "percent":
        hint = "steps, epochs or examples"
        raise ConfigError(f"{value!r} is a share of itself", where=path, hint=hint)
    return durations.spell(number, unit)


def refuse_units(path: str, units: Mapping[str, Any], *, prefix: str = "") -> None:
    """Refuses a duration that is spelled as a group of units, as in earlier versions.

    Raises:
      ConfigError: with the new spelling.
    """
    try:
        new = old_configs.one_duration(units)
    except ValueError:
        new = "20 epochs"
    value = "none" if new is None else f'"{new}"'
    hint = f"write {prefix}{path}={value}"
    where = f"{path}.{next(iter(units))}" if len(units) == 1 else path
    raise ConfigError("a duration is one value, not a group of units", where=where, hint=hint)


def refuse_old_keys(values: Mapping[str, Any], *, prefix: str = "") -> None:
    """Refuses paths of earlier versions, such as `total.epochs`, with those of this one."""
    for path, value in values.items():
        new = old_configs.renamed(path)
        if new != path and not path.startswith(("roles.", "objective.")):
            value = old_configs.RENAMED_VALUES.get(new, {}).get(value, value)
            hint = f"write {prefix}{new}={value}"
            raise ConfigError(f"it is called {new}", where=path, hint=hint)
    for group in DURATIONS:
        units = {u: values[f"{group}.{u}"] for u in durations.UNITS if f"{group}.{u}" in values}
        if units:
            refuse_units(group, units, prefix=prefix)
