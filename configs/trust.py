"""Arms of the studies of learned trust: the same for every task, so that budgets are equal."""

from collections.abc import Mapping
from typing import Any

ALPHA = "objective.kwargs.alpha"
PERCENT = (10, 30, 50, 70, 90)
SCENARIOS = {
    "class": {"teacher_damage": 0.3, "teacher_damage_kind": "class"},
    "random": {"teacher_damage": 0.3, "teacher_damage_kind": "random"},
    "noisy": {"label_noise": 0.3},
}
"""A teacher that is wrong on 30 % of the classes, or of the examples; 30 % wrong labels."""

OUTLIERS = {"outliers": {"outliers": 0.1}}
"""Noise images with random labels among the training images, a tenth of their number."""


def kd(alpha: float | str, *, temperature: float) -> dict:
    """Distillation at a constant ratio."""
    return {
        "objective": {"name": "kd", "kwargs": {"temperature": temperature, "alpha": alpha}},
        "roles": {"teacher": {"init": "arm:teacher", "frozen": True}},
    }


def weighted(name: str, *, temperature: float, control: str = "none", **kwargs) -> dict:
    """Distillation with a weighting that has no network."""
    arm = kd(0.5, temperature=temperature)
    arm["weighting"] = {"name": name, "kwargs": kwargs, "control": control}
    return arm


def with_network(arm: dict, model: str, **kwargs) -> dict:
    """Gives the weighting of an arm a network, and a picture of what it does."""
    roles = {**arm["roles"], "weighting": {"model": model, "kwargs": kwargs}}
    return {**arm, "roles": roles, "evaluators": {"trust": {}}}


def arms(*, teacher: dict, temperature: float, hidden: tuple[int, ...], full: bool) -> dict:
    """Returns the arms of a study.

    Args:
      teacher: what the teacher's run changes in the config.
      temperature: of every distillation term.
      hidden: hidden widths of the ratio network.
      full: all arms; otherwise those that tell whether trust mattered under a fault.
    """
    t = temperature

    def tgeo(control: str = "none", **network) -> dict:
        arm = weighted("trilateral", temperature=t, control=control)
        return with_network(arm, "ratio_mlp", hidden=hidden, **network)

    mwn = weighted("meta_weight_net", temperature=t)
    found = {"alone": {}}
    found |= {f"kd_{p}": kd(p / 100, temperature=t) for p in percent(full)}
    found |= {
        "ada_sample": weighted("teacher_margin", temperature=t, granularity="sample"),
        "wsl": weighted("wsl", temperature=t),
        "rw": _every_step(weighted("reweight", temperature=t, normalize="loss_terms")),
        "mwn": with_network(mwn, "ratio_mlp", outputs=2, hidden=(100,)),
        "tgeo": tgeo(),
        "tgeo_frozen": tgeo("frozen", zero_init=False),
        "tgeo_shuffled": tgeo("shuffled"),
    }
    found |= {f"kd_{p}_more": _with_outer(kd(p / 100, temperature=t)) for p in percent(full)}
    if full:
        found |= {
            "annealed": weighted("annealed", temperature=t),
            "ada_class": weighted("teacher_margin", temperature=t, granularity="class"),
            "l2rw": _every_step(weighted("reweight", temperature=t, normalize="batch")),
            "tgeo_batch_mean": tgeo("batch_mean"),
            "tgeo_joint": tgeo("joint"),
        }
        whole = ("alone", "kd_50", "kd_90", "ada_sample", "wsl", "annealed", "tgeo_joint")
        found |= {f"{name}_all_data": _all_data(found[name]) for name in whole}
    return {**found, "teacher": teacher}


def around(
    constant: str = "kd_tuned",
    *,
    temperature: float,
    hidden: tuple[int, ...],
    control: str = "none",
    **network: Any,
) -> dict:
    """TGeo-KD around a tuned constant: only differences between examples are learned."""
    centre = _tuned(ALPHA, constant)
    arm = weighted("trilateral", temperature=temperature, control=control, centre=centre)
    return with_network(arm, "ratio_mlp", hidden=hidden, **network)


def tuned_more(
    *settings: str, temperature: float, corrupt: Mapping[str, Any] | None = None
) -> dict:
    """The constant `kd_tuned` with the outer examples in its training part.

    Args:
      *settings: config paths, besides the ratio, in which the arms of `kd_tuned` differ.
      temperature: of the distillation term.
      corrupt: faults of the data.
    """
    arm = kd(_tuned(ALPHA), temperature=temperature)
    arm["data"] = {"corrupt": {**(corrupt or {}), "train_on_outer": "added"}}
    for path in settings:
        group, _, key = path.rpartition(".")
        node = arm.setdefault(group, {}) if group else arm
        node[key] = _tuned(path)
    return arm


def _tuned(path: str, constant: str = "kd_tuned") -> str:
    return f"setting:{constant}#{path}"


def percent(full: bool) -> tuple[int, ...]:
    """Returns the constant ratios that are tried."""
    return PERCENT if full else PERCENT[::2]


def tuned(*, full: bool) -> dict:
    """The constant ratio that the held-out part prefers; it has the budget of all of them.

    `kd_tuned_more` has also trained on the examples from which a learned ratio learns.
    """
    return {
        "kd_tuned": tuple(f"kd_{p}" for p in percent(full)),
        "kd_tuned_more": tuple(f"kd_{p}_more" for p in percent(full)),
    }


def _every_step(arm: dict) -> dict:
    """Weights by gradient are taken anew in every step."""
    return {**arm, "bilevel": {"every": 1, "warmup": None}}


def _with_outer(arm: dict) -> dict:
    """Gives the examples that weightings learn from to an arm that would leave them unused."""
    return {**arm, "data": {"corrupt": {"train_on_outer": "added"}}}


def _all_data(arm: dict) -> dict:
    """Gives the held-out part back to an arm that learns nothing from it: last state, no choice."""
    return {**arm, "data": {"held_out": 0.0, "outer": 0.0}, "eval": {"metric": ""}}
