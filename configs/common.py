"""Pieces that most configs share."""

from collections.abc import Iterable

from distill_jax.core.errors import ConfigError, nearest
from distill_jax.run import config as config_lib


def parse(arg: str, *options: str) -> set[str]:
    """Splits `file.py:full,noisy` into its options; `smoke`, which every file has, is not given.

    Raises:
      ConfigError: for an option that the file does not have.
    """
    given = {part for part in arg.split(",") if part}
    if unknown := given - set(options):
        option = min(unknown)
        hint = nearest(option, ("smoke", *options))
        raise ConfigError(
            f"unknown option {option!r} behind the colon", where="--config", hint=hint
        )
    return given


def choose(options: set[str], among: Iterable[str], default: str = "") -> str:
    """Returns the one option of those that exclude each other, or the default.

    Raises:
      ConfigError: the options have two of them.
    """
    given = sorted(options & set(among))
    if len(given) > 1:
        what = f"{' and '.join(given)} behind the colon exclude each other"
        raise ConfigError(what, where="--config", hint="one of them")
    return given[0] if given else default


def need(options: set[str], option: str, other: str) -> None:
    """Raises a ConfigError where an option is given without the one that it changes."""
    if option in options and other not in options:
        what = f"{option} behind the colon changes {other}, which is not there"
        raise ConfigError(what, where="--config", hint=f"'{other},{option}'")


def images(*, full: bool = False):
    """A classification config on Fashion-MNIST, or on the 5k/1k part that ships with the package.

    Pixels are scaled by the mean and deviation of the training part, also of other images.
    """
    config = config_lib.base()
    config.data.name = "fashion_mnist" if full else "fashion_mnist_5k"
    config.data.train_transforms = ("random_crop", "horizontal_flip", "normalize")
    config.data.eval_transforms = ("normalize",)
    config.data.transform_kwargs.random_crop = {"padding": 2}
    config.evaluators = {"classification": {}, "calibration": {}}
    config.optim.name = "nesterov"
    config.optim.lr = 0.1
    config.optim.weight_decay = 5e-4
    config.optim.warmup = "1 epoch"
    config.eval.every = "1 epoch"
    config.eval.metric = "held_out/accuracy"
    return config


def fashion_mnist(*, full: bool = False):
    """A config like `images` for studies, whose arms share the numbers of the full training set."""
    config = images(full=full)
    config.data.transform_kwargs.normalize = {"mean": (0.286,), "std": (0.353,)}
    return config


def table(name: str):
    """A classification config on a table; columns come scaled from the data set."""
    config = config_lib.base()
    config.data.name = name
    config.objective.name = "supervised"
    config.optim.name = "nesterov"
    config.optim.lr = 0.05
    config.optim.weight_decay = 1e-4
    config.optim.warmup = "30 steps"
    return config


def bilevel(config, *, losses: bool) -> None:
    """Gives distillation a ratio that learns from held-out examples.

    Args:
      config: a config of `kd`, which is changed.
      losses: whether the network sees the losses of an example, and gives a weight to each; or the
        triangle of student, teacher and label.
    """
    if losses:
        config.weighting.name = "meta_weight_net"
        config.roles.weighting = config_lib.role("ratio_mlp", hidden=(100,), outputs=2)
    else:
        config.weighting.name = "trilateral"
        config.roles.weighting = config_lib.role("ratio_mlp", hidden=(32,))
    config.bilevel.every = 2
    config.bilevel.warmup = "1 epoch"
    config.bilevel.outer_batch = 0.5
    config.bilevel.optim.lr = 3e-3


def table_classifier(name: str):
    """A config like `table` that measures a classifier and keeps the best state."""
    config = table(name)
    config.evaluators = {"classification": {}, "calibration": {}}
    config.eval.every = "1 epoch"
    config.eval.metric = "held_out/accuracy"
    return config


def text(name: str = "stdlib_bytes"):
    """A config on packed rows of text that keeps the state of the lowest bits per byte."""
    config = config_lib.base()
    config.data.name = name
    config.data.kwargs = {"length": 128, "test_fraction": 0.02}
    config.data.held_out = 0.02
    config.data.train_transforms = ("next_token",)
    config.data.eval_transforms = ("next_token",)
    config.batch_size = 16
    config.optim.name = "adamw"
    config.optim.lr = 2e-3
    config.optim.weight_decay = 0.01
    config.optim.warmup = "100 steps"
    config.optim.clip_norm = 1.0
    config.evaluators = {"next_token": {}}
    config.eval.every = "200 steps"
    config.eval.batch_size = 64
    config.eval.metric = "held_out/bits_per_byte"
    config.eval.mode = "min"
    return config


def chains(**data):
    """A config on arithmetic chains that keeps the state of the highest held-out accuracy.

    Args:
      **data: arguments of `data/arithmetic_chains.py`.
    """
    config = text("arithmetic_chains")
    sizes = {"steps": (3, 4), "largest": 9, "n_train": 750, "n_test": 600, "distracted": 0.2}
    config.data.kwargs = {**sizes, **data}
    config.data.held_out = 1 / 3
    config.batch_size = 32
    config.objective.name = "next_token"
    config.roles.student = config_lib.role("transformer", width=64, depth=2, heads=4)
    config.optim.lr = 3e-3
    config.optim.warmup = "50 steps"
    config.evaluators = {"exact_answer": {}, "next_token": {}}
    config.eval.every = "100 %"
    config.eval.batch_size = 100
    config.eval.metric = "held_out/accuracy"
    config.eval.mode = "max"
    return config


def smollm2(config, *, teacher: bool) -> None:
    """Gives a config of `text` plays of Shakespeare, a student for them, and SmolLM2-135M.

    Args:
      config: a config of `text`, which is changed.
      teacher: whether there is a role `teacher`, whose 32 most probable tokens are stored.
    """
    tokens = {"vocabulary": 3_830, "layout": "llama"}
    config.data.name = "text_folder"
    config.data.kwargs = {
        "path": "runs/smollm2/text",
        "tokenizer_path": "runs/smollm2/teacher",
        "length": 128,
        "name": "plays of Shakespeare",
        "licence": "public domain",
    }
    config.roles.student = config_lib.role("transformer", width=128, depth=4, heads=4, **tokens)
    config.batch_size = 8
    config.optim.warmup = "10 %"
    config.optim.lr = 4e-3 if teacher else 2e-3
    config.total = "4 epochs"
    config.eval.every = "2 epochs"
    if teacher:
        config.roles.teacher = config_lib.role(
            "transformer",
            **tokens,
            width=576,
            depth=30,
            heads=9,
            groups=3,
            mlp_width=1536,
            max_length=8192,
            epsilon=1e-5,
            rope_theta=100_000.0,
            head="tied",
            top=32,
        )
        config.roles.teacher.frozen = True
        config.roles.teacher.init = "hf:runs/smollm2/teacher"
        config.cache.dir = "runs/smollm2/outputs"
        config.cache.outputs = ("top_index", "top_log_probs", "tail_log_prob")
        config.cache.dtype = "float16"
