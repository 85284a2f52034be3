# ruff: noqa: F401
"""Folders that the program writes: their ownership, their locks, and the contents of a run.

The rules, each in one function:

- `claim`: one writer per folder, files of other programs are left alone, and a start that fails
  leaves the folder as it was. `foreign` finds those files; `hold` is the lock alone.
- `is_run`: a folder is a run once it holds a finished checkpoint or a result.
- `set_aside`: starting over moves the existing files into a subfolder.
- `check_config`: a run continues under the config that is stored in its newest checkpoint.
- `check_inputs`: a run continues with the data and the networks that it began with, by checksum.
- `changes`: what may differ in a run that goes on, if it is asked for; `segments` records it.
- `environment_changes`: versions, devices and precision that differ from the previous start.

Nothing here imports JAX at module level, so that launchers may use it.
"""

from distill_jax.run.workdir import changes, segments
from distill_jax.run.workdir.continuation import (
    RESCUE,
    START_OVER,
    Alike,
    check_config,
    check_inputs,
    data_checksums,
    explain_divergence,
    stored_config,
)
from distill_jax.run.workdir.history import arithmetic, describe, environment_changes
from distill_jax.run.workdir.lock import LOCK, InUse, check_held, hold
from distill_jax.run.workdir.names import MARK, WRITTEN, WRITTEN_FOLDERS
from distill_jax.run.workdir.ownership import claim, is_run, refuse_foreign
from distill_jax.run.workdir.results import intact, read_result, write_json, write_result
