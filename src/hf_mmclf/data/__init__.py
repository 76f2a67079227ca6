"""Tables, labels, splits, transforms and batches."""
