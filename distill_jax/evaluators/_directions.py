"""The direction of improvement of each metric. Does not import JAX, so config checks can use it."""

import re
from typing import Literal

_CONTROL = re.compile(r"_(initial|raw|teacher|student|target)$")

_DIRECTIONS: dict[Literal["max", "min"], re.Pattern[str]] = {
    "min": re.compile(
        r"loss|nll|log_loss|normalised_entropy|brier|ece|ece_adaptive|aurc|kl|uniformity|alignment"
        r"|rmse|mae|risk_ece|vote_error_rest|bits_per_(byte|token)"
    ),
    "max": re.compile(
        r"(\w+_)?accuracy|few_label_(balanced_)?accuracy_\w+|top5|(macro|micro)_f1|(\w+_)?auc"
        r"|(mean_)?average_precision|r2|pearson|spearman|agreement(_reference_(right|wrong))?|rankme|lidar|normalized_std"
        r"|ndcg\d+|mrr\d+|precision1"
        r"|gap_recovered|accuracy_where_weak_wrong|risk_correlation"
    ),
}


def direction(metric: str) -> Literal["max", "min"] | None:
    """Returns the direction in which a metric improves, or None if it is unknown.

    It is unknown for metrics of user-defined evaluators, and for metrics of this package that have
    an intermediate optimum or are descriptive, such as `alpha_req` or `ratio_mean`.

    Args:
      metric: its name, with or without the split. A metric of another network, such as
        `nll_initial`, has the same direction.
    """
    name = _CONTROL.sub("", metric.rpartition("/")[2])
    return next((end for end, names in _DIRECTIONS.items() if names.fullmatch(name)), None)
