"""What several tests share and no server provides."""

from pathlib import Path

REPOSITORY = Path(__file__).parent.parent

SEQUENCE, STEPS = 32, 6
"""Of the trainings of `compressed`: tokens of a sequence, optimizer steps."""
