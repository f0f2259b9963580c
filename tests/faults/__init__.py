"""Deliberate faults, by the folders of the package; python tests/mutants.py tries them."""

from faults import families, kernels, package, runtime, trust
from faults.table import Mutant

MUTANTS = [*kernels.FAULTS, *trust.FAULTS, *runtime.FAULTS, *families.FAULTS, *package.FAULTS]
__all__ = ["MUTANTS", "Mutant"]
