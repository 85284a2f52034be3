"""Is a message spam? A sentence encoder teaches a small one, with 20 labels a class.

  python tools/fetch_spam.py --out=runs/spam
  python -m distill_jax.main --config=configs/language/spam.py:teacher --workdir=runs/spam_teacher
  python -m distill_jax.main --config=configs/language/spam.py --workdir=runs/spam_student

The messages are those of the SpamAssassin public corpus. The teacher is all-MiniLM-L6-v2 (22 M
parameters, of which only a linear classifier learns, from the 40 labels); the student has 2.0 M, of
which 1.95 M are its embedding. It learns from the same labels and from what the teacher says of all
training messages, which is stored once. Words alone tell spam better than this encoder does
(`docs/results/language.md`): the config shows how, not that it helps. `:alone` is the same student
without a teacher. The package `tokenizers` is needed: `pip install "distill_jax[text]"`. `:smoke`
as in `distill/supervised.py`.
"""

from distill_jax.configs import common
from distill_jax.run import config as config_lib

MINILM = {"layout": "minilm", "width": 384, "depth": 6, "heads": 12, "vocabulary": 30_522}


def get_config(arg: str = ""):
    options = common.parse(arg, "teacher", "alone")
    config = config_lib.base()
    config.data.name = "text_classes"
    config.data.kwargs = {
        "path": "runs/spam/spam.jsonl",
        "tokenizer_path": "runs/spam/minilm",
        "length": 64,
        "classes": ("ham", "spam"),
        "licence": "CC0-1.0",
    }
    config.data.corrupt = {"labels_per_class": 20}
    config.evaluators = {"classification": {}, "calibration": {}}
    config.objective.name = "supervised"
    config.optim.name = "adamw"
    config.optim.lr = 1e-3
    config.optim.warmup = "10 %"
    config.eval.metric = "held_out/balanced_accuracy"
    if "teacher" in options:
        config.roles.student = config_lib.role("transformer", **MINILM)
        config.roles.student.init = "hf:runs/spam/minilm"
        config.roles.student.freeze = ("*_embedding*", "embedding_norm*", "block*")
        config.data.corrupt = {"labels_per_class": 20, "drop_unlabelled": True}
        config.optim.lr = 0.01
        config.batch_size = 40
        config.total = "60 epochs"
        return config
    config.roles.student = config_lib.role(
        "transformer", layout="minilm", width=64, depth=2, heads=4, max_length=64, vocabulary=30_522
    )
    config.total = "20 epochs"
    config.eval.every = "2 epochs"
    if "alone" not in options:
        config.objective.name = "kd"
        config.objective.kwargs = {"temperature": 2.0, "alpha": 0.9}
        config.roles.teacher = config_lib.role("transformer", **MINILM)
        config.roles.teacher.frozen = True
        config.roles.teacher.init = "runs/spam_teacher"
        config.cache.dir = "runs/spam_answers/seed{seed}"
    return config


def sweep():
    """What `launch/sweep.py` tries."""
    return {"optim.lr": [3e-4, 1e-3, 3e-3], "objective.kwargs.temperature": [1.0, 2.0, 4.0]}
