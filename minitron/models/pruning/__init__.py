"""How a student is cut out of its teacher: importance, the choice of what to keep, surgery, compensation.

Engines and stages call it.
"""
