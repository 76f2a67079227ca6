import pickle
from collections import Counter

import numpy as np
import pytest
import torch
from PIL import Image

from hf_mmclf.data.augmentation import AugmentationArguments, ImageAugmentation, TextAugmentation
from hf_mmclf.model.image_processing_mmclf import MMClfImageProcessor

OFF = {"crop_scale": 0, "flip": 0, "vertical_flip": 0, "rotation": 0, "color_jitter": 0}
TEXT = "a brown dog runs after a red ball on the wet grass"


def photo(width=64, height=48):
    return Image.fromarray(np.random.default_rng(0).integers(0, 256, (height, width, 3), dtype=np.uint8))


def raw(size=32, **switches):
    """An augmentation whose output is in pixels, 0 to 255."""
    return augmentation(size, [0.0] * 3, [1 / 255] * 3, **{**OFF, **switches})


def augmentation(size, mean, std, **strengths):
    processor = MMClfImageProcessor(size=size, image_mean=mean, image_std=std)
    return ImageAugmentation(processor, AugmentationArguments(**strengths))


@pytest.mark.parametrize(
    "width, height", [(640, 480), (48, 64), (224, 224), (1, 1), (20_000, 10), (10, 20_000), (333, 100)]
)
@pytest.mark.parametrize(
    "settings", [{}, {"size": 65, "resample": 2, "image_mean": [0.5] * 3, "image_std": [0.2] * 3}]
)
def test_with_everything_off_it_equals_the_image_processor(width, height, settings):
    processor = MMClfImageProcessor(**settings)
    image = photo(width, height)
    expected = processor(image, return_tensors="pt").pixel_values[0]
    assert torch.equal(ImageAugmentation(processor, AugmentationArguments(**OFF))(image), expected)


def test_output_is_normalised_float_of_the_given_size():
    processor = MMClfImageProcessor(size=40)
    for image in (photo(), photo(500, 3), photo(1, 1)):
        output = ImageAugmentation(processor)(image)
        assert output.shape == (3, 40, 40) and output.dtype == torch.float32
    plain = augmentation(8, [0.5] * 3, [0.25] * 3, rotation=0, color_jitter=0)(Image.new("RGB", (9, 9), "white"))
    torch.testing.assert_close(plain, torch.full((3, 8, 8), 2.0))


def test_draws_differ_and_follow_the_seed():
    augment = augmentation(32, [0.5] * 3, [0.5] * 3)
    again = pickle.loads(pickle.dumps(augment))
    torch.manual_seed(1)
    first, second = augment(photo()), augment(photo())
    torch.manual_seed(1)
    assert torch.equal(again(photo()), first) and torch.equal(again(photo()), second)
    assert not torch.equal(first, second)


def test_flips_mirror_and_nothing_else():
    image = photo()
    plain = raw()(image)
    assert torch.equal(raw(flip=1)(image), plain.flip(-1))
    assert torch.equal(raw(vertical_flip=1)(image), plain.flip(-2))
    torch.manual_seed(0)
    augment = raw(flip=0.5)
    mirrored = sum(torch.equal(augment(image), plain.flip(-1)) for _ in range(200))
    assert 70 < mirrored < 130


def test_rotation_stays_within_the_angle_and_fills_with_black():
    torch.manual_seed(0)
    white = Image.new("RGB", (100, 100), "white")
    outputs = torch.stack([raw(100, rotation=20)(white) for _ in range(40)])
    corners = outputs[:, 0, [0, 0, -1, -1], [0, -1, 0, -1]]
    assert (corners.max(dim=1).values == 0).sum() > 30  # black, not grey or white
    assert outputs[..., 30:70, 30:70].min() > 254.99
    # Along the diagonal the rotated square reaches 50 / cos(45 - angle): 55 px at 20 degrees, 50 px at 45.
    assert outputs[..., 13, 13].min() > 254.99  # 51.6 px from the centre
    assert outputs[..., 0, 15:20].min() == 0


def test_color_jitter_changes_colors_within_bounds_and_no_places():
    torch.manual_seed(0)
    gray = Image.new("RGB", (32, 32), (100, 100, 100))
    outputs = torch.stack([raw(color_jitter=0.2)(gray) for _ in range(40)])
    assert (outputs == outputs[:, :1, :1, :1]).all()  # still uniform and, without hue, grey
    levels = outputs[:, 0, 0, 0]
    assert 78 <= levels.min() < 90 and 110 < levels.max() <= 122


def test_color_jitter_acts_on_brightness_contrast_and_saturation():
    torch.manual_seed(0)
    dark, light, red = (100, 100, 100), (150, 150, 150), (160, 90, 90)
    image = Image.fromarray(np.repeat(np.array([[dark, light, red]], dtype=np.uint8), 3, axis=0))
    outputs = torch.stack([raw(3, color_jitter=0.2)(image)[:, 0] for _ in range(40)])  # (draw, channel, column)
    dark, light = outputs[:, 0, 0], outputs[:, 0, 1]
    gain = (light - dark) / 50  # brightness x contrast
    chroma = (outputs[:, 0, 2] - outputs[:, 1, 2]) / 70  # brightness x contrast x saturation
    assert (light / dark).max() - (light / dark).min() > 0.1
    assert (chroma / gain).max() - (chroma / gain).min() > 0.2
    assert (chroma / gain).min() > 0.75 and (chroma / gain).max() < 1.25


def test_crops_keep_their_share_of_the_area_and_fill_the_canvas():
    torch.manual_seed(0)
    across, down = np.meshgrid(np.arange(100), np.arange(100))
    ramp = Image.fromarray(np.stack([across, down, np.full_like(across, 255)], axis=-1).astype(np.uint8))
    shares = []
    for _ in range(40):
        output = raw(100, crop_scale=0.6)(ramp)
        assert output[2].min() == 255  # no padding, no border
        width, height = (float(output[i].max() - output[i].min() + 1) for i in (0, 1))
        shares.append(width * height / 100**2)
    assert min(shares) > 0.57 and max(shares) <= 1
    assert max(shares) - min(shares) > 0.2


def plain_crop(image, step):
    box = step.make_params([torch.from_numpy(image).permute(2, 0, 1)])
    left, top = box["left"], box["top"]
    crop = Image.fromarray(image.astype(np.uint8)).crop((left, top, left + box["width"], top + box["height"]))
    return np.asarray(crop.resize(step.size, Image.Resampling.BICUBIC), dtype=np.float64)


def plain_flip(image, step):
    return image[:, ::-1] if torch.rand(1) < step.p else image


def plain_rotation(image, step):
    """Bilinear, from outside counted as black, around the centre, one pixel after the other."""
    angle = np.deg2rad(step.make_params([])["angle"])
    size, rotated = len(image), np.zeros_like(image)
    bordered = np.pad(image, ((1, 1), (1, 1), (0, 0)))
    for row in range(size):
        for column in range(size):
            x, y = column - (size - 1) / 2, row - (size - 1) / 2
            x, y = x * np.cos(angle) - y * np.sin(angle), x * np.sin(angle) + y * np.cos(angle)
            x, y = x + (size + 1) / 2, y + (size + 1) / 2
            left, top = int(np.floor(x)), int(np.floor(y))
            for i, j, share in (
                (top, left, (1 - y + top) * (1 - x + left)),
                (top, left + 1, (1 - y + top) * (x - left)),
                (top + 1, left, (y - top) * (1 - x + left)),
                (top + 1, left + 1, (y - top) * (x - left)),
            ):
                if 0 <= i < size + 2 and 0 <= j < size + 2:
                    rotated[row, column] += share * bordered[i, j]
    return rotated


def plain_jitter(image, step):
    draws = step.make_params([])
    for number in draws["fn_idx"].tolist():
        if number == 3:  # hue, which stays
            continue
        name = ("brightness", "contrast", "saturation")[number]
        gray = image @ [0.2989, 0.587, 0.114]
        other = {"brightness": 0, "contrast": gray.mean(), "saturation": gray[..., None]}[name]
        factor = draws[f"{name}_factor"]
        image = (factor * image + (1 - factor) * other).clip(0, 255)
    return image


PLAIN = {"crop_scale": plain_crop, "flip": plain_flip, "rotation": plain_rotation, "color_jitter": plain_jitter}
STRENGTHS = {"crop_scale": 0.6, "flip": 0.5, "rotation": 20.0, "color_jitter": 0.2}


@pytest.mark.parametrize("names", [[name] for name in PLAIN] + [list(PLAIN)], ids="-".join)
def test_each_step_and_the_whole_equal_a_slow_plain_implementation(names):
    """With the same draws. A crop is rounded to whole levels, by PIL and by torchvision in different places."""
    smooth = np.asarray(photo(8, 6).resize((80, 60) if "crop_scale" in names else (32, 32)))
    augment = raw(32, **{name: STRENGTHS[name] for name in names})
    steps = [step for step in augment.transform.transforms if type(step).__name__ not in ("PILToTensor", "ToDtype")]
    steps = steps[-1 - len(names) : -1]  # without what resizes where nothing is cropped, and without Normalize
    for seed in range(6):
        torch.manual_seed(seed)
        output = augment(Image.fromarray(smooth))
        torch.manual_seed(seed)
        expected = smooth.astype(np.float64)
        for name, step in zip(names, steps, strict=True):
            expected = PLAIN[name](expected, step)
        difference = np.abs(output.permute(1, 2, 0).numpy() - expected)
        assert difference.max() < (2 if "crop_scale" in names else 0.01)
        assert np.abs(output.permute(1, 2, 0).numpy() - smooth[:32, :32]).max() > 5 or names == ["flip"]


@pytest.mark.parametrize(
    "switch", [{"flip": 1.5}, {"vertical_flip": -1}, {"rotation": -1}, {"color_jitter": -1}, {"crop_scale": 1.5}]
)
def test_impossible_image_settings_are_refused(switch):
    with pytest.raises(ValueError):
        raw(**switch)


def test_swapping_keeps_the_words_and_changes_their_order():
    torch.manual_seed(0)
    augment = TextAugmentation(0.3)
    outputs = [augment(TEXT) for _ in range(50)]
    assert all(Counter(output.split()) == Counter(TEXT.split()) for output in outputs)
    assert sum(output != TEXT for output in outputs) > 40
    assert len(set(outputs)) > 40


def test_more_swaps_move_more_words():
    torch.manual_seed(0)
    words = [str(i) for i in range(20)]

    def moved(swap):
        outputs = [TextAugmentation(swap)(" ".join(words)).split() for _ in range(100)]
        return np.mean([[a != b for a, b in zip(output, words, strict=True)] for output in outputs])

    rare, often = moved(0.05), moved(0.5)
    assert 0.04 < rare < 0.16 < 0.4 < often  # a swap moves two words: about 2 x 0.05 of them


def test_a_swap_always_takes_another_word():
    torch.manual_seed(0)
    assert all(TextAugmentation(1.0)("one two") == "one two" for _ in range(20))  # there and back
    positions = {TextAugmentation(0.2)("a b c d").index("a") for _ in range(200)}
    assert positions == {0, 2, 4, 6}


def test_texts_without_a_swap_come_back_as_they_are():
    text = "  odd   spacing \n stays "
    assert TextAugmentation(0)(text) == text
    for short in ("", " ", "word", " word "):
        assert TextAugmentation(1.0)(short) == short


def test_text_draws_follow_the_seed_also_after_pickling():
    augment = TextAugmentation(0.5)
    torch.manual_seed(3)
    first = [augment(TEXT) for _ in range(3)]
    torch.manual_seed(3)
    again = pickle.loads(pickle.dumps(augment))
    assert [again(TEXT) for _ in range(3)] == first


@pytest.mark.parametrize("swap", [-0.1, 1.1])
def test_impossible_swap_probabilities_are_refused(swap):
    with pytest.raises(ValueError, match="between 0 and 1"):
        TextAugmentation(swap)
