"""Names with indices, such as `layer{i}.{j}.conv{c}.weight`, read and written."""

import functools
import re
from collections.abc import Mapping
from typing import NamedTuple

_FIELD = re.compile(r"\{(\w+)(?:([+-]\d+)|=([^}]+))?\}")


class Pattern(NamedTuple):
    """A name whose fields in braces stand for integers or for one of several words.

    `{i}` is an integer, `{i+1}` the integer that is larger by 1, `{x=a|b}` one of the words a and
    b, which `{x}` elsewhere repeats.
    """

    regex: re.Pattern
    template: str
    words: frozenset[str]

    def match(self, name: str) -> dict[str, int | str] | None:
        """Returns the fields of a name, None for a name that does not fit."""
        matched = self.regex.fullmatch(name)
        if matched is None:
            return None
        fields: dict[str, int | str] = {}
        parts = zip(_FIELD.findall(self.template), matched.groups(), strict=True)
        for (field, shift, _), text in parts:
            value = text if field in self.words else int(text) - int(shift or 0)
            if fields.setdefault(field, value) != value or (type(value) is int and value < 0):
                return None
        return fields

    def format(self, fields: Mapping[str, int | str]) -> str:
        def filled(field: re.Match) -> str:
            value = fields[field[1]]
            return str(value + int(field[2] or 0) if isinstance(value, int) else value)

        return _FIELD.sub(filled, self.template)


@functools.lru_cache(maxsize=4096)
def compiled(template: str, other: str = "") -> Pattern:
    """Returns the pattern of a template.

    Args:
      template: the name with fields.
      other: the template on the other side of a rule, which may declare words that this one uses.
    """
    words = {name: words for name, _, words in _FIELD.findall(other + template) if words}
    regex, at = "", 0
    for field in _FIELD.finditer(template):
        regex += re.escape(template[at : field.start()])
        name, at = field[1], field.end()
        choices = "|".join(map(re.escape, words[name].split("|"))) if name in words else r"\d+"
        regex += f"({choices})"
    return Pattern(re.compile(regex + re.escape(template[at:])), template, frozenset(words))
