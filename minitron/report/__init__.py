"""The report of a compression for people: page, card, tables, figures, charts, TensorBoard's events.

Everything here turns records into text and pictures. It imports config, storage and registry.
"""

from pathlib import Path

TEMPLATES = Path(__file__).with_name("templates")
"""The directory of the templates."""
