"""Faults that other programs train with in silence, each as one command line, and what is expected.

Every fault is named for where it was reported or read: an issue of a public repository, or its
code. `tests/faulty.py` has the networks, objectives and data that commit one. `make` writes what
several start from, a teacher that has seen no step. Tests and `benchmarks/silent_faults.py` share
this corpus.
"""

import json
import pathlib
from typing import NamedTuple

import jax

from distill_jax.run import build, flags, workdir
from distill_jax.run import config as config_lib
from distill_jax.trainer.io import checkpoint

HERE = "tests.faulty"
SUPERVISED = "configs/distill/supervised.py:smoke"
KD = "configs/distill/kd.py:smoke"
TGEO = "configs/bilevel/tgeo_kd.py:smoke"
SIMCLR = "configs/ssl/simclr.py:smoke"


class Fault(NamedTuple):
    """A fault.

    Attributes:
      name: what is wrong, in a few words.
      source: where it was seen.
      config: the config that it is put into.
      overrides: what puts it there; `{tmp}` is the folder that `make` filled.
      expected: "refused", "warned", or "silent" where it cannot be found before training.
      message: words that the message must have.
    """

    name: str
    source: str
    config: str
    overrides: tuple[str, ...]
    message: tuple[str, ...] = ()
    expected: str = "refused"


def make(folder: pathlib.Path) -> None:
    """Writes a teacher of each kind, untrained but for the record of what it saw."""
    config = config_lib.override(
        flags.load(SUPERVISED), {"roles.student.model": f"{HERE}:plain", "mesh.data": 1}
    )
    experiment = build.build(config)
    state = build.initial_state(experiment, jax.random.key(0), config)
    names = list(experiment.dataset.classes)

    def teacher(name, changes=None, *, classes=names, accuracy=0.9):
        changed = config_lib.override(config, changes or {})
        (folder / name).mkdir()
        workdir.describe(changed, folder / name, {}, 0)
        meta = {"config": json.loads(config_lib.to_json(changed)), "metrics": {}}
        saver = checkpoint.Checkpointer(folder / name / "checkpoints", mode="max")
        saver.save(state, meta, metric=accuracy)
        saver.close()
        best = {"step": 0, "held_out/accuracy": accuracy}
        result = {"status": "done", "classes": classes, "best": best}
        workdir.write_json(folder / name / "result.json", result)

    teacher("teacher")
    teacher("other_inputs", {"data.transform_kwargs.normalize.mean": (0.5,)})
    teacher("other_order", classes=names[::-1])
    teacher("chance", accuracy=0.25)
    teacher("begun", {"batch_size": 16})
    (folder / "begun" / "result.json").unlink()


OWN = (f"objective.name={HERE}:Own", f"roles.student.model={HERE}:normalized")
OWN_KD = (f"objective.name={HERE}:OwnKD", f"roles.student.model={HERE}:plain")
TEACHER = ("roles.teacher.model=", "roles.teacher.init={tmp}/teacher")
AVERAGE = ("roles.teacher.frozen=false", "roles.teacher.init=none", "roles.teacher.model=")
MEAN_TEACHER = (*AVERAGE, "roles.teacher.ema_of=student")


def own(fault: str, *more: str) -> tuple[str, ...]:
    return (*OWN, f"objective.kwargs.fault={fault}", *more)


def data(name: str) -> tuple[str, ...]:
    return (f"data.name={HERE}:{name}", "data.kwargs={}", "roles.student.kwargs.num_classes=4")


FAULTS = (
    # Keys that nothing reads.
    Fault(
        "a key that does not exist",
        "facebookresearch/vjepa2#47: anneal_ckpt is ignored",
        KD,
        (*TEACHER, "roles.student.anneal_ckpt=runs/x"),
        ("anneal_ckpt",),
    ),
    Fault(
        "options under the group of another method",
        "public code of a prompt-mixture method: keys under MoELASP, code reads MoCoOp",
        KD,
        (*TEACHER, "weighting.kwargs.prompts=4"),
        ("nothing reads it", "weighting"),
    ),
    Fault(
        "bilevel options without a bilevel method",
        "uvm-neurobotics-lab/ANML#3: the second-order term is absent",
        KD,
        (*TEACHER, "bilevel.outer_update=lookahead"),
        ("nothing reads it", "no weighting"),
    ),
    Fault(
        "an average's rate on a network that is no average",
        "galilai-group/stable-pretraining#302: teacher updates",
        SUPERVISED,
        ("roles.student.decay=0.99",),
        ("student is no moving average",),
    ),
    Fault(
        "arguments of a network that comes from elsewhere",
        "AI-Hypercomputer/maxtext documentation: overrides reach the student alone",
        KD,
        (*TEACHER, "roles.teacher.kwargs.widths=(4,)"),
        ("no model is named",),
    ),
    Fault(
        "seeds of a study in a single run",
        "megvii-research/mdistiller#51: which seed",
        SUPERVISED,
        ("study.seeds=0,1,2",),
        ("there are no arms",),
    ),
    Fault(
        "a temperature that no term has",
        "facebookresearch/vjepa2#47, in an objective's arguments",
        KD,
        (*OWN_KD, *TEACHER, "objective.kwargs.temperature=2.0"),
        ("temperature", "does not read it"),
    ),
    # Gradients that are zero.
    Fault(
        "a ratio that does not depend on its network",
        "public code of TGeo-KD: the fusion network has no gradient",
        TGEO,
        (*TEACHER, f"roles.weighting.model={HERE}:blind_ratio", "roles.weighting.kwargs={}"),
        ("reaches no weight",),
    ),
    Fault(
        "a weighting that waits longer than training",
        "public code of TGeo-KD: the outer variables see nothing",
        TGEO,
        (*TEACHER, "bilevel.warmup=40"),
        ("would never learn",),
    ),
    Fault(
        "a weighting of learning rate zero",
        "public code of TGeo-KD: the outer variables see nothing",
        TGEO,
        (*TEACHER, "bilevel.optim.lr=0"),
        ("would never learn",),
    ),
    Fault(
        "a solver without implicit gradient",
        "patrick-kidger/optimistix#54: meta-gradients are zero",
        SUPERVISED,
        (f"roles.student.model={HERE}:implicit",),
        ("could never learn", "pull"),
    ),
    Fault(
        "rounding without a straight-through gradient",
        "method cards: quantized students",
        SUPERVISED,
        (f"roles.student.model={HERE}:quantized",),
        ("could never learn", "kernel"),
    ),
    Fault(
        "the error rate as a loss",
        "method cards: hard predictions as a signal",
        SUPERVISED,
        own("hard"),
        ("could never learn",),
    ),
    Fault(
        "features are scaled and passed on unscaled",
        "a public re-implementation: the classifier sees the features before normalization",
        SUPERVISED,
        (f"roles.student.model={HERE}:unscaled",),
        ("scale", "could never learn"),
    ),
    Fault(
        "evaluation of a head that nothing trains",
        "vturrisi/solo-learn#221: which evaluation is it",
        SIMCLR,
        ("roles.student.kwargs.num_classes=4", "evaluators.classification.role=student"),
        ("gets no gradient",),
    ),
    # Losses.
    Fault(
        "a network that returns probabilities",
        "public code of TGeo-KD and an early keras.Distiller: a softmax of a softmax",
        SUPERVISED,
        (f"roles.student.model={HERE}:probabilities",),
        ("probabilities already",),
    ),
    Fault(
        "a loss that takes a softmax of a softmax",
        "public code of TGeo-KD: cross-entropy of softmax outputs",
        SUPERVISED,
        own("softmax"),
        ("takes a softmax of a softmax",),
    ),
    Fault(
        "a column of losses",
        "public code of TGeo-KD on CIFAR-100: the ratio broadcasts",
        SUPERVISED,
        own("column"),
        ("not one value per example",),
    ),
    Fault(
        "a term of weight zero with a teacher",
        "AI-Hypercomputer/maxtext: beta cannot rise from 0",
        KD,
        (*TEACHER, "objective.kwargs.alpha=0.0"),
        ("has weight 0",),
    ),
    Fault(
        "a ramp that begins after the end",
        "HobbitLong/RepDistiller#10: a schedule of another length",
        SUPERVISED,
        own("late"),
        ("'late' is 0 at each",),
    ),
    Fault(
        "a warmup that is longer than training",
        "NVlabs-style recipes on short runs",
        SUPERVISED,
        ("optim.warmup=40",),
        ("warmup of 40",),
    ),
    Fault(
        "a teacher that no term uses",
        "method cards: a term that was commented out",
        KD,
        (*OWN_KD, *TEACHER, "objective.kwargs.fault=unused"),
        ("depends on teacher",),
    ),
    # Batch statistics and averages.
    Fault(
        "a teacher in training mode",
        "public code of FST and method cards: teacher statistics of the student's batch",
        KD,
        (
            *OWN_KD,
            "objective.kwargs.fault='training mode'",
            "roles.teacher.kwargs={}",
            f"roles.teacher.model={HERE}:normalized",
            "roles.teacher.init={tmp}/teacher",
        ),
        ("frozen", "training mode"),
    ),
    Fault(
        "statistics that never move",
        "public code of Meta-DMoE: all networks in evaluation mode",
        SUPERVISED,
        own("evaluating"),
        ("never called in training mode",),
    ),
    Fault(
        "statistics that are dropped",
        "public code of FST: running statistics are not restored",
        SUPERVISED,
        own("'state dropped'"),
        ("does not return",),
    ),
    Fault(
        "a batch of one under batch norm",
        "method cards: per-device batches of one",
        SUPERVISED,
        (*OWN, "batch_size=1", "mesh.data=1"),
        ("statistics of one example",),
    ),
    Fault(
        "accumulation of a loss between examples",
        "lightly-ai/lightly#1528: gradients of gathered batches",
        SIMCLR,
        ("accum_steps=4",),
        ("couples the examples",),
    ),
    Fault(
        "an average that never moves",
        "galilai-group/stable-pretraining#308",
        KD,
        (*MEAN_TEACHER, "roles.teacher.decay=1.0"),
        ("never move",),
    ),
    Fault(
        "an average that is its source",
        "galilai-group/stable-pretraining#317",
        KD,
        (*MEAN_TEACHER, "roles.teacher.decay=0.0"),
        ("be its source",),
    ),
    # Data.
    Fault(
        "validation on the test part",
        "public code of T-JEPA: validation is the test part where its share is 0",
        SUPERVISED,
        data("held_out_is_test"),
        ("held_out and in the test",),
    ),
    Fault(
        "validation on training examples",
        "public code of a weak-to-strong method: overlapping splits",
        SUPERVISED,
        data("held_out_in_train"),
        ("train and in the held_out",),
    ),
    Fault(
        "a test part that is a copy",
        "public code of a curriculum method: trains on the test images",
        SUPERVISED,
        data("test_copied_from_train"),
        ("are in the training part too",),
    ),
    Fault(
        "selection on the test part",
        "public code for ANIMAL-10N: validates in the test folder",
        SUPERVISED,
        ("eval.metric=test/accuracy",),
        ("never to select",),
    ),
    Fault(
        "labels shifted by one",
        "lightly-ai/lightly#1177",
        SUPERVISED,
        data("shifted_labels"),
        ("label 4",),
    ),
    Fault(
        "mixed images with labels before mixing",
        "public code of PS-KD: stored predictions of mixed images",
        SUPERVISED,
        own("nothing", "data.train_transforms=random_crop,normalize,mixup"),
        ("before mixing",),
    ),
    Fault(
        "hidden labels that are read",
        "method cards: semi-supervised baselines",
        SUPERVISED,
        own("nothing", "data.corrupt.labels_per_class=4"),
        ("labels that are hidden",),
    ),
    Fault(
        "normalization in training alone",
        "PaddlePaddle/PaddleClas#1608: low accuracy on own data",
        SUPERVISED,
        ("data.eval_transforms=()",),
        ("'normalize'", "eval_transforms"),
    ),
    Fault(
        "normalization in grey levels",
        "PaddlePaddle/PaddleClas#1608: low accuracy on own data",
        SUPERVISED,
        (
            "data.transform_kwargs.normalize.mean=(73.0,)",
            "data.transform_kwargs.normalize.std=(90.0,)",
        ),
        ("grey levels",),
    ),
    Fault(
        "augmented evaluation",
        "vturrisi/solo-learn#372",
        SUPERVISED,
        ("data.eval_transforms=random_crop,normalize",),
        ("draws random numbers",),
    ),
    Fault(
        "a transform listed twice",
        "PaddlePaddle/PaddleClas#1608",
        SUPERVISED,
        ("data.train_transforms=normalize,random_crop,normalize",),
        ("listed twice",),
    ),
    # Teachers.
    Fault(
        "another number of classes",
        "huggingface/trl#2215, arcee-ai/DistillKit#7: vocabularies differ",
        KD,
        (*TEACHER, "roles.student.kwargs.num_classes=5"),
        ("the student 5",),
    ),
    Fault(
        "a teacher without weights",
        "PaddlePaddle/PaddleClas#1608: unloaded weights",
        KD,
        ("roles.teacher.init=none",),
        ("without weights",),
    ),
    Fault(
        "a teacher asked about other inputs",
        "PaddlePaddle/PaddleClas#1608: wrong normalization",
        KD,
        ("roles.teacher.model=", "roles.teacher.init={tmp}/other_inputs"),
        ("was evaluated on inputs",),
    ),
    Fault(
        "a teacher of classes in another order",
        "yoshitomo-matsubara/torchdistill#427: a teacher from elsewhere",
        KD,
        ("roles.teacher.model=", "roles.teacher.init={tmp}/other_order"),
        ("another order",),
    ),
    Fault(
        "a teacher's view that it never sees",
        "public code of FKD: the stored crop and the student's",
        KD,
        (*OWN_KD, *TEACHER, 'objective.kwargs.fault="student\'s view"', "data.teacher_view=clean"),
        ("never uses",),
    ),
    Fault(
        "another batch size on resume",
        "facebookresearch/ijepa#35: the batch changes",
        SUPERVISED,
        ("workdir={tmp}/begun",),
        ("holds a run of another config", "batch_size"),
    ),
    # Doubts.
    Fault(
        "an average slower than training",
        "public code of MoCo on short runs: 0.999 in a few hundred steps",
        KD,
        (*MEAN_TEACHER, "roles.teacher.decay=0.999"),
        ("of what it started from",),
        "warned",
    ),
    Fault(
        "a teacher at chance",
        "PaddlePaddle/PaddleClas#1608",
        KD,
        ("roles.teacher.model=", "roles.teacher.init={tmp}/chance"),
        ("chance is",),
        "warned",
    ),
    Fault(
        "some test examples in the training part",
        "near-duplicates of CIFAR",
        SUPERVISED,
        data("some_repeated"),
        ("8 of 64 examples",),
        "warned",
    ),
    # Beyond structure.
    Fault(
        "a queue that skips every other stripe",
        "public code of LOOK: the pointer advances twice",
        SUPERVISED,
        (f"objective.name={HERE}:SkippingQueue", f"roles.student.model={HERE}:plain"),
        (),
        "silent",
    ),
    Fault(
        "target masks that are all the same",
        "public code of T-JEPA",
        SUPERVISED,
        (f"objective.name={HERE}:SameMasks", f"roles.student.model={HERE}:plain"),
        (),
        "silent",
    ),
)


def argv(fault: Fault, folder: pathlib.Path, workdir: pathlib.Path) -> list[str]:
    """Returns the command line of a fault, of four steps."""
    found = [f"--config={fault.config}", f"--trust={HERE}"]  # networks of teachers
    overrides = [one.replace("{tmp}", str(folder)) for one in fault.overrides]
    own_workdir = [one.partition("=")[2] for one in overrides if one.startswith("workdir=")]
    found.append(f"--workdir={own_workdir[0] if own_workdir else workdir}")
    return found + [f"--config.{one}" for one in overrides if not one.startswith("workdir=")]


def outcome(fault: Fault, code: int, out: str, err: str) -> str:
    """Returns what became of a fault: "refused", "warned", "silent", or how else its command ended.

    Refused and warned of are those whose message has all the words of the fault.

    Args:
      fault: one of `FAULTS`.
      code: exit code of its command line.
      out: what it printed.
      err: what it printed as an error.
    """
    if code == 2 and all(word in err.partition("error: ")[2] for word in fault.message):
        return "refused"
    if code:
        return f"exit {code}"
    lines = [x for x in (out + "\n" + err).splitlines() if x.startswith("warning:")]
    warned = any(all(word in line for word in fault.message) for line in lines)
    return "warned" if warned and fault.message else "silent"
