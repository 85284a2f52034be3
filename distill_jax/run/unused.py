"""Values of a config that nothing reads, given its other values; needs neither JAX nor data.

A key that does not exist is refused by `config.validate`. This module finds keys that exist, were
changed, and would be ignored. In a study, an arm need not read the values that it inherits, as long
as some arm reads them, but it must read all values that it sets itself. Likewise a command line may
switch off values that the file sets.
"""

from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

from distill_jax.core.errors import ConfigError
from distill_jax.run import config as config_lib
from distill_jax.run.config import ConfigDict


class Unread(NamedTuple):
    """A value that is ignored: its path, the reason, and the remedy."""

    path: str
    why: str
    hint: str


def check(config: ConfigDict, *, changes: Mapping[str, Any] | None = None, before=None) -> None:
    """Refuses values that are set and never read.

    Args:
      config: a config that passes `config.validate`.
      changes: values that a command line changed in it, by path.
      before: the config without these changes.

    Raises:
      ConfigError: naming the path.
    """
    arms = config_lib.arms(config)
    flat_config = config_lib.flatten(config)
    inherited = {unread.path: unread for unread in unread_values(flat_config)}
    if before is not None:
        earlier = {unread.path for unread in unread_values(config_lib.flatten(before))}
        groups = tuple(f"{path}." for path in changes or ())
        inherited = {
            path: unread
            for path, unread in inherited.items()
            if path in earlier or f"{path}.".startswith(groups)
        }
    single = config_lib.without_study(config)
    for arm, changes in arms.items():
        flat = config_lib.flatten(config_lib.override(single, changes))
        flat |= {path: value for path, value in flat_config.items() if path.startswith("study.")}
        here = {unread.path: unread for unread in unread_values(flat)}
        for path, unread in here.items():
            if path in changes:
                raise _refusal(unread, f"study.arms.{arm}.{path}")
        inherited = {path: unread for path, unread in inherited.items() if path in here}
    for unread in inherited.values():
        raise _refusal(unread, unread.path)


def _refusal(unread: Unread, where: str) -> ConfigError:
    return ConfigError(f"nothing reads it: {unread.why}", where=where, hint=unread.hint)


def unread_values(flat: Mapping[str, Any]) -> Iterator[Unread]:
    """Yields values that a config sets and nothing reads, from its leaves by path."""
    roles = {p.split(".")[1]: {} for p in flat if p.startswith("roles.") and p.count(".") > 1}
    for path, value in flat.items():
        parts = path.split(".", 2)
        if parts[0] == "roles" and len(parts) == 3:
            roles[parts[1]][parts[2]] = value
    changed = [p for p, v in flat.items() if v not in ({}, None) and v != config_lib.default(p)]

    def below(*groups: str) -> list[str]:
        return [p for p in changed for group in groups if p == group or p.startswith(f"{group}.")]

    def unread(paths: list[str], why: str, hint: str) -> Iterator[Unread]:
        yield from (Unread(path, why, hint) for path in paths)

    if not flat["weighting.name"]:
        hint = "set weighting.name, or leave it at its default"
        yield from unread(below("weighting", "bilevel"), "no weighting is named", hint)
    if not flat["lookahead.steps"]:
        hint = "set lookahead.steps, or leave it at its default"
        yield from unread(below("lookahead"), "lookahead.steps is 0", hint)
    if not flat["cache.dir"]:
        hint = "set cache.dir, or leave it at its default"
        yield from unread(below("cache"), "cache.dir is empty, so nothing is stored", hint)
    elif not flat["cache.top_k"]:
        paths = below("cache.rest")
        yield from unread(paths, "cache.top_k is 0: all classes are stored", "set cache.top_k")
    if not flat["cache.teacher"]:
        hint = "set cache.teacher, or leave it out"
        yield from unread(below("cache.teacher_kwargs"), "cache.teacher is empty", hint)
    if not flat["cache.teacher"] and not any(
        role.get("frozen") or role.get("ema_of") for role in roles.values()
    ):
        paths = below("data.teacher_view", "data.teacher_shares", "data.teacher_transforms")
        yield from unread(paths, "no role is a teacher", "add a frozen role, or leave it out")
    if not flat["data.train_transforms"]:
        paths = below("data.views")
        yield from unread(paths, "without transforms all views are alike", "leave it out")
    if not flat["optim.weight_decay"] and flat["optim.name"] != "lars":
        paths = below("optim.decay_mask")
        yield from unread(paths, "optim.weight_decay is 0", "set optim.weight_decay")
    if not flat["eval.metric"]:
        paths = below("eval.mode")
        yield from unread(paths, "eval.metric is empty: nothing is selected", "set eval.metric")
    if not any(path.startswith("study.arms.") for path in flat):
        hint = "set study.arms; a single run takes its seed from the key seed"
        yield from unread(below("study"), "there are no arms", hint)
    for name, role in roles.items():
        where, source = f"roles.{name}", role.get("ema_of")
        if not source:
            paths = below(*(f"{where}.{key}" for key in ("decay", "decay_end", "decay_schedule")))
            hint = f"set {where}.ema_of, or leave it out"
            yield from unread(paths, f"{name} is no moving average", hint)
        else:
            hint = f"leave it out, or start {source} from it"
            why = f"{name} starts as a copy of {source}"
            yield from unread(below(f"{where}.init"), why, hint)
        if not role.get("model"):
            why = f"no model is named, so it comes from {source or 'the run in init'}"
            hint = "leave it out, or name the model too"
            yield from unread(below(f"{where}.kwargs"), why, hint)
