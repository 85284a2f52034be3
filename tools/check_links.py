"""Checks the links of the built site and of the Markdown files beside it; no network is used.

    python tools/check_links.py build/site

Every link of a page of the site leads to a file there, and to an element of that page if it names
one. Every link of a Markdown file, and every path in backticks such as `docs/export.md`, leads to a
file of the tree. Links to other hosts are only listed, with `--external`.
"""

import argparse
import html.parser
import pathlib
import re
import sys
import urllib.parse

ROOT = pathlib.Path(__file__).parents[1]
OTHER_FILES = ("CHANGELOG.md", "CONTRIBUTING.md")  # name files that are gone, or that you add
MARKDOWN = ("*.md", "docs/*.md", "docs/results/*.md", "launch/*.md", "examples/*.md")
_LINK = re.compile(r"(?<!!)\[[^\]\n]*\]\(([^)\s]+)\)|^\[[^\]]+\]:\s+(\S+)", re.M)
_CODE = re.compile(r"^(```|~~~).*?^\1", re.M | re.S)
_PATH = re.compile(r"`((?:docs|launch|tests|tools|examples|configs|distill_jax)/[\w./-]+\.\w+)`")


class Page(html.parser.HTMLParser):
    """The links and the names of elements of a page."""

    def __init__(self, text: str):
        super().__init__()
        self.links: list[str] = []
        self.names: set[str] = set()
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        given = dict(attrs)
        self.names |= {v for k in ("id", "name") if (v := given.get(k))}
        self.links += [v for k in ("href", "src") if (v := given.get(k))]


def is_external(link: str) -> bool:
    parts = urllib.parse.urlsplit(link)
    return bool(parts.scheme or parts.netloc)


def of_site(site: pathlib.Path) -> tuple[list[str], set[str]]:
    """Returns the broken links of a built site, as sentences, and its links to other hosts."""
    pages = {path.resolve(): Page(path.read_text()) for path in sorted(site.rglob("*.html"))}
    broken, external = [], set()
    for path, page in pages.items():
        for link in page.links:
            if is_external(link):
                external.add(link)
                continue
            parts = urllib.parse.urlsplit(link)
            target = (path.parent / urllib.parse.unquote(parts.path)) if parts.path else path
            target = (target / "index.html" if target.is_dir() else target).resolve()
            if path.name == "404.html" and parts.path.startswith("/"):
                continue  # of the host's root, which is not known
            name = path.relative_to(site.resolve())
            anchor = urllib.parse.unquote(parts.fragment)
            if not target.is_file():
                broken.append(f"{name}: {link} leads nowhere")
            elif anchor and target in pages and anchor not in pages[target].names:
                broken.append(f"{name}: {link} names no element of that page")
    return broken, external


def of_markdown(root: pathlib.Path) -> tuple[list[str], set[str]]:
    """Returns the broken links of the Markdown files of a tree, and those to other hosts."""
    broken, external = [], set()
    for path in sorted(p for pattern in MARKDOWN for p in root.glob(pattern)):
        text = _CODE.sub("", path.read_text())
        name = path.relative_to(root)
        for match in _LINK.finditer(text):
            link = match[1] or match[2]
            if is_external(link):
                external.add(link)
                continue
            parts = urllib.parse.urlsplit(link)
            target = path.parent / urllib.parse.unquote(parts.path) if parts.path else path
            if not target.exists():
                broken.append(f"{name}: {link} leads nowhere")
            elif (
                parts.fragment and target.suffix == ".md" and parts.fragment not in anchors(target)
            ):
                broken.append(f"{name}: {link} names no heading of that page")
        broken += [
            f"{name}: {match[1]} does not exist"
            for match in _PATH.finditer(text)
            if not (root / match[1]).exists() and name.name not in OTHER_FILES
        ]
    return broken, external


def anchors(path: pathlib.Path) -> set[str]:
    """Returns the anchors that the headings of a Markdown file have."""
    headings = re.findall(r"^#+\s+(.*)$", _CODE.sub("", path.read_text()), re.M)
    plain = (re.sub(r"[^\w\s-]", "", heading.lower()).strip() for heading in headings)
    return {re.sub(r"\s", "-", heading) for heading in plain}


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("site", nargs="?", type=pathlib.Path, help="folder of the built site")
    parser.add_argument("--external", action="store_true", help="list the links to other hosts")
    options = parser.parse_args()
    broken, external = of_markdown(ROOT)
    if options.site is not None:
        if not (options.site / "index.html").is_file():
            raise SystemExit(f"{options.site} holds no site: make site")
        of_pages = of_site(options.site)
        broken, external = broken + of_pages[0], external | of_pages[1]
    for line in broken:
        print(line, file=sys.stderr)
    if options.external:
        print("\n".join(sorted(external)))
    print(f"{len(broken)} broken links, {len(external)} links to other hosts, not fetched")
    return 1 if broken else 0


if __name__ == "__main__":
    sys.exit(main())
