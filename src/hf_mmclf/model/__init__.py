"""The model and all that is pushed to the Hub with it as code."""
