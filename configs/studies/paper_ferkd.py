"""FerKD: which labels of crops to trust, where some crops miss the object.

  python -m distill_jax.main --mode=study --config=configs/studies/paper_ferkd.py \\
      --workdir=runs/paper_ferkd

Shen 2023, "FerKD: Surgical Label Adaptation for Efficient Distillation" (arXiv:2312.17473). Crops
of 5 to 60 % of an image of 14 x 14 pixels, scaled back; some of them show a sleeve or nothing.
Each image has ten crops that come back in turn, and what the teacher said of them is stored (FKD).
Arms: all labels kept, uncertain crops discarded, calibrated with the softened true label, or both;
true labels alone; and SelfMix of two crops, whose teacher is asked in every step. The teacher of
"over_confident" was trained without such crops, so that what it says of them is less to be
trusted.

Thresholds are not the paper's, which could not be confirmed.
"""

from distill_jax.configs import common
from distill_jax.run import config as config_lib

POLICIES = {
    "keep": {},
    "discard": {"low": 0.4},
    "calibrate": {"mid": 0.7},
    "both": {"low": 0.4, "mid": 0.7},
}


def get_config():
    config = common.fashion_mnist()
    config.objective.name = "supervised"
    config.roles.student = config_lib.role("convnet", widths=(8, 16, 32))
    config.data.train_transforms = ("downscale", "normalize", "random_resized_crop")
    config.data.eval_transforms = ("downscale", "normalize")
    del config.data.transform_kwargs["random_crop"]
    config.data.transform_kwargs.random_resized_crop = {"area": (0.05, 0.6)}
    config.data.views = 10
    config.total = "20 epochs"
    config.eval.every = "2 epochs"

    answers = "runs/ferkd_answers"

    def arm(teacher: str = "teacher", *, store: bool = True, crop: dict | None = None, **policy):
        changes: dict = {
            "objective": {"name": "stored_labels", "kwargs": policy},
            "roles": {"teacher": {"init": f"arm:{teacher}", "frozen": True}},
        }
        if store:
            changes["cache"] = {"dir": f"{answers}/{teacher}/seed{{seed}}"}
        if crop:
            changes["data"] = {"transform_kwargs": {"random_resized_crop": crop}}
        return changes

    wide = {"roles": {"student": {"kwargs": {"widths": (16, 32, 64)}}}}
    whole = {"transform_kwargs": {"random_resized_crop": {"area": (0.8, 1.0)}}}
    config.study.arms = {
        "teacher": wide,
        "teacher_whole": {**wide, "data": whole},
        "labels": {},
        **{name: arm(**policy) for name, policy in POLICIES.items()},
        "self_mix": arm(store=False, crop={"self_mix": "cutmix"}, **POLICIES["both"]),
        "over_confident_keep": arm("teacher_whole"),
        "over_confident_both": arm("teacher_whole", **POLICIES["both"]),
    }
    config.study.sources = ("teacher", "teacher_whole")
    config.study.seeds = (0, 1, 2, 3, 4)
    config.study.reference = "keep"
    config.study.title = "FerKD: labels of crops kept, calibrated, discarded"
    return config
