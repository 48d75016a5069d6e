"""Memory modes of a training step, and counting what they save."""
