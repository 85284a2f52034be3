"""Which class has a text? A sentence encoder teaches a small one, with 20 labels a class.

  python tools/fetch_reviews.py --out=runs/reviews
  python -m distill_jax.main --config=configs/language/text_kd.py:teacher \\
      --workdir=runs/text_teacher
  python -m distill_jax.main --config=configs/language/text_kd.py --workdir=runs/text_student

The teacher is a linear layer, trained on 20 labels of each class, on the frozen embeddings of
all-MiniLM-L6-v2 (22.7 M parameters), which are stored once. The student has 2.0 M parameters, of
which 1.95 M are its embedding, and learns what the teacher says of 600 training texts (SimCLRv2,
Chen et al. 2020). `:alone` is the same student on the labels. The texts are reviews of clothes, and
classes are departments of the shop. Other corpora, to be given to all commands: `:spam`
(`tools/fetch_spam.py`), `:genres`, `:authors`, `:novels` and `:plays` (`tools/fetch_plays.py`). On
which corpora the encoder knows more than words do is in `docs/results/language.md`;
`configs/studies/minilm.py` compares. The package `tokenizers` is needed:
`pip install "distill_jax[text]"`. `:smoke` as in `distill/supervised.py`.
"""

from distill_jax.configs import common, texts
from distill_jax.run import config as config_lib


def get_config(arg: str = ""):
    options = common.parse(arg, "teacher", "alone", *texts.CORPORA)
    corpus = common.choose(options, texts.CORPORA, "reviews")
    config = texts.base(corpus, at_most=600)
    kind = common.choose(options, ("teacher", "alone"))
    if kind == "teacher":
        changes = texts.probe(corpus)
    elif kind == "alone":
        changes = texts.alone()
    else:
        changes = texts.distilled(corpus, head="runs/text_teacher#head")
    return config_lib.override(config, changes)


def sweep():
    """What `launch/sweep.py` tries."""
    return {"optim.lr": [3e-4, 1e-3, 3e-3], "objective.kwargs.temperature": [1.0, 2.0, 4.0]}
