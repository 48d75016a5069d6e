"""Loading diffusion models, and the one sampling primitive."""
