"""The distillation methods as arms of a study: each with its published weights, times a scale.

The weights of `ab` and `ft` were published for other reductions than the means of ours: there the
scale has more to do (objectives/ab.py, objectives/factor_transfer.py). `cc` is the kernel form, for
which no weight was published as a mean. `dkd` has the largest published beta and a warm-up for
short runs. `review_kd` compares with the teacher's stages behind the activation; published are
those before it. configs/studies/kd_cifar100.py has the published form of these three.
"""

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

TEACHER = {"teacher": {"init": "arm:teacher", "frozen": True}}
HEAD = {
    "teacher_head": {
        "model": "linear_head",
        "init": "arm:teacher#student/Dense_0",
        "frozen": True,
    }
}


@dataclasses.dataclass(frozen=True)
class Method:
    """How a method enters a table.

    Attributes:
      objective: its module.
      kwargs: scale -> keyword arguments; at 1 the weights are the published ones.
      roles: networks beside student and teacher.
      maps: whether it needs feature maps of both networks, which perceptrons do not have.
      equal: whether it needs equal widths of both.
      prediction: whether what it says is not the student's own logits.
      family: "logit", "feature", "relation", "contrast" or "self".
    """

    objective: str
    kwargs: Callable[[float], Mapping[str, Any]]
    roles: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    maps: bool = False
    equal: bool = False
    prediction: bool = False
    family: str = "logit"


def _weight(published: float, **kwargs: Any) -> Callable[[float], Mapping[str, Any]]:
    return lambda scale: {"weight": scale * published, **kwargs}


def _projectors(features: int) -> dict[str, Any]:
    roles = ("projector", "projector_of_teacher")
    return {role: {"model": "projector", "kwargs": {"features": features}} for role in roles}


def _regressor(**kwargs: Any) -> dict[str, Any]:
    kwargs = {"batch_norm": True, "relu": True} | kwargs
    return {"regressor": {"model": "regressor", "kwargs": kwargs}}


POSTERIOR = {"kernel_sizes": (1, 1, 1), "variance": 5.0}
REVIEWED = ("stage1", "stage2", "stage3", "embedding")

METHODS = {
    "kd": Method("kd", lambda s: {"alpha": 0.9 * s}),
    "cross_entropy": Method(
        "divergence",
        _weight(9.0, kind="cross_entropy", label_weight=1.0, temperature=4.0),
    ),
    "reverse_kl": Method(
        "divergence", _weight(9.0, kind="reverse", label_weight=1.0, temperature=4.0)
    ),
    "jeffreys": Method("divergence", _weight(1.0, kind="jeffreys", label_weight=0.0)),
    "js": Method("divergence", _weight(9.0, kind="js", label_weight=1.0, temperature=4.0)),
    "dkd": Method("dkd", _weight(1.0, alpha=1.0, beta=8.0, warmup="2 epochs")),
    "dist": Method("dist", _weight(1.0, beta=2.0, gamma=2.0, temperature=4.0)),
    "standardized": Method("logit_standardization", _weight(9.0)),
    "tf_kd": Method("tf_kd", _weight(1.0), family="self"),
    "fitnet": Method("fitnet", _weight(100.0), _regressor(), maps=True, family="feature"),
    "at": Method("attention_transfer", _weight(1000.0), maps=True, family="feature"),
    "vid": Method(
        "vid",
        _weight(1.0),
        {"posterior": {"model": "regressor", "kwargs": POSTERIOR}},
        maps=True,
        family="feature",
    ),
    "fsp": Method("fsp", _weight(50.0), maps=True, equal=True, family="feature"),
    "ab": Method("ab", _weight(1.0), _regressor(relu=False), maps=True, family="feature"),
    "ft": Method(
        "factor_transfer",
        _weight(200.0),
        {
            "paraphraser": {"model": "paraphraser"},
            "translator": {"model": "translator"},
        },
        maps=True,
        family="feature",
    ),
    "review_kd": Method(
        "review_kd",
        _weight(1.0, student_stages=REVIEWED, teacher_stages=REVIEWED),
        {"fusion": {"model": "review_fusion", "kwargs": {"width": 32}}},
        maps=True,
        family="feature",
    ),
    "srrl": Method(
        "srrl",
        lambda s: {"weight": s, "regression_weight": s},
        _regressor() | HEAD,
        family="feature",
    ),
    "simkd": Method(
        "simkd",
        _weight(1.0, label_weight=0.0),
        _regressor(kernel_sizes=(1, 3, 1), reduction=2) | HEAD,
        maps=True,
        prediction=True,
        family="feature",
    ),
    "rkd": Method("rkd", _weight(1.0), family="relation"),
    "sp": Method("similarity", _weight(3000.0), family="relation"),
    "cc": Method("correlation_congruence", _weight(100.0), family="relation"),
    "pkt": Method("pkt", _weight(30000.0), family="relation"),
    "nst": Method("nst", _weight(50.0), maps=True, family="relation"),
    "ickd": Method("ickd", _weight(2.5), _regressor(relu=False), maps=True, family="relation"),
    "crd": Method(
        "crd",
        _weight(0.8, negatives="memory", num_negatives=1024, class_aware=True),
        _projectors(128),
        family="contrast",
    ),
    "crd_batch": Method("crd", _weight(0.8), _projectors(128), family="contrast"),
}

EIGHT = ("kd", "dkd", "dist", "js", "srrl", "crd_batch", "pkt", "cross_entropy")
"""Methods of different families that need neither feature maps nor a memory."""

GRID = (1.0, 0.1, 0.01)
"""Scales of the published weights that studies compare."""


def arm(name: str, *, scale: float = 1.0, light: bool = False) -> dict[str, Any]:
    """Returns an arm that trains the study's student by a method.

    Args:
      name: of `METHODS`.
      scale: of the published weights.
      light: see `arms`.
    """
    method = METHODS[name]
    roles = {**({} if method.family == "self" else TEACHER), **method.roles}
    if light and name == "ft":
        roles |= {role: {**roles[role], "kwargs": {"depth": 1}} for role in method.roles}
    made: dict[str, Any] = {
        "objective": {"name": method.objective, "kwargs": dict(method.kwargs(scale))}
    }
    if roles:
        made["roles"] = roles
    if method.prediction:
        evaluators = ("classification", "calibration")
        made["evaluators"] = {name: {"role": "prediction"} for name in evaluators}
    return made


def arms(
    *, maps: bool, equal: bool, scales: Mapping[str, float], light: bool = False
) -> dict[str, dict[str, Any]]:
    """Returns an arm for every method that a pair of networks admits.

    Args:
      maps: whether both have feature maps.
      equal: whether both have the same widths.
      scales: of the published weights, 1 where left out.
      light: whether connectors of three convolutions, which would cost more than the student of a
        small table, have one.
    """
    return {
        name: arm(name, scale=scales.get(name, 1.0), light=light)
        for name, method in METHODS.items()
        if (maps or not method.maps) and (equal or not method.equal)
    }
