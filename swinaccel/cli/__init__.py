"""The command line, models by name, and benchmarks. Nothing else of the package imports from here."""
