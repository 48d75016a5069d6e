"""Metrics: one number per video."""
