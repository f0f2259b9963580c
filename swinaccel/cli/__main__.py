"""Run the command line by `python -m swinaccel.cli`."""

from .main import main

main()
