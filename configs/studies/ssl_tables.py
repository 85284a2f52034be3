"""Self-supervised methods on a table, below heads of three kinds, against raw columns and trees.

  python -m distill_jax.main --mode=study --config=configs/studies/ssl_tables.py \\
      --workdir=runs/ssl_tables

Letters, 18,668 rows of 16 numbers; 1,000 steps of batch 256 and the same transformer over columns
for every arm, whose tokens side by side are judged frozen: by 20 nearest neighbours, by linear
probes of few labels, and by a linear probe, a perceptron and boosted trees of scikit-learn on 4,000
labels, all beside raw columns and the network before training, which is as wide. Claim of T-JEPA
(Thimonier et al. 2025, arXiv:2410.05016): heads do better on its tokens than on raw columns, and
register tokens keep it from collapse.

T-JEPA has arms without and with four registers, and without a moving average; SCARF, and BYOL,
SimSiam, VICReg and Barlow Twins on its views, are the rivals. No state is chosen: the last counts.
Objectives, heads and moving averages are those of `configs/ssl/`, the optimizer is the same for all
arms; nothing is tuned. `:adult` takes the census table, `:digits` the columns of digits, `:smoke`
seconds on generated rows.
"""

import importlib

from distill_jax.configs import common, self_supervised

TABLES = ("letter", "adult", "digits")
RIVALS = ("byol", "simsiam", "vicreg", "barlow_twins")


def get_config(arg: str = ""):
    options = common.parse(arg, *TABLES)
    name = common.choose(options, TABLES, "letter")
    config = self_supervised.table(name)
    config.batch_size = 256
    config.total = config.eval.every = "1000 steps"
    # Linear probes of wide embeddings take the longest of all.
    config.evaluators.probe = {"c": (1e-3, 1e-2, 1e-1), "max_examples": 4000}
    config.roles.student.kwargs.width = 16
    config.objective.name = "simclr"
    columns = config.data.train_transforms
    reference = config.copy_and_resolve_references()

    def arm(method: str, transforms: dict, **student) -> dict:
        """What the objective of a method, and its heads, change in the study's config."""
        module, _, argument = method.partition(":")
        own = importlib.import_module(f"distill_jax.configs.ssl.{module}").get_config(argument)
        changed = reference.copy_and_resolve_references()
        changed.data.train_transforms = (*columns, *transforms)
        changed.data.transform_kwargs = transforms
        changed.objective = own.objective
        heads = {role: spec for role, spec in own.roles.items() if role != "student"}
        changed.roles.update(heads)
        changed.roles.student.kwargs.update(student)
        if method == "tjepa":
            self_supervised.read_target(changed)
        return self_supervised.as_arm(changed, reference)

    masks = {"column_masks": {"context": 0.3, "target": 0.3, "targets": 4}}
    views = {"views": self_supervised.CORRUPTED}
    config.study.arms = {
        "tjepa": arm("tjepa", masks),
        "tjepa_no_registers": arm("tjepa", masks, registers=0),
        "tjepa_4_registers": arm("tjepa", masks, registers=4),
        "tjepa_no_average": arm("tjepa:no_average", masks),
        "scarf": arm("scarf", views),
        **{name: arm(name, views) for name in RIVALS},
    }
    config.study.reference = "tjepa"
    config.study.metric = "test/probe_accuracy"
    config.study.seeds = (1, 2, 3)
    config.study.title = f"Self-supervised methods on a table: {name}"
    return config
