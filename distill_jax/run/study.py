"""Studies: arms times seeds from one config, finished work skipped, one comparison at the end."""

import itertools
import json
import pathlib
import time
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from typing import Any

from distill_jax import report
from distill_jax.core.errors import ConfigError, NonFiniteError, UserError
from distill_jax.evaluators._directions import direction
from distill_jax.report import sharing, statistics
from distill_jax.report.choices import sentences
from distill_jax.report.tables import number
from distill_jax.run import build as build_lib
from distill_jax.run import choices, paths, processes
from distill_jax.run import config as config_lib
from distill_jax.run import workdir as workdir_lib
from distill_jax.run.arms import (
    arm_config,
    check,
    leaves,
    ordered_arms,
    references,
    run_folder,
)
from distill_jax.run.choices import Chosen
from distill_jax.run.config import ConfigDict, settings
from distill_jax.run.members import NO_REPLICAS, Member
from distill_jax.run.members import kind as kind_of
from distill_jax.run.train import loop
from distill_jax.trainer.io.files import write_text
from distill_jax.trainer.io.paths import NetworkRef, absolute
from distill_jax.trainer.io.step_index import find_step


class _OneExperiment:
    """Builds experiments, keeping the last: seeds of an arm share data and compiled programs.

    Arms of the same data and stored teacher share what it gave for the evaluated examples.
    """

    def __init__(self, trusted: Collection[str] | None):
        self._key, self._asked, self._experiment, self._trusted = "", "", None, trusted

    def __call__(self, config: ConfigDict) -> build_lib.Experiment:
        same = json.loads(config_lib.to_json(config))
        if not config_lib.data_follow_seed(config):
            del same["seed"]
        for role in same["roles"].values():
            if role["model"]:
                del role["init"]
        key = json.dumps(same, sort_keys=True)
        if key != self._key or self._experiment is None:
            parts = [same.get(name) for name in ("seed", "data", "cache", "evaluators")]
            asked, earlier = json.dumps(parts, sort_keys=True), self._experiment
            self._experiment = build_lib.build(config, trusted=self._trusted)
            if earlier is not None and asked == self._asked:
                self._experiment.caches.asked.update(earlier.caches.asked)
            self._key, self._asked = key, asked
        return self._experiment


def run_study(
    config: ConfigDict,
    workdir: pathlib.Path,
    *,
    trusted: Collection[str] | None = None,
    start_over: bool = False,
    log_line: Callable[[str], None] = print,
) -> str:
    """Runs the unfinished members, writes `study.json` and `report.html`, returns the table.

    A run that diverges is recorded as failed and the others continue. With `study.replicas`, runs
    of one kind are trained side by side (`contrib/replicas.py`).

    Args:
      config: with `study.arms`, `study.seeds`, `study.reference` and `study.metric`.
      workdir: the study's folder; each run lies in `<arm>/seed<k>`.
      trusted: as in `build.build`.
      start_over: whether the contents of the folder and its runs are set aside.
      log_line: prints a line.

    Raises:
      UserError: an arm's config, data or starting network does not fit, a folder is not this
        program's or another process writes to it.
      Preempted: stopped by a signal; the same command continues.
    """
    check(config, trusted)
    with workdir_lib.claim(workdir, "study", start_over=start_over, log_line=log_line):
        for folder in _run_folders(config, workdir) if start_over else ():
            with workdir_lib.claim(folder, "run", start_over=True, log_line=log_line):
                pass
        return _run_study(config, workdir, trusted, log_line)


def _run_folders(config: ConfigDict, workdir: pathlib.Path) -> list[pathlib.Path]:
    folders = (run_folder(workdir, a, s) for a in ordered_arms(config) for s in config.study.seeds)
    return [folder for folder in folders if folder.is_dir()]


class _SameData:
    """Builds experiments, and refuses one whose data differ from those of earlier runs."""

    def __init__(self, make_experiment: Callable[[ConfigDict], build_lib.Experiment]):
        self._build, self._alike = make_experiment, workdir_lib.Alike()

    def __call__(self, config: ConfigDict) -> build_lib.Experiment:
        experiment = self._build(config)
        checksums = workdir_lib.data_checksums(experiment.dataset)
        self._alike.check(config, checksums, "the runs that are left", done=False)
        return experiment

    def see(self, member: Member, result: Mapping[str, Any] | None) -> None:
        """Takes a finished run for later ones to be compared with."""
        data = (result or {}).get("inputs", {}).get("data")
        self._alike.check(member.config, data, f"{member.arm} seed {member.seed}")


def _run_study(
    config: ConfigDict,
    workdir: pathlib.Path,
    trusted: Collection[str] | None,
    log_line: Callable[[str], None],
) -> str:
    order, make_experiment = ordered_arms(config), _SameData(_OneExperiment(trusted))
    statuses: dict[tuple[str, int], dict[str, Any]] = {
        (arm, seed): {"status": "pending", "value": None}
        for arm in order
        for seed in config.study.seeds
    }
    began, done = time.perf_counter(), 0
    compared: dict[str, dict[str, list[statistics.ArmSummary]]] = {}
    groups = _groups(config, order, workdir)
    left: dict[str, Member] = {}
    for member in (member for group in groups for member in group):
        folder, single = member.workdir, member.config

        def stored(folder=folder, single=single, arm=member.arm) -> dict[str, Any] | None:
            if not settings.needed(config, arm):  # else it is checked once they are chosen
                workdir_lib.check_config(single, folder)
            return workdir_lib.read_result(folder, log_line=_log_later)

        result = processes.from_first(stored, where=str(folder))
        make_experiment.see(member, result)
        if result is None:
            _check_starts(member, workdir)
            if not settings.needed(config, member.arm):
                left.setdefault(member.arm, member)
    _check_parts(left.values(), trusted)
    for group in groups:
        parts, unsettled = _settled(config, group, workdir, statuses)
        for member, why in unsettled:
            done += 1
            statuses[member.arm, member.seed] = {"status": "failed", "value": None, "error": why}
            log_line(f"[{done}/{len(statuses)}] {member.arm} seed {member.seed} failed: {why}")
            compared = _write(config, workdir, statuses)
        for member, outcome, took in (
            found for part in parts for found in _outcomes(config, part, make_experiment, log_line)
        ):
            done += 1
            label = f"[{done}/{len(statuses)}] {member.arm} seed {member.seed}"
            if isinstance(outcome, NonFiniteError):
                failure = {"status": "failed", "value": None, "error": str(outcome)}
                statuses[member.arm, member.seed] = failure
                result = {"status": "failed", "arm": member.arm, "seed": member.seed}
                result["error"] = sharing.scrubbed(str(outcome), member.workdir)
                workdir_lib.write_result(member.workdir, result)
                log_line(f"{label} failed: {outcome.what}")
            else:
                make_experiment.see(member, outcome)
                status = _status(config, outcome)
                statuses[member.arm, member.seed] = status
                value = status["value"]
                measured = "done" if value is None else f"{config.study.metric} {number(value)}"
                log_line(
                    f"{label}: {measured}"
                    f" ({took:.0f} s, {time.perf_counter() - began:.0f} s in all)"
                )
            compared = _write(config, workdir, statuses)
    metric, best = config.study.metric, f"the state of the best {config.eval.metric}"
    titles = {"value": metric, "best": f"{metric} of {best}"}
    table = statistics.comparison(
        compared, titles=titles, mode=_mode(config), published=config.study.published
    )
    chosen = Chosen(config, statuses)
    if lines := sentences(chosen.tuned, chosen.fallback):
        table = "\n\n".join([table, "\n".join(lines)])
    if not processes.is_main():
        return table
    write_text(workdir / "table.txt", table + "\n")
    path = report.write_study_report(workdir)
    return f"{table}\n\nreport: {path}"


def _check_starts(member: Member, workdir: pathlib.Path) -> None:
    """Raises UserError where a run would start from a network that is nowhere.

    Networks of the study's own arms may still have to be trained.
    """
    for role, spec in member.config.roles.items():
        if not spec.init or paths.is_foreign(spec.init):
            continue
        where = f"study.arms.{member.arm}: roles.{role}.init"
        source = NetworkRef.parse(spec.init, where=where).path
        if not source.is_relative_to(absolute(str(workdir), where="--workdir")):
            find_step(source, where=where)


def _check_parts(members: Iterable[Member], trusted: Collection[str] | None) -> None:
    """Raises ConfigError where the parts of a run do not fit each other or the data.

    What is not there yet may be what an earlier run of the study will write.
    """
    reader = build_lib.DataReader()
    for member in members:
        try:
            build_lib.build(member.config, shapes_only=True, trusted=trusted, reader=reader)
        except ConfigError as error:
            where = f"study.arms.{member.arm}" + f": {error.where}" * bool(error.where)
            raise ConfigError(error.what, where=where, hint=error.hint) from error
        except UserError:
            continue


def _status(config: ConfigDict, result: Mapping[str, Any]) -> dict[str, Any]:
    """Returns what a study keeps of the result of a finished run."""
    return {
        "status": "done",
        "value": result["metrics"].get(config.study.metric),
        "best": result["best"].get(config.study.metric),
        "metrics": result["metrics"],
        "selecting": result.get("selecting"),
    }


def _settled(
    config: ConfigDict, group: list[Member], workdir: pathlib.Path, statuses: choices.Statuses
) -> tuple[list[list[Member]], list[tuple[Member, str]]]:
    """Gives the members of a group the settings that were chosen for them.

    Returns:
      The members that can be run, in groups of a kind, and the others with the reason.
    """
    parts: dict[str, list[Member]] = {}
    unsettled = []
    for member in group:
        needed = settings.needed(config, member.arm)
        if not needed:
            parts.setdefault("", []).append(member)
            continue
        chosen = choices.settled(config, needed, member.seed, statuses)
        if chosen is None:
            names = " or ".join(name for name in needed if name in config.study.tuned)
            unsettled.append((member, f"no candidate of {names} has finished"))
            continue
        single = arm_config(config, member.arm, member.seed, workdir, chosen)
        parts.setdefault(kind_of(single), []).append(member._replace(config=single))
    return list(parts.values()), unsettled


def _groups(config: ConfigDict, order: list[str], workdir: pathlib.Path) -> list[list[Member]]:
    """Returns the runs of a study, in groups that may go side by side, in an order that works.

    Runs of an arm join an earlier group of their kind where all that the arm starts from comes
    before that. Without replicas, each arm has its own.
    """
    arms = config_lib.arms(config)
    groups: list[tuple[str, list[Member]]] = []
    for arm in order:
        sources = {m["arm"] for m in references(leaves(config, arms[arm])).values()}
        sources = sources.union(*settings.needed(config, arm).values())
        earlier = (i for i, (_, g) in enumerate(groups) if sources & {m.arm for m in g})
        first = max(earlier, default=-1) + 1 if config.study.replicas != "no" else len(groups)
        reported = "" if arm in config.study.sources else config.study.metric
        for seed in config.study.seeds:
            single = arm_config(config, arm, seed, workdir)
            member = Member(arm, seed, single, run_folder(workdir, arm, seed), reported)
            kind = kind_of(single)
            alike = (g for k, g in groups[first:] if k == kind)
            if (group := next(alike, None)) is not None:
                group.append(member)
            else:
                groups.append((kind, [member]))
    return [group for _, group in groups]


def _outcomes(
    config: ConfigDict,
    group: list[Member],
    make_experiment: Callable[[ConfigDict], build_lib.Experiment],
    log_line: Callable[[str], None],
) -> Iterator[tuple[Member, dict[str, Any] | NonFiniteError, float]]:
    """Yields each run of a group with its result, or why it has none, and the seconds it took."""
    together: dict[int, Any] = {}
    reported: set[tuple[str, str]] = set()
    before = time.perf_counter()
    if config.study.replicas != "no":
        results = (workdir_lib.read_result(member.workdir, log_line=_log_later) for member in group)
        left = [member for member, result in zip(group, results, strict=True) if result is None]
        if len(left) > 1:
            together = _side_by_side(config, left, make_experiment, log_line, reported)
    share = (time.perf_counter() - before) / max(len(together), 1)
    for member in group:
        before = time.perf_counter()
        if id(member) in together:
            yield member, together[id(member)], share
            continue
        try:
            outcome: Any = loop.train(
                member.config,
                member.workdir,
                arm=member.arm,
                reported=member.reported,
                make_experiment=make_experiment,
                log_line=_warnings([member], log_line, reported),
            )
        except NonFiniteError as error:
            outcome = error
        yield member, outcome, time.perf_counter() - before


def _log_later(line: str) -> None:
    """Prints nothing: `loop.train` checks the same folder and prints the line."""
    del line


def _side_by_side(
    config: ConfigDict,
    members: list[Member],
    make_experiment: Callable[[ConfigDict], build_lib.Experiment],
    log_line: Callable[[str], None],
    reported: set[tuple[str, str]],
) -> dict[int, dict[str, Any] | NonFiniteError]:
    """Returns outcomes by `id` of the member; those that cannot run side by side are left out."""
    from distill_jax.contrib import replicas  # a layer above this one; imported only if it is used

    arms = list(dict.fromkeys(member.arm for member in members))
    try:
        outcomes = replicas.train(
            members,
            make_experiment=make_experiment,
            only_if_faster=config.study.replicas == "auto",
            log_line=_warnings(members, log_line, reported),
        )
    except NO_REPLICAS as error:
        if len(arms) > 1:
            finished = {}
            for arm in arms:
                own = [member for member in members if member.arm == arm]
                if len(own) > 1:
                    finished |= _side_by_side(config, own, make_experiment, log_line, reported)
            return finished
        log_line(f"{arms[0]}: one run after the other ({str(error).splitlines()[0]})")
        return {}
    return {id(member): outcome for member, outcome in zip(members, outcomes, strict=True)}


def _warnings(
    members: list[Member], log_line: Callable[[str], None], reported: set[tuple[str, str]]
) -> Callable[[str], None]:
    """Returns a `log_line` for runs that forwards their warnings, once for each of their arms.

    Args:
      members: runs that log the same lines.
      log_line: prints a line.
      reported: (arm, line) of the warnings that were forwarded.
    """
    arms = list(dict.fromkeys(member.arm for member in members))
    seeds = list(dict.fromkeys(str(member.seed) for member in members))
    title = f"{', '.join(arms)} seed{'s'[: len(seeds) > 1]} {', '.join(seeds)}"

    def pass_on(line: str) -> None:
        new = {(arm, line) for arm in arms} - reported
        if new and line.startswith(("warning:", "damaged checkpoint")):
            reported.update(new)
            log_line(f"{title}: {line}")

    return pass_on


def _mode(config: ConfigDict) -> str:
    """Says which end of `study.metric` is better; `eval.mode` where that is chosen by it too."""
    compared, selected = (m.rpartition("/")[2] for m in (config.study.metric, config.eval.metric))
    return direction(compared) or (config.eval.mode if compared == selected else "max")


def _write(config, workdir, statuses) -> dict[str, dict[str, list[statistics.ArmSummary]]]:
    """Writes `study.json`; returns the comparison of last ("value") and of best states ("best").

    The second is left out if no run selected a state. Each is a mapping by question, or has one
    entry "" for all arms if the study has no questions.
    """
    study, chosen = config.study, Chosen(config, statuses)
    names = [*study.arms, *study.tuned, *study.fallback]
    compared = [name for name in names if name not in study.sources]
    order = sorted(compared, key=lambda name: name != study.reference)
    summaries, by_question = {}, {}
    for state in ("value", "best"):
        values: dict[str, dict[str, float]] = {name: {} for name in order}
        for name, seed in itertools.product(order, study.seeds):
            arm = chosen.arm(name, seed, state)
            value = statuses[arm, seed].get(state) if arm else None
            if value is not None:
                values[name][str(seed)] = value
        if state == "value" or any(values.values()):
            summaries[state] = statistics.summarise(values, reference=study.reference)
            asked = statistics.ask(values, study.questions)
            by_question[state] = asked or {"": summaries[state]}
    contents = {
        "name": workdir.name,
        "title": study.title or f"{', '.join(names)} on {config.data.name}",
        "metric": study.metric,
        "mode": _mode(config),
        "reference": study.reference,
        "arms": {
            name: {
                "overrides": config_lib.flatten(study.arms.get(name, {})),
                "seeds": {str(seed): _entry(chosen, statuses, name, seed) for seed in study.seeds},
            }
            for name in names
        },
        "tuned": chosen.tuned,
        "fallback": chosen.fallback,
        "questions": {name: list(arms) for name, arms in study.questions.items()},
        "published": dict(study.published),
        "summary": [_summary_row(row) for row in summaries["value"]],
        "summary_best": [_summary_row(row) for row in summaries.get("best", [])],
    }
    workdir_lib.write_json(workdir / "study.json", sharing.scrubbed(contents, workdir))
    return by_question


def _entry(chosen: Chosen, statuses: choices.Statuses, name: str, seed: int) -> dict[str, Any]:
    """Returns the entry of `study.json` for an arm, or a name that stands for one, in a seed."""
    arm = chosen.arm(name, seed)
    if arm is None:
        decision = chosen.fallback.get(name, {}).get("seeds", {}).get(str(seed), {})
        why = {"error": decision["value"]["why"]} if decision else {}
        return {"status": "pending", "value": None, **why}
    entry = {key: value for key, value in statuses[arm, seed].items() if key != "selecting"}
    if (best := chosen.arm(name, seed, "best")) is not None and best != arm:
        entry["best"] = statuses[best, seed].get("best")
    if arm != name:
        entry["arm"] = arm
    return {**entry, "run": str(run_folder(pathlib.Path(), arm, seed))}


def _summary_row(row: statistics.ArmSummary) -> dict[str, Any]:
    return {
        "arm": row.arm,
        "seeds": list(row.seeds),
        "value": row.value._asdict() if row.value else None,
        "difference": row.difference._asdict() if row.difference else None,
        "is_reference": row.is_reference,
    }
