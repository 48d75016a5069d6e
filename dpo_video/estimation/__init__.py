"""Peak memory and time of a run, predicted before any weight is loaded."""
