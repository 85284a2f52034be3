"""Is a learned ratio ever worse than a tuned constant? Situations times methods, in pieces.

  python benchmarks/trust_suite.py run --dir=runs/trust_suite --minutes=10
  python benchmarks/trust_suite.py cost --dir=runs/trust_suite
  python benchmarks/trust_suite.py report --dir=runs/trust_suite \\
      --out=benchmarks/results/trust_suite.json --svg=docs/results/trust_suite.svg \\
      --page=docs/results/trust_suite.md

`run` trains what the folder lacks and may be stopped at any time; `--minutes` stops it. Two
situations are set aside (`_trust_situations.SET_ASIDE`) and run only with `--set_aside`.

Each seed draws its own training part, 250 outer and 250 selecting examples, faults, teacher and
initial weights. Every arm has a grid of settings (`grid`) and is measured at several times in
training; the setting and the time of the highest selecting accuracy are taken, those of the smaller
loss among equals, in every seed by itself. Arms:

* `alone`, `clean`: the labels, and the outer examples, without a teacher.
* `constant`: a ratio for all examples; `constant_more`: with the outer examples in training.
* `oracle`: ratio 0 where the teacher is wrong, 1 where the label is, else a constant (1/2 where
  both are), by the true flags.
* `tgeo`: TGeo-KD from the ratio .5; `tgeo_start` from the tuned constant; `around`: differences
  between examples alone, the mean logit stays that of the tuned constant (`Trilateral.centre`);
  `two_speed`: with a long horizon for the mean. `shuffled`, `frozen`: controls of `tgeo`.
* `tgeo_kd`: `around` where it has more selecting examples right than the tuned constant, by one
  standard error of the paired difference; else the tuned constant.
* `around_more`: the network of `around`, frozen, for a new student with the outer examples in
  training; `tgeo_kd_more`: that, or `constant_more`, by the same rule.
* `wsl`, `ada`, `l2rw`, `mwn`, `joint`: rivals.
* `constant_rates`, `around_rates`, `tgeo_kd_rates`: as without `_rates`, with the learning rates of
  `joint` in the grid of the constants; the learned ratio takes that of the tuned constant. Only
  with `--arms`.

The domain "text" needs what `tools/fetch_addresses.py` downloads. `report --base=JSON` adds the
seeds of the folder to those of a stored result.
"""

import argparse
import json
import pathlib
import time
from collections.abc import Mapping, Sequence
from typing import Any

import _trust_arms as arms
import _trust_situations as situations
import numpy as np

from distill_jax.run import environment

RATIOS = (0.0, 0.1, 0.3, 0.5, 0.7, 0.9, 1.0)
OUTER_RATES = (1e-3, 3e-3, 1e-2, 3e-2)
RATES = (0.25, 0.5, 1.0, 2.0)  # factors of the domain's
GIVEN = ("alone", "clean", "constant", "constant_more", "oracle")
RIVALS = ("wsl", "ada", "l2rw", "mwn", "joint")
LEARNED = ("around", "around_more", "tgeo_start", "tgeo", "shuffled", "frozen", "two_speed")
ARMS = (*GIVEN, *LEARNED[:2], *RIVALS, *LEARNED[2:])
MORE_RATES = ("constant_rates", "around_rates")
SHORT = {"length": 120.0}
SEEDS = 5  # runs of so many seeds share a program


def grid(arm: str) -> list[tuple[str, dict[str, Any]]]:
    """Returns the settings of an arm: the program of each and the fields of its `Run`."""
    lengths: tuple[dict[str, float], ...] = ({}, SHORT)
    if arm in ("alone", "clean"):
        use = "shown" if arm == "alone" else "outer"
        rates = RATES[1:3] if arm == "alone" else RATES[:2]
        return [("given", {"use": use, "numbers": {"lr": r, **n}, "ratio": 0.0})
                for n in lengths for r in rates]  # fmt: skip
    if arm in ("constant", "constant_more", "oracle"):
        use = "added" if arm == "constant_more" else "train"
        return [("given", {"use": use, "ratio": r}) for r in RATIOS]
    if arm == "constant_rates":
        return [("given", {"ratio": r, "numbers": {"lr": f}}) for f in RATES for r in RATIOS]
    if arm == "wsl":
        return [("wsl", {"numbers": {"scale": s}}) for s in (0.5, 1.0, 2.5, 5.0)]
    if arm == "ada":
        return [(f"ada_{g}", {"numbers": {"temperature": t}})
                for g in ("class", "sample") for t in (2.0, 4.0)]  # fmt: skip
    if arm in ("l2rw", "joint"):
        return [(arm, {"numbers": {"lr": r}}) for r in RATES]
    if arm == "shuffled":
        return [(arm, {})]
    if arm == "frozen":
        return [(arm, {})]
    if arm == "around_more":
        return [("frozen_around", {"use": "added"})]
    name = {"tgeo_start": "tgeo", "around_rates": "around"}.get(arm, arm)
    if arm == "two_speed":
        return [(arm, {"numbers": {"outer_lr": r}}) for r in OUTER_RATES[1:3]]
    return [(name, {"numbers": {"outer_lr": r}}) for r in OUTER_RATES]


def choose(piece: Mapping[str, np.ndarray]) -> tuple[int, int]:
    """Returns setting and time of the highest selecting accuracy, then of the smallest loss."""
    right, loss = piece["right"].mean(-1), piece["loss"].astype(float).mean(-1)
    best = np.where(right == np.nanmax(right), np.nan_to_num(loss, nan=1e9), np.inf)
    return tuple(int(i) for i in np.unravel_index(best.argmin(), best.shape))  # type: ignore


class Suite:
    """A folder of pieces `<domain>/<situation>/<arm>/<seed>.npz`."""

    def __init__(self, folder: pathlib.Path, until: float):
        self.folder, self.until = folder, until
        self.programs: dict[tuple[str, str], arms.Program] = {}

    def path(self, domain: str, situation: str, arm: str, seed: int) -> pathlib.Path:
        return self.folder / domain / situation / arm / f"{seed}.npz"

    def read(self, *where: Any) -> dict[str, np.ndarray]:
        with np.load(self.path(*where)) as arrays:
            return dict(arrays)

    def teachers(self, domain: str, situation: str, seeds: Sequence[int]) -> list[np.ndarray]:
        what = (situations.SITUATIONS | situations.SET_ASIDE)[situation]
        kind = f"{what.teacher}{what.imbalance:g}"
        found = []
        for seed in seeds:
            path = self.folder / domain / f"teacher_{kind}_{seed}.npy"
            if not path.exists():
                path.parent.mkdir(parents=True, exist_ok=True)
                data = situations.domain(domain)
                np.save(path, situations.teachers(data, what, [seed], 400)[0])
            found.append(np.load(path))
        return found

    def run(self, domain: str, names: Sequence[str], which: Sequence[str], seeds: Sequence[int]):
        data = situations.domain(domain)
        given = [a for a in which if a in GIVEN or a == "constant_rates"]
        for group in (given, *([a] for a in which if a not in given)):
            for name in names:
                left = [a for a in group for s in seeds
                        if not self.path(domain, name, a, s).exists()]  # fmt: skip
                if not left:
                    continue
                if time.time() > self.until:
                    return
                began = time.time()
                logits = self.teachers(domain, name, seeds)
                tables = [situations.make_tables(data, name, s, x)
                          for s, x in zip(seeds, logits, strict=True)]  # fmt: skip
                self._group(domain, name, group, tables, seeds)
                print(f"{domain} {name} {' '.join(group)}: {time.time() - began:.0f} s", flush=True)

    def _group(self, domain, name, group, tables, seeds) -> None:
        jobs = []  # arm, number of setting, seed, program, length, run
        for arm in group:
            for i, (program, fields) in enumerate(grid(arm)):
                length = fields.get("numbers", {}).get("length", arms.LENGTH)
                for t, seed in enumerate(seeds):
                    given = dict(fields, table=t, seed=seed)
                    if "ratio" in given:
                        given["ratio"] = self._ratio(arm, given["ratio"], tables[t])
                    if arm == "tgeo_start":
                        given["start"] = self.start(domain, name, seed)["centre"]
                    if arm.startswith("around"):
                        which = "constant_rates" if arm == "around_rates" else "constant"
                        start = self.start(domain, name, seed, which)
                        given["numbers"] = {**given.get("numbers", {}), **start}
                    if arm == "around_more":
                        given["omega"] = self.omega(domain, name, seed)
                    jobs.append((arm, i, seed, program, length, arms.Run(**given)))
        found: dict[tuple[str, int], list[Any]] = {}
        for kind in dict.fromkeys((j[3], j[4]) for j in jobs):
            mine = [j for j in jobs if (j[3], j[4]) == kind]
            key = domain, kind[0]
            if key not in self.programs:
                self.programs[key] = arms.Program(kind[0], situations.domain(domain))
            results = self.programs[key]([j[5] for j in mine], tables)
            for (arm, i, seed, *_), result in zip(mine, results, strict=True):
                found.setdefault((arm, seed), []).append((i, result))
        for (arm, seed), settings in found.items():
            self._write(self.path(domain, name, arm, seed), [r for _, r in sorted(
                settings, key=lambda pair: pair[0])])  # fmt: skip

    @staticmethod
    def _ratio(arm: str, level: float, t: situations.Tables) -> np.ndarray:
        ratio = np.full(len(t.label), level, np.float32)
        if arm == "oracle":
            ratio = np.where(t.teacher_wrong, 0.0, ratio)
            ratio = np.where(t.label_wrong, np.where(t.teacher_wrong, 0.5, 1.0), ratio)
        return ratio

    def start(
        self, domain: str, name: str, seed: int, constant: str = "constant"
    ) -> dict[str, float]:
        """The tuned constant, inside the range of a sigmoid, and the numbers of its run."""
        setting, _ = choose(self.read(domain, name, constant, seed))
        fields = grid(constant)[setting][1]
        return {"centre": float(np.clip(fields["ratio"], 0.05, 0.95)), **fields.get("numbers", {})}

    def omega(self, domain: str, name: str, seed: int) -> Any:
        piece = self.read(domain, name, "around", seed)
        setting, _ = choose(piece)
        tree: dict[str, Any] = {}
        for key, value in piece.items():
            if key.startswith("omega/"):
                _, layer, leaf = key.split("/")
                tree.setdefault(layer, {})[leaf] = value[setting]
        return tree

    @staticmethod
    def _write(path: pathlib.Path, settings: list[dict[str, Any]]) -> None:
        times = max(len(s["test"]) for s in settings)

        def padded(name: str, dtype: Any) -> np.ndarray:
            rows = [np.asarray(s[name], float) for s in settings]
            pad = [[(0, times - len(r))] + [(0, 0)] * (r.ndim - 1) for r in rows]
            full = [np.pad(r, p, constant_values=np.nan) for r, p in zip(rows, pad, strict=True)]
            return np.stack(full).astype(dtype)

        arrays = {n: padded(n, np.float32) for n in ("right", "loss", "test", "share")}
        for layer, leaves in settings[0]["omega"].items():
            for leaf in leaves:
                values = [s["omega"][layer][leaf] for s in settings]
                arrays[f"omega/{layer}/{leaf}"] = np.stack(values).astype(np.float32)
        path.parent.mkdir(parents=True, exist_ok=True)
        with open(path.with_suffix(".part"), "wb") as file:
            np.savez(file, **arrays)
        path.with_suffix(".part").rename(path)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("what", choices=("run", "cost", "report"))
    parser.add_argument("--dir", type=pathlib.Path, required=True)
    parser.add_argument("--out", type=pathlib.Path)
    parser.add_argument("--svg", type=pathlib.Path)
    parser.add_argument("--page", type=pathlib.Path)
    parser.add_argument("--base", type=pathlib.Path)
    parser.add_argument("--domains", default="table,images")
    parser.add_argument("--arms", default=",".join(ARMS))
    parser.add_argument("--situations", default="")
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--first", type=int, default=0)
    parser.add_argument("--minutes", type=float, default=1e9)
    parser.add_argument("--set_aside", action="store_true")
    options = parser.parse_args()
    environment.keep_freed_memory()
    suite = Suite(options.dir, time.time() + 60 * options.minutes)
    known = situations.SET_ASIDE if options.set_aside else situations.SITUATIONS
    names = options.situations.split(",") if options.situations else list(known)
    if options.what == "report":
        import _trust_report

        base = json.loads(options.base.read_text()) if options.base else {}
        found = _trust_report.result(suite, base.get("cells", {}))
        cost = options.dir / "cost.json"
        new = json.loads(cost.read_text()) if cost.exists() else {}
        found["cost"] = base.get("cost", {}) | new
        if options.out:
            options.out.write_text(json.dumps(found, indent=1) + "\n")
        if options.svg:
            options.svg.write_text(_trust_report.picture(found["cells"]))
        if options.page:
            _trust_report.write(options.page, found)
        print(_trust_report.verdict(found), _trust_report.differences(found["cells"]),
              _trust_report.table(found["cells"]), sep="\n\n")  # fmt: skip
        return
    if options.what == "cost":
        flops = {d: {name: arms.Program(name, situations.domain(d)).flops()
                     for name in arms.METHODS} for d in options.domains.split(",")}  # fmt: skip
        plain = {d: {name: round(x / of["given"], 2) for name, x in of.items()}
                 for d, of in flops.items()}  # fmt: skip
        (options.dir / "cost.json").write_text(json.dumps(plain))
        print(plain)
        return
    for first in range(options.first, options.first + options.seeds, SEEDS):
        seeds = list(range(first, min(first + SEEDS, options.first + options.seeds)))
        for domain in options.domains.split(","):
            suite.run(domain, names, options.arms.split(","), seeds)


if __name__ == "__main__":
    main()
