"""Measurements that print one JSON line each; run from the checkout as `python -m benchmarks.NAME` (docs/performance.md)."""
