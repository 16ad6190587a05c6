"""The report's plots in markdown: SVG images inside the text, so that a card asks nobody for a picture."""

import base64
import re

from markupsafe import Markup

from flows.display.markdown import escape
from sera_core.reporting.pages import render


def image(plot: Markup, caption: str) -> str:
    """A plot as a markdown image, its caption (of our own words) below."""
    data = base64.b64encode(standalone(plot).encode()).decode()
    return f"![{caption}](data:image/svg+xml;base64,{data})\n\n*{escape(caption)}*"


def standalone(plot: Markup) -> str:
    """A plot as an SVG file of its own: name space, size, background and the style sheet of the pages."""
    box = re.search(r'viewBox="0 0 (\d+) (\d+)"', plot)
    assert box is not None, "a plot of the report has a viewBox"
    return render("plot.svg.j2", plot=plot, width=box[1], height=box[2])
