import html
import json
import re

import numpy as np
import pytest
from support.tiny_folder import LABELS, write_folder, write_table

from hf_mmclf import DataArguments, Predictor
from hf_mmclf.cli import main
from hf_mmclf.evaluation.metrics import multi_label_metrics
from hf_mmclf.hub import gallery
from hf_mmclf.hub.gallery import confusions, curves, mistakes, render_gallery, suspects


@pytest.fixture
def noisy():
    """Scores that follow the true labels, and labels of which 3% are wrong."""
    generator = np.random.default_rng(0)
    true = (generator.random((1000, 6)) < 0.3).astype(np.int8)
    scores = 1 / (1 + np.exp(-(4 * true - 2 + generator.normal(size=true.shape)))).astype(np.float32)
    flipped = generator.random(true.shape) < 0.03
    return scores, np.where(flipped, 1 - true, true), flipped


def test_wrong_labels_are_among_the_first_suspects(noisy):
    scores, references, flipped = noisy
    ranked = suspects(scores, references)
    assert len(ranked) == len(set(ranked)) == gallery.SUSPECTS
    assert np.mean([flipped[place] for place in ranked]) > 0.9 > 20 * flipped.mean()
    row, label = ranked[0]
    references[row, label - 1] = -1  # a row with an unknown label has no rank
    assert row not in {place[0] for place in suspects(scores, references)}
    assert suspects(scores, np.full_like(references, -1)) == []


def test_mistakes_and_confusions():
    scores = np.array([[0.9, 0.1], [0.7, 0.2], [0.4, 0.8], [0.1, 0.6]])
    references = np.array([[0, 1], [0, 1], [1, 0], [-1, -1]])
    predicted = scores >= 0.5
    assert mistakes(scores, predicted, references, 1) == ([[0], [2]], [[2], [0]])
    assert mistakes(scores, predicted, references, 9) == ([[0, 1], [2]], [[2], [0, 1]])
    assert confusions(predicted, references, ["a", "b"]) == [
        {"given": "b", "predicted": "a", "rows": 2},
        {"given": "a", "predicted": "b", "rows": 1},
    ]


@pytest.mark.parametrize("min_labels", [0, 1])
def test_the_slider_has_the_figures_of_each_threshold(min_labels, noisy):
    scores, references, _ = noisy
    found = curves(scores, references, min_labels)
    best = scores == scores.max(1, keepdims=True)
    for place in (4, 49, 90):
        cut = found["cuts"][place]
        expected = multi_label_metrics(scores, references, np.where(best & (min_labels > 0), 0.0, cut))
        assert found["micro"][place] == pytest.approx(100 * expected["f1"], abs=0.051)
        assert found["samples"][place] == pytest.approx(100 * expected["f1_samples"], abs=0.051)
        assert np.mean(found["labels"][place], 0)[2] == pytest.approx(100 * expected["f1_macro"], abs=0.051)


@pytest.mark.parametrize("kind", ["both", "image", "text"])
def test_the_page_stands_alone_and_escapes_what_it_shows(kind, tmp_path, monkeypatch):
    predictor = Predictor.load(write_folder(tmp_path / "m", kind, threshold=0.4))
    predictor.model.config.id2label[0] = "<b>cat</b>"
    table = write_table(tmp_path)
    evil = "</script><script>alert(1)</script>"
    table.write_text(table.read_text().replace(",a dog\n", f",{evil}\n"))
    prepared = predictor.prepare(DataArguments(str(table)))
    _, rows = predictor.choose_split(prepared)
    scores = 1 - np.array(rows["labels"], dtype=np.float32) * 0.9  # all labels are wrong
    page = render_gallery(predictor, rows, prepared.folder, scores)
    assert not re.search(r"(src|href)=.(?!data:)", page) and page.count("<script>") == 1
    assert "<b>cat</b>" not in page and html.escape("<b>cat</b>") in page
    assert (html.escape(evil) in page) == (kind != "image")
    assert ("data:image/jpeg;base64," in page) == (kind != "text")
    data = json.loads(re.search(r"const curves = (.*);", page)[1])
    assert len(data["micro"]) == 99 and len(data["labels"][0]) == 3
    cards = len(re.findall('<div class="card">', page))
    assert cards == 2 * 3 * len(rows)  # all decisions of three labels are mistakes, and suspects
    assert "with an unknown label" not in page
    unknown = rows.map(lambda row: {"labels": [-1, *row["labels"][1:]]}, load_from_cache_file=False)
    page = render_gallery(predictor, unknown, prepared.folder, scores)
    assert f"{len(rows)} rows with an unknown label are left out." in page
    monkeypatch.setattr(gallery, "find_spec", lambda name: None)
    assert "<code>pip install 'hf_mmclf[gallery]'</code>" in render_gallery(predictor, rows, prepared.folder, scores)


def test_the_command_writes_the_page(tmp_path, monkeypatch, capsys):
    folder, table = write_folder(tmp_path / "m", "both"), write_table(tmp_path)
    monkeypatch.chdir(tmp_path)
    main(["gallery", str(folder), "--data", table.name])
    assert capsys.readouterr().out == f"{len(LABELS)} rows of train: gallery.html\n"
    assert (tmp_path / "gallery.html").read_text(encoding="utf-8").startswith("<!doctype html>")
    with pytest.raises(SystemExit, match="gallery.html exists already; give another --output"):
        main(["gallery", str(folder), "--data", table.name])
