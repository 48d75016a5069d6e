"""Pair construction: clips or prompts in, preference pairs out."""
