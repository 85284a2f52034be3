"""Mode compare: one page about any runs."""

import glob
import os
import pathlib
from collections.abc import Sequence

from distill_jax.core.errors import UserError
from distill_jax.report.folders import read_json
from distill_jax.report.of_comparison import read, write_comparison_report
from distill_jax.report.statistics import format_table, verdict
from distill_jax.run import workdir as workdir_lib

_RUN = ("study.json", "config.json", "metrics.jsonl", "result.json")
_HINT = "--mode=compare --workdir=runs/comparison runs/a runs/b 'runs/c*'"


def compare_runs(given: Sequence[str], folder: pathlib.Path, *, metric: str = "") -> str:
    """Writes `report.html` and `comparison.json` into a folder; returns what the console prints.

    Args:
      given: folders of runs and of studies, whose runs are meant, and patterns of these.
      folder: the folder of the page.
      metric: as in `report.of_comparison.read`.

    Raises:
      UserError: nothing is given, a folder holds no run, a pattern matches none, the folder of the
        page has another use, or as in `read`.
    """
    runs = expand(given)
    if used := [name for name in _RUN if (folder / name).is_file()]:
        hint = "give --workdir a folder of its own"
        raise UserError(f"holds a run or a study: {used[0]}", where=str(folder), hint=hint)
    study = read(runs, folder, metric=metric)
    with workdir_lib.claim(folder, "comparison", with_peers=False):
        arms = {name: {**arm} for name, arm in study.arms.items()}
        workdir_lib.write_json(folder / "comparison.json", {**study.spec, "arms": arms})
        page = write_comparison_report(study)
    shown = {"mode": study.mode, "digits": study.digits}
    answers = [
        f"{s.arm}: {verdict(s, **shown)}" for s in study.summaries if not s.is_reference and s.value
    ]
    table = format_table(study.summaries, metric=study.metric, **shown)
    return "\n".join([table, "", *answers, f"report: {page}"])


def expand(given: Sequence[str]) -> list[pathlib.Path]:
    """Returns the folders of the runs that arguments name, each once, in their order.

    Raises:
      UserError: an argument names no run.
    """
    if not given:
        raise UserError("no runs are given", where="--mode=compare", hint=_HINT)
    runs: dict[pathlib.Path, None] = {}
    for text in given:
        is_pattern = glob.has_magic(text) and not os.path.lexists(text)
        names = sorted(glob.glob(os.path.expanduser(text))) if is_pattern else [text]
        found = [run for name in names for run in _runs_in(pathlib.Path(name).expanduser())]
        if not found:
            what = "matches no run" if is_pattern else "holds no run and no study"
            raise UserError(what, where=text, hint="name the --workdir of runs")
        runs |= dict.fromkeys(found)
    return list(runs)


def _runs_in(folder: pathlib.Path) -> list[pathlib.Path]:
    if (folder / "study.json").is_file():
        arms = read_json(folder / "study.json", []).get("arms") or {}
        entries = [e for arm in arms.values() for e in (arm.get("seeds") or {}).values()]
        return [folder / str(e["run"]) for e in entries if e.get("run")]
    return [folder] if any((folder / name).is_file() for name in _RUN[1:]) else []
