"""Load and sample diffusion models."""
