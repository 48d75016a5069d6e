"""The embedded text-to-video model: its procedural world, its training recipe and its weights."""
