"""Meta-DMoE: does a student that learned to be taught by experts adapt to a new domain?

  python -m distill_jax.main --mode=study --config=configs/studies/paper_meta_dmoe.py \\
      --workdir=runs/paper_meta_dmoe

Zhong et al. 2022 (arXiv:2210.03885) on digits turned by eight angles, two for each of four experts;
tested are four other angles, one of them beyond. Arms: all domains together (the reference), that
for longer, the method, the method with the domain's own expert kept in training, and the method
without the step at the test domain. The predictions of an adapted student see the images that they
are for, without labels. The student starts from the reference; the aggregator from scratch.
"""

from distill_jax.configs import papers


def get_config():
    config = papers.small("rotated_digits", steps=300, lr=1e-3)
    config.optim.name = "adam"
    config.roles.student.kwargs = {"hidden": (128, 64)}
    config.batch_size = 1024
    experts = {f"teacher{j + 1}": f"expert_{j + 1}" for j in range(4)}

    def meta(role: str = "prediction", **kwargs) -> dict:
        sizes = {"experts": 4, "domains": 8, "test_domains": 4, "inner_lr": 1.0}
        return {
            "objective": {"name": "meta_dmoe", "kwargs": {**sizes, **kwargs}},
            "roles": {
                "student": {"init": "arm:erm"},
                **papers.frozen(**experts),
                "aggregator": {"model": "expert_aggregator", "kwargs": {"heads": 4}},
            },
            "evaluators": {"classification": {"role": role}},
        }

    def expert(j: int) -> dict:
        of_two = {"kwargs": {"keep": (2 * j, 2 * j + 1)}}
        return {"data": of_two, "batch_size": 256, "total": "200 steps"}

    config.study.arms = {
        "erm": {},
        "erm_longer": {"roles": {"student": {"init": "arm:erm"}}},
        "meta": meta(),
        "meta_all_experts": meta(leave_out=False),
        "meta_not_adapted": meta("student"),
        **{f"expert_{j + 1}": expert(j) for j in range(4)},
    }
    config.study.sources = tuple(experts.values())
    config.study.reference = "erm"
    config.study.title = "Meta-DMoE: adapting to new domains"
    return config
