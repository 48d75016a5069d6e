"""Measure a tuned model against its base model, judge the result and show it."""
