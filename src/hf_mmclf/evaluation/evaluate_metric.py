"""The multi-label metrics as a metric of the `evaluate` library."""

import evaluate
from datasets import Features, List, Value
from numpy.typing import ArrayLike

from .metrics import check_scores, multi_label_metrics


class MultiLabelMetric(evaluate.Metric):
    """
    Multi-label metrics as an `evaluate` metric.

    It needs no network and writes no file, so several processes can compute at the same time.
    `compute(predictions, references, threshold=0.5, label_names=None)` takes the arguments of [`multi_label_metrics`],
    with the scores as `predictions`, and returns the same figures.
    """

    def __init__(self):
        super().__init__(keep_in_memory=True)

    def _info(self) -> evaluate.MetricInfo:
        # float64 instead of the usual float32: rounding could move a score across its threshold
        features = Features({"predictions": List(Value("float64")), "references": List(Value("int8"))})
        return evaluate.MetricInfo(
            description="Metrics for multi-label classification.",
            citation="",
            features=features,
            inputs_description=multi_label_metrics.__doc__,
        )

    def add_batch(self, *, predictions: ArrayLike, references: ArrayLike) -> None:
        """
        Add rows. They are checked here, because `evaluate` would keep rows that it cannot compute.

        Args:
            predictions, references (`ArrayLike` of shape `(rows, labels)`): As for [`multi_label_metrics`].

        Raises:
            `ValueError`: if an input has a wrong shape or range.
        """
        predictions, references = check_scores(predictions, references)
        super().add_batch(predictions=predictions, references=references)

    def _compute(self, predictions, references, threshold=0.5, label_names=None) -> dict[str, float]:
        return multi_label_metrics(predictions, references, threshold, label_names)
