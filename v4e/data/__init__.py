"""Samples on disk and the order in which a run meets them."""
