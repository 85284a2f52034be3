"""Names of the compiled steps of a run: "inner", or "outer" where the weighting learns too.

Those of the second phase of a method are "inner/2" and "outer/2", and so on.
"""


def name(phase: int, *, outer: bool) -> str:
    """Returns the name of the step of a phase, counted from 0."""
    kind = "outer" if outer else "inner"
    return f"{kind}/{phase + 1}" if phase else kind


def read(variant: str) -> tuple[int, bool]:
    """Returns the phase of a name, and whether the weighting learns."""
    kind, _, phase = variant.partition("/")
    return int(phase or 1) - 1, kind == "outer"
