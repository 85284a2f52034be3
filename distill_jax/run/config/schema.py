"""Every key of a config with its default, and the groups that accept new keys."""

import functools
import re
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from ml_collections import config_dict

if TYPE_CHECKING:

    class ConfigDict(config_dict.ConfigDict):
        """The type of a value depends on its key, which a type checker cannot follow."""

        def __getattr__(self, attribute: str) -> Any: ...
        def __getitem__(self, key: str) -> Any: ...
        def get(self, key: str, default: Any = None) -> Any: ...

else:
    ConfigDict = config_dict.ConfigDict

DURATIONS = ("total", "optim.warmup", "bilevel.warmup", "eval.every", "checkpoint.every")
"""Keys that hold a duration: steps as a number, or a text such as "20 epochs"."""

TRANSFORMS = ("train_transforms", "eval_transforms", "teacher_transforms")
"""Keys of `data` that list transforms."""

SPLITS = ("train", "held_out", "test")

LONGEST_NAME = 200
"""Bytes in the name of an arm: file systems allow 255 in the name of a folder."""

# Groups that accept new keys, as patterns over config paths.
OPEN = re.compile(
    r"(objective|weighting|data|optim|bilevel\.optim|roles\.\w+)\.kwargs(\..+)?"
    r"|data\.transform_kwargs(\..+)?|data\.corrupt(\..+)?"
    r"|cache\.teacher_kwargs(\..+)?|optim\.schedule_kwargs(\..+)?|evaluators(\..+)?|log\.to(\..+)?"
    r"|study\.arms(\..+)?|study\.(tuned|fallback|published|questions)|roles"
)

# Groups whose entries are groups: `none` deletes an entry.
ENTRIES = ("roles", "evaluators", "log.to", "data.transform_kwargs", "study.arms")


def role(model: str = "", **kwargs: Any) -> ConfigDict:
    """Returns the config of one network.

    Args:
      model: name of a module in `distill_jax.models`, or `package.module:Symbol`. Leave it empty
        for a moving average, which copies the architecture of its source, or for a role with
        `init`, which takes the architecture from that run or file.
      **kwargs: keyword arguments of the model.
    """
    config = ConfigDict()
    config.model = model
    config.kwargs = ConfigDict(kwargs)
    config.init = config_dict.placeholder(str)  # checkpoint, run folder or weights to start from
    config.frozen = False  # true for a network that is never trained, such as a teacher
    config.freeze = ()  # patterns of parameters that keep their first values: ("stem*", "stage1_*")
    config.classes = ()  # of a frozen network with other classes: its index, or a tuple of indices
    # whose probabilities are summed, for each class of the data; or a file, ("classes.json",)
    config.ema_of = config_dict.placeholder(str)  # this role is the moving average of that role
    config.decay = 0.996  # decay of the moving average, per step
    config.decay_schedule = "constant"  # constant | cosine | linear: the last two end at 1
    config.lock()
    config.kwargs.unlock()
    return config


def base() -> ConfigDict:
    """Returns every key with its default. All groups are locked except the open ones.

    A duration is a number of steps, or a text: "500 steps", "20 epochs", "100000 examples" or
    "10 %" of training. `total` does not accept a percentage.
    """
    config = ConfigDict()
    config.seed = 0  # seed of initialization, order and augmentation
    config.batch_size = 128  # examples per step, over all devices
    config.total = config_dict.placeholder(object)  # length of training, a duration
    config.accum_steps = 1  # micro-batches per step; divides batch_size
    config.precision = "float32"  # compute type: float32 | bfloat16; parameters stay float32
    # float64 computes and stores everything in float64: for comparing meshes, not for training

    config.objective = ConfigDict()
    config.objective.name = ""  # module in distill_jax.objectives, or package.module:Symbol
    config.objective.kwargs = ConfigDict()  # open: keyword arguments of the objective

    config.weighting = ConfigDict()
    config.weighting.name = ""  # module in distill_jax.weighting; empty: fixed coefficients
    config.weighting.kwargs = ConfigDict()  # open: keyword arguments of the weighting
    config.weighting.loss_terms = (
        "cross_entropy",
        "distillation",
    )  # loss terms to weight, in order
    config.weighting.control = "none"  # none | frozen | joint | shuffled | batch_mean
    config.weighting.stop_features = True  # no gradient through its inputs to the student

    config.bilevel = ConfigDict()  # how a weighting learns from the held-out part
    # through one step: exact | finite_difference | last_layer; over a longer horizon, see
    # core.horizon: neumann | cg | truncated | two_speed
    config.bilevel.method = "exact"
    config.bilevel.outer_update = "after_step"  # after_step | lookahead: after a trial step
    config.bilevel.every = 1  # student steps between two steps of the weighting
    config.bilevel.warmup = config_dict.placeholder(object)  # a duration before the first of them
    config.bilevel.outer_batch = 1.0  # held-out examples per step, as a share of batch_size
    config.bilevel.outer_loss = ("cross_entropy",)  # terms whose sum is the held-out loss
    config.bilevel.jvp_fraction = 1.0  # share 1/m of the training batch in the forward-mode product
    config.bilevel.unroll = 1  # inner steps ahead that the exact gradient goes through
    config.bilevel.horizon = 1  # terms of neumann, steps of cg, last steps of truncated
    config.bilevel.damping = 0.0  # added to the diagonal of the Hessian by neumann and cg
    config.bilevel.forget = 1.0  # factor of the tangents of two_speed in each step; 1 keeps all
    config.bilevel.low_memory = False  # recompute activations in an additional forward pass
    config.bilevel.optim = ConfigDict()
    config.bilevel.optim.name = "adamw"  # as optim.name
    config.bilevel.optim.kwargs = ConfigDict()  # open: keyword arguments of the optimizer
    config.bilevel.optim.lr = 1e-3  # constant learning rate; that of adamw need not follow horizon
    config.bilevel.optim.weight_decay = 1e-4  # as optim.weight_decay; kernels only

    config.lookahead = ConfigDict()  # virtual steps that advance the moving averages
    config.lookahead.steps = 0  # virtual steps before each real step; 0 is off
    config.lookahead.kind = "deep"  # deep: on one batch | wide: on several batches, averaged
    config.lookahead.restore = "all"  # restored after them: all | params+opt | params

    config.roles = ConfigDict()  # open: {role: role(model, **kwargs)}

    config.data = ConfigDict()
    config.data.name = ""  # module in distill_jax.data, or package.module:Symbol
    config.data.kwargs = ConfigDict()  # open: keyword arguments of the data set
    config.data.held_out = 0.1  # fraction of the training data kept for selection
    # share of the held-out part that a weighting learns from; the rest selects. Unset: 0.5 where a
    # weighting learns, else 0; with 0 the whole part has both uses
    config.data.outer = config_dict.placeholder(float)
    config.data.at_most = 0  # most examples of each part to use; 0 uses all
    config.data.corrupt = ConfigDict()  # open: known faults; keywords of data.corruption.corrupt
    config.data.resident = "auto"  # keep the data on the device: auto | yes | no
    config.data.train_transforms = ()  # make_<name> in distill_jax.data.transforms, in order
    config.data.eval_transforms = ()  # transforms of evaluation; they must not be random
    # of a teacher's own view, in training and evaluation, not random; empty: see teacher_view.
    # "card:ROLE" prepares images as the card of the weights in roles.ROLE.init says
    config.data.teacher_transforms = ()
    config.data.transform_kwargs = ConfigDict()  # open: {transform: {keyword: value}}

    config.data.views = 0  # augmented views of each example, cycled; 0: a new view every epoch
    config.data.teacher_view = "same"  # same as the student | clean: eval_transforms | independent
    config.data.teacher_shares = ()  # train_transforms with the same draw in both views

    config.cache = ConfigDict()  # outputs of frozen networks, stored before training
    config.cache.dir = ""  # folder of the outputs; "{seed}" is replaced; empty stores nothing
    config.cache.roles = ("teacher",)  # frozen roles whose outputs are stored
    config.cache.outputs = ("logits",)  # names of the outputs to store
    config.cache.top_k = 0  # store only this many most likely classes; 0 stores all logits
    config.cache.rest = "spread"  # probability of the other classes: spread evenly | drop
    config.cache.dtype = "float32"  # type of stored values: float32 | float16 | bfloat16
    config.cache.teacher = ""  # package.module:Symbol | file.onnx | package:NAME, in its place
    config.cache.teacher_kwargs = ConfigDict()  # open: of an ONNX file, weights.onnx_teacher

    config.optim = ConfigDict()
    config.optim.name = "sgd"  # sgd | momentum | nesterov | adam | adamw | lars | lamb
    config.optim.kwargs = ConfigDict()  # open: keyword arguments of the optimizer
    config.optim.lr = 0.1  # peak learning rate
    config.optim.schedule = "cosine"  # constant | cosine | linear | step | rsqrt
    config.optim.schedule_kwargs = ConfigDict()  # open: keyword arguments of the schedule
    config.optim.warmup = config_dict.placeholder(object)  # duration of a linear rise from zero
    config.optim.weight_decay = 0.0  # L2 for the SGD family; decoupled for adamw, lamb; not adam
    config.optim.decay_mask = (  # (regex, decayed) over role/path/to/leaf; the first match applies
        (r"/(kernel|embedding)$", True),
        (r".", False),
    )
    config.optim.lr_by_layer = ()  # (regex, factor of the rate) over role/path/to/leaf; first match
    config.optim.layer_decay = 1.0  # factor of the rate of each block to that of the one behind it
    config.optim.clip_norm = config_dict.placeholder(float)  # largest global gradient norm

    config.mesh = ConfigDict()
    config.mesh.data = -1  # devices along the batch; -1 takes the remaining devices
    config.mesh.fsdp = 1  # devices over which each large parameter is sharded
    config.mesh.model = 1  # devices over which partition rules split the work on one example
    config.mesh.cpu_devices = 0  # devices to split a CPU into; 0 is automatic

    config.partition = ConfigDict()
    config.partition.rules = ()  # for the state: (regex, (mesh axis or None, ...)) over leaf paths,
    # the first match applies; or names of core.partition.RULE_SETS; or "networks": their own rules
    config.partition.frozen_rules = ()  # the same for frozen networks, over role/0/path/to/leaf
    config.partition.min_size = 2**14  # elements; smaller parameters are replicated

    config.eval = ConfigDict()
    config.eval.every = config_dict.placeholder(object)  # a duration; unset: only at the end
    config.eval.batch_size = 500  # examples per evaluation step
    config.eval.metric = "held_out/accuracy"  # split/metric that selects the best checkpoint;
    # leave it empty with data.held_out=0: nothing is selected
    config.eval.mode = "max"  # whether the best value is the largest or the smallest: max | min

    config.evaluators = ConfigDict()  # open: {module in distill_jax.evaluators: keyword arguments}

    config.log = ConfigDict()
    config.log.every_steps = 50  # steps between two lines of metrics
    config.log.grad_norm = False  # also log the norm of the gradient; costs a pass over it
    config.log.tensorboard = True  # also write TensorBoard events
    config.log.images = 0  # training images shown there as steps see them, at the start and at
    # evaluations; 0: none
    config.log.to = ConfigDict()  # open: {wandb | mlflow | trackio: keyword arguments}; each is
    # sent the metrics by a process of its own, which the run does not wait for (docs/loggers.md)

    config.watch = ConfigDict()  # monitoring of a run
    config.watch.stall_seconds = 600.0  # seconds without progress that count as a stall; 0 is off
    config.watch.on_stall = "report"  # report: write all stacks and continue | exit: with code 70
    config.watch.nonfinite = "stop"  # stop: with code 3 | skip: discard the step
    config.watch.spike = 10.0  # alarm at this many deviations above the median; 0 is off

    config.checkpoint = ConfigDict()
    config.checkpoint.every = config_dict.placeholder(object)  # a duration; unset: only at the end
    config.checkpoint.keep = 2  # number of latest checkpoints to keep, beside the best

    config.study = ConfigDict()
    config.study.arms = ConfigDict()  # open: {arm: nested dict of its changes to this config}
    config.study.tuned = ConfigDict()  # open: {name: arms}; the best of them on held-out data
    config.study.tuned_by = "mean"  # the best mean over seeds | seed: the best in each seed
    # open: {name: (arm, other)}: in each seed the arm, where it has more of the selecting examples
    # right than the other by so many standard errors of the paired difference; else the other
    config.study.fallback = ConfigDict()
    config.study.fallback_margin = 1.0
    config.study.questions = ConfigDict()  # open: {question: (arm, reference, other arms ...)}
    config.study.published = ConfigDict()  # open: {arm: published figure, shown beside ours}
    config.study.sources = ()  # arms that other arms start from; they are not compared
    config.study.title = ""  # title of the report
    config.study.seeds = ()  # seeds of every arm
    config.study.replicas = "no"  # one program for seeds and scalars, side by side: yes | no | auto
    config.study.reference = ""  # arm that the other arms are compared with
    config.study.metric = "test/accuracy"  # split/metric to compare

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
    """Returns `base()` with the roles of `config`. It is cached: do not change it."""
    return _template(tuple(config.get("roles", {})))


@functools.lru_cache(maxsize=64)
def _template(roles: tuple[str, ...]) -> ConfigDict:
    config = base()
    for name in roles:
        config.roles[name] = role()
    return config


CHOICES = {
    "precision": ("float32", "bfloat16", "float64"),
    "data.resident": ("auto", "yes", "no"),
    "data.teacher_view": ("same", "clean", "independent"),
    "cache.rest": ("spread", "drop"),
    "cache.dtype": ("float32", "float16", "bfloat16"),
    "eval.mode": ("max", "min"),
    "study.replicas": ("no", "yes", "auto"),
    "study.tuned_by": ("mean", "seed"),
    "watch.on_stall": ("report", "exit"),
    "watch.nonfinite": ("stop", "skip"),
    "lookahead.kind": ("deep", "wide"),
    "lookahead.restore": ("all", "params+opt", "params"),
}
