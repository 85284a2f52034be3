"""Hooks of the documentation site: links between pages, and the table of methods from the code.

Pages name each other as files (`docs/export.md`), which reads well in a terminal; the site turns
these names into links. The table of methods is made from the objectives, the configs and the
verdicts in `docs/results/papers.md`.
"""

import ast
import pathlib
import re

ROOT = pathlib.Path(__file__).parents[1]
_PAGE = re.compile(r"(?<!\[)`(?:docs/)?((?:results/)?[\w]+\.md)`(?!\])")
_DATA = "distill_jax/data/transforms"
_TRANSFORMS = {"masked_thought": "masked_thought", "denoise": "ul2", "refinement": ""}
"""Methods that are transforms of text, and their configs."""
_VERDICT = re.compile(r"^\| `(\w+)` \| (.+?) \| (.+?) \| (.+?) \|$", re.M)


def on_page_markdown(markdown, *, page, **_):
    """Returns the text of a page with its links, and its generated table."""
    if page.file.src_uri == "methods_table.md":
        markdown = markdown.replace("{{ table }}", table())
    here = pathlib.PurePosixPath(page.file.src_uri).parent

    def link(match):
        target = match[1]
        full = "contributing.md" if target == "CONTRIBUTING.md" else target
        if not (ROOT / "docs" / full).is_file():
            return match[0]
        up = "../" * len(here.parts)
        return f"[`{target}`]({up}{full})"

    return "\n".join(
        line if line.startswith(("    ", "```", "#")) else _PAGE.sub(link, line)
        for line in markdown.split("\n")
    )


def on_page_content(html, **_):
    """Returns the content of a page, in which a heading without words heads no column."""
    return re.sub(r"<th([^>]*)></th>", r"<td\1></td>", html)


def table():
    """Returns a Markdown table: method, source, config and command, verdict of its study."""
    verdicts = {}
    for study, claim, _, verdict in _VERDICT.findall((ROOT / "docs/results/papers.md").read_text()):
        text = re.sub(r"\]\((\w+\.md)", r"](results/\1", f"{verdict}: {claim}")
        verdicts.setdefault(study, text)
    configs = {
        path.stem: f"{path.parent.name}/{path.stem}"
        for folder in ("distill", "ssl", "language", "weak")
        for path in sorted((ROOT / "configs" / folder).glob("*.py"))
    }
    rows = ["| objective | method | command | one claim, tested here |", "|---|---|---|---|"]
    for path in sorted((ROOT / "distill_jax/objectives").glob("[a-z]*.py")):
        doc = ast.get_docstring(ast.parse(path.read_text())) or ""
        what = doc.partition("\n\n")[0].replace("\n", " ").replace("|", "\\|").rstrip(".")
        name = configs.get(path.stem)
        command = f"`--config={name}`" if name else f"`--config.objective.name={path.stem}`"
        rows.append(f"| `{path.stem}` | {what} | {command} | {verdicts.get(path.stem, '')} |")
    rows += [
        "",
        "| transform of text | method | command | claims, tested here |",
        "|---|---|---|---|",
    ]
    for name, config in _TRANSFORMS.items():
        where = f"configs/language/{config}.py" if config else f"{_DATA}/{name}.py"
        doc = ast.get_docstring(ast.parse((ROOT / where).read_text())) or ""
        what = doc.partition("\n\n")[0].replace("\n", " ").rstrip(".")
        command = f"`--config=language/{config}`" if config else f"`make_{name}`"
        rows.append(f"| `{name}` | {what} | {command} | [sequences](results/sequences.md) |")
    return "\n".join(rows)
