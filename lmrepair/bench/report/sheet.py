"""Templates filled in: everything that came from a prompt, a model or a file is escaped."""

from __future__ import annotations

from importlib.resources import files
from typing import Any

from lmrepair.errors import UsageError

TEMPLATES = ("base.html", "card.html", "page.html", "fix.html")
STYLES = ("page.css", "fix.css")


def filled(template: str, styles: tuple[str, ...], **given: Any) -> str:
    """One of the TEMPLATES as HTML, its style sheets inside. Raises UsageError where Jinja2 is not installed."""
    try:
        from jinja2 import DictLoader, Environment, StrictUndefined
        from markupsafe import Markup
    except ImportError as error:
        raise UsageError("the report needs Jinja2, which is not installed; pip install 'lmrepair[bench]'") from error
    folder = files("lmrepair") / "bench" / "report"
    sources = {name: (folder / name).read_text(encoding="utf-8") for name in (*TEMPLATES, *STYLES)}
    environment = Environment(
        loader=DictLoader(sources), autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    # Both are ours: the style sheets ship, the SVG was drawn by a library that escapes its labels.
    environment.filters["drawn"] = Markup
    style = Markup("".join(sources[name] for name in styles))
    return environment.get_template(template).render(style=style, **given)
