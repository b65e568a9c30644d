"""What TensorBoard finds in a directory."""

from pathlib import Path

from tensorboard.backend.event_processing.event_accumulator import EventAccumulator


def read_events(directory: Path) -> dict[str, list[tuple[int, float]]]:
    """Return the points of every curve that TensorBoard finds in a directory."""
    events = EventAccumulator(str(directory))
    events.Reload()
    tags = events.Tags()["scalars"]
    return {tag: [(event.step, event.value) for event in events.Scalars(tag)] for tag in tags}
