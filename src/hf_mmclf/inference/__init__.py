"""A finished model at work: predictions, comparison and explanation."""
