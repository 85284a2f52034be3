"""RFC: do found features make invariance penalties depend less on where they start?

  python -m distill_jax.main --mode=study --config=configs/studies/paper_rfc.py \\
      --workdir=runs/paper_rfc

Zhang et al. 2022 (arXiv:2203.15516) on coloured digits, whose colour is reversed in the test part:
chance is 50 %, colour alone 10 %, form alone at most 75 %. Training without penalty for a few
steps, a second round that must succeed where the first fails, and a network that learns the hard
predictions of both. Arms: no penalty (the reference); IRMv1 and V-REx from random weights; IRMv1
from the network without penalty; IRMv1 and V-REx from the found features. Nearly the whole training
part is one batch.
"""

from distill_jax.configs import papers


def get_config():
    config = papers.small("coloured_digits", steps=400, lr=1e-3)
    config.optim.name = "adamw"
    config.optim.weight_decay = 3.0
    config.roles.student.kwargs = {"hidden": (128, 128)}
    config.batch_size = 1200

    def invariant(penalty: str, start: str = "") -> dict:
        kwargs = {"penalty": penalty, "penalty_weight": 1e4}
        arm: dict = {"objective": {"name": "invariance", "kwargs": kwargs}}
        if start:
            arm["roles"] = {"student": {"init": f"arm:{start}"}}
        return arm

    rounds = papers.frozen(teacher1="erm", teacher2="round_1")
    config.study.arms = {
        "erm": {"total": "60 steps"},
        "irm": invariant("irm"),
        "vrex": invariant("vrex"),
        "irm_from_erm": invariant("irm", "erm"),
        "irm_from_found": invariant("irm", "found"),
        "vrex_from_found": invariant("vrex", "found"),
        "round_1": {
            "objective": {"name": "group_dro", "kwargs": {"rounds": 1}},
            "roles": papers.frozen(teacher1="erm"),
        },
        "found": {
            "objective": {"name": "hard_label_heads", "kwargs": {"rounds": 2}},
            "roles": {**rounds, "heads": {"model": "projector", "kwargs": {"features": 4}}},
        },
    }
    config.study.sources = ("round_1", "found")
    config.study.reference = "erm"
    config.study.title = "RFC: invariance from found features"
    return config
