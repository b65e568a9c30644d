"""How any stage runs: inputs identified, a result reused or made, its record, its outputs.

It imports config, storage, tracking, registry and engines. entry.py starts minitron.stages.STAGE by name: the one step
up, on purpose.
"""
