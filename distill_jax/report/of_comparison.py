"""The report on any runs side by side: what differs in their configs, and what came of it."""

import os
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from distill_jax.core.errors import UserError, nearest
from distill_jax.evaluators._directions import direction
from distill_jax.report import of_study, segments
from distill_jax.report.folders import Run, Study, lookup, read_json, read_segments
from distill_jax.report.html import Html, el, join
from distill_jax.report.page import muted, table, write
from distill_jax.report.wording import flat, is_finite

_OWN = ("seed", "study", "workdir")
_SEED = re.compile(r"[-_.]?seed[-_.]?\d+|[-_.]\d+")
_LAST_SEED = re.compile(r"(?:[-_.]?seed[-_.]?|[-_.]s|[-_.])?\d+$")
_INIT = re.compile(r"roles\.(\w+)\.init")


def read(
    folders: Sequence[str | os.PathLike[str]],
    folder: Path,
    *,
    metric: str = "",
    names: Mapping[Path, str] | None = None,
    state: str = "last",
) -> Study:
    """Returns runs as a study whose arms are the runs with equal configs but for the seed.

    Runs that start from networks of other runs are one arm if those would be. The arm of the first
    run is the reference. The value of a run is that of its last step.

    Args:
      folders: of runs, in the order of the page.
      folder: the folder of the page, to which the runs are named relative.
      metric: "<split>/<name>", by default the metric that selects the checkpoint of the first run,
        on the test split where every run measured it.
      names: names of arms by folder, by default derived from the folders.
      state: "last", or "best" for the state that the held-out part selects.

    Raises:
      UserError: a folder holds no run, fewer than two are given, or no run has the metric.
    """
    folder = folder.absolute()
    runs = [Run.read(Path(path).absolute(), label=Path(path).name) for path in folders]
    for run in runs:
        if not run.exists:
            hint = "a run folder holds config.json, metrics.jsonl or result.json"
            raise UserError("holds no run", where=str(run.path), hint=hint)
    if len(runs) < 2:
        hint = "give several run folders, or a pattern such as 'runs/kd*'"
        raise UserError("a comparison needs two runs or more", where="compare", hint=hint)
    groups: dict[str, list[Run]] = {}
    for run in runs:
        groups.setdefault(_essence(run.path), []).append(run)
    titles = _names(list(groups.values()))
    if names:
        titles = [names.get(g[0].path, t) for g, t in zip(groups.values(), titles, strict=True)]
    metric, mode, notes = _metric(runs, metric)
    arms = {
        name: {"seeds": _entries(group, metric, folder, state)}
        for name, group in zip(titles, groups.values(), strict=True)
    }
    spec = {"metric": metric, "mode": mode, "reference": titles[0], "arms": arms}
    return Study(folder, spec, notes)


def write_comparison_report(study: Study) -> Path:
    """Writes `report.html` into the folder of a comparison and returns its path."""
    sections = {anchor: (title, body) for anchor, title, body in of_study.sections(study)}
    first = ["config", "results"]
    order = [*first, *(anchor for anchor in sections if anchor not in first)]
    shown = [(anchor, *sections[anchor]) for anchor in order]
    return write(
        study.path,
        kicker="Comparison",
        title=" · ".join(list(study.arms)[:4]) + (" ..." if len(study.arms) > 4 else ""),
        lead=of_study.lead(study),
        sections=[*shown, ("files", "Files", files_section(study))],
        sources="the files that it names",
    )


def _essence(folder: Path, above: Sequence[Path] = ()) -> str:
    """Returns what the runs of an arm have in common: their config without seeds.

    A network that a run starts from stands for the essence of its own run where that is there,
    else for its checksum, so neither its folder nor its seed matters. Neither does the folder of a
    teacher cache: what it holds follows from the other keys.

    Args:
      folder: of the run.
      above: runs that start from it.
    """
    config = _read_config(folder)
    networks = lookup(read_json(folder / "result.json", []), "inputs.networks") or {}
    leaves = {}
    for name, value in flat(config).items():
        if name.partition(".")[0] in _OWN:
            continue
        if (match := _INIT.fullmatch(name)) and value.startswith("/"):
            value = _origin(value, networks.get(match[1]), (*above, folder))
        leaves[name] = bool(value) if name == "cache.dir" else value
    history = segments.summary(read_segments(folder, []))
    leaves |= {"history": history} if leaves and history else {}
    return repr(sorted(leaves.items())) if leaves else str(folder)


def _read_config(folder: Path) -> Mapping[str, Any]:
    """Returns the config of a run with its paths; empty if there is none."""
    return read_json(folder / "config.json", [], scrub=False)


def _origin(init: str, checksum: Any, above: Sequence[Path]) -> str:
    """Returns the essence of the run that `roles.*.init` names, else its checksum or its path."""
    named = "#" in init and not os.path.lexists(init)  # else it is part of a folder's name
    path, mark, network = init.rpartition("#") if named else (init, "", "")
    for folder in (Path(path), *Path(path).parents[:2]):
        if folder not in above and {"roles", "seed"} <= _read_config(folder).keys():
            step = os.path.relpath(path, folder)
            return f"{_essence(folder, above)} at {step}{mark}{network}"
    return f"{checksum}{mark}{network}" if checksum else init


def _names(groups: Sequence[Sequence[Run]]) -> list[str]:
    """Returns names for groups of runs, from their folders without the seed, each once."""

    def stem(run: Run, several: bool) -> str:
        if re.fullmatch(r"seed[-_.]?\d+", run.path.name):
            return run.path.parent.name
        name = run.path.name
        return (_SEED.sub("", name).strip("-_.") if several else name) or name

    def label(group: Sequence[Run]) -> str:
        ends = {_LAST_SEED.sub("", run.path.name) for run in group}
        if len(group) > 1 and len(ends) == 1:
            return ends.pop() or group[0].path.parent.name
        return stem(group[0], len(group) > 1)

    names = [label(group) for group in groups]
    for i, group in enumerate(groups):
        if names.count(names[i]) > 1:
            parent = group[0].path.parent
            parent = parent.parent if group[0].path.name.startswith("seed") else parent
            names[i] = f"{parent.name}/{names[i]}"
    seen: dict[str, int] = {}
    for i, name in enumerate(names):
        seen[name] = seen.get(name, 0) + 1
        names[i] = name if seen[name] == 1 else f"{name} ({seen[name]})"
    return names


def _metric(runs: Sequence[Run], given: str) -> tuple[str, str, list[str]]:
    """Returns the metric of the comparison, whether more or less of it is better, and notes."""
    chosen = [str(lookup(run.config, "eval.metric") or "") for run in runs]
    measured = [{*(r.result.get("metrics") or {}), *(r.result.get("best") or {})} for r in runs]
    every = set().union(*measured)
    first = next(filter(None, chosen), "")
    on_test = f"test/{first.rpartition('/')[2]}"
    metric = given or (on_test if all(on_test in m for m in measured if m) else first)
    if every and metric not in every:
        hint = nearest(metric, every)
        raise UserError(f"no run measured {metric!r}", where="--metric", hint=hint)
    same = [run for run, own in zip(runs, chosen, strict=True) if _name(own) == _name(metric)]
    modes = {str(lookup(run.config, "eval.mode") or "max") for run in same}
    mode = direction(metric) or (modes.pop() if len(modes) == 1 else "max")
    notes = []
    if len({*filter(None, chosen)}) > 1:
        notes.append(f"runs select their checkpoints by different metrics: {', '.join({*chosen})}")
    lacking = [r.label for r, m in zip(runs, measured, strict=True) if m and metric not in m]
    if lacking:
        notes.append(f"{metric} was not measured by {', '.join(lacking)}")
    return metric, mode, notes


def _name(metric: str) -> str:
    return metric.rpartition("/")[2]


def _entries(
    group: Sequence[Run], metric: str, folder: Path, state: str
) -> dict[str, Mapping[str, Any]]:
    entries: dict[str, Mapping[str, Any]] = {}
    for run in group:
        seed = str(run.result.get("seed", run.config.get("seed", 0)))
        while seed in entries:
            seed += " again"
        value = (run.result.get("metrics") or {}).get(metric)
        best = (run.result.get("best") or {}).get(metric)
        status = str(run.result.get("status") or "not finished")
        status = "being extended" if segments.unfinished(run) else status
        entries[seed] = {
            "run": os.path.relpath(run.path, folder),
            "status": status,
            "value": next((v for v in [best if state == "best" else value] if is_finite(v)), None),
            "best": best if is_finite(best) else None,
            "error": run.result.get("error") or run.result.get("reason"),
        }
    return entries


def files_section(study: Study) -> Html:
    rows = [
        [
            el("th", arm, scope="row"),
            el("td", seed),
            el("td", str(entry["run"]), class_="code"),
            el("td", str(entry["status"])),
        ]
        for arm in study.arms
        for seed, entry in study.seeds(arm).items()
    ]
    return join(
        muted(
            "Final values and costs are those of result.json in these folders, curves of "
            "metrics.jsonl, predictions of predictions.npz, weights of trust.npz, and configs of "
            "config.json."
        ),
        table(["arm", "seed", "folder", "status"], rows, numeric=False),
    )
