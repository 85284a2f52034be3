"""What a trace of the step shows: calls, labels, terms, and where no gradient flows."""

import dataclasses
from collections.abc import Iterator, Sequence
from typing import Any

import jax

from distill_jax.analysis import dependence, softmax
from distill_jax.core import weighted_objective
from distill_jax.core.api import Model, Role
from distill_jax.core.partition import named_leaves
from distill_jax.core.state import RoleShapes
from distill_jax.core.steps import BoundNets
from distill_jax.core.weighted_objective import WeightedObjective
from distill_jax.run.build import Experiment
from distill_jax.run.preflight import constants, unread
from distill_jax.run.preflight.finding import Finding
from distill_jax.run.preflight.trace import (
    Inputs,
    Traced,
    first_of,
    inputs_of,
    label,
    method_of,
    trace,
)


def findings(experiment: Experiment) -> Iterator[Finding]:
    """Yields the findings of one trace of the step of each phase."""
    parts = [experiment.in_phase(i) for i in range(len(experiment.phases))]
    traces = [trace(part) for part in parts]
    reads = frozenset().union(*(traced.batch for traced in traces))
    dead = {
        role: [path for path in paths if all(path in traced.dead[role] for traced in traces)]
        for role, paths in traces[0].dead.items()
    }
    yield from _of_class_means(experiment)
    for part, traced in zip(parts, traces, strict=True):
        yield from _of_calls(part, traced)
        yield from _of_softmax(part, traced)
        yield from _of_batch(part, traced, reads)
        yield from _of_terms(part, traced)
        yield from _of_dead(part, dataclasses.replace(traced, dead=dead))
        if part.objective is experiment.objective:
            yield from unread.findings(part, traced.read)


def _of_calls(experiment: Experiment, traced: Traced) -> Iterator[Finding]:
    """Batch statistics that move, or stay, against the role of the network."""
    stateful = {role for role, shapes in experiment.shapes.roles.items() if shapes.state}
    for role in experiment.frozen:
        if (role, True) in traced.calls and role in stateful:
            what = (
                f"{role} is frozen and is called in training mode: its outputs would depend on "
                "the other examples of the batch"
            )
            yield Finding("error", what, f"roles.{role}", "nets(role, ..., train=False)")
    for role in experiment.trainable:
        if role not in stateful:
            continue
        if (role, True) not in traced.calls:
            what = "is never called in training mode, so its batch statistics never change"
        elif role not in traced.state:
            what = "gets new batch statistics that the objective does not return"
        else:
            continue
        hint = "Terms(..., state={role: new_state})"
        yield Finding("error", f"{role} {what}", f"roles.{role}", hint)


def _of_softmax(experiment: Experiment, traced: Traced) -> Iterator[Finding]:
    if not traced.repeated:
        return
    for role, shapes in experiment.shapes.roles.items():
        if _gives_probabilities(experiment.models[role], shapes):
            what = (
                f"the logits of {role} are probabilities already, and the loss takes a softmax of"
            )
            hint = "return the numbers before the softmax"
            yield Finding("error", f"{what} them", f"roles.{role}.model", hint)
            return
    what = f"{label(experiment.objective)} takes a softmax of a softmax"
    yield Finding("error", what, "objective", "give the loss logits")


def _gives_probabilities(model: Model, shapes: RoleShapes) -> bool:
    return softmax.gives_probabilities(
        lambda *args: _apply(model, *args, train=False).get("logits", ()), *_given(shapes)
    )


def _outputs_of(model: Model, shapes: RoleShapes) -> dict[str, set[str]]:
    """Returns the names of the outputs in which each parameter has a part."""
    outputs = dependence.of(lambda *args: _apply(model, *args, train=True), *_given(shapes))
    return {
        path: {name for name, output in outputs.items() if f"0/{path}" in dependence.union(output)}
        for path in named_leaves(shapes.params)
    }


def _apply(model: Model, params: Any, state: Any, key: Any, *inputs: Any, train: bool) -> Any:
    return dict(model.apply(params, state, *inputs, train=train, rngs={"dropout": key})[0])


def _given(shapes: RoleShapes) -> tuple[Any, ...]:
    return shapes.params, shapes.state, jax.eval_shape(jax.random.key, 0), *shapes.inputs


def _of_batch(experiment: Experiment, traced: Traced, in_any: frozenset[str]) -> Iterator[Finding]:
    """Parts of a batch that are read and should not be, or should be read, in any phase, and are
    not."""
    batch, reads, who = experiment.shapes.batch, traced.batch, label(experiment.objective)
    if "label_probs" in batch and "label" in reads and "label_probs" not in reads:
        what = f"inputs are mixed and {who} reads the labels before mixing"
        hint = "leave out mixup and cutmix, or use an objective that reads label_probs"
        yield Finding("error", what, "data.train_transforms", hint)
    if "teacher_input" in batch and "teacher_input" not in in_any:
        what = f"{who} never uses the teacher's separate view"
        hint = "same, or an objective whose teacher uses teacher_input"
        own = experiment.config.data.teacher_transforms
        where = "data.teacher_transforms" if own else "data.teacher_view"
        yield Finding("error", what, where, "leave it out" if own else hint)
    if traced.leaks:
        percent = experiment.config.data.corrupt.get("labels_percent")
        where = f"data.corrupt.labels_{'percent' if percent else 'per_class'}"
        if not percent and not experiment.config.data.corrupt.get("labels_per_class"):
            where = "data.kwargs"  # of the data themselves: ignore_label
        weighting = getattr(experiment.objective, "weighting", None)
        by = f" weighted by {type(weighting).__name__}" if weighting else ""
        hint = (
            "set data.corrupt.drop_unlabelled, or use a method that uses a label only where "
            "labelled is above 0"
        )
        if "label_probs" in traced.leaks:
            hint = f"leave out mixup and cutmix, or {hint}"
        yield Finding("error", f"{who}{by} reads labels that are hidden", where, hint)
    if not reads & {"input", "views", "local_views", "teacher_input"}:
        yield Finding("error", f"the loss of {who} does not depend on the data", "objective")


def _of_class_means(experiment: Experiment) -> Iterator[Finding]:
    objective = experiment.objective
    if not isinstance(objective, WeightedObjective):
        return
    roles = weighted_objective.roles_of_class_means(objective, experiment.models, experiment.shapes)
    who = type(objective.weighting).__name__
    for role in sorted(roles - set(experiment.frozen)):
        what = (
            f"{who} compares with class means of a teacher, which are computed before the "
            "first step, "
            f"and {role} changes"
        )
        hint = f"freeze {role}, or use blocks or a granularity that need no class means"
        yield Finding("error", what, "weighting.name", hint)


def _of_terms(experiment: Experiment, traced: Traced) -> Iterator[Finding]:
    """Terms without weight or with one value, and networks that run for nothing."""
    weightless = [name for name, coef in traced.coef.items() if coef.zero]
    never = constants.never_weighed(experiment, traced)
    for term in never:
        what = f"the weight of the term {term!r} is 0 at each of the {experiment.total_steps} steps"
        hint = "a schedule that fits the length of training"
        yield Finding("error", what, "objective.kwargs", hint)
    yield from constants.findings(experiment, idle={*weightless, *never})
    used = (
        traced.roles
        | {*weighted_objective.networks(experiment.objective)}
        | _predicting(experiment)
        | _beside(experiment)
    )
    roles = (*experiment.trainable, *experiment.frozen, *experiment.ema)
    unreached, terms = [r for r in roles if r not in used], ", ".join(map(repr, weightless))
    if unreached and weightless:
        what = f"{', '.join(unreached)} would run in every step for {terms}, which has weight 0"
        hint = "another weight, or an objective without the term"
        yield Finding("comparison", what, "objective.kwargs", hint)
    elif weightless and _set_to_an_end(experiment):
        yield Finding("warning", f"{terms} has weight 0 at every step", "objective.kwargs")
    read = _evaluated(experiment)
    for role in unreached if not weightless else ():
        if role in experiment.frozen or (role in experiment.ema and role not in read):
            what = f"nothing that is learned depends on {role}"
            hint = "an objective that uses its outputs, or delete the role"
            yield Finding("error", what, f"roles.{role}", hint)


def _beside(experiment: Experiment) -> set[Role]:
    """Returns the roles that the method calls for evaluators alone and that one of them reads."""
    return {*getattr(method_of(experiment.objective), "beside", ())} & _evaluated(experiment)


def _evaluated(experiment: Experiment) -> set[Role]:
    """Returns the roles and predictions whose outputs evaluators read."""
    if experiment.measured:  # with any network
        return {*experiment.models}
    return {role for evaluator in experiment.evaluators.values() for role in evaluator.outputs}


def _predicting(experiment: Experiment) -> frozenset[Role]:
    """Returns the networks of the method's predictions, where evaluators read those."""
    if not _evaluated(experiment) & set(experiment.shapes.predictions):
        return frozenset()

    def predict(given: Inputs) -> Any:
        params = {**given.fixed, **given.learned}
        nets = BoundNets(experiment.models, params, given.state, key=given.key, batch=given.batch)
        return experiment.objective.predictions(nets, given.batch, given.memory, given.step)

    used = dependence.inputs_used(predict, inputs_of(experiment))
    return first_of(used, "learned") | first_of(used, "fixed")


def _set_to_an_end(experiment: Experiment) -> bool:
    """Whether the config sets a share or a weight to an end that is not the method's default."""
    defaults = unread.defaults(method_of(experiment.objective))
    return any(
        isinstance(value, (int, float)) and value in (0, 1) and value != defaults.get(name)
        for name, value in experiment.config.objective.kwargs.items()
    )


def _of_dead(experiment: Experiment, traced: Traced) -> Iterator[Finding]:
    """Parameters that get no gradient."""
    weighting = weighted_objective.networks(experiment.objective)
    weightless = any(coef.zero for coef in traced.coef.values())
    for role, dead in traced.dead.items():
        if not dead or role in weighting:
            continue
        where = f"roles.{role}"
        still = [path for path in dead if f"{role}/{path}" in traced.moves]
        if still:
            what = "could never learn: no gradient flows from the loss to it"
            hint = (
                "no stop_gradient, argmax or rounding between it and the loss, or freeze the role"
            )
            yield Finding("comparison", f"{_some(still)} {what}", where, hint)
        others = [path for path in dead if path not in still]
        if not others or (weightless and role not in traced.roles):
            continue
        if role not in traced.roles:
            what = f"the loss does not depend on any parameter of {role}"
            yield Finding("error", what, where, "delete the role")
            continue
        outputs = _outputs_of(experiment.models[role], experiment.shapes.roles[role])
        nowhere = [path for path in others if not outputs[path]]
        if nowhere:
            what = "could never learn: no output of the network depends on it"
            hint = "use it, or leave it out of the network"
            yield Finding("error", f"{_some(nowhere)} {what}", where, hint)
        for name, evaluator in experiment.evaluators.items():
            read = set(evaluator.outputs.get(role, ()))
            random = [path for path in others if outputs[path] & read]
            if random:
                what = f"reads {', '.join(sorted(read))} of {role}, and {_some(random)} gets no"
                hint = "an evaluator of trained outputs"
                yield Finding("error", f"{what} gradient", f"evaluators.{name}", hint)
        idle = [path for path in others if outputs[path]]
        if idle:
            names = ", ".join(sorted(set().union(*(outputs[path] for path in idle))))
            yield Finding(
                "warning", f"{_some(idle)} is not trained: the loss reads no {names}", where
            )


def _some(paths: Sequence[str]) -> str:
    more = f" and {len(paths) - 2} more" if len(paths) > 2 else ""
    return ", ".join(paths[:2]) + more
