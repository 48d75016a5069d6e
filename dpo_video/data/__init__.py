"""Videos, clips, prompts and the pair store: everything that is read from or written to disk."""
