import pytest

from hf_mmclf import MMClfTrainingArguments, ModelArguments
from hf_mmclf.training.inputs import check_arguments


def test_dataclasses_work_from_python(tmp_path):
    args = MMClfTrainingArguments(str(tmp_path))
    assert (args.output_dir, args.metric_for_best_model, args.greater_is_better) == (str(tmp_path), "f1", True)
    assert args.load_best_model_at_end and not args.remove_unused_columns and args.backbone_learning_rate is None
    with pytest.raises(ValueError, match="remove_unused_columns"):
        MMClfTrainingArguments(str(tmp_path), remove_unused_columns=True)
    for wrong, message in (
        (dict(loss="zlpr", positive_weight_power=0.5), "'zlpr' compares labels"),
        (dict(label_smoothing_factor=2.0), "label smoothing is 2.0"),
        (dict(threshold_beta=0.0), "beta is 0.0"),
        (dict(threshold_objective="precision", threshold_precision=90.0), "precision is 90.0"),
        (dict(threshold_shrinkage=-2.0), "threshold_shrinkage is -2.0; expected at least 0, or -1"),
        (dict(cached_views=2), "--cached_views has no effect, because --cache_features is not given"),
        (dict(cached_views=2, feature_cache_dir="x"), "--cached_views, --feature_cache_dir have no effect"),
        (dict(positive_weight_cap=3.0), "--positive_weight_cap has no effect, because --positive_weight_power is 0"),
        (dict(threshold_shrinkage=3.0), "--threshold_shrinkage has no effect, because --label_thresholds is not"),
        (dict(threshold_precision=0.8), "--threshold_precision has no effect, because --threshold_objective is not"),
        (dict(threshold_objective="precision", threshold_beta=2.0), "--threshold_beta has no effect"),
        (dict(do_predict=True), "--do_predict has no effect"),
        (dict(prediction_loss_only=True), "--prediction_loss_only has no effect"),
        (dict(hub_model_id="a/b"), "--hub_model_id has no effect, because training uploads nothing"),
        (dict(hub_token="x"), "--hub_token has no effect, because training uploads nothing"),
        (dict(report_to="clearml"), "report_to is clearml, which transformers does not find; installed are: "),
        (dict(report_to=["none", "tensorbord"]), "report_to is tensorbord, which transformers does not find"),
        (dict(metric_for_best_model="f2"), "metric_for_best_model is 'f2'"),
    ):
        with pytest.raises(ValueError, match=message):
            check_arguments(MMClfTrainingArguments(str(tmp_path), **wrong))
    with pytest.raises(ValueError, match="resnet18"):
        ModelArguments(image_backbone="resnet81")


@pytest.mark.parametrize("metric, greater", [("loss", False), ("eval_loss", False), ("map", True), ("eval_f1", True)])
def test_best_model_by_loss_is_the_one_with_the_lowest(metric, greater, tmp_path):
    assert MMClfTrainingArguments(str(tmp_path), metric_for_best_model=metric).greater_is_better is greater
