"""Helpers without video or diffusion: files, hashes, random generators, statistics."""
