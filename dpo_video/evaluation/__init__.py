"""Base against tuned: measuring, judging and showing."""
