"""The NeMo engine: engine.py checks, launches and follows; worker.py, training.py and course.py run inside NeMo."""
