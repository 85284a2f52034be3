"""MiniLM as the teacher of a small encoder: classes of texts, with 20 labels a class.

  pip install "distill_jax[text]" pyarrow
  python tools/fetch_reviews.py --out=runs/reviews
  python -m distill_jax.main --mode=study --config=configs/studies/minilm.py --workdir=runs/minilm

`probe` is a linear layer on the frozen embeddings of all-MiniLM-L6-v2 (22.7 M parameters), trained
on 20 labels of each class, other ones in each seed. `distilled` is a student of 2.0 M parameters
that learns the probe's answers for 600 training texts, labelled or not. Controls: `alone`, the same
student on the labels, and `from_alone`, distilled from `alone` on the same texts: unlabelled text
without MiniLM. `benchmarks/text_study.py` adds what words know, from the same labels. Rates are
those of the best held-out balanced accuracy of seed 0 (`:tune` runs the grids); in the study, the
last state counts and nothing is chosen. Classes are departments of a shop for clothes, and no
product is in two parts. `:spam` (`tools/fetch_spam.py`), `:genres` and others of
`configs/texts.py` are other corpora, with 400 texts and the rates of the reviews.
"""

import functools

from distill_jax.configs import common, texts

CHOSEN = {"probe": 1e-2, "alone": 3e-3, "distilled": 1e-2, "from_alone": 1e-3}
"""Rates, chosen on the reviews with seed 0."""

RATES = {
    "probe": (1e-2, 1e-1),
    "alone": (1e-3, 3e-3, 1e-2),
    "distilled": (1e-3, 3e-3, 1e-2),
    "from_alone": (1e-3, 3e-3, 1e-2),
}


def from_alone(arm: str, lr: float) -> dict:
    return {
        "objective": {"name": "kd", "kwargs": {"alpha": 1.0, "temperature": 1.0}},
        "roles": {"teacher": {"init": f"arm:{arm}#student", "frozen": True}},
        "optim": {"lr": lr},
    }


def get_config(arg: str = ""):
    options = common.parse(arg, "tune", *texts.CORPORA)
    corpus = common.choose(options, texts.CORPORA, "reviews")
    config = texts.base(corpus, at_most=600 if corpus == "reviews" else 400)
    config.log.tensorboard = False
    make = {
        "alone": texts.alone,
        "probe": functools.partial(texts.probe, corpus),
        "distilled": functools.partial(texts.distilled, corpus, head="arm:probe#head"),
        "from_alone": functools.partial(from_alone, "alone"),
    }
    chosen = {arm: make[arm](lr=lr) for arm, lr in CHOSEN.items()}
    if "tune" in options:
        config.study.arms = {name: chosen[name] for name in ("alone", "probe")} | {
            f"{arm}_{lr:.0e}": make[arm](lr=lr) for arm in chosen for lr in RATES[arm]
        }
        config.study.replicas = "yes"
        config.study.seeds = (0,)
        config.study.metric = "held_out/balanced_accuracy"
    else:
        config.study.arms = chosen
        config.study.seeds = (1, 2, 3, 4, 5)
        config.study.metric = "test/balanced_accuracy"
    config.study.reference = "alone"
    config.study.title = f"MiniLM to a small encoder, 20 labels a class: {corpus}"
    return config
