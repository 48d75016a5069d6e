"""References: where the frozen model's predictions come from."""
