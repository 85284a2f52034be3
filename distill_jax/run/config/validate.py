"""What can be known to be wrong before data and arrays exist, in a config and in its arms."""

import math
import re

from distill_jax.core.errors import ConfigError, nearest
from distill_jax.run.config.checks import check_run
from distill_jax.run.config.overrides import arms, override, without_study
from distill_jax.run.config.schema import LONGEST_NAME, ConfigDict
from distill_jax.run.config.tree import is_a, mistyped


def validate(config: ConfigDict) -> None:
    """Refuses errors that can be detected before data and arrays exist.

    Names and keyword arguments of open groups are checked when they are resolved.

    Raises:
      ConfigError: names the path, the correct value, and the nearest name.
    """
    if not isinstance(config, ConfigDict):
        raise ConfigError(f"a config is a ConfigDict, not {type(config).__name__}")
    check_run(config)
    _check_study(config)


def _check_study(config: ConfigDict) -> None:
    study = config.study
    for seed in study.seeds:
        if not is_a(seed, int) or seed < 0:
            raise ConfigError(f"{seed!r} is not a seed", where="study.seeds", hint="(0, 1, 2)")
    if len(set(study.seeds)) != len(study.seeds):
        raise ConfigError(f"{study.seeds} repeats a seed", where="study.seeds", hint="(0, 1, 2)")
    names = (*study.arms, *study.tuned, *study.fallback)
    if study.reference and study.reference not in names:
        raise ConfigError(
            f"{study.reference!r} is not an arm",
            where="study.reference",
            hint=nearest(study.reference, names),
        )
    for arm in study.sources:
        if arm not in study.arms or arm == study.reference:
            what = "the reference" if arm == study.reference else "not an arm"
            hint = nearest(arm, set(study.arms) - {study.reference})
            raise ConfigError(f"{arm!r} is {what}", where="study.sources", hint=hint)
    for name, figure in study.published.items():
        where = f"study.published.{name}"
        if name not in study.arms:
            hint = nearest(name, study.arms)
            raise ConfigError(f"{name!r} is not an arm", where=where, hint=hint)
        if not is_a(figure, (int, float)):
            raise ConfigError(f"{figure!r} is not a number", where=where, hint="0.7066")
    for name, candidates in study.tuned.items():
        where = f"study.tuned.{name}"
        if name in study.arms:
            raise ConfigError("an arm has this name", where=where, hint="choose another")
        if not isinstance(candidates, (tuple, list)) or not candidates:
            raise ConfigError(f"{candidates!r} lists no arms", where=where, hint="('a', 'b')")
        for arm in candidates:
            if arm not in study.arms:
                raise ConfigError(
                    f"{arm!r} is not an arm", where=where, hint=nearest(arm, study.arms)
                )
    _check_fallback(study)
    for name, asked in study.questions.items():
        where = f"study.questions.{name}"
        known = [arm for arm in names if arm not in study.sources]
        if not isinstance(asked, (tuple, list)) or len(asked) < 2 or len(set(asked)) < len(asked):
            what = f"{asked!r} does not compare two arms"
            raise ConfigError(what, where=where, hint="(arm, reference, other arms ...)")
        for arm in asked:
            if arm not in known:
                what = f"{arm!r} is not an arm that is compared"
                raise ConfigError(what, where=where, hint=nearest(arm, known))
    for name, changes in study.arms.items():
        if not isinstance(changes, ConfigDict):
            raise mistyped(changes, ConfigDict, f"study.arms.{name}")
        if not re.fullmatch(r"[\w+-][\w.+-]*", name) or len(name.encode()) > LONGEST_NAME:
            raise ConfigError(
                f"{name[:50]!r}{'...' if len(name) > 50 else ''} cannot be the name of a folder",
                where="study.arms",
                hint=f"at most {LONGEST_NAME} bytes: letters, digits, '_', '-', '+' and '.', "
                "not first a '.'",
            )
        if "seed" in changes:
            raise ConfigError(
                "every arm is run with the seeds of the study",
                where=f"study.arms.{name}.seed",
                hint="set study.seeds, and leave this out",
            )
        if "study" in changes:
            raise ConfigError("an arm cannot change the study", where=f"study.arms.{name}.study")
    single = without_study(config)
    for name, changes in arms(config).items():
        try:
            check_run(override(single, changes))
        except ConfigError as error:
            where = f"study.arms.{name}.{error.where}"
            raise ConfigError(error.what, where=where, hint=error.hint) from None


def _check_fallback(study: ConfigDict) -> None:
    names = (*study.arms, *study.tuned, *study.fallback)
    if not 0 <= study.fallback_margin < math.inf:
        where, hint = "study.fallback_margin", "standard errors, 0 or more"
        raise ConfigError(f"{study.fallback_margin} is out of range", where=where, hint=hint)
    needs: dict[str, set[str]] = {}
    for name, pair in study.fallback.items():
        where = f"study.fallback.{name}"
        if name in study.arms or name in study.tuned:
            raise ConfigError("an arm has this name", where=where, hint="choose another")
        if not isinstance(pair, (tuple, list)) or len(pair) != 2 or pair[0] == pair[1]:
            hint = "(arm, other): the arm where it is better on the selecting examples"
            raise ConfigError(f"{pair!r} does not name two arms", where=where, hint=hint)
        for arm in pair:
            if arm not in names:
                hint = nearest(arm, set(names) - {name})
                raise ConfigError(f"{arm!r} is not an arm", where=where, hint=hint)
        needs[name] = {*pair} & {*study.fallback}
    while ready := [name for name, others in needs.items() if not others & needs.keys()]:
        for name in ready:
            del needs[name]
    if needs:
        what = f"falls back on itself, through {', '.join(needs)}"
        raise ConfigError(what, where=f"study.fallback.{next(iter(needs))}")
