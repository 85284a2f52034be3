"""Tools that fetch text, on made-up text: what is cut out, and the parts of passages."""

import collections
import importlib
import pathlib
import random
import struct

import pytest

TOOLS = pathlib.Path(__file__).resolve().parents[2] / "tools"
PLAY = """THE TALE OF ALBAN

DRAMATIS PERSONAE.

ALBAN, a king.
SCENE: Rome.

ACT I.

SCENE I. Rome. A street near
the tower.

[Enter ALBAN and a
Soldier.]

ALBAN.
Who walks so late with me, good {0},
upon the walls?

1 Soldier.
A friend of Alban's, sir.

ALBAN. My own friend then.

SCENE II. Another street.

ALBAN.
What 's the hour, {0}?
'T is late [Aside.] and dark for Alban.

1 Soldier.
So says the bell.

Exeunt.
"""
NOVEL = """THE NOVEL

CHAPTER 1

It was said that Mr. Alban
walked to {0} with Alban's friend.
 [End of the first edition.]
VOLUME II

CHAPTER 2

She saw the walls of {0}, and Alban.

THE END""".splitlines()


@pytest.fixture
def tool(monkeypatch):
    monkeypatch.syspath_prepend(str(TOOLS))
    return importlib.import_module("fetch_plays")


def test_headings_speakers_and_directions_are_taken_out(tool):
    scenes = [" ".join(" ".join(scene).split()) for scene in tool.scenes_of(PLAY)]
    assert scenes == [
        "Who walks so late with me, good {0}, upon the walls? A friend of Alban's, sir. "
        "My own friend then.",
        "What 's the hour, {0}? 'T is late and dark for Alban. So says the bell.",
    ]
    chapters = [" ".join(" ".join(chapter).split()) for chapter in tool.chapters_of(NOVEL)]
    assert chapters == [
        "It was said that Mr. Alban walked to {0} with Alban's friend.",
        "She saw the walls of {0}, and Alban.",
    ]


def test_names_are_what_has_a_capital_within_a_line(tool, monkeypatch):
    scenes = tool.scenes_of(PLAY.format("Bertram")) + tool.chapters_of(NOVEL)
    scenes.append(["and it is what she and my friend say who so did a tis"])
    tokens = [tool.tokens_of(scene) for scene in scenes]
    names = tool.names_of(tokens)
    assert names == {"alban", "bertram", "mr"}
    monkeypatch.setattr(tool, "WORDS", 8)
    assert tool.passages_of(tokens[1], names) == ["what's the hour? tis late and dark for."]
    monkeypatch.setattr(tool, "WORDS", 3)
    found = tool.passages_of(tokens[2], names)
    assert found[:2] == ["it was said", "that walked to"]


@pytest.mark.parametrize("keep", [False, True])
def test_no_scene_and_no_work_is_on_two_sides(tool, monkeypatch, keep):
    monkeypatch.setattr(tool, "WORDS", 4)
    draw = random.Random(0)

    def scene():
        words = (draw.choice(("one", "two", "three")) for _ in range(draw.randint(5, 60)))
        return [f"so said Alban {' '.join(words)}"]

    works = {f"work {i}": ("a", "bc"[i % 2], [scene() for _ in range(12)]) for i in range(20)}
    rows = tool.rows_of(works, keep_names=keep)
    assert any("alban" in row["text"] for row in rows) == keep
    assert {len(row["text"].split()) for row in rows} == {4}
    sides = {"by_scene": ("scene", "work"), "by_work": ("work", "genre")}
    for split, (unit, whole) in sides.items():
        assert len({(row[unit], row[split]) for row in rows}) == len({row[unit] for row in rows})
        parts = collections.defaultdict(set)
        for row in rows:
            parts[row[whole]].add(row[split])
        assert all(found == {"train", "val", "test"} for found in parts.values())
        share = sum(row[split] == "test" for row in rows) / len(rows)
        assert 0.1 < share < 0.3
    assert [row["work"] for row in rows] != sorted(row["work"] for row in rows)


def test_strings_of_r(tool):
    lines = [b"CHAPTER 1", b"", "caf\u00e9".encode()]
    raw = b"X\n" + struct.pack(">iii", 3, 0x40201, 0x30500) + struct.pack(">i", 5) + b"UTF-8"
    raw += struct.pack(">ii", 16, len(lines))
    raw += b"".join(struct.pack(">ii", 0x40009, len(line)) + line for line in lines)
    assert tool.strings_of(raw) == ["CHAPTER 1", "", "caf\u00e9"]


def test_reviews(monkeypatch):
    monkeypatch.syspath_prepend(str(TOOLS))
    tool = importlib.import_module("fetch_reviews")
    names = ("Review Text", "Department Name", "Recommended IND", "Clothing ID")
    text = "a shirt that fits  me as well as any other\nshirt"
    table = [
        (text, "Tops", 1, 7),
        (text, "Tops", 0, 8),  # repeated
        ("too short", "Tops", 1, 7),
        (None, "Tops", 1, 7),
        (text + " again", None, 1, 7),
        (text + " and again", "Trend", 1, 7),
    ]
    assert tool.rows_of(dict(zip(names, row, strict=True)) for row in table) == [
        {
            "text": "a shirt that fits me as well as any other shirt",
            "department": "tops",
            "recommended": "yes",
            "product": "7",
        }
    ]
