"""How the site is built: ``python -m sphinx -W --keep-going -b html docs docs/_build/html``, without a network."""

import atexit
import os
import re
import shutil
import sys
import tempfile
from importlib.metadata import version as version_of
from pathlib import Path

import matplotlib.font_manager  # noqa: F401  (makes its font cache now; a page's kernel would print that it does)
from docutils import nodes
from docutils.utils.math.latex2mathml import tex2mathml
from sphinx.ext.napoleon.docstring import GoogleDocstring

sys.path.insert(0, str(Path(__file__).parent / "_ext"))

project = "pvae"
version = release = version_of("pvae")
extensions = [
    "myst_nb",
    "sphinx.ext.autodoc",
    "sphinx.ext.autosummary",
    "sphinx.ext.napoleon",
    "sphinx.ext.viewcode",
    "sphinx_copybutton",
    "elsewhere",
    "executed_pages",
]
exclude_patterns = ["_build", "jupyter_execute"]
myst_enable_extensions = ["colon_fence", "deflist", "dollarmath"]
myst_heading_anchors = 3

# --- Pages that are run -----------------------------------------------------------------------------------------------

nb_execution_mode = "force"
nb_execution_raise_on_error = True
nb_execution_timeout = 120
nb_merge_streams = True
nb_output_stderr = "remove-warn"  # a page that warns is a page to mend: with -W it fails the build
os.environ["CUDA_VISIBLE_DEVICES"] = ""  # the same pages on every machine
os.environ["OMP_NUM_THREADS"] = "1"  # networks this small gain nothing by threads, which wait for each other
os.environ["MATPLOTLIBRC"] = str(Path(__file__).parent)  # figures for light and dark pages
os.environ["PYTHONWARNINGS"] = "ignore:IProgress not found"  # tqdm, imported by Pyro, where ipywidgets is missing

# No start-up files of the reader's own IPython; and ipykernel's warning that it uses TCP is no news.
_profile = Path(tempfile.mkdtemp()) / "profile_default"
atexit.register(shutil.rmtree, _profile.parent, ignore_errors=True)
_profile.mkdir()
(_profile / "ipython_kernel_config.py").write_text('get_config().IPKernelApp.log_level = "ERROR"\n')
os.environ["IPYTHONDIR"] = str(_profile.parent)

# --- The API from docstrings ------------------------------------------------------------------------------------------

default_role = "py:obj"
autosummary_generate = False  # entries are in api/*.md
autodoc_member_order = "bysource"
autodoc_typehints_format = "short"
autodoc_preserve_defaults = True
python_maximum_signature_line_length = 96
napoleon_numpy_docstring = False
napoleon_use_rtype = False
napoleon_attr_annotations = False
# The docstring of a property is a sentence: what stands before a colon in it is no type.
GoogleDocstring._parse_attribute_docstring = GoogleDocstring._consume_to_end

# --- How it looks -----------------------------------------------------------------------------------------------------

html_theme = "furo"
html_static_path = ["_static"]
html_css_files = ["site.css"]
html_title = f"pvae {release}"
html_short_title = "pvae: variational autoencoders as Pyro programs"
html_favicon = "_static/favicon.svg"
html_show_copyright = False
html_show_sphinx = False
html_math_renderer = "mathml"
pygments_style = "friendly"
pygments_dark_style = "monokai"
copybutton_prompt_text = "$ "


def _mathml(tex, as_block=False):
    # An index of \hat k is beside it, and not below it: after {} docutils takes it for no limit of a sign.
    accent = r"(\\(?:hat|bar|tilde)\s*(?:\{[^{}]*\}|\\[A-Za-z]+|\w))(?=[_^])"
    mathml = tex2mathml(re.sub(accent, r"{{}\1}", tex), as_block)
    # Browsers put no space between a function's name and its argument; TeX does, except before a parenthesis.
    mathml = re.sub(r"(<mo>&ApplyFunction;</mo>)(?!\s*<mo[^>]*>\()", r'\1<mspace width="0.17em"/>', mathml)
    # Where the font can, browsers let bars grow to the height of their line; TeX does so after \left alone.
    bar = r"(?<!<mrow>)(?<!\s)(\s*)<mo>([|\u2016\u2223\u2225])</mo>(?!\s*</mrow>)"
    return re.sub(bar, r'\1<mo stretchy="false">\2</mo>', mathml)


def _inline_math(translator, node):
    translator.body.append(_mathml(node.astext()))
    raise nodes.SkipNode


def _block_math(translator, node):
    translator.body.append(f'<div class="math">{_mathml(node.astext(), as_block=True)}</div>')
    raise nodes.SkipNode


_NOT_MADE_BY_USERS = {
    "pvae.FitResult",
    "pvae.EvidenceEstimate",
    "pvae.datasets.Dataset",
    "pvae.diagnostics.Gaps",
    "pvae.evidence.Bracket",
    "pvae.evidence.QuadratureEstimate",
    "pvae.evidence.pareto.Tail",
    "pvae.evidence.proposals.Proposal",
    "pvae.evidence.proposals.Gaussian",
    "pvae.evidence.proposals.LatentSpace",
    "pvae.evidence.densities.Densities",
    "pvae.evidence.weights.WeightSums",
    "pvae.testing.LinearGaussian",
    "pvae.testing.TwoModes",
}


def _without_constructor(app, what, name, obj, options, signature, return_annotation):
    """Some classes are made by the package alone: show what they hold, not how to make one."""
    return ("", None) if name in _NOT_MADE_BY_USERS else None


def setup(app):
    """Formulas become MathML when the site is built: nothing is fetched when a page is read."""
    app.add_html_math_renderer("mathml", (_inline_math, None), (_block_math, None))
    app.connect("autodoc-process-signature", _without_constructor)
    return {"parallel_read_safe": True, "parallel_write_safe": True}
