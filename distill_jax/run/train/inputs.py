"""What a run starts from, as checksums."""

from typing import Any

from distill_jax.run import class_map, foreign, paths, processes
from distill_jax.run import workdir as workdir_lib
from distill_jax.run.build import Experiment
from distill_jax.run.config import ConfigDict
from distill_jax.trainer.io.network import network_checksum
from distill_jax.trainer.io.paths import NetworkRef
from distill_jax.weights import pretrained


def read_inputs(experiment: Experiment, config: ConfigDict) -> dict[str, Any]:
    """Returns checksums of the data and of the networks that a run starts from.

    `{"data": see workdir.data_checksums, "networks": {role: checksum}}`; a network that is gone,
    which a run that goes on may not need, has None. Among the networks are the files of their
    classes, as `<role>.classes`.
    """

    def networks() -> dict[str, str | None]:
        checksums = {}
        for role, spec in config.roles.items():
            where = f"roles.{role}.init"
            if paths.is_foreign(spec.init):
                checksums[role] = foreign.checksum(spec.init, where=where)
            elif spec.init:
                ref = NetworkRef.parse(spec.init, where=where)
                checksums[role] = network_checksum(ref.path, role=ref.role, where=where)
            if (path := class_map.file_of(spec.classes)) is not None:
                digest = pretrained.sha256_of(path) if path.is_file() else None
                checksums[f"{role}.classes"] = digest
        return checksums

    return {
        "data": workdir_lib.data_checksums(experiment.dataset),
        "networks": processes.from_first(networks, where="roles"),
    }
