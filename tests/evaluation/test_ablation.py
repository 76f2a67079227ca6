import numpy as np
import pytest

from hf_mmclf.evaluation.ablation import ABLATIONS, ablation_figures, shuffled_texts

TEXTS = ["a", None, "b", "c", None, "d"]


@pytest.mark.parametrize("seed", range(20))
def test_each_text_goes_to_another_row_that_has_one(seed):
    shuffled = shuffled_texts(TEXTS, seed)
    assert sorted(filter(None, shuffled)) == ["a", "b", "c", "d"]
    assert [text is None for text in shuffled] == [text is None for text in TEXTS]
    assert not [row for row, text in enumerate(shuffled) if text and text == TEXTS[row]]
    assert TEXTS == ["a", None, "b", "c", None, "d"]


def test_the_seed_decides_the_shuffle():
    texts = [f"text {row}" for row in range(30)]
    first, again, other = (shuffled_texts(texts, seed) for seed in (0, 0, 1))
    assert first == again != other


@pytest.mark.parametrize("texts", [["a", None], [None, None], ["a"], []])
def test_a_single_text_stays(texts):
    assert shuffled_texts(texts) == texts


def test_figures_use_the_thresholds_of_the_configuration(tiny_config):
    config = tiny_config(threshold=0.3, label_thresholds={"LABEL_1": 0.7})
    references = np.array([[1, 0, 1], [0, 1, 1]])
    has_image = np.array([True, False])
    scores = dict.fromkeys(ABLATIONS, np.array([[0.4, 0.6, 0.2], [0.1, 0.6, 0.9]], dtype=np.float32))
    found = ablation_figures(scores, references, config, has_image)
    assert found == dict.fromkeys(
        ABLATIONS,
        {
            "f1": pytest.approx(2 / 3),
            "f1_samples": pytest.approx(2 / 3),
            "f1_macro": pytest.approx((1 + 0 + 2 / 3) / 3),
        },
    )
    config.missing_thresholds = {"text": 0.05, "image": 0.95}  # the ablated rows have these
    found = ablation_figures(scores, references, config, has_image)
    assert found["image_only"]["f1"] == pytest.approx(8 / 10)
    assert found["text_only"]["f1"] == 0
    assert found["shuffled_captions"]["f1"] == pytest.approx(2 / 5)  # the second row has no image there either


def test_a_score_equal_to_the_threshold_of_ablated_rows_is_predicted(tiny_config):
    config = tiny_config(missing_thresholds={"text": 0.25})
    scores = {"image_only": np.full((2, 3), 0.25, dtype=np.float32)}
    assert ablation_figures(scores, np.ones((2, 3)), config)["image_only"] == dict.fromkeys(
        ("f1", "f1_samples", "f1_macro"), 1
    )
