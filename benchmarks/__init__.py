"""Figures of thawline beside hand-written loops, measured side by side in one run: ``python -m benchmarks``."""
