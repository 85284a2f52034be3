"""Every key of a config with its default, and which groups take keys of their own."""

import functools
import re
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from ml_collections import config_dict

if TYPE_CHECKING:

    class ConfigDict(config_dict.ConfigDict):
        """What a key holds depends on the key, which a type checker cannot follow."""

        def __getattr__(self, attribute: str) -> Any: ...
        def __getitem__(self, key: str) -> Any: ...
        def get(self, key: str, default: Any = None) -> Any: ...

else:
    ConfigDict = config_dict.ConfigDict

DURATIONS = ("total", "optim.warmup", "bilevel.warmup", "eval.every", "checkpoint.every")
"""Keys that hold a duration: steps as a number, or a text such as "20 epochs"."""

SPLITS = ("train", "held_out", "test")

LONGEST_NAME = 200
"""Bytes in the name of an arm: file systems allow 255 in the name of a folder."""

# Groups that accept new keys, as patterns over config paths.
OPEN = re.compile(
    r"(objective|weighting|data|optim|bilevel\.optim|roles\.\w+)\.kwargs(\..+)?"
    r"|data\.transform_kwargs(\..+)?|data\.corrupt(\..+)?"
    r"|optim\.schedule_kwargs(\..+)?|evaluators(\..+)?"
    r"|study\.arms(\..+)?|study\.(tuned|published|questions)|roles"
)

# Groups whose entries are groups: `none` deletes an entry.
ENTRIES = ("roles", "evaluators", "data.transform_kwargs", "study.arms")


def role(model: str = "", **kwargs: Any) -> ConfigDict:
    """Returns the config of one network.

    Args:
      model: name of a module in `distill_jax.models`, or `package.module:Symbol`. May stay empty
        for a moving average, which has the architecture of its source, and for a role with
        `init`, which has that of its run or file.
      **kwargs: keyword arguments of the model.
    """
    config = ConfigDict()
    config.model = model
    config.kwargs = ConfigDict(kwargs)
    config.init = config_dict.placeholder(str)  # checkpoint, run folder or weights to start from
    config.frozen = False  # never trained: a teacher
    config.ema_of = config_dict.placeholder(str)  # role whose moving average this one is
    config.decay = 0.996  # of the moving average, per step
    config.decay_schedule = "constant"  # constant | cosine | linear: up to 1 at the end
    config.lock()
    config.kwargs.unlock()
    return config


def base() -> ConfigDict:
    """Returns every key with its default; locked but for the open groups.

    A duration is a number of steps, or one of "500 steps", "20 epochs", "100000 examples" and, but
    for `total`, "10 %" of training.
    """
    config = ConfigDict()
    config.seed = 0  # of initialization, order and augmentation
    config.batch_size = 128  # examples per step, over all devices
    config.total = config_dict.placeholder(object)  # length of training, a duration
    config.accum_steps = 1  # micro-batches per step; divides batch_size
    config.precision = "float32"  # compute type: float32 | bfloat16; parameters stay float32
    # float64 computes and keeps everything in it: to compare meshes, not to train

    config.objective = ConfigDict()
    config.objective.name = ""  # module in distill_jax.objectives, or package.module:Symbol
    config.objective.kwargs = ConfigDict()  # open: keyword arguments of the objective

    config.weighting = ConfigDict()
    config.weighting.name = ""  # module in distill_jax.weighting; empty keeps fixed coefficients
    config.weighting.kwargs = ConfigDict()  # open: keyword arguments of the weighting
    config.weighting.loss_terms = (
        "cross_entropy",
        "distillation",
    )  # terms that it weighs, in order
    config.weighting.control = "none"  # none | frozen | joint | shuffled | batch_mean
    config.weighting.stop_features = True  # what it sees has no gradient to the student

    config.bilevel = ConfigDict()  # how a weighting learns from the held-out part
    config.bilevel.method = "exact"  # exact | finite_difference | last_layer
    config.bilevel.outer_update = "after_step"  # after_step | lookahead: from a step tried first
    config.bilevel.every = 1  # student steps between two of the weighting
    config.bilevel.warmup = config_dict.placeholder(object)  # a duration before its first
    config.bilevel.outer_batch = 1.0  # held-out examples a step, as a share of batch_size
    config.bilevel.outer_loss = ("cross_entropy",)  # terms whose sum the held-out part judges by
    config.bilevel.jvp_fraction = 1.0  # share 1/m of the training batch in the forward-mode product
    config.bilevel.unroll = 1  # inner steps that the gradient goes through
    config.bilevel.low_memory = False  # a forward pass more instead of activations kept
    config.bilevel.optim = ConfigDict()
    config.bilevel.optim.name = "adamw"  # as optim.name
    config.bilevel.optim.kwargs = ConfigDict()  # open: keyword arguments of the optimizer
    config.bilevel.optim.lr = 1e-3  # constant
    config.bilevel.optim.weight_decay = 1e-4  # as optim.weight_decay; kernels only

    config.lookahead = ConfigDict()  # virtual steps that advance the moving averages
    config.lookahead.steps = 0  # before each real step; 0 is off
    config.lookahead.kind = "deep"  # deep: on the same batch | wide: on so many batches, averaged
    config.lookahead.restore = "all"  # all | params+opt | params: what they leave no trace in

    config.roles = ConfigDict()  # open: {role: role(model, **kwargs)}

    config.data = ConfigDict()
    config.data.name = ""  # module in distill_jax.data, or package.module:Symbol
    config.data.kwargs = ConfigDict()  # open: keyword arguments of the data set
    config.data.held_out = 0.1  # fraction of the training data kept for selection
    config.data.at_most = 0  # examples of each part that are used; 0 uses all
    config.data.corrupt = ConfigDict()  # open: known faults, keywords of data.corruption.corrupt
    config.data.resident = "auto"  # keep the data on the device: auto | yes | no
    config.data.train_transforms = ()  # make_<name> in distill_jax.data.transforms, in order
    config.data.eval_transforms = ()  # the same for evaluation: those without randomness
    config.data.transform_kwargs = ConfigDict()  # open: {transform: {keyword: value}}

    config.data.views = 0  # augmented views of each example, in turn; 0: a new one every epoch
    config.data.teacher_view = "same"  # as the student's | clean: eval_transforms | independent
    config.data.teacher_shares = ()  # train_transforms whose draws a view of its own shares

    config.cache = ConfigDict()  # answers of frozen networks, stored before training
    config.cache.dir = ""  # their folder; "{seed}" stands for the seed; empty stores nothing
    config.cache.roles = ("teacher",)  # frozen roles that are asked beforehand
    config.cache.outputs = ("logits",)  # what is stored of their outputs
    config.cache.top_k = 0  # store the likeliest classes alone; 0 stores all logits
    config.cache.rest = "spread"  # mass of the other classes: spread evenly | drop
    config.cache.dtype = "float32"  # of stored values: float32 | float16 | bfloat16
    config.cache.teacher = ""  # package.module:Symbol, a function that answers for the one role

    config.optim = ConfigDict()
    config.optim.name = "sgd"  # sgd | momentum | nesterov | adam | adamw | lars | lamb
    config.optim.kwargs = ConfigDict()  # open: keyword arguments of the optimizer
    config.optim.lr = 0.1  # peak learning rate
    config.optim.schedule = "cosine"  # constant | cosine | linear | step | rsqrt
    config.optim.schedule_kwargs = ConfigDict()  # open: keyword arguments of the schedule
    config.optim.warmup = config_dict.placeholder(object)  # a duration: linear from zero
    config.optim.weight_decay = 0.0  # L2 for the SGD family; decoupled for adamw, lamb; not adam
    config.optim.decay_mask = (  # (regex, decayed) over role/path/to/leaf; the first match decides
        (r"/(kernel|embedding)$", True),
        (r".", False),
    )
    config.optim.clip_norm = config_dict.placeholder(float)  # largest global gradient norm

    config.mesh = ConfigDict()
    config.mesh.data = -1  # devices along the batch; -1 takes what is left
    config.mesh.fsdp = 1  # devices that share each large parameter
    config.mesh.model = 1  # devices that share the work on an example, by partition rules
    config.mesh.cpu_devices = 0  # devices to split a CPU into; 0 is automatic

    config.partition = ConfigDict()
    config.partition.rules = ()  # of the state: (regex, (mesh axis or None, ...)) over leaf paths,
    # of which the first match decides, or names of core.partition.RULE_SETS
    config.partition.frozen_rules = ()  # the same for frozen networks, as role/0/path/to/leaf
    config.partition.min_size = 2**14  # smaller parameters are replicated (elements)

    config.eval = ConfigDict()
    config.eval.every = config_dict.placeholder(object)  # a duration; unset: at the end
    config.eval.batch_size = 500  # examples per evaluation step
    config.eval.metric = "held_out/accuracy"  # split/metric that selects the best checkpoint;
    # empty selects none, and goes with data.held_out=0
    config.eval.mode = "max"  # which end of eval.metric is best: max | min

    config.evaluators = ConfigDict()  # open: {module in distill_jax.evaluators: keyword arguments}

    config.log = ConfigDict()
    config.log.every_steps = 50  # steps between two lines of metrics
    config.log.grad_norm = False  # also log the norm of the gradient; costs a pass over it
    config.log.tensorboard = True  # also write TensorBoard events

    config.watch = ConfigDict()  # what a run says of how it is
    config.watch.stall_seconds = 600.0  # nothing done for so long is a stall; 0 is off
    config.watch.on_stall = "report"  # report: write all stacks, go on | exit: with code 70
    config.watch.nonfinite = "stop"  # stop: with code 3 | skip: the step changes nothing
    config.watch.spike = 10.0  # alarm: loss or gradient norm so far above its median; 0 is off

    config.checkpoint = ConfigDict()
    config.checkpoint.every = config_dict.placeholder(object)  # a duration; unset: at the end
    config.checkpoint.keep = 2  # latest checkpoints that stay, beside the best

    config.study = ConfigDict()
    config.study.arms = ConfigDict()  # open: {arm: nested dict of what it changes in this config}
    config.study.tuned = ConfigDict()  # open: {name: arms}; stands for the best of them, held out
    config.study.questions = ConfigDict()  # open: {question: (arm, reference, other arms ...)}
    config.study.published = ConfigDict()  # open: {arm: figure of others, shown beside ours}
    config.study.sources = ()  # arms that others start from and that are not compared
    config.study.title = ""  # of the report
    config.study.seeds = ()  # seeds of every arm
    config.study.replicas = "no"  # seeds and scalars side by side in one program: yes | no | auto
    config.study.reference = ""  # arm that the others are compared with
    config.study.metric = "test/accuracy"  # split/metric that is compared

    return lock(config)


def lock(config: ConfigDict) -> ConfigDict:
    config.lock()
    for path, node in groups(config):
        if OPEN.fullmatch(path):
            node.unlock()
    for group in config.roles.values():
        if isinstance(group, ConfigDict):
            group.lock()
            if isinstance(group.get("kwargs"), ConfigDict):
                group.kwargs.unlock()
    return config


def groups(config: ConfigDict, prefix: str = "") -> Iterator[tuple[str, ConfigDict]]:
    for key, value in config.items():
        if isinstance(value, ConfigDict):
            yield f"{prefix}{key}", value
            yield from groups(value, f"{prefix}{key}.")


def template(config: ConfigDict) -> ConfigDict:
    """Returns `base()` with the roles of `config`: what each closed path may be. Not to change."""
    return _template(tuple(config.get("roles", {})))


@functools.lru_cache(maxsize=64)
def _template(roles: tuple[str, ...]) -> ConfigDict:
    made = base()
    for name in roles:
        made.roles[name] = role()
    return made


CHOICES = {
    "precision": ("float32", "bfloat16", "float64"),
    "data.resident": ("auto", "yes", "no"),
    "data.teacher_view": ("same", "clean", "independent"),
    "cache.rest": ("spread", "drop"),
    "cache.dtype": ("float32", "float16", "bfloat16"),
    "eval.mode": ("max", "min"),
    "study.replicas": ("no", "yes", "auto"),
    "watch.on_stall": ("report", "exit"),
    "watch.nonfinite": ("stop", "skip"),
    "lookahead.kind": ("deep", "wide"),
    "lookahead.restore": ("all", "params+opt", "params"),
}
