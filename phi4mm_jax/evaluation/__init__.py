"""Benchmarks: items with references, metrics with intervals, published figures beside them."""
