"""How any stage runs: it identifies its inputs, reuses or makes the result, and writes the record and the outputs.

This room imports config, storage, tracking, registry and engines. entry.py starts minitron.stages.STAGE by name: the
one import upward, on purpose.
"""
