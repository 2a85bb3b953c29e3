"""Measurements that print one JSON line each; run from the checkout as `python -m benchmarks.NAME`.

Figures and what they mean: docs/performance.md.
"""
