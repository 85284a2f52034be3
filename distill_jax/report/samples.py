"""Text that a language model continued."""

from collections.abc import Mapping

from distill_jax.core.errors import UserError
from distill_jax.report.folders import Run
from distill_jax.report.html import Html, el, join
from distill_jax.report.page import muted
from distill_jax.trainer.io.files import MissingFile, read_json


def section(run: Run) -> Html | None:
    """Shows the contents of `samples.json`; None if the run stored none."""
    try:
        found = read_json(run.path / "samples.json", shape={"samples": list}, hint="")
    except MissingFile:
        return None
    except UserError as error:
        return muted(str(error))
    part = str(found.get("part", "held_out")).replace("_", "-")
    columns = {"prompt": "prompt", "greedy": "greedy"}
    columns["sampled"] = f"sampled at temperature {found.get('temperature')}"
    rows = [
        el("tr", [el("td", _printable(one.get(name, ""))) for name in columns])
        for one in found["samples"]
        if isinstance(one, Mapping)
    ]
    heads = [el("th", title, scope="col") for title in columns.values()]
    return join(
        muted(f"Continuations by the student after the last step; prompts are of {part} text."),
        el(
            "div",
            el("table", el("thead", el("tr", heads)), el("tbody", rows), class_="samples"),
            class_="scroll",
            tabindex="0",
        ),
    )


def _printable(text: object) -> str:
    """Returns a text whose control characters, which HTML does not allow, are replaced."""
    return "".join(c if c.isprintable() or c in "\n\t " else "\ufffd" for c in str(text))
