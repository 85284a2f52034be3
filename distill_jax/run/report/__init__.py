"""One offline HTML file about a run or a study, rebuilt from the files of its folder alone."""

from distill_jax.run.report.of_run import write_run_report
from distill_jax.run.report.of_study import write_study_report

__all__ = ["write_run_report", "write_study_report"]
