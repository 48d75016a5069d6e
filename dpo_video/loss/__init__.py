"""Losses: elementwise errors in, one loss per pair out."""
