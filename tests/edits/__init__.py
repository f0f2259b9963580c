"""What users do to a model, and how they call one: tables of functions that do the very same to any two alike.

An edit takes a model and a number by which it chooses among places and values, and changes the model in place, or
returns another one. A way calls a model on inputs and gives output and gradients.
"""

from __future__ import annotations

from edits import contents, parts, ways
from edits.parts import LowRank
from edits.tables import EDITS, SCOPES, WAYS
from edits.ways import total

__all__ = ["EDITS", "SCOPES", "WAYS", "LowRank", "contents", "parts", "total", "ways"]
