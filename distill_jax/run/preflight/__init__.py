"""Finds, before anything is compiled, what would train and do nothing of what its config says.

An error ends the run. A warning is a line that begins "warning:". What a study may compare on
purpose (a teacher of weight zero, an average that never moves) is an error in a single run and a
warning in an arm. The step is traced once on shapes (`trace`), and `distill_jax.analysis` reads the
trace. Of the data only what lies in memory is looked at.
"""

from collections.abc import Callable, Iterator

from distill_jax.core.api import Batch, Transform
from distill_jax.core.errors import ConfigError
from distill_jax.run import hyperparameters
from distill_jax.run.build import Experiment, batch_shapes
from distill_jax.run.preflight import data, lengths, step, teachers
from distill_jax.run.preflight.finding import Finding


def warn(
    experiment: Experiment, log_line: Callable[[str], None], *, alone: bool, planned: bool = False
) -> None:
    """Refuses what would do nothing of what the config says, and warns of what may not, once.

    Args:
      experiment: what will be run.
      log_line: prints a line.
      alone: whether it is a single run, not an arm of a study.
      planned: whether nothing is run, so that it may need more memory than there is here.

    Raises:
      ConfigError: something certainly does nothing.
    """
    if experiment.caches.warned:
        return
    raw = batch_shapes(experiment.dataset.train, experiment.config.batch_size)
    evaluate = experiment.transform(train=False)
    warnings = check(experiment, raw=raw, evaluate=evaluate, alone=alone, planned=planned)
    experiment.caches.warned = True
    for warning in (*experiment.notes, *experiment.data.warnings, *warnings):
        log_line(f"warning: {warning}")


def check(
    experiment: Experiment, *, raw: Batch, evaluate: Transform, alone: bool, planned: bool = False
) -> list[str]:
    """Returns warnings, one line each.

    Args:
      experiment: what will be run.
      raw: shapes of a batch as the source gives it.
      evaluate: the transform of evaluation batches.
      alone: whether it is a single run, not an arm of a study.
      planned: whether nothing is run here.

    Raises:
      ConfigError: the first error.
    """
    warnings = []
    for finding in findings(experiment, raw=raw, evaluate=evaluate):
        refused = {"error": True, "warning": False, "memory": not planned}
        if refused.get(finding.kind, alone):
            raise ConfigError(finding.what, where=finding.where, hint=finding.hint)
        if finding.kind != "unused":
            warnings.append(f"{finding.where}: {finding.what}")
    return list(dict.fromkeys(warnings))


def findings(experiment: Experiment, *, raw: Batch, evaluate: Transform) -> Iterator[Finding]:
    """Yields what is found, cheap checks first; arguments as of `check`."""
    yield from lengths.findings(experiment)
    yield from hyperparameters.findings(experiment)
    yield from data.of_transforms(experiment.config, raw, evaluate)
    yield from data.of_parts(experiment.dataset, experiment.overlaps)
    yield from teachers.findings(experiment.config, experiment.frozen, experiment.dataset)
    yield from step.findings(experiment)
