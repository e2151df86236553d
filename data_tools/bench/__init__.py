"""Benchmarks, side by side on one machine: `make bench`."""
