"""What each command does, as functions without a terminal."""
