"""UL2: does a mixture of denoisers serve two tasks, and do its mode tokens matter?

  python -m distill_jax.main --mode=study --config=configs/studies/paper_ul2.py \\
      --workdir=runs/paper_ul2

Tay et al. 2022 (arXiv:2205.05131). Arms read the same rows of the standard library's sources and
as many of them: as plain text, as prefix and end, with hidden spans, with the seven denoisers, and
with these without mode tokens. Each is measured on both tasks of the evaluator `denoising`, in the
form of its own denoisers and as plain text from the left. `benchmarks/ul2.py` has the same arms as
one program each, with a learning rate and a form for each, chosen on held-out text.
"""

from distill_jax.configs.language import ul2

from distill_jax.configs import common


def get_config(arg: str = ""):
    common.parse(arg)
    config = ul2.get_config()
    config.data.kwargs = {"length": 64, "test_fraction": 0.02}
    config.total = "600 steps"
    config.optim.lr = 6e-3
    config.optim.warmup = "60 steps"
    config.eval.every = "600 steps"
    config.log.every_steps = 200
    config.log.tensorboard = False
    config.roles.student.kwargs.depth = 2
    ul2.denoise(config, "mixture", modes=False, scale=2.0)
    plain = config.copy_and_resolve_references()
    config.data.train_transforms = ("next_token",)
    del config.data.transform_kwargs["denoise"]

    def own(name: str, *, modes: bool = True) -> dict:
        """What an arm changes of plain text."""
        arm = plain.copy_and_resolve_references()
        ul2.denoise(arm, name, modes=modes, scale=2.0)
        return {
            "data": {
                "train_transforms": arm.data.train_transforms,
                "transform_kwargs": arm.data.transform_kwargs.to_dict(),
            }
        }

    config.study.arms = {
        "causal": {},
        "prefix": own("prefix"),
        "spans": own("spans"),
        "mixture": own("mixture"),
        "mixture_unmarked": own("mixture", modes=False),
    }
    config.study.reference = "mixture"
    config.study.seeds = (1, 2, 3, 4, 5)
    config.study.metric = "test/infill_bits"
    config.study.title = "UL2 on source code"
    return config
