"""The report of a compression for people: page, card, tables, figures, charts, TensorBoard's events.

Everything here turns records into text and pictures. It imports config, storage and registry.
"""

from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined

from minitron.config.metrics import FORMS

TEMPLATES = Path(__file__).with_name("templates")
"""The directory of the templates."""


def render_page(template: str, content: dict[str, Any]) -> str:
    """Render an HTML template, with the formats of numbers and the style that the pages share."""
    environment = Environment(
        loader=FileSystemLoader(TEMPLATES), autoescape=True, undefined=StrictUndefined, trim_blocks=True,
        lstrip_blocks=True,
    )  # fmt: skip
    environment.filters |= FORMS
    return environment.get_template(template).render(content)
