"""Finds, before anything is compiled, settings that would have no effect on training.

An error ends the run. A warning is a line that begins "warning:". What a study may compare on
purpose (a teacher of weight zero, an average that never moves) is an error in a single run and a
warning in an arm. The step is traced once on shapes (`trace`), and `distill_jax.analysis` reads the
trace. Only data that is in memory is inspected.
"""

from collections.abc import Callable, Iterator

from distill_jax.core.errors import ConfigError
from distill_jax.run.build import Experiment, batch_shapes
from distill_jax.run.preflight import data, hyperparameters, lengths, step, teachers
from distill_jax.run.preflight.finding import Finding


def warn(
    experiment: Experiment, log_line: Callable[[str], None], *, alone: bool, planned: bool = False
) -> None:
    """Refuses settings that would have no effect, and warns once of those that may have none.

    Args:
      experiment: what will be run.
      log_line: prints a line.
      alone: whether it is a single run, not an arm of a study.
      planned: whether nothing is run, so that the run may need more memory than this machine has.

    Raises:
      ConfigError: the first error.
    """
    if experiment.caches.warned:
        return
    refused = {"error": True, "warning": False, "memory": not planned}
    warnings = [*experiment.notes, *experiment.data.warnings]
    for finding in findings(experiment):
        if refused.get(finding.kind, alone):
            raise ConfigError(finding.what, where=finding.where, hint=finding.hint)
        if finding.kind != "unused":
            warnings.append(f"{finding.where}: {finding.what}")
    experiment.caches.warned = True
    for warning in dict.fromkeys(warnings):
        log_line(f"warning: {warning}")


def findings(experiment: Experiment) -> Iterator[Finding]:
    """Yields the findings, cheap checks first."""
    config, dataset = experiment.config, experiment.dataset
    yield from lengths.findings(experiment)
    yield from hyperparameters.findings(experiment)
    raw = batch_shapes(dataset.train, config.batch_size)
    yield from data.of_transforms(config, raw, experiment.transform(train=False))
    yield from data.of_parts(dataset, experiment.overlaps)
    yield from teachers.findings(config, experiment.frozen, dataset)
    yield from step.findings(experiment)
