"""What checks before a run find."""

from typing import NamedTuple


class Finding(NamedTuple):
    """Something that does not do what it says.

    Attributes:
      kind: "mistake"; "doubt"; "comparison", what only a study may want, a mistake elsewhere and a
        doubt there; "unused", a mistake but where an arm has inherited it; or "memory", a mistake
        but where nothing is run.
      what: one sentence without a full stop.
      where: the config path.
      hint: what would be right.
    """

    kind: str
    what: str
    where: str
    hint: str = ""
