"""Memory modes of a training step, and the count of the bytes that it needs."""
