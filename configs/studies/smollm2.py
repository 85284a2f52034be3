"""SmolLM2-135M as the teacher of a language model of 1.8 M parameters, on plays of Shakespeare.

  pip install "distill_jax[text]"
  python tools/fetch_smollm2.py --out=runs/smollm2
  python -m distill_jax.main --mode=study --config=configs/studies/smollm2.py \\
      --workdir=runs/smollm2_study

`distilled` learns from 53,000 tokens of Hamlet and from the 32 most probable tokens that the
teacher names at each of them, which are stored once (`language/kd:smollm2`). `alone` is the same
student on the same tokens. Both have the same steps, and held-out bits per byte choose the epoch.
`:tune` tries learning rates of both and weights of the teacher with a seed of its own.
"""

from distill_jax.configs import common

LR = {"alone": 2e-3, "distilled": 4e-3}
ALPHA = 0.8


def get_config(arg: str = ""):
    options = common.parse(arg, "tune")
    config = common.text()
    common.smollm2(config, teacher=False)
    config.objective.name = "next_token"
    config.eval.every = "1 epoch"
    config.log.tensorboard = False
    taught = common.text()
    common.smollm2(taught, teacher=True)

    def alone(lr: float) -> dict:
        return {"optim": {"lr": lr}}

    def distilled(lr: float, alpha: float) -> dict:
        return {
            "optim": {"lr": lr},
            "objective": {"name": "token_kd", "kwargs": {"alpha": alpha}},
            "roles": {"teacher": taught.roles.teacher.to_dict()},
            "cache": {key: taught.cache[key] for key in ("dir", "outputs", "dtype")},
        }

    if "tune" in options:
        config.study.arms = {
            **{f"alone_{lr}": alone(lr / 1000) for lr in (2, 4, 8)},
            **{
                f"distilled_{lr}_{percent}": distilled(lr / 1000, percent / 100)
                for lr, percent in ((4, 50), (4, 80), (8, 50))
            },
        }
        config.study.seeds = (0,)
        config.study.metric = "held_out/bits_per_byte"
    else:
        config.study.arms = {
            "alone": alone(LR["alone"]),
            "distilled": distilled(LR["distilled"], ALPHA),
        }
        config.study.seeds = (1, 2, 3, 4, 5)
        config.study.metric = "test/bits_per_byte"
    config.study.reference = next(iter(config.study.arms))
    config.study.title = "SmolLM2-135M to a small language model, Shakespeare"
    return config
