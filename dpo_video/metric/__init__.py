"""Metrics: a video in, one number out."""
