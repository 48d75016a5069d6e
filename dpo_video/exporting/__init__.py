"""LoRA files that other programs load, and their model cards."""
