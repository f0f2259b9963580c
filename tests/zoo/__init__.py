"""Every model that is to be found and accelerated, small and at a real size, and what must be left alone.

The census (docs/results/supported.py) and the tests run the same list. Nothing is downloaded; what is no
package comes from the stand-ins of microsoft_models.py, descendant_models.py, changed_models.py, bias_models.py,
video_models.py and weather_models.py.
"""

from __future__ import annotations

# The order of the lines is that of these imports; near_misses imports projects.
from zoo import libraries, near_misses
from zoo.entries import ENTRIES, NEAR_MISSES, Entry
from zoo.projects import Blocks

__all__ = ["ENTRIES", "NEAR_MISSES", "Blocks", "Entry", "libraries", "near_misses"]
