"""Use of a saved model: prediction, evaluation, comparison and explanation."""
