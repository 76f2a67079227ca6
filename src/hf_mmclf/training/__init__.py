"""Training runs: arguments, losses, the trainer and what a run writes."""
