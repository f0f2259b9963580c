"""Settings of the documentation, whose pages are Markdown and whose API is docstrings.

python -m sphinx -W --keep-going -n docs docs/_build
"""

from __future__ import annotations

import importlib
from pathlib import Path

import typer
from sphinx.application import Sphinx
from sphinx.environment import BuildEnvironment
from sphinx.util import logging

import swinaccel

HERE = Path(__file__).parent
SOURCES = "https://github.com/swinaccel/swinaccel"
PUBLIC = ("swinaccel", "swinaccel.functional", "swinaccel.nn")

project, author, copyright = "swinaccel", "the swinaccel authors", "the swinaccel authors"
version = release = swinaccel.__version__
extensions = ["myst_parser", "sphinx.ext.autodoc", "sphinx.ext.napoleon", "sphinx.ext.viewcode"]
exclude_patterns = ["_build", "_generated"]
nitpicky, default_role = True, "code"

smartquotes = False  # --option is no dash
html_theme, html_title = "furo", f"swinaccel {version}"
html_theme_options = {"source_repository": SOURCES, "source_branch": "main", "source_directory": "docs/"}
html_static_path = ["_static"]
html_css_files = ["wide_tables.css"]

myst_enable_extensions = ["deflist", "colon_fence"]
myst_heading_anchors = 3

autodoc_member_order = "bysource"
autodoc_typehints = "none"  # docstrings say more than types, and signatures have them
autodoc_preserve_defaults = True
autodoc_inherit_docstrings = False
napoleon_google_docstring, napoleon_numpy_docstring = True, False
napoleon_custom_sections = ["Shapes", "State dict"]
# Types of other libraries, whose inventories would have to be downloaded, and words of docstrings that are no names.
nitpick_ignore_regex = [
    (r"py:.*", r"(torch|torch\..*|typing|typing\..*|collections\..*|callable.*|nn\..*|TypeError, ValueError.*|Model)"),
    (r"py:.*", r"(ValueError, TypeError|int|float|bool|str|None|Tensor|Any|Axes)"),
]


def write_commands(app: Sphinx) -> None:
    """Write the pages' part about commands: every command and option, with the help that the shell shows."""
    from swinaccel.cli.main import app as commands

    lines = []
    for name, command in typer.main.get_command(commands).commands.items():  # type: ignore[attr-defined]
        arguments = [(one.metavar or one.name).upper() for one in command.params if one.param_type_name == "argument"]
        usage = f"swinaccel {name} {' '.join(arguments)} [OPTIONS]"
        lines += [f"## swinaccel {name}", "", command.help, "", "```text", usage, "```", ""]
        lines += ["| option | meaning | default |", "|---|---|---|"]
        for option in command.params:
            if option.param_type_name == "option":
                spelled = " / ".join(f"`{one}`" for one in (*option.opts, *option.secondary_opts))
                default = "" if option.default in (None, False) else f"`{option.default}`"
                lines.append(f"| {spelled} | {option.help} | {default} |")
        lines.append("")
    folder = HERE / "_generated"
    folder.mkdir(exist_ok=True)
    (folder / "commands.md").write_text("\n".join(lines))


def check_public_names(app: Sphinx, env: BuildEnvironment) -> None:
    """Warn, which fails a strict build, of every public name that no page documents."""
    documented = set(env.domains.python_domain.objects)
    for module in PUBLIC:
        for name in importlib.import_module(module).__all__:
            if f"{module}.{name}" not in documented:
                logging.getLogger(__name__).warning("the public name %s.%s is on no page", module, name)


def escape_bars(app: Sphinx, kind: str, name: str, value: object, options: object, lines: list[str]) -> None:
    """Let |x| in docstrings be a length, and not a substitution."""
    lines[:] = [line.replace("|", r"\|") for line in lines]


def setup(app: Sphinx) -> None:
    app.connect("autodoc-process-docstring", escape_bars)
    app.connect("builder-inited", write_commands)
    app.connect("env-check-consistency", check_public_names)
