"""Benchmarks of the ops, of one DiT block, and end to end. Run them with ``python -m benchmarks``."""
