"""One offline HTML file about a run or a study, built from the files of its folder alone.

Beside it stand the plain tables and the statistics that the console shows of the same numbers.
"""

from distill_jax._lazy import attach

__getattr__, __dir__ = attach(__name__)
