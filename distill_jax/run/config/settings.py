"""Values that an arm of a study takes from another: `"setting:NAME#PATH"`.

NAME is an arm, or a name of `study.tuned`: then the value is that of the arm that it chooses, so
that an arm can start where tuning ended, in one study:

    "weighting": {"kwargs": {"centre": "setting:kd_tuned#objective.kwargs.alpha"}}
"""

import re
from collections.abc import Iterator, Mapping
from typing import Any

from distill_jax.core.errors import ConfigError, nearest
from distill_jax.run.config.schema import ConfigDict
from distill_jax.run.config.tree import flatten

PREFIX = "setting:"
_SETTING = re.compile(rf"{PREFIX}(?P<name>[\w.+-]+)#(?P<path>\w+(\.\w+)*)")

Arms = Mapping[str, Mapping[str, Any]]


def names(changes: Mapping[str, Any], *, arm: str) -> Iterator[tuple[str, str, str]]:
    """Yields (path, NAME, PATH) for each such value among the changes of an arm."""
    for path, value in changes.items():
        if isinstance(value, str) and value.startswith(PREFIX):
            match = _SETTING.fullmatch(value)
            if match is None:
                raise ConfigError(
                    f"{value!r} names no value of an arm",
                    where=f"study.arms.{arm}.{path}",
                    hint=f"write {PREFIX}ARM#PATH, as in {PREFIX}kd_tuned#objective.kwargs.alpha",
                )
            yield path, match["name"], match["path"]


def candidates(config: ConfigDict, name: str, *, where: str) -> tuple[str, ...]:
    """Returns the arms that a name may stand for."""
    known = config.study.tuned.get(name, (name,))
    if name in config.study.tuned or name in config.study.arms:
        return tuple(arm for arm in known if arm in config.study.arms)
    raise ConfigError(
        f"{name!r} is neither an arm nor a name of study.tuned",
        where=where,
        hint=nearest(name, (*config.study.arms, *config.study.tuned)),
    )


def resolved(
    config: ConfigDict, arms: Arms, chosen: Mapping[str, str]
) -> dict[str, dict[str, Any]]:
    """Returns the changes of every arm, with values in the place of their settings.

    Args:
      config: of the study.
      arms: changes as written.
      chosen: the arm that each name of `study.tuned` stands for; by default its first candidate.

    Raises:
      ConfigError: a setting names no arm, or a value that one of the candidates does not have.
    """
    found, flat = {arm: dict(changes) for arm, changes in arms.items()}, None
    for arm, changes in arms.items():
        for path, name, of in names(changes, arm=arm):
            where = f"study.arms.{arm}.{path}"
            flat = flatten(config) if flat is None else flat
            values = {}
            for candidate in candidates(config, name, where=where):
                values[candidate] = arms[candidate].get(of, flat.get(of))
                value = values[candidate]
                if value is None or (isinstance(value, str) and value.startswith(PREFIX)):
                    taken = f"takes {of} from another arm itself"
                    raise ConfigError(
                        f"{candidate} {taken if value else f'has no value {of}'}",
                        where=where,
                        hint=nearest(of, arms[candidate]),
                    )
            found[arm][path] = values[chosen.get(name, next(iter(values)))]
    return found


def needed(config: ConfigDict, arm: str) -> dict[str, tuple[str, ...]]:
    """Returns the names that the settings of an arm go back to, with the arms each may be."""
    changes = flatten(config.study.arms[arm])
    return {
        name: candidates(config, name, where=f"study.arms.{arm}.{path}")
        for path, name, _ in names(changes, arm=arm)
    }
