"""The arms of a study: their order, the config of each run, and the checks on them.

An arm may start from another's network: `init = "arm:teacher"` means the run of arm `teacher`
with the same seed, `"arm:teacher@0"` the one with seed 0. It may also take a value from another
arm's config, see `config.settings`.
"""

import pathlib
import re
from collections.abc import Collection, Iterator, Mapping
from typing import Any

from distill_jax.core.errors import ConfigError, nearest
from distill_jax.run import build as build_lib
from distill_jax.run import choices
from distill_jax.run import config as config_lib
from distill_jax.run.arguments import located
from distill_jax.run.config import ConfigDict, settings
from distill_jax.run.resolve import names_in
from distill_jax.trainer.io.paths import NetworkRef

_REFERENCE = re.compile(r"arm:(?P<arm>[\w.+-]+)(@(?P<seed>\d+))?(?P<role>#[\w/]+[*]{0,2})?$")


def references(changes: Mapping[str, Any]) -> dict[str, re.Match]:
    """Returns the config paths that name another arm's network."""
    matches = {}
    for path, value in changes.items():
        if isinstance(value, str) and value.startswith("arm:"):
            match = _REFERENCE.match(value)
            if match is None:
                raise ConfigError(
                    f"{value!r} names no arm", where=path, hint="write arm:NAME or arm:NAME@SEED"
                )
            matches[path] = match
    return matches


def leaves(single: ConfigDict, changes: Mapping[str, Any]) -> dict[str, Any]:
    """Returns the leaves of an arm's config by path, before references are resolved."""
    return config_lib.flatten(config_lib.override(single, changes))


def ordered_arms(config: ConfigDict) -> list[str]:
    """Returns the arms such that each comes after those it starts from.

    Raises:
      ConfigError: an arm starts from one that does not exist, or from itself in a circle.
    """
    arms = config_lib.arms(config)
    tuned = {arm: set().union(*settings.needed(config, arm).values()) for arm in arms}
    needs: dict[str, set[str]] = {}
    single = config_lib.without_study(config)
    for arm, changes in arms.items():
        sources = references(leaves(single, changes))
        needs[arm] = set(tuned[arm])
        for path, match in sources.items():
            source, seed = match["arm"], match["seed"]
            if source not in arms:
                raise ConfigError(
                    f"starts from an arm {source!r} that the study does not have",
                    where=f"study.arms.{arm}.{path}",
                    hint=nearest(source, arms),
                )
            if seed is not None and int(seed) not in config.study.seeds:
                raise ConfigError(
                    f"starts from seed {seed}, which the study does not run",
                    where=f"study.arms.{arm}.{path}",
                    hint=f"seeds: {config.study.seeds}",
                )
            needs[arm].add(source)
    order: list[str] = []
    while len(order) < len(arms):
        ready = [arm for arm in arms if arm not in order and needs[arm] <= set(order)]
        if not ready:
            left = [arm for arm in arms if arm not in order]
            raise ConfigError(
                f"the arms {', '.join(left)} start from each other in a circle", where="study.arms"
            )
        order.append(ready[0])
    return order


def arm_config(
    config: ConfigDict,
    arm: str,
    seed: int,
    workdir: pathlib.Path,
    chosen: Mapping[str, str] | None = None,
) -> ConfigDict:
    """Returns the config of one run: the arm's changes, its seed, and paths for its sources.

    A role that starts from another arm and names no model gets the network of that arm.

    Args:
      config: of the study.
      arm: the arm.
      seed: of the run.
      workdir: folder of the study.
      chosen: as in `config.arms`.
    """
    single = config_lib.without_study(config)
    return _arm_config(single, config_lib.arms(config, chosen), arm, seed, workdir)


def _arm_config(
    single: ConfigDict, arms: Mapping[str, Any], arm: str, seed: int, workdir: pathlib.Path
) -> ConfigDict:
    changes = dict(arms[arm])
    flat = leaves(single, changes)
    for path, match in references(flat).items():
        source = run_folder(workdir, match["arm"], int(match["seed"] or seed))
        changes[path] = str(source) + (match["role"] or "")
        role = path.removesuffix(".init")
        if not flat.get(f"{role}.model"):
            origin = _arm_config(single, arms, match["arm"], seed, workdir).roles
            part = NetworkRef.parse(changes[path], where=path)
            network = origin[part.role]
            changes |= {f"{role}.model": network.model, f"{role}.kwargs": network.kwargs.to_dict()}
    return config_lib.override(single, {**changes, "seed": seed})


def run_folder(workdir: pathlib.Path, arm: str, seed: int) -> pathlib.Path:
    return workdir / arm / f"seed{seed}"


def check(config: ConfigDict, trusted: Collection[str] | None = None) -> None:
    """Raises `ConfigError` unless every arm is a valid config and the comparison is defined.

    Args:
      config: of the study.
      trusted: as in `build.build`.
    """
    if not config.study.arms or not config.study.seeds:
        raise ConfigError(
            "the config defines no study",
            where="study",
            hint="set study.arms and study.seeds, or use --mode=train",
        )
    if not config.study.reference:
        raise ConfigError(
            "no reference arm is named",
            where="study.reference",
            hint=nearest("", config.study.arms),
        )
    if config.study.tuned and not config.eval.metric:
        raise ConfigError(
            "tuned arms are chosen by eval.metric, which is empty",
            where="study.tuned",
            hint="set eval.metric, such as held_out/accuracy",
        )
    whole, configs = config_lib.without_study(config), {}
    for arm in ordered_arms(config):
        for chosen in _choices(config, arm):
            arms = config_lib.arms(config, chosen)
            try:
                single = _arm_config(whole, arms, arm, config.study.seeds[0], pathlib.Path())
                config_lib.validate(single)
                if chosen and single.weighting.name:
                    names = names_in(single) if trusted is None else trusted
                    with located(single):
                        build_lib.make_weighting(single, 1, names)
                configs[arm] = single
            except ConfigError as e:
                where = f"study.arms.{arm}: {e.where}"
                if chosen:
                    where += f", where {' and '.join(f'{n} is {a}' for n, a in chosen.items())}"
                raise ConfigError(e.what, where=where, hint=e.hint) from e
    choices.check(config, configs, trusted)


def _choices(config: ConfigDict, arm: str) -> Iterator[dict[str, str]]:
    """Yields each candidate that the settings of an arm may come from, one name at a time."""
    needed = settings.needed(config, arm)
    if not needed:
        yield {}
    for name, candidates in needed.items():
        yield from ({name: candidate} for candidate in candidates)
