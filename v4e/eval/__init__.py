"""Measuring edits: metrics, the evaluator, and its report."""
