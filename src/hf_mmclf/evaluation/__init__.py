"""Metrics, thresholds and reports, from arrays of scores and labels."""
