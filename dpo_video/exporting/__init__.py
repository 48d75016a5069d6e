"""LoRA files that other programs load, and model cards."""
