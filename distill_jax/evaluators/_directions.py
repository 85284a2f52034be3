"""Which end of a metric is better. Needs no JAX, so that configs are checked with it."""

import re
from typing import Literal

_CONTROL = re.compile(r"_(initial|raw|teacher|student|target)$")

_DIRECTIONS: dict[Literal["max", "min"], re.Pattern[str]] = {
    "min": re.compile(
        r"loss|nll|log_loss|normalised_entropy|brier|ece|ece_adaptive|aurc|kl|uniformity|alignment"
        r"|rmse|mae"
    ),
    "max": re.compile(
        r"(\w+_)?accuracy|few_label_(balanced_)?accuracy_\w+|top5|(macro|micro)_f1|(\w+_)?auc"
        r"|(mean_)?average_precision|r2|pearson|spearman|agreement(_reference_(right|wrong))?|rankme|lidar|normalized_std"
    ),
}


def direction(metric: str) -> Literal["max", "min"] | None:
    """Returns which end of a metric is better, None where nothing is known of it.

    Nothing is known of what only an evaluator of the user gives, and of metrics of this package
    that are best in between or describe something, such as `alpha_req` or `ratio_mean`.

    Args:
      metric: its name, with or without the split. What is measured of another network, as in
        `nll_initial`, is better at the same end.
    """
    name = _CONTROL.sub("", metric.rpartition("/")[2])
    return next((end for end, names in _DIRECTIONS.items() if names.fullmatch(name)), None)
