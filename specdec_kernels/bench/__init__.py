"""Benchmarks: correct first, timed second, in the same run."""
