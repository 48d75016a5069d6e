"""Peak memory and time of a run, predicted before a weight is loaded."""
