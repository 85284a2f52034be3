"""Corpora for classifiers of text, and the networks of `language/text_kd` and of its study."""

from typing import Any

from distill_jax.run import config as config_lib

PLAYS = {"tokenizer_path": "runs/plays/minilm", "licence": "public domain", "length": 64}
CORPORA: dict[str, dict[str, Any]] = {
    "reviews": {
        "path": "runs/reviews/reviews.jsonl",
        "tokenizer_path": "runs/reviews/minilm",
        "label": "department",
        "id_column": "product",
        "classes": ("bottoms", "dresses", "intimate", "jackets", "tops"),
        "licence": "CC0-1.0",
        "length": 64,
    },
    "spam": {
        "path": "runs/spam/spam.jsonl",
        "tokenizer_path": "runs/spam/minilm",
        "classes": ("ham", "spam"),
        "licence": "CC0-1.0",
        "length": 64,
    },
    "authors": {
        **PLAYS,
        "path": "runs/plays/works.jsonl",
        "label": "author",
        "split_column": "by_work",
        "classes": ("austen", "shakespeare"),
    },
    "novels": {
        **PLAYS,
        "path": "runs/plays/novels.jsonl",
        "label": "work",
        "split_column": "by_scene",
    },
    "plays": {
        **PLAYS,
        "path": "runs/plays/plays.jsonl",
        "label": "work",
        "split_column": "by_scene",
    },
    "genres": {
        **PLAYS,
        "path": "runs/plays/plays.jsonl",
        "label": "genre",
        "split_column": "by_work",
        "classes": ("comedy", "history", "tragedy"),
    },
}
"""Arguments of `text_classes` by name."""

MINILM = {
    "layout": "minilm",
    "width": 384,
    "depth": 6,
    "heads": 12,
    "vocabulary": 30_522,
    "max_length": 512,
    "num_classes": 0,
}
"""Arguments of all-MiniLM-L6-v2, 22.7 M parameters."""

STUDENT = {"layout": "minilm", "width": 64, "depth": 2, "heads": 4, "vocabulary": 30_522}
"""2.0 M parameters, of which 1.95 M are the embedding."""


def base(corpus: str, *, labels: int = 20, at_most: int = 0) -> config_lib.ConfigDict:
    """Returns the config of a student that sees all training texts and few labels."""
    config = config_lib.base()
    config.data.name = "text_classes"
    config.data.kwargs = CORPORA[corpus]
    config.data.at_most = at_most
    config.data.corrupt = {"labels_per_class": labels, "drop_unlabelled": False, "seed": "run"}
    config.objective.name = "supervised"
    config.roles.student = config_lib.role(
        "transformer", **STUDENT, max_length=CORPORA[corpus]["length"]
    )
    config.evaluators = {"classification": {}}
    config.batch_size = 32
    config.total = "10 epochs"
    config.optim.name = "adamw"
    config.optim.lr = 1e-3
    config.optim.weight_decay = 0.01
    config.optim.warmup = "10 %"
    config.eval.every = "100 %"  # no state is chosen: the last counts
    config.eval.metric = "held_out/balanced_accuracy"
    return config


def encoder(corpus: str) -> dict:
    """The role of all-MiniLM-L6-v2, frozen."""
    init = f"hf:{CORPORA[corpus]['tokenizer_path']}"
    return {"model": "transformer", "kwargs": MINILM, "init": init, "frozen": True}


def stored(corpus: str, role: str) -> dict:
    """Embeddings of all training texts, stored once for all seeds."""
    folder = f"runs/text_embeddings/{corpus}"
    return {"dir": folder, "roles": (role,), "outputs": ("embedding",)}


def probe(corpus: str, *, lr: float = 0.01) -> dict:
    """A linear layer on embeddings, trained on the labelled texts: the teacher."""
    return {
        "objective": {"name": "finetune", "kwargs": {"train_encoder": False}},
        "roles": {"student": encoder(corpus), "head": {"model": "linear_head"}},
        "cache": stored(corpus, "student"),
        "batch_size": 300,
        "total": "200 steps",
        "optim": {"lr": lr},
        "evaluators": {"classification": {"role": "prediction"}},
    }


def distilled(corpus: str, *, head: str, lr: float = 1e-3) -> dict:
    """The student, taught by the probe on all training texts."""
    return {
        "objective": {"name": "simclr_v2"},
        "roles": {
            "teacher": encoder(corpus),
            "teacher_head": {"model": "linear_head", "init": head, "frozen": True},
        },
        "cache": stored(corpus, "teacher"),
        "optim": {"lr": lr},
    }


def alone(*, lr: float = 1e-3, steps: int = 150) -> dict:
    """The student on the labelled texts."""
    return {
        "data": {"corrupt": {"drop_unlabelled": True}},
        "optim": {"lr": lr},
        "total": f"{steps} steps",
    }
