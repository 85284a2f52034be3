"""Says of each claim that was not confirmed whether that stays so in a longer study.

  python tools/claims_page.py --out=docs/results/papers runs/longer_fst runs/longer_ps_kd_full ...

Reads finished studies of `configs/studies/longer.py`, whose folders end in the name of the paper,
and "_full" where they have all of Fashion-MNIST. Writes the difference of each claim of `CLAIMS`
before (from OUT.json and weak_supervision.json) and after into OUT_longer.json and a table of
OUT.md between two marks. A claim "holds" or is "contradicted" where the 95 % interval of the
paired difference excludes 0.
"""

import argparse
import json
import pathlib
from typing import Any, NamedTuple

import results_page

from distill_jax.report import statistics

MARK = "<!-- claims: tools/claims_page.py -->"
END = "<!-- end of claims -->"


class Claim(NamedTuple):
    """That `arm` minus `minus` is positive, or negative if not `higher`, in a metric."""

    study: str
    text: str
    arm: str
    minus: str
    metric: str = "test/accuracy"
    higher: bool = True


CLAIMS = (
    Claim("ps_kd", "lower NLL than label smoothing", "ps_kd_80", "ls_10", "test/nll", False),
    Claim("ps_kd", "lower ECE than label smoothing", "ps_kd_80", "ls_10", "test/ece", False),
    Claim("ps_kd", "more accurate than cross-entropy", "ps_kd_80", "ce"),
    Claim("sla", "SLA+SD beats a baseline of equal steps", "sla_sd", "baseline"),
    Claim("nested_coteaching", "nested dropout beats dropout", "nested", "dropout"),
    Claim(
        "nested_coteaching",
        "nested dropout before co-teaching beats plain training before it",
        "nested_then_co",
        "ce_then_co",
    ),
    Claim(
        "rad",
        "robust questions beat even draws with a planted teacher",
        "robust_planted",
        "uniform_planted",
    ),
    Claim("ssld", "mined images beat the whole pool", "mined", "everything"),
    Claim("ssld", "two-way divergence beats one-way", "mined", "mined_one_way"),
    Claim("hard", "the guard of the teacher's answer helps", "hard", "hard_unguarded"),
    Claim("fst", "one step ahead beats a faster average", "deep_1", "fresher"),
    Claim("fst", "three steps ahead beat a faster average", "deep_3", "fresher"),
    Claim("fst", "three steps ahead beat the same compute", "deep_3", "same_compute"),
    Claim("rfc", "IRM gains over random weights", "irm_from_found", "irm"),
    Claim("rfc", "IRM gains over plain pretraining", "irm_from_found", "irm_from_erm"),
    Claim("meta_dmoe", "beats plain training", "meta", "erm"),
    Claim("meta_dmoe", "leaving out the domain's own expert helps", "meta", "meta_all_experts"),
    Claim("ferkd", "calibrated crops beat all labels kept", "calibrate", "keep"),
    Claim("ferkd", "discarded crops beat all labels kept", "discard", "keep"),
    Claim(
        "ferkd",
        "both beat labels kept, with a teacher that never saw such crops",
        "over_confident_both",
        "over_confident_keep",
    ),
    Claim("ferkd", "SelfMix adds to both", "self_mix", "both"),
    Claim("weak_to_strong", "the confidence loss beats weak labels alone", "conf_75", "naive"),
    Claim("weak_to_strong", "a learned share beats the schedule", "learned", "conf_75"),
    Claim("weak_to_strong", "and training on the clean images", "learned", "conf_75_clean"),
    Claim(
        "polar",
        "the square is better calibrated than the sum",
        "square",
        "linear",
        "test/risk_ece",
        False,
    ),
    Claim("evidence", "for both sides beats one-sided", "evidence", "one_sided"),
    Claim("evidence", "for both sides beats the answer", "evidence_ensemble", "told"),
    Claim("predictions", "pseudo-labels before 25 labels help", "pseudo_then_25", "finetune_25"),
    Claim(
        "predictions",
        "also against labels alone for all steps",
        "pseudo_then_25",
        "finetune_long_25",
    ),
    Claim("predictions", "and before 200 labels", "pseudo_then_200", "finetune_200"),
    Claim(
        "zero_shot",
        "unseen digits by their attributes",
        "segments",
        "shuffled",
        "test/zero_shot_accuracy",
    ),
)

BESIDE = ("weak_supervision",)
"""Pages beside OUT that have shorter studies too."""


def estimate(values: dict[str, Any], claim: Claim) -> statistics.Estimate | None:
    """Returns the paired difference of a claim in a study's values, None where an arm lacks."""
    ours, theirs = (values.get(arm, {}).get(claim.metric, {}) for arm in (claim.arm, claim.minus))
    paired = [ours[seed] - theirs[seed] for seed in ours if seed in theirs]
    return statistics.estimate(paired) if paired else None


def verdict(found: statistics.Estimate, claim: Claim) -> str:
    if found.interval is None or found.interval[0] <= 0 <= found.interval[1]:
        return "null"
    return "holds" if (found.mean > 0) == claim.higher else "contradicted"


def cell(values: dict[str, Any] | None, claim: Claim) -> str:
    found = estimate(values, claim) if values else None
    if found is None or found.interval is None:
        return ""
    low, high = found.interval
    return f"{found.mean:+.4f} [{low:+.4f}, {high:+.4f}] {verdict(found, claim)}"


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("studies", nargs="*", type=results_page.study_folder)
    parser.add_argument("--out", required=True, type=pathlib.Path)
    options = parser.parse_args()
    short = {}
    for page in (options.out.with_name(f"{name}.json") for name in (options.out.name, *BESIDE)):
        if not page.is_file():
            parser.error(f"no {page}, which has the shorter studies")
        short |= json.loads(page.read_text())
    stored = options.out.with_name(f"{options.out.name}_longer.json")
    longer = json.loads(stored.read_text()) if stored.exists() else {}
    for folder in options.studies:
        longer[folder.name.removeprefix("longer_")] = results_page.read(folder)
    stored.write_text(json.dumps(longer) + "\n")
    head = ["study", "claim", "as above", "twice as long", "all of Fashion-MNIST"]
    rows = [head, ["---"] * len(head)]
    for claim in CLAIMS:
        values = [
            short[f"paper_{claim.study}"]["values"],
            *(longer.get(f"{claim.study}{end}", {}).get("values") for end in ("", "_full")),
        ]
        cells = [cell(found, claim) for found in values]
        if any(cells[1:]):
            rows.append([f"`{claim.study}`", claim.text, *cells])
    lines = ["| " + " | ".join(row) + " |" for row in rows]
    for name, study in longer.items():
        lines += ["", f"`longer_{name}`: {results_page.spent_line(study['spent'])}"]
    page = options.out.with_suffix(".md")
    before, _, rest = page.read_text().partition(MARK)
    after = rest.partition(END)[2]
    page.write_text(f"{before}{MARK}\n\n" + "\n".join(lines) + f"\n\n{END}{after}")


if __name__ == "__main__":
    main()
