"""Benchmarks of the ops, of one DiT block, and end to end: ``python -m benchmarks --help``."""
