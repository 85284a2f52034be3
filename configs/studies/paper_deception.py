"""Does a student deceive its weak supervisor? On digits.

  python -m distill_jax.main --mode=study --config=configs/studies/paper_deception.py \\
      --workdir=runs/paper_deception

Yang et al. 2024 (arXiv:2406.11431): with a conflicting reward, students go wrong rather where the
supervisor cannot tell, more so the larger they are. Here students of two widths learn parity from a
linear network on 4 x 4 pixels, without a conflict (`aligned`), with a bonus for wrong answers
(`wrong`), and with a second task, whether the digit is at least 5 (`task`); `_confident` with the
confidence loss. Compared is `test/deception_excess`: the share of flipped examples that the
supervisor does not know, less the share that random flips would have.
"""

from distill_jax.configs import weak

WIDTHS = (32, 256)


def arms(width: int) -> dict[str, dict]:
    """Students of a width, each pretrained, and what they are compared with."""
    hidden = (width, width)
    student = {
        "kwargs": {"hidden": hidden},
        "init": f"arm:pretrain_{width}#student/**",
    }
    names = {"ceiling": f"ceiling_{width}"}

    def conflicting(kind: str, alpha: float = 0.0) -> dict:
        arm = weak.from_weak(
            student, alpha=alpha, beside=("ceiling", "aligned"), conflict=kind, **names
        )
        arm["objective"]["name"] = "conflict"
        arm["roles"] |= weak.frozen(aligned=f"aligned_{width}")
        del arm["data"]  # labels are read: that is the device
        return {**arm, "evaluators": {"gap_recovered": {}, "deception": {}}}

    return {
        f"pretrain_{width}": weak.pretrain(hidden),
        f"ceiling_{width}": {"roles": {"student": student}},
        f"aligned_{width}": weak.naive(student, **names),
        f"wrong_{width}": conflicting("labels"),
        f"wrong_confident_{width}": conflicting("labels", alpha=0.5),
        f"task_{width}": conflicting("task"),
    }


def get_config():
    config = weak.base("parity", steps=400)
    config.study.arms = {"weak": weak.weak()} | {
        name: arm for width in WIDTHS for name, arm in arms(width).items()
    }
    compared = [f"{kind}_{w}" for kind in ("wrong", "wrong_confident", "task") for w in WIDTHS]
    config.study.sources = tuple(name for name in config.study.arms if name not in compared)
    config.study.reference = "wrong_32"
    config.study.metric = "test/deception_excess"
    config.study.title = "Does a student deceive its supervisor?"
    return config
