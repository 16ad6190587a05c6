"""From a template and its facts to one self-contained HTML page. Everything is escaped but our own SVG."""

from importlib import resources
from typing import Any

from jinja2 import Environment, FunctionLoader, StrictUndefined
from markupsafe import Markup

from sera_core.guards.shown import shown
from sera_core.reporting import words

GENERATOR = "sera-flow report"
"""What the pages' `generator` says: how a page of ours is told from another file."""


def render(template: str, **facts: Any) -> str:
    """The page. Raises when the template asks for a fact it was not given."""
    return _environment().get_template(template).render(facts, generator=GENERATOR)


def _environment() -> Environment:
    environment = Environment(
        loader=FunctionLoader(_source),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
        finalize=_shown,
    )
    for name in ("number", "count", "interval", "percent", "plural", "stage"):
        environment.filters[name] = getattr(words, name)
    return environment


def _shown(fact: Any) -> Any:
    """Text as it may be shown; our own SVG and what a macro made are markup already."""
    return shown(fact) if isinstance(fact, str) and not isinstance(fact, Markup) else fact


def _source(name: str) -> str:
    return (resources.files("sera_core.reporting") / "templates" / name).read_text(encoding="utf-8")
