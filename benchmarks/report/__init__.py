"""Benchmark results: their form, tables and pictures of them, and the comparison of two. `benchmarks/` makes
them.
"""
