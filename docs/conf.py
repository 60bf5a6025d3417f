"""The documents as a site: `sphinx-build -W docs outputs/docs`. The tutorial is executed while building."""

import re
from textwrap import indent

project = "dldm_pipeline"
author = copyright = "The dldm_pipeline authors"
html_title = project
html_theme = "furo"

extensions = ["myst_nb", "sphinx.ext.autodoc", "sphinx.ext.napoleon"]
default_role = "literal"  # names in docstrings stand in single backticks
autodoc_member_order = "bysource"
napoleon_use_ivar = True  # the fields of a NamedTuple are listed once, not twice
myst_heading_anchors = 2

nb_execution_mode = "force"
nb_execution_raise_on_error = True
nb_execution_timeout = -1
nb_merge_streams = True


def markdown_to_restructured_text(app, what, name, obj, options, lines):
    """Docstrings are Markdown in diffusers' manner; Sphinx wants references, code and tables in its own."""
    text = "\n".join(re.sub(r"`[^`]*`|\|", lambda m: m[0] if m[0][1:] else r"\|", line) for line in lines)
    text = re.sub(r"^ *```.*$", "", text, flags=re.M)  # `>>>` already says that it is code
    text = re.sub(r"\[`(~?[\w.]+)`\]", r":py:obj:`\1`", text)
    if what == "module":  # elsewhere an indented paragraph belongs to an argument
        text = re.sub(r"(?<=\n\n)( {4}.*\n?|\n(?= {4}))+", r"::\n\n\g<0>\n", text)
        text = re.sub(
            r"(^\\\|.*\n?)+",
            lambda table: "::\n\n" + indent(table[0].replace(r"\|", "|"), "    ") + "\n",
            text,
            flags=re.M,
        )
    lines[:] = text.split("\n")


def setup(app):
    app.connect("autodoc-process-docstring", markdown_to_restructured_text, priority=400)  # before napoleon's 500
