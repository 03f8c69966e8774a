"""What pages that are run have beside their text: a notebook to download, and words for pictures.

A picture's words are ``alt`` under ``mystnb: image:`` of its cell. Where there are none, they are the title of its
section, with what the functions of `pvae.plots` in its cell say of themselves, or the titles and labels of its axes.
"""

import html
import os
import re

import nbformat
from docutils import nodes
from sphinx import addnodes
from sphinx.util import logging

import pvae

NOTEBOOKS = "jupyter_execute"  # where MyST-NB writes what it ran, beside the site's folder

logger = logging.getLogger(__name__)


def offer_notebook(app, doctree):
    """Puts a link to the page as it was run, a notebook, under the page's title."""
    docname = app.env.docname
    path = app.outdir.parent / NOTEBOOKS / f"{docname}.ipynb"
    if "exec_data" not in app.env.nb_metadata.get(docname, {}) or not path.is_file():
        return
    tidy(path)
    # Sphinx looks for a file whose name begins with a slash from its source folder.
    target = f"/{os.path.relpath(path, app.srcdir)}".replace(os.sep, "/")
    link = addnodes.download_reference(reftarget=target)
    link += nodes.inline(text="Download as a notebook")
    title = next(doctree.findall(nodes.title))
    title.parent.insert(title.parent.index(title) + 1, nodes.paragraph("", "", link, classes=["notebook"]))


def tidy(path):
    """Leaves out of a notebook what means something on the site alone: see `plain`."""
    notebook = nbformat.read(path, as_version=4)
    for cell in notebook.cells:
        if cell.cell_type == "markdown":
            cell.source = plain(cell.source)
    nbformat.write(notebook, path)


def plain(text):
    """MyST as Markdown: without labels, directives, and links to pages that are not beside a notebook."""
    text = re.sub(r"^\([\w-]+\)=\n?", "", text, flags=re.MULTILINE)
    text = re.sub(r"^```\{.*?^```\n?", "", text, flags=re.DOTALL | re.MULTILINE)
    text = re.sub(r"^:::\{(\w+)\}", lambda match: f"**{match[1].capitalize()}**\n", text, flags=re.MULTILINE)
    text = re.sub(r"^:::\n?", "", text, flags=re.MULTILINE)
    text = re.sub(r"\[\]\(([^)\s#]*\.md)[^)]*\)", r"\1", text)
    return re.sub(r"\[([^\]]+)\]\((?:#|(?!https?:)[^)\s]*\.md)[^)]*\)", r"*\1*", text)


def describe_images(app, doctree):
    """Gives each picture that a cell made, and that has no words of its own, some."""
    for image in doctree.findall(nodes.image):
        cell = _cell_of(image)
        if cell is not None and not image.get("alt"):
            image["alt"] = f"{_section_of(image)}: {_plots(cell) or _axes(cell) or 'a figure'}"


def _cell_of(node):
    while node is not None and node.get("nb_element") != "cell_code":
        node = node.parent
    return node


def _source(cell):
    parts = (part for part in cell.children if part.get("nb_element") == "cell_code_source")
    return "\n".join(block.astext() for part in parts for block in part)


def _plots(cell):
    """What the functions of `pvae.plots` that a cell calls say they draw, by the first sentence of their docstrings."""
    called = dict.fromkeys(re.findall(r"\bplots\.(\w+)\(", _source(cell)))
    names = [name for name in called if name in pvae.plots.__all__ and name != "subplots"]
    docs = [" ".join(getattr(pvae.plots, name).__doc__.split()) for name in names]
    firsts = [re.split(r"(?<=\.)\s", doc)[0].removeprefix("Draws ").replace("`", "") for doc in docs]
    return " ".join(first[0].upper() + first[1:] for first in firsts)


def _axes(cell):
    """The labels and titles that a cell gives to Axes."""
    source = _source(cell)

    def given(name):
        found = re.findall(rf'\b(?:set_{name}\(\s*|{name}=)[rf]*"([^"]+)"', source)
        return list(dict.fromkeys(found))

    titles, across, up = (", ".join(given(name)) for name in ("title", "xlabel", "ylabel"))
    axes = f"{up} against {across}" if up and across else up or across
    return re.sub(r"[$\\]", "", "; ".join(filter(None, [titles, axes])))


def _section_of(node):
    while not isinstance(node, nodes.section | nodes.document):
        node = node.parent
    return node[0].astext()


def describe_page(app, pagename, templatename, context, doctree):
    """Gives each page its first sentences as a description, for search engines and previews."""
    first = next(doctree.findall(_is_prose), None) if doctree else None
    words = (first.astext().replace("\\", "") if first else app.config.html_short_title).split()
    text = ""
    while words and len(text) + len(words[0]) < 160:
        text = f"{text} {words.pop(0)}".strip()
    text += " ..." if words else ""
    context["metatags"] = context.get("metatags", "") + f'<meta name="description" content="{html.escape(text)}" />\n'


def _is_prose(node):
    return isinstance(node, nodes.paragraph) and isinstance(node.parent, nodes.section) and not node["classes"]


def mix(app, env, docnames):
    """Puts pages of all folders beside each other: processes take their pages in runs, and tutorials take longest."""
    docnames[:] = [name for start in range(8) for name in docnames[start::8]]


def start_clock(app, docname, source):
    """Keeps how long kernels had computed before this page; a busy machine changes that less than the time of day."""
    app.env.temp_data["computed"] = _computed()


def stop_clock(app, doctree):
    """Keeps how long the page's kernel computed."""
    app.env.nb_metadata.setdefault(app.env.docname, {})["computed"] = _computed() - app.env.temp_data["computed"]


def _computed():
    return os.times().children_user + os.times().children_system


def tell_times(app, exception):
    """Says which pages took longest to run."""
    times = {name: data["computed"] for name, data in app.env.nb_metadata.items() if data.get("computed", 0) > 1}
    said = ", ".join(f"{name} {times[name]:.0f} s" for name in sorted(times, key=times.get, reverse=True))
    logger.info(f"{len(times)} pages were run, for {sum(times.values()):.0f} s of CPU time: {said}")


def setup(app):
    """Comes before the collector of downloads, which looks for links at the same event."""
    app.connect("env-before-read-docs", mix)
    app.connect("source-read", start_clock)
    app.connect("doctree-read", stop_clock)
    app.connect("doctree-read", offer_notebook, priority=400)
    app.connect("doctree-read", describe_images, priority=400)
    app.connect("html-page-context", describe_page)
    app.connect("build-finished", tell_times)
    return {"parallel_read_safe": True, "parallel_write_safe": True}
