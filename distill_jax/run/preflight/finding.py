"""What the checks before a run yield."""

from typing import NamedTuple


class Finding(NamedTuple):
    """A setting that does not have its stated effect.

    Attributes:
      kind: "error" or "warning"; "comparison", an error in a single run and a warning in an arm of
        a study, which may want it; "unused", an error unless an arm has inherited it; "memory", an
        error unless nothing is run.
      what: one sentence without a full stop.
      where: the config path.
      hint: the remedy.
    """

    kind: str
    what: str
    where: str
    hint: str = ""
