"""How ``make docs`` builds the pages: Sphinx, MyST Markdown, and the API reference from docstrings."""

import inspect
import os
import re
import shutil
from pathlib import Path

import flax.linen as nn
from docutils import nodes
from docutils.utils.math.latex2mathml import tex2mathml

import shiftaddvit_jax

project = "shiftaddvit_jax"
author = "The shiftaddvit_jax authors"
copyright = f"{author}, Apache-2.0"
version = release = shiftaddvit_jax.__version__

extensions = ["myst_nb", "sphinx.ext.autodoc", "sphinx.ext.napoleon"]
exclude_patterns = ["_build"]
# Outputs are kept in _build until a notebook's code changes. DOCS_NOTEBOOKS=off builds quickly, without them.
nb_execution_mode = "off" if os.environ.get("DOCS_NOTEBOOKS") == "off" else "cache"
nb_execution_excludepatterns = [] if shutil.which("nvidia-smi") else ["notebooks/gpu_benchmark.ipynb"]
nb_execution_timeout = 900  # seconds a cell
nb_execution_in_temp = True  # what they write is in no one's way
nb_execution_show_tb = True
nb_output_stderr = "remove"  # logs of what compiles
nb_merge_streams = True
myst_enable_extensions = ["colon_fence", "dollarmath"]
html_math_renderer = "mathml"
myst_heading_anchors = 3
# One backtick in a docstring is a link to what it names, where that has an entry, and code elsewhere.
default_role = "py:obj"

autodoc_default_options = {"members": True, "special-members": "__call__"}
autodoc_member_order = "bysource"
autodoc_typehints = "signature"
autodoc_typehints_format = "short"
autodoc_preserve_defaults = True
autodoc_class_signature = "mixed"
python_use_unqualified_type_names = True
python_maximum_signature_line_length = 88
napoleon_numpy_docstring = False
napoleon_use_ivar = True
add_module_names = False
toc_object_entries_show_parents = "hide"

html_theme = "sphinx_book_theme"
html_title = "shiftaddvit_jax"
html_static_path = ["static"]
html_css_files = ["pages.css"]
html_copy_source = False
html_show_sourcelink = False
html_theme_options = {
    "use_download_button": False,
    "use_fullscreen_button": False,
    "home_page_in_toc": True,
    "show_toc_level": 2,
    "navbar_persistent": [],
}


def copy_notebooks(app):
    """Copies of colab/'s notebooks, in docs/notebooks/, where Sphinx looks for pages."""
    copies = Path(app.srcdir, "notebooks")
    shutil.rmtree(copies, ignore_errors=True)
    copies.mkdir()
    for notebook in Path(app.srcdir).parent.glob("colab/*.ipynb"):
        shutil.copy2(notebook, copies)


def link_to_copies(app, page, source):
    """A link to a notebook in the repository leads to its page here."""
    source[0] = re.sub(r"\.\./colab/(\w+\.ipynb)", r"notebooks/\1", source[0])


def shorten_signature(app, what, name, thing, options, signature, returned):
    """A signature without Flax's ``parent`` and ``name``, and without where ``Array`` is from."""
    if inspect.isclass(thing) and issubclass(thing, (nn.Conv, nn.Dense)):
        return "", None  # all of Flax's own
    if inspect.isclass(thing) and issubclass(thing, nn.Module) and signature:
        signature = re.sub(r", parent: .*\)$", ")", signature, flags=re.DOTALL)
    return tuple(text and text.replace("jaxlib._jax.Array", "Array") for text in (signature, returned))


def tidy_docstring(app, what, name, thing, options, lines):
    """A docstring's ``|x|`` is an absolute value, and what Python says of every ``__call__`` is left out."""
    lines[:] = [
        re.sub(r"(``.*?``)|\|", lambda found: found[1] or r"\|", line)
        for line in lines
        if line != "Call self as a function."
    ]


def write_formula(writer, node):
    """A formula as MathML, which browsers draw without a script from elsewhere."""
    block = isinstance(node, nodes.math_block)
    formula = tex2mathml(node.astext(), block)
    writer.body.append(f'<div class="math">{formula}</div>' if block else formula)
    raise nodes.SkipNode


def setup(app):
    """What Sphinx calls first."""
    app.connect("builder-inited", copy_notebooks)
    app.connect("source-read", link_to_copies)
    app.add_html_math_renderer("mathml", (write_formula, None), (write_formula, None))
    app.connect("autodoc-process-signature", shorten_signature)
    app.connect("autodoc-process-docstring", tidy_docstring)
