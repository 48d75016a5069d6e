"""Labelers: two videos in, who is better per segment out."""
