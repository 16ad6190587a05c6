"""The report's plots as inline SVG images in markdown, so that a card loads no external image."""

import base64
import re

from markupsafe import Markup

from flows.display.markdown import escape
from sera_core.reporting.pages import render


def image(plot: Markup, caption: str) -> str:
    """A plot as a markdown image with its caption (trusted text) below."""
    data = base64.b64encode(standalone(plot).encode()).decode()
    return f"![{caption}](data:image/svg+xml;base64,{data})\n\n*{escape(caption)}*"


def standalone(plot: Markup) -> str:
    """A plot as a standalone SVG: with namespace, size, background and style sheet."""
    box = re.search(r'viewBox="0 0 (\d+) (\d+)"', plot)
    assert box is not None, "a plot of the report has a viewBox"
    return render("plot.svg.j2", plot=plot, width=box[1], height=box[2])
