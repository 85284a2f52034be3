"""SimCLRv2: pretrain, fine-tune with few labels, distil on unlabelled images into a small network.

  python -m distill_jax.main --mode=study --config=configs/studies/paper_simclr_v2.py \\
      --workdir=runs/paper_simclr_v2

Chen et al. 2020 (arXiv:2006.10029) on digits with five labels a class, all other images without.
Claims: pretraining helps (`narrow` above `scratch_narrow`), and bigger networks more (`wide` above
`narrow`); a narrow student distilled from the wide one on all images keeps its accuracy
(`distilled`), on the labelled images alone it does not (`distilled_labelled`); fine-tuning from the
first layer of the projector beats fine-tuning from the encoder (`wide` above `wide_layer_0`).
`:draw1`, `:draw2` take other labels. `:smoke` takes seconds on generated images.
"""

from distill_jax.configs import common, self_supervised

WIDTHS = {"narrow": (8, 16, 32), "wide": (32, 64, 128)}
HIDDEN = (128, 128)


def get_config(arg: str = ""):
    options = common.parse(arg, "draw1", "draw2")
    config = self_supervised.base("digits")
    chain = config.data.transform_kwargs.views.transforms
    pretraining = {
        "train_transforms": ("scale", "views"),
        "transform_kwargs": {"views": {"count": 2, "transforms": chain}},
    }
    # Crops and rotations alone, as published: colour would hide nothing in a grey image.
    weak = {k: v for k, v in chain if k in ("rotation", "random_resized_crop")}
    learning = {"train_transforms": ("scale", *weak), "transform_kwargs": weak}
    few = {"data": {**learning, "corrupt": {"drop_unlabelled": True}}, "batch_size": 50}
    del config.data.transform_kwargs["views"]
    config.data.train_transforms = ("scale",)
    draw = {"draw1": 1, "draw2": 2}.get(common.choose(options, ("draw1", "draw2")), 0)
    config.data.corrupt = {"labels_per_class": 5, "drop_unlabelled": False, "seed": draw}
    for name in list(config.evaluators):
        del config.evaluators[name]
    config.eval.metric = "held_out/accuracy"
    config.eval.every = config.total  # no state is chosen by labels: the last counts
    config.objective.name = "supervised"

    def wide(width: str, **kwargs) -> dict:
        return {"kwargs": {"widths": WIDTHS[width], **kwargs}}

    def finetune(width: str, *, layer: int = 1, start: str = "") -> dict:
        roles = {"student": wide(width), "head": {"model": "linear_head"}}
        if layer:
            kwargs = {"features": 0, "hidden": HIDDEN[:layer], "batch_norm": True}
            roles["projector"] = {"model": "projector", "kwargs": kwargs}
        if start:
            roles["student"]["init"] = f"arm:{start}"
            if layer:
                roles["projector"]["init"] = f"arm:{start}#projector/*"
        return {
            **few,
            "objective": {"name": "finetune", "kwargs": {"projector": bool(layer)}},
            "roles": roles,
            "optim": {"lr": 1e-3},
            "total": "300 steps",
            "evaluators": {"classification": {"role": "prediction"}},
        }

    def pretrain(width: str) -> dict:
        kwargs = {"features": 64, "hidden": HIDDEN, "batch_norm": True}
        projector = {"model": "projector", "kwargs": kwargs}
        return {
            "objective": {"name": "simclr", "kwargs": {"temperature": 0.2}},
            "data": pretraining,
            "roles": {"student": wide(width), "projector": projector},
            "evaluators": {"knn": {}},
            "eval": {"metric": "held_out/knn_accuracy"},
        }

    def distil(**changes) -> dict:
        frozen = {"frozen": True}
        return {
            "objective": {"name": "simclr_v2", "kwargs": {"projector": True}},
            "data": learning,
            "roles": {
                "student": wide("narrow", num_classes=10),
                "teacher": {"init": "arm:wide#student", **frozen},
                "teacher_projector": {"init": "arm:wide#projector", **frozen},
                "teacher_head": {"init": "arm:wide#head", **frozen},
            },
            "evaluators": {"classification": {}},
            **changes,
        }

    config.study.arms = {
        "pretrained_narrow": pretrain("narrow"),
        "pretrained_wide": pretrain("wide"),
        "scratch_narrow": finetune("narrow"),
        "scratch_wide": finetune("wide"),
        "narrow": finetune("narrow", start="pretrained_narrow"),
        "wide": finetune("wide", start="pretrained_wide"),
        "wide_layer_0": finetune("wide", layer=0, start="pretrained_wide"),
        "distilled": distil(),
        "distilled_labelled": distil(**few),
    }
    config.study.sources = ("pretrained_narrow", "pretrained_wide")
    config.study.reference = "narrow"
    config.study.seeds = (1, 2, 3, 4, 5)
    config.study.title = "SimCLRv2: few labels, then distillation"
    return config
