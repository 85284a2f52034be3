"""A small file-type classifier distilled from Magika, on real files without labels.

  pip install "distill_jax[export]"
  pip install --no-deps magika==1.0.3
  python tools/fetch_files.py --out=runs/files
  python -m distill_jax.main --mode=study --config=configs/studies/file_types.py \\
      --workdir=runs/file_types

The same command continues a study that was stopped. `make demo-files` runs `file_types.py:small`,
which downloads no files: it takes those of the Python packages that are installed beside this one,
and its figures depend on them.

The teacher is Google's Magika (Fratantonio et al. 2024, arXiv:2409.13768), 214 types, 784,519
parameters, as the ONNX file inside its package. It is asked once about every training file and
about three crops of each: a teacher names the type of any bytes. The student has an eleventh of its
parameters. `extensions` is the same student trained on the types that file extensions stand for,
of the same files and crops. Both are compared with the teacher, not with the truth, on packages
that no part of training has seen. `benchmarks/file_types.py` adds intervals over packages, the
majority class, calibration, recall by type, and latency.
"""

from distill_jax.configs import common
from distill_jax.run import config as config_lib


def get_config(arg: str = ""):
    options = common.parse(arg, "small")
    config = config_lib.base()
    config.data.name = "file_bytes"
    config.data.kwargs.path = "runs/files"
    config.data.held_out = 0.15
    config.data.kwargs.most = 40_000  # all that the other two limits leave
    config.data.kwargs.per_package = 25
    config.data.kwargs.crops_each = 3
    config.objective.name = "kd"
    config.objective.kwargs = {"temperature": 4.0, "alpha": 1.0}
    config.roles.student = config_lib.role("byte_convnet")
    config.cache.dir = "runs/file_types_teacher"
    config.cache.teacher = "package:magika"
    config.cache.dtype = "float16"
    config.evaluators = {"agreement": {}}
    config.batch_size = 32
    config.total = "3000 steps"
    config.optim.name = "adamw"
    config.optim.lr = 7e-3
    config.optim.weight_decay = 1e-4
    config.optim.warmup = "100 steps"
    config.eval.every = "3000 steps"
    config.eval.metric = "held_out/agreement"  # no state is chosen: the last counts
    config.study.arms = {
        "distilled": {},
        "extensions": {"objective": {"kwargs": {"alpha": 0.0}}, "optim": {"lr": 1.5e-2}},
    }
    config.study.reference = "extensions"
    config.study.seeds = (0, 1, 2, 3, 4)
    config.study.metric = "test/agreement"
    config.study.title = "File types from Magika"
    if "small" in options:
        config.data.kwargs.path = ""
        config.data.kwargs.per_extension = 150
        config.data.kwargs.crops_each = 2
        config.cache.dir = "runs/file_types_small_teacher"
        config.total = config.eval.every = "600 steps"
        config.study.title = "File types from Magika, files of the installed packages"
    return config
