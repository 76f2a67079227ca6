import io

import pytest
from PIL import Image as PILImage

from hf_mmclf.data.images import open_image
from hf_mmclf.model.processing_mmclf import is_missing_image


@pytest.mark.parametrize(
    "cell, missing",
    [
        (None, True),
        ({"bytes": None, "path": None}, True),
        ({"bytes": None, "path": ""}, True),
        ("a.png", False),
        ({"bytes": None, "path": "a.png"}, False),
        ({"bytes": b"", "path": None}, False),  # an image that cannot be read, not a missing one
    ],
)
def test_what_counts_as_a_missing_image(cell, missing):
    assert is_missing_image(cell) == missing


def test_images_are_opened_upright(tmp_path):
    image = PILImage.new("RGB", (8, 4), "black")
    image.putpixel((0, 0), (255, 255, 255))  # the corner that goes to the upper right
    exif = PILImage.Exif()
    exif[0x0112] = 6  # rotate by 90 degrees clockwise
    image.save(tmp_path / "turned.png", exif=exif)
    for cell in ("turned.png", {"bytes": (tmp_path / "turned.png").read_bytes(), "path": None}):
        upright = open_image(cell, tmp_path, "here")
        assert upright.shape == (3, 8, 4) and upright[:, 0, 3].tolist() == [255] * 3
    image.save(tmp_path / "turned.jpg", exif=exif)
    assert open_image("turned.jpg", tmp_path, "here").shape == (3, 8, 4)


def test_a_file_that_no_longer_exists_is_named(tmp_path):
    with pytest.raises(ValueError, match=r"t.csv:2: cannot read the image gone.png: .*No such file"):
        open_image("gone.png", tmp_path, "t.csv:2")


def test_a_truncated_jpeg_in_the_table_is_named(tmp_path):
    file = io.BytesIO()
    PILImage.effect_noise((640, 480), 50).save(file, "jpeg")
    with pytest.raises(ValueError, match="t.csv:2: cannot read the image in the table: .*truncated"):
        open_image({"bytes": file.getvalue()[:2000], "path": None}, tmp_path, "t.csv:2")
