"""What a study chooses on the selecting examples: arms of `study.tuned` and of `study.fallback`.

The test part is not used. A fallback takes an arm only where it has more of the selecting examples
right than the other by `study.fallback_margin` standard errors of the paired difference, in each
seed by itself, for the last and for the best state each; otherwise it takes the other.
"""

import zlib
from collections.abc import Collection, Mapping
from typing import Any

import numpy as np

from distill_jax.core.errors import ConfigError
from distill_jax.run import build as build_lib
from distill_jax.run import config as config_lib
from distill_jax.run.config import ConfigDict
from distill_jax.run.resolve import names_in

Statuses = Mapping[tuple[str, int], Mapping[str, Any]]
"""By arm and seed: "status", for finished runs "metrics" and "selecting", see `packed`."""

STATES = {"value": "last", "best": "best"}


def packed(right: np.ndarray, index: np.ndarray) -> dict[str, Any]:
    """Returns which examples are right `[n]`, in a form for JSON, and a checksum of their ids."""
    ids = np.ascontiguousarray(index, np.int64)
    bits = np.packbits(np.asarray(right, bool)).tobytes().hex()
    return {"n": len(right), "right": bits, "examples": zlib.crc32(ids.tobytes())}


def unpacked(stored: Mapping[str, Any]) -> np.ndarray:
    """Returns bool `[n]`."""
    data = np.frombuffer(bytes.fromhex(stored["right"]), np.uint8)
    return np.unpackbits(data, count=stored["n"]).astype(bool)


def tune(config: ConfigDict, statuses: Statuses) -> dict[str, dict[str, Any]]:
    """Chooses, for each entry of `study.tuned`, the best arm by `eval.metric` of the last state.

    The first of equals. With `study.tuned_by` "mean" it is that of the best mean over the finished
    seeds, else each seed has its own, once all candidates have ended there.

    Returns:
      `{name: {"by": metric, "candidates": {arm: mean}, "seeds": {seed: chosen}}}`, with the arm of
      all seeds as "arm" where there is one; a name is left out as long as none of its candidates
      has finished.
    """
    sign, found = 1 if config.eval.mode == "max" else -1, {}
    for name, candidates in config.study.tuned.items():
        values = {
            arm: {
                seed: float(metrics[config.eval.metric])
                for seed in config.study.seeds
                if (metrics := statuses.get((arm, seed), {}).get("metrics"))
            }
            for arm in candidates
        }
        means = {arm: sum(v.values()) / len(v) for arm, v in values.items() if v}
        if not means:
            continue

        chosen = {"by": config.eval.metric, "candidates": means}
        if config.study.tuned_by == "mean":
            chosen |= {"arm": _best(means, sign)}
            chosen["seeds"] = dict.fromkeys(map(str, config.study.seeds), chosen["arm"])
        else:
            own = {s: {a: v[s] for a, v in values.items() if s in v} for s in config.study.seeds}
            ended = {s: all(_ended(statuses, a, s) for a in candidates) for s in own}
            chosen["seeds"] = {str(s): _best(v, sign) for s, v in own.items() if v and ended[s]}
            if len(same := set(chosen["seeds"].values())) == 1:
                chosen["arm"] = same.pop()
        found[name] = chosen
    return found


def _best(values: Mapping[str, float], sign: int) -> str:
    return max(values, key=lambda arm: sign * values[arm])


def settled(
    config: ConfigDict, names: Collection[str], seed: int, statuses: Statuses
) -> dict[str, str] | None:
    """Returns the arms that names of `study.tuned` stand for in a seed; None if some are open."""
    names = [name for name in names if name in config.study.tuned]
    seeds = config.study.seeds if config.study.tuned_by == "mean" else (seed,)
    arms = [arm for name in names for arm in config.study.tuned[name]]
    if not all(_ended(statuses, arm, s) for arm in arms for s in seeds):
        return None
    tuned = tune(config, statuses)
    chosen = {name: tuned.get(name, {}).get("seeds", {}).get(str(seed)) for name in names}
    return None if None in chosen.values() else chosen


def _ended(statuses: Statuses, arm: str, seed: int) -> bool:
    return statuses.get((arm, seed), {}).get("status") in ("done", "failed")


class Chosen:
    """The arm that each name of a study stands for, by seed and state.

    Attributes:
      tuned: from `tune`.
      fallback: `{name: {"arms": (arm, other), "margin": m, "seeds": {seed: {state: decision}}}}`.
        A decision has the "arm" that is taken, None while it is open, "right" (how many examples
        each has right), "examples", "difference" and "se" of the shares, or "why" it has none.
    """

    def __init__(self, config: ConfigDict, statuses: Statuses):
        self._study, self._statuses = config.study, statuses
        self.tuned = tune(config, statuses)
        self.fallback = {
            name: {
                "arms": list(pair),
                "margin": config.study.fallback_margin,
                "seeds": {
                    str(seed): {state: self._decide(pair, seed, state) for state in STATES}
                    for seed in config.study.seeds
                },
            }
            for name, pair in config.study.fallback.items()
        }

    def arm(self, name: str, seed: int, state: str = "value") -> str | None:
        """Returns the arm whose run stands for a name; None while that is open."""
        if name in self._study.arms:
            return name
        if name in self._study.tuned:
            return self.tuned.get(name, {}).get("seeds", {}).get(str(seed))
        taken = self._decide(self._study.fallback[name], seed, state)["arm"]
        return None if taken is None else self.arm(taken, seed, state)

    def _decide(self, pair: tuple[str, str], seed: int, state: str) -> dict[str, Any]:
        arms = [self.arm(name, seed, state) for name in pair]
        runs = [self._statuses.get((arm, seed), {}) if arm else {} for arm in arms]
        for name, run in zip(pair[::-1], runs[::-1], strict=True):
            if run.get("status") == "failed":
                other = None if name == pair[1] else pair[1]
                if other is None or runs[1].get("status") == "done":
                    return {"arm": other, "why": f"{name} failed"}
            if run.get("status") != "done":
                return {"arm": None, "why": f"{name} has not finished"}
        stored: list[Mapping[str, Any]] = []
        for name, run in zip(pair, runs, strict=True):
            stored.append((run.get("selecting") or {}).get(STATES[state]) or {})
            if not stored[-1]:
                return {"arm": None, "why": f"{name} stored no right answers of its {state} state"}
        if stored[0].get("examples") != stored[1].get("examples"):
            return {"arm": None, "why": f"{' and '.join(pair)} select by different examples"}
        try:
            first, second = map(unpacked, stored)
        except (KeyError, TypeError, ValueError):
            return {"arm": None, "why": f"{' or '.join(pair)} has a damaged entry selecting"}
        gain = first.astype(float) - second
        n, margin = len(gain), self._study.fallback_margin
        se = float(gain.std(ddof=1) / np.sqrt(n)) if n > 1 else float("inf")
        return {
            "arm": pair[0] if gain.mean() > margin * se else pair[1],
            "right": [int(first.sum()), int(second.sum())],
            "examples": n,
            "difference": float(gain.mean()),
            "se": se,
        }


def check(
    config: ConfigDict, configs: Mapping[str, ConfigDict], trusted: Collection[str] | None = None
) -> None:
    """Refuses fallbacks whose arms cannot be compared example by example.

    Args:
      config: of the study.
      configs: of one run of each arm.
      trusted: as in `build.build`.

    Raises:
      ConfigError: an arm does not select, does not classify, or selects by other examples.
    """
    for name in config.study.fallback:
        where, parts = f"study.fallback.{name}", {}
        for arm in dict.fromkeys(_arms_behind(config, name)):
            single = configs[arm]
            if not single.eval.metric or not single.data.held_out:
                raise ConfigError(
                    f"{arm} has no selecting part",
                    where=where,
                    hint="set data.held_out and eval.metric, or name other arms",
                )
            if not any(e == "classification" or ":" in e for e in single.evaluators):
                raise ConfigError(
                    f"{arm} does not measure which examples are right",
                    where=where,
                    hint="add the evaluator classification to it",
                )
            parts[arm] = _selecting(single, trusted)
        first = next(iter(parts))
        for arm, part in parts.items():
            for path in part.keys() | parts[first].keys():
                values = [parts[a].get(path) for a in (first, arm)]
                if values[0] != values[1]:
                    raise ConfigError(
                        f"{first} and {arm} select by different examples: "
                        f"{path} is {values[0]} and {values[1]}",
                        where=where,
                        hint=f"set {path} for all arms",
                    )


def _arms_behind(config: ConfigDict, name: str) -> list[str]:
    if name in config.study.arms:
        return [name]
    named = config.study.tuned.get(name) or config.study.fallback[name]
    return [arm for other in named for arm in _arms_behind(config, other)]


def _selecting(single: ConfigDict, trusted: Collection[str] | None) -> dict[str, Any]:
    """Returns what decides which examples of the data select; with `data.outer` as it is in use."""
    flat = config_lib.flatten(single.data)
    names = [n for n in flat if n == "name" or n.startswith("kwargs")]
    found = {f"data.{n}": flat[n] for n in (*names, "held_out", "at_most")}
    given = single.data.corrupt.get("train_on_held_out", 0)
    return found | {
        "data.outer": build_lib.outer_share(
            single, trusted=names_in(single) if trusted is None else trusted
        ),
        "data.corrupt.train_on_held_out": given,
    }
