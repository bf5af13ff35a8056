"""Checkpoints of published models: per family a table of tensor names and a reading of its config.json.

Nothing else in `model` knows a family's name. `docs/models.md` says how to add one.
"""
