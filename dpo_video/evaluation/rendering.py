"""The environment of all page and chart templates: everything that goes into them is escaped."""

from __future__ import annotations

from functools import cache

from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup

from dpo_video.support.formatting import brief, option, percent


@cache
def templates() -> Environment:
    """The templates of this package."""
    environment = Environment(
        loader=PackageLoader("dpo_video.evaluation"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters.update(brief=brief, percent=percent, option=option)
    return environment


def asset(name: str) -> Markup:
    """A file of this package that goes into a page unchanged."""
    loader = templates().loader
    assert loader is not None
    return Markup(loader.get_source(templates(), name)[0])
