"""Origin of the data, machines of the runs, and their configs."""

import json
from collections.abc import Mapping, Sequence

from distill_jax.report.folders import Run
from distill_jax.report.html import Html, el, join
from distill_jax.report.page import alert, table
from distill_jax.report.wording import cut, joined, variants


def section(runs: Sequence[Run]) -> Html | None:
    records: dict[tuple[str, str], int] = {}
    for run in runs:
        for split, record in (run.result.get("provenance") or {}).items():
            entry = (str(split), json.dumps(record, sort_keys=True, default=str))
            records[entry] = records.get(entry, 0) + 1
    splits = [split for split, _ in records]
    mixed = sorted({split for split in splits if splits.count(split) > 1})
    rows = []
    for (split, text), count in records.items():
        record = json.loads(text)
        record = record if isinstance(record, dict) else {"name": record}
        n = record.get("n")
        cells = [
            el("td", record.get("name", "")),
            el("td", f"{n:,}" if isinstance(n, int) else n, class_="n"),
            el("td", record.get("origin", ""), class_="code"),
            el("td", record.get("sha256", ""), class_="code"),
            el("td", record.get("licence", "")),
        ]
        if mixed:
            cells.append(el("td", count, class_="n"))
        rows.append([el("th", split, scope="row"), *cells])
    heads = ["split", "data", "examples", "origin", "SHA-256", "licence"] + ["runs"] * bool(mixed)
    surroundings: dict[str, dict[str, int]] = {}
    for run in runs:
        for name, value in run.env.items():
            value = joined(value)
            counts = surroundings.setdefault(name, {})
            counts[value] = counts.get(value, 0) + 1
    env_rows = [
        [el("th", name, scope="row"), el("td", variants(counts), class_="code")]
        for name, counts in surroundings.items()
    ]
    if not rows and not env_rows:
        return None
    repeated = dict.fromkeys(
        str(shared.get("text", name))
        for run in runs
        for name, shared in ((run.result.get("data") or {}).get("in_training") or {}).items()
        if isinstance(shared, dict)
    )
    warning = [f"runs read different {split} data: they cannot be compared" for split in mixed]
    return join(
        alert("Please note", [*warning, *repeated], stop=True),
        table(heads, rows, numeric=False) if rows else None,
        join(el("h3", "Surroundings"), table(["", "value"], env_rows, numeric=False))
        if env_rows
        else None,
    )


def config_table(flat: Mapping[str, str]) -> Html | None:
    rows = [
        [el("th", name, scope="row", class_="code"), el("td", cut(value), class_="code")]
        for name, value in flat.items()
    ]
    return table(["key", "value"], rows, numeric=False) if rows else None
