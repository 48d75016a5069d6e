"""Losses: functions from elementwise errors to one loss per pair."""
