"""Does the ratio network find a teacher that is known to be wrong? On generated images.

  python -m distill_jax.main --mode=study --config=configs/studies/trust_known.py \\
      --workdir=runs/trust_known

The teacher is right on almost all of ten generated classes and is then made wrong on a random 30 %
of the examples. Compared is the area under the ROC curve of (1 - ratio) for "the teacher is
wrong", on test examples that neither the student nor the ratio network has seen, against a ratio
network that is never trained.
"""

from distill_jax.configs import trust
from distill_jax.run import config as config_lib


def get_config():
    config = config_lib.base()
    config.data.name = "synthetic"
    config.data.kwargs = {"n_train": 3000, "n_test": 1000, "image_size": 12, "num_classes": 10}
    config.data.corrupt = trust.SCENARIOS["random"]
    config.data.held_out = 0.2
    config.data.outer = 0.5  # of these; the rest chooses
    config.data.train_transforms = ("normalize",)
    config.data.eval_transforms = ("normalize",)
    config.data.transform_kwargs.normalize = {"mean": (0.5,), "std": (0.2,)}
    config.objective.name = "supervised"
    config.roles.student = config_lib.role("mlp", hidden=(64,))
    config.evaluators = {"classification": {}}
    config.optim.name = "momentum"
    config.optim.lr = 0.05
    config.total = "600 steps"
    config.eval.every = "100 steps"
    config.bilevel.optim.lr = 1e-2
    config.bilevel.warmup = "20 steps"
    arms = trust.arms(
        teacher={"roles": {"student": {"kwargs": {"hidden": (128,)}}}},
        temperature=4.0,
        hidden=(128,),
        full=False,
    )
    config.study.arms = {name: arms[name] for name in ("tgeo", "tgeo_frozen", "teacher")}
    config.study.seeds = (0, 1, 2, 3, 4)
    config.study.sources = ("teacher",)
    config.study.reference = "tgeo_frozen"
    config.study.metric = "test/teacher_wrong_auc"
    config.study.title = "Does the ratio network find a teacher that is wrong?"
    return config
