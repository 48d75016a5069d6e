"""Backbones: the families of video diffusion models."""
