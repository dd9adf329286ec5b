"""Figures of quality, each with its uncertainty; `python -m ldm3d.evaluation`."""
