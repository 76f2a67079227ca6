import copy
import io
import re
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image
from support.tiny_folder import CAPTIONS, TEXT, write_folder
from torch import nn

import hf_mmclf
from hf_mmclf import MMClfConfig, MMClfForImageTextClassification, MMClfImageProcessor, MMClfProcessor
from hf_mmclf.data.tokenizer import load_tokenizer
from hf_mmclf.inference.explanation import explain
from hf_mmclf.inference.predictor import Predictor

SENTENCE = 'a man says "no, dog" to dogs'
RESNET = dict(image_backbone="test_resnet")
VIT = dict(image_backbone="test_vit", image_backbone_args=dict(img_size=32))
SWIN = dict(
    image_backbone="swin_tiny_patch4_window7_224",
    image_backbone_args=dict(img_size=32, window_size=4, embed_dim=8, depths=(1, 1), num_heads=(1, 1)),
)
FROZEN = dict(unfrozen_image_stages=0, unfrozen_text_layers=0)


@pytest.fixture(scope="module")
def tokenizer():
    tokenizer = load_tokenizer("train", CAPTIONS, 60)[0]
    tokenizer.model_max_length = TEXT["max_position_embeddings"]
    return tokenizer


@pytest.fixture
def make(tokenizer):
    """A tiny model with random weights and its processor, for 32 pixels, of `kind` "both", "image" or "text"."""

    def make(kind="both", text=TEXT, **fields):
        if kind != "image":
            fields["text_config"] = dict(text, vocab_size=len(tokenizer))
        if kind != "text":
            fields = {**RESNET, **fields}
        config = MMClfConfig(**{"width": 8, "id2label": {0: "cat", 1: "dog", 2: "bird"}, **fields})
        model = MMClfForImageTextClassification(config).eval()
        image_processor = None if kind == "text" else MMClfImageProcessor(size=32)
        return SimpleNamespace(
            model=model, processor=MMClfProcessor(image_processor, None if kind == "image" else tokenizer)
        )

    return make


class Reddest(nn.Module):
    """An image backbone with one feature: how red the reddest place is."""

    head_hidden_size = num_features = 1

    def forward_features(self, pixels):
        return pixels[:, :1] - pixels[:, 1:].mean(1, keepdim=True)

    def forward_head(self, features, pre_logits):
        return features.amax((2, 3))


@pytest.fixture
def sees_red(make):
    """Knows "dog" by red, "bird" by its absence."""
    pipe = make("image")
    pipe.model.image_model = Reddest()
    pipe.model.classifier = nn.Linear(1, 3)
    with torch.no_grad():
        pipe.model.classifier.weight.copy_(torch.tensor([[0.0], [1.0], [-1.0]]))
    return pipe


@pytest.fixture
def reads_dog(make, tokenizer):
    """Knows "dog" by the words dog and dogs: no layers, so that the mean of the embeddings is what is classified."""
    pipe = make("text", dict(TEXT, num_hidden_layers=0, hidden_size=32), text_pooling="mean")
    embeddings = pipe.model.text_model.embeddings
    with torch.no_grad():
        embeddings.position_embeddings.weight.zero_()
        embeddings.token_type_embeddings.weight.zero_()
        dog = embeddings(tokenizer("dog", add_special_tokens=False, return_tensors="pt")["input_ids"])[0, 0]
        pipe.model.classifier.weight.copy_(torch.stack([torch.zeros(32), dog, -dog]))
    return pipe


def red_squares(width=64, height=64, red=(), color="navy"):
    """An image with red squares of 12 pixels at the given top left corners."""
    image = Image.new("RGB", (width, height), color)
    for left, top in red:
        image.paste("red", (left, top, left + 12, top + 12))
    return image


def noise(width=40, height=30):
    pixels = np.random.default_rng(0).integers(0, 256, (height, width, 3), dtype=np.uint8)
    return Image.fromarray(pixels)


def hottest(explanation):
    """Column and row of the middle of the hottest place."""
    heat = explanation.heat_map
    rows, columns = np.nonzero(heat >= 0.99 * heat.max())
    return columns.mean(), rows.mean()


def in_square(explanation, left, top):
    """Whether the hottest place is a red square, or no further from it than half a cell."""
    x, y = hottest(explanation)
    margin = max(explanation.image.size) / 16
    return -margin <= x - left < 12 + margin and -margin <= y - top < 12 + margin


def strongest(explanation):
    return max(explanation.words, key=lambda word: word.weight).word


# What is found


@pytest.mark.parametrize("corner", [(0, 0), (52, 0), (24, 40), (40, 52)])
def test_the_place_that_carries_a_label_is_the_hottest(sees_red, corner):
    assert in_square(explain(sees_red, image=red_squares(red=[corner]), label="dog"), *corner)


def test_what_speaks_against_a_label_is_negative(sees_red):
    image = red_squares(red=[(24, 40)])
    for_dog, for_bird = (explain(sees_red, image=image, label=label) for label in ("dog", "bird"))
    assert for_dog.cells.max() > 0 and for_dog.cells.min() == pytest.approx(0, abs=1e-6)
    np.testing.assert_allclose(for_bird.cells, -for_dog.cells, atol=1e-6)
    assert not explain(sees_red, image=image, label="cat").cells.any()


@pytest.mark.parametrize(
    ("size", "corner", "shape"),
    [((120, 40), (100, 10), (3, 8)), ((40, 120), (2, 70), (8, 3)), ((30, 200), (9, 3), (8, 1))],
    ids=str,
)
def test_the_heat_map_is_over_the_image_not_its_padded_square(sees_red, size, corner, shape):
    explanation = explain(sees_red, image=red_squares(*size, red=[corner]), label="dog")
    assert explanation.heat_map.shape == size[::-1] and explanation.cells.shape == shape
    assert in_square(explanation, *corner)


def test_the_heat_map_is_over_the_upright_red_squares(sees_red, tmp_path):
    upright = red_squares(120, 40, red=[(100, 10)])
    exif = Image.Exif()
    exif[0x0112] = 6  # the camera was turned: shown after a quarter turn to the right
    upright.transpose(Image.Transpose.ROTATE_90).save(tmp_path / "turned.png", exif=exif)
    for form in (tmp_path / "turned.png", Image.open(tmp_path / "turned.png")):
        explanation = explain(sees_red, image=form, label="dog")
        assert explanation.image.size == (120, 40)
        assert in_square(explanation, 100, 10)


def test_a_finer_grid_tells_more(sees_red):
    image = red_squares(red=[(24, 40)])
    coarse, fine = (explain(sees_red, image=image, label="dog", grid=grid) for grid in (4, 16))
    assert coarse.cells.shape == (4, 4) and fine.cells.shape == (16, 16)
    assert (fine.cells > 0).mean() < (coarse.cells > 0).mean()


@pytest.mark.parametrize("size", [(32, 32), (32, 16)])
def test_nine_windows_hide_each_cell_also_at_the_edge(make, size):
    """Fill every window by hand: each 3 x 3 cells around a cell of the image or one just outside of it."""
    pipe, image, grid = make("image"), noise(*size), 4
    columns, rows, edge = grid, grid * size[1] // size[0], 32 // grid
    pixels = pipe.processor.image_processor(image, return_tensors="pt")["pixel_values"]
    top = (32 - size[1]) // 2

    def logit(row=None, column=None):
        changed = pixels.clone()
        inside = changed[..., top : top + size[1], :]
        if row is not None:
            window = (
                slice(max(row - 1, 0) * edge, (row + 2) * edge),
                slice(max(column - 1, 0) * edge, (column + 2) * edge),
            )
            inside[(..., *window)] = inside.mean((2, 3), keepdim=True)
        with torch.no_grad():
            return float(pipe.model(pixel_values=changed).logits[0, 1])

    falls = np.array(
        [[logit() - logit(row, column) for column in range(-1, columns + 1)] for row in range(-1, rows + 1)]
    )
    expected = [[falls[row : row + 3, column : column + 3].mean() for column in range(columns)] for row in range(rows)]
    np.testing.assert_allclose(explain(pipe, image=image, label="dog", grid=grid).cells, expected, atol=1e-5)


@pytest.mark.parametrize("text", ["Dog on a man", "a man says:\n“a DOG!”", "no  man, no man to a dog"])
def test_the_word_that_carries_a_label_is_the_strongest(reads_dog, text):
    explanation = explain(reads_dog, text=text, label="dog")
    assert "dog" in strongest(explanation).lower()
    assert "dog" in min(explain(reads_dog, text=text, label="bird").words, key=lambda w: w.weight).word.lower()


def test_a_word_of_several_pieces_counts_as_one(reads_dog, tokenizer):
    text = "a man on no-dog-no to a man"
    assert len(tokenizer.tokenize("no-dog-no")) > 1
    assert strongest(explain(reads_dog, text=text, label="dog")) == "no-dog-no"


@pytest.mark.parametrize(
    "text", ["a dog", " a man,\tsays:  “no”…\n\n", "DOG’s café — naïve 犬 🐕‍🦺!", "dog", "á b", "\u200b dog"]
)
def test_words_stand_where_they_are_written(make, text):
    words = explain(make("text"), text=text).words
    assert [word.word for word in words] == text.split()
    rest = list(text)
    for word in words:
        start, end = word.span
        assert text[start:end] == word.word
        rest[start:end] = " " * (end - start)
    assert not "".join(rest).strip()


def test_words_that_the_model_has_not_read_have_no_weight(make):
    text = "a man on a dog says no to a dog on a man on a dog says no"  # 18 words; 16 tokens with the special ones
    weights = [word.weight for word in explain(make("text"), text=text).words]
    assert all(weights[:14]) and not any(weights[14:]) and len(weights) == 18


# Every figure is a fact about the model


@pytest.mark.parametrize(
    "fields",
    [
        dict(fusion=fusion, image_tokens=tokens)
        for fusion in ("self", "cross_text", "cross_image", "concat", "label_queries")
        for tokens in ("pooled", "spatial")
    ]
    + [
        dict(fusion="label_queries", image_tokens="stages", modality_dropout=0.2),
        dict(image_tokens="spatial", **VIT),
        dict(image_tokens="spatial", **SWIN),
        dict(image_tokens="spatial", learned_missing=True, **FROZEN),
        dict(kind="image", **VIT),
        dict(kind="text", text_pooling="pooler"),
        dict(kind="text", text_pooling="mean"),
    ],
    ids=lambda fields: "-".join(str(value) for value in fields.values() if not isinstance(value, dict)),
)
def test_figures_are_what_the_model_says_without_the_part(make, fields):
    pipe = make(**fields)
    kind = fields.get("kind", "both")
    image, text = (None if kind == "text" else noise()), (None if kind == "image" else SENTENCE)
    explanation = explain(pipe, image=image, text=text, label="dog", grid=1)  # of one cell, so that all is hidden

    inputs = {}
    if image is not None:
        inputs["pixel_values"] = pipe.processor.image_processor(image, return_tensors="pt")["pixel_values"]
    if text is not None:
        inputs |= pipe.processor.tokenizer(text, return_tensors="pt")

    def logit(**changed):
        with torch.no_grad():
            return float(pipe.model(**{**inputs, **changed}).logits[0, 1])

    def score(**changed):
        return pytest.approx(1 / (1 + np.exp(-logit(**changed))), abs=1e-6)

    assert explanation.score == score()
    if image is not None:
        hidden = inputs["pixel_values"].clone()
        shown = hidden[..., 4:28, :]  # 40 x 30 pixels in a square of 32
        shown[:] = shown.mean((2, 3), keepdim=True)
        assert explanation.cells[0, 0] == pytest.approx(logit() - logit(pixel_values=hidden), abs=1e-5)
    if text is not None:
        pieces = [4, 5, 6, 7, 8]  # of "no, after [CLS] a man says, and of dog"
        words = [word.weight for word in explanation.words]
        assert pipe.processor.tokenizer.convert_ids_to_tokens(inputs["input_ids"][0, pieces]) == [
            '"',
            "no",
            ",",
            "dog",
            '"',
        ]
        for word, (start, end) in ((3, (4, 7)), (4, (7, 9))):
            mask = inputs["attention_mask"].clone()
            mask[:, start:end] = 0
            assert words[word] == pytest.approx(logit() - logit(attention_mask=mask), abs=1e-5)
    if kind == "both":
        assert explanation.score_without_image == score(image_mask=torch.tensor([False]))
        assert explanation.score_without_text == score(text_mask=torch.tensor([False]))
    else:
        assert explanation.score_without_image is explanation.score_without_text is None


def test_scores_are_those_of_the_pipeline(tmp_path):
    thresholds = dict(threshold=0.3, label_thresholds={"dog": 0.9}, missing_thresholds={"image": 0.2})
    folder = write_folder(tmp_path, **thresholds, learned_missing=True)
    pipe, image = hf_mmclf.pipeline(folder), noise()
    both, seen, read = (
        {entry["label"]: entry["score"] for entry in pipe(row, return_all_scores=True)}
        for row in ({"image": image, "text": SENTENCE}, {"image": image}, {"text": SENTENCE})
    )
    for label, score in both.items():
        explanation = explain(pipe, image=image, text=SENTENCE, label=label)
        figures = (explanation.score, explanation.score_without_text, explanation.score_without_image)
        assert figures == pytest.approx((score, seen[label], read[label]), abs=1e-6)
        assert explanation.threshold == (0.9 if label == "dog" else 0.3)
    assert explain(pipe, text=SENTENCE, label="dog").threshold == 0.2
    assert explain(pipe, image=image, text=SENTENCE).label == max(both, key=both.get)
    assert explain(Predictor.load(folder), text=SENTENCE, label="dog").score == pytest.approx(read["dog"], abs=1e-6)
    assert explain(pipe, image=image, text=" \n", label="dog").score == pytest.approx(seen["dog"], abs=1e-6)


def test_batches_do_not_matter(make):
    pipe = make(image_tokens="spatial")
    one, many = (explain(pipe, noise(), SENTENCE, "dog", batch_size=size) for size in (1, 64))
    np.testing.assert_allclose(one.cells, many.cells, atol=1e-5)
    assert [word.weight for word in one.words] == pytest.approx([word.weight for word in many.words], abs=1e-5)


def test_images_in_every_form(sees_red, tmp_path):
    image = red_squares(120, 40, red=[(100, 10)])
    image.save(tmp_path / "a.png")
    array, data = np.array(image), (tmp_path / "a.png").read_bytes()
    expected = explain(sees_red, image=image, label="dog")
    forms = [tmp_path / "a.png", str(tmp_path / "a.png"), data, {"bytes": data, "path": None}, array]
    for form in [*forms, array.transpose(2, 0, 1), torch.from_numpy(array), image.convert("RGBA")]:
        explanation = explain(sees_red, image=form, label="dog")
        np.testing.assert_array_equal(explanation.cells, expected.cells)
        assert explanation.image.tobytes() == image.tobytes()
    grey = explain(sees_red, image=np.array(image.convert("L")), label="dog")
    assert grey.image.mode == "RGB" and grey.heat_map.shape == (40, 120)


def test_the_model_is_left_as_it_was(make):
    pipe = make(image_tokens="spatial", dropout=0.5, unfrozen_image_stages=1)
    model = pipe.model.train()
    model.classifier.eval()
    model(**pipe.processor(images=[noise()] * 2, text=[SENTENCE] * 2)).logits.sum().backward()

    def condition():
        return (
            {name: tensor.clone() for name, tensor in model.state_dict().items()},
            {
                name: (p.requires_grad, None if p.grad is None else p.grad.clone())
                for name, p in model.named_parameters()
            },
            {name: (m.training, len(m._forward_hooks), len(m._backward_hooks)) for name, m in model.named_modules()},
            torch.is_grad_enabled(),
        )

    before = copy.deepcopy(condition())
    first, second = (explain(pipe, noise(), SENTENCE, "dog") for _ in range(2))
    torch.testing.assert_close(condition(), before, rtol=0, atol=0)
    assert first.score == second.score  # without dropout
    with pytest.raises(TypeError):
        explain(pipe, noise(), SENTENCE, "dog", batch_size="two")
    torch.testing.assert_close(condition(), before, rtol=0, atol=0)


def test_half_precision(make):
    pipe = make(image_tokens="spatial")
    pipe.model.to(torch.bfloat16)
    explanation = explain(pipe, noise(), SENTENCE)
    assert np.isfinite(explanation.heat_map).all() and explanation.heat_map.dtype == np.float32
    explanation.figure()


# What is shown


@pytest.mark.parametrize("kind", ["both", "image", "text"])
def test_figures_show_what_there_is(make, kind, tmp_path):
    image = None if kind == "text" else red_squares(120, 40, red=[(100, 10)])
    text = None if kind == "image" else "a $dog$ for $5 on a man " * 6
    explanation = explain(make(kind), image=image, text=text, label="dog")
    figure = explanation.figure()
    shown = [drawn.get_array().shape for axes in figure.axes for drawn in axes.images]
    assert shown == ([] if image is None else [(40, 120, 3), (40, 120), (40, 120, 4)])
    drawn = {text.get_text() for text in figure.findobj(match=lambda artist: hasattr(artist, "get_text"))}
    assert set((text or "").split()) <= drawn
    assert any(line.startswith(f"dog: {explanation.score:.3f}") for line in drawn)
    explanation.save(tmp_path / "why.png")
    with Image.open(tmp_path / "why.png") as saved, Image.open(io.BytesIO(explanation._repr_png_())) as displayed:
        for seen in (saved, displayed):
            assert len(seen.convert("RGB").getcolors(seen.width * seen.height)) > 50


def test_hot_places_and_words_are_red_and_cold_ones_blue(sees_red, reads_dog):
    for label, warmer, colder in (("dog", 0, 2), ("bird", 2, 0)):
        figure = explain(sees_red, image=red_squares(red=[(24, 40)]), label=label).figure()
        red, green, blue, _ = figure.axes[1].images[1].get_array()[46, 30]
        assert (red > blue) == (label == "dog")
        figure = explain(reads_dog, text="a dog on a man", label=label).figure()
        word = next(t for t in figure.findobj(match=lambda a: hasattr(a, "get_text")) if t.get_text() == "dog")
        color = word.get_bbox_patch().get_facecolor()
        assert color[warmer] > color[colder]


def test_nothing_that_matters_is_a_figure_too(sees_red):
    explain(sees_red, image=red_squares(), label="cat")._repr_png_()


# Errors


def test_a_folder_is_not_taken_for_a_pipeline():
    with pytest.raises(TypeError, match="got 'outputs/demo'; expected a pipeline"):
        explain("outputs/demo", text="a dog")


@pytest.mark.parametrize(
    ("kind", "given", "message"),
    [
        ("both", dict(), "neither an image nor a text"),
        ("text", dict(text=" "), "neither an image nor a text"),
        ("text", dict(image=red_squares(), text="a dog"), "got image, but this model has no image backbone"),
        ("image", dict(image=red_squares(), text="a dog"), "got text, but this model has no text backbone"),
        ("text", dict(text="a dog", label="dgo"), "unknown label 'dgo'; expected one of cat, dog, bird"),
        ("image", dict(image=red_squares(), grid=0), "grid is 0"),
        ("image", dict(image="nowhere.png"), "nowhere.png"),
        ("image", dict(image=[red_squares()]), "expected one image"),
        ("image", dict(image=np.zeros((2, 8, 8, 3), np.uint8)), "expected one image"),
        ("text", dict(text=["a dog"]), "expected one image, one text"),
    ],
)
def test_errors(make, kind, given, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        explain(make(kind), **given)
