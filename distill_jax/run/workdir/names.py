"""Names of the files that are written into folders."""

from collections.abc import Mapping, Sequence

MARK = ".distill_jax.json"
"""Marks a folder as made by this program, and states its purpose."""

_RUN = (
    *("config.json", "env.json", "metrics.jsonl", "alarms.jsonl", "heartbeat.json", "stall.txt"),
    *("predictions.npz", "embeddings.npz", "masks.npz", "trust.npz", "result.json", "report.html"),
    *("history.json", "samples.json"),
)
_STUDY = ("study.json", "table.txt", "report.html")
_DAMAGED = ("metrics.jsonl.damaged", "alarms.jsonl.damaged", "result.json.damaged")

WRITTEN: Mapping[str, Sequence[str]] = {
    "train": (*_RUN, *_DAMAGED, "crash.txt"),
    "study": (*_STUDY, "crash.txt"),
    "eval": ("eval.json", "crash.txt"),
    "export": ("crash.txt",),
    "compare": ("comparison.json", "report.html", "crash.txt"),
}
"""Files that a mode writes into its folder."""

WRITTEN_FOLDERS: Mapping[str, Sequence[str]] = {
    "train": ("checkpoints", "tensorboard", "segments"),
    "study": (),
    "eval": (),
    "export": ("export",),
    "compare": (),
}
"""Folders that a mode makes in its folder."""

NAMES: Mapping[str, Sequence[str]] = {
    "run": (
        *_RUN,
        "heartbeat-*.json",
        "logger-*.json",
        "logger-*.txt",
        "wandb",
        "stall-*.txt",
        "eval.json",
        "eval-*.json",
        "export",
        *WRITTEN_FOLDERS["train"],
    ),
    "export": ("model.*", "config.json", "README.md"),
    "study": _STUDY,
    "comparison": ("comparison.json", "report.html"),
    "sweep": ("sweep.json", "sweep.sh", "halving.json", "report.html"),
    "cache": ("key.json", "[0-9]" * 5 + "-" + "[0-9]" * 5),
}
"""What belongs to a folder of each kind, as patterns of names."""
