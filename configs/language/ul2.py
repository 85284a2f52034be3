"""The mixture of denoisers of UL2, on the standard library's sources as bytes.

  python -m distill_jax.main --config=configs/language/ul2.py --workdir=runs/ul2

One decoder learns to fill in short spans (R), long or many ones (X), and to continue a text (S); a
token in front of each sequence names the task (`data/transforms/denoising.py`). Mean lengths of
spans are four times those of the paper, whose tokens are longer than bytes. `:spans` is span
corruption alone, `:prefix` continues alone, `:unmarked` leaves the tokens out. `denoising` measures
both tasks on held-out text, `next_token` plain text from the left. `:smoke` as in
`distill/supervised.py`.
"""

from distill_jax.configs import common
from distill_jax.data.transforms import denoising
from distill_jax.run import config as config_lib

DENOISERS = {
    "spans": denoising.UL2[:2],
    "prefix": (("S", 0.0, 0.25),),
    "mixture": denoising.UL2,
}


def get_config(arg: str = ""):
    options = common.parse(arg, "spans", "prefix", "unmarked")
    config = common.text()
    config.total = "600 steps"
    config.objective.name = "next_token"
    config.roles.student = config_lib.role("transformer", width=64, depth=3, heads=4)
    name = common.choose(options, ("spans", "prefix"), "mixture")
    denoise(config, name, modes="unmarked" not in options)
    return config


def denoise(config, name: str, *, modes: bool = True, scale: float = 4.0) -> None:
    """Makes a config of text learn from denoisers.

    Args:
      config: changed in place.
      name: one of `DENOISERS`.
      modes: whether sequences begin with a mode token.
      scale: factor of the mean lengths of spans.
    """
    config.data.kwargs.reserved = denoising.extra_tokens(config.data.kwargs.length, scale=scale)
    config.data.train_transforms = ("denoise",)
    config.data.eval_transforms = ("denoised_views", "next_token")
    how = {"denoisers": DENOISERS[name], "scale": scale, "modes": modes}
    config.data.transform_kwargs.denoise = {"first": 257, **how}
    seen = {mode for mode, *_ in DENOISERS[name]}
    own = min(seen) if len(seen) == 1 else ""
    marks = {"infill_mode": own or "R", "continuation_mode": own or "S"}
    config.data.transform_kwargs.denoised_views = {
        "first": 257,
        **(marks if modes else dict.fromkeys(marks, "")),
    }
    config.evaluators = {"denoising": {}, "next_token": {}}
    config.eval.metric = "held_out/infill_bits"


def sweep():
    """What `launch/sweep.py` tries."""
    return {"optim.lr": [2e-3, 4e-3, 8e-3], "data.transform_kwargs.denoise.scale": [1.0, 2.0, 4.0]}
