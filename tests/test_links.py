"""Links of the documents and of the built site; `make site` checks the site itself."""

import importlib.util
import pathlib
import sys

ROOT = pathlib.Path(__file__).parents[1]


def load():
    spec = importlib.util.spec_from_file_location("check_links", ROOT / "tools/check_links.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules["check_links"] = module
    spec.loader.exec_module(module)
    return module


links = load()


def test_the_documents_have_no_broken_link():
    assert links.of_markdown(ROOT)[0] == []


def test_broken_links_of_documents_are_found(tmp_path):
    (tmp_path / "docs").mkdir()
    (tmp_path / "docs/a.md").write_text("# First, a heading\n\n[up](../README.md)\n")
    (tmp_path / "README.md").write_text(
        "[a](docs/a.md#first-a-heading) [b](docs/b.md) [c](docs/a.md#none)\n"
        "`docs/c.md` `docs/a.md`\n"
        "[far](https://example.org/x)\n```\n[in code](nowhere.md)\n```\n"
    )
    broken, external = links.of_markdown(tmp_path)
    assert [line.partition(": ")[2] for line in broken] == [
        "docs/b.md leads nowhere",
        "docs/a.md#none names no heading of that page",
        "docs/c.md does not exist",
    ]
    assert external == {"https://example.org/x"}


def test_broken_links_of_a_site_are_found(tmp_path):
    (tmp_path / "sub").mkdir()
    (tmp_path / "index.html").write_text(
        '<h1 id="top">x</h1><a href="sub/b.html#%C3%A4">1</a><a href="#top">2</a>'
        '<a href="sub/b.html#no">3</a><a href="gone.html">4</a><img src="no.png">'
        '<a href="sub">5</a><a href="mailto:a@example.org">6</a>'
        '<script src="//cdn.org/x.js"></script>'
    )
    (tmp_path / "sub/b.html").write_text('<p id="ä"><a href="../index.html#top">up</a></p>')
    broken, external = links.of_site(tmp_path)
    assert [line.partition(": ")[2] for line in broken] == [
        "sub/b.html#no names no element of that page",
        "gone.html leads nowhere",
        "no.png leads nowhere",
        "sub leads nowhere",
    ]
    assert external == {"mailto:a@example.org", "//cdn.org/x.js"}
