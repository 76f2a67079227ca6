import base64
import functools
import http.server
import json
import pickle
import threading
from io import BytesIO

import numpy as np
import pytest
import torch
from PIL import Image
from transformers import AutoImageProcessor, PreTrainedConfig

from hf_mmclf.model import image_processing_mmclf
from hf_mmclf.model.image_processing_mmclf import MMClfImageProcessor, download, read_image, to_rgb

ORIENTATION = 0x0112
MEAN = torch.tensor([0.485, 0.456, 0.406]).view(3, 1, 1)
STD = torch.tensor([0.229, 0.224, 0.225]).view(3, 1, 1)


def noise(width, height, mode="RGB"):
    channels = {"L": (), "RGB": (3,), "RGBA": (4,)}[mode]
    return Image.fromarray(np.random.default_rng(0).integers(0, 256, (height, width, *channels), dtype=np.uint8))


def run(images, **kwargs):
    return MMClfImageProcessor()(images, return_tensors="pt", **kwargs).pixel_values


def pixels(values):
    """Undo the normalisation: (3, height, width) in 0 to 255."""
    return (values * STD + MEAN) * 255


def color(image):
    return to_rgb(image).getpixel((0, 0))


# The canvas


def test_an_image_of_the_right_size_is_only_normalised():
    image = noise(224, 224)
    expected = (torch.from_numpy(np.array(image)).permute(2, 0, 1) / 255 - MEAN) / STD
    values = run(image)
    assert values.shape == (1, 3, 224, 224) and values.dtype == torch.float32
    torch.testing.assert_close(values[0], expected)


@pytest.mark.parametrize(
    "width, height, left, top, right, bottom",
    [
        (640, 480, 0, 28, 224, 196),  # 224 x 168
        (480, 640, 28, 0, 196, 224),
        (40, 30, 0, 28, 224, 196),  # enlarged
        (224, 223, 0, 0, 224, 223),  # an odd row goes below
        (1, 1, 0, 0, 224, 224),
        (20_000, 10, 0, 111, 224, 112),
        (10, 20_000, 111, 0, 112, 224),
    ],
)
def test_the_image_is_centred_on_black(width, height, left, top, right, bottom):
    canvas = pixels(run(Image.new("RGB", (width, height), (200, 100, 50)))[0])
    expected = torch.zeros(3, 224, 224)
    expected[:, top:bottom, left:right] = torch.tensor([200.0, 100, 50]).view(3, 1, 1)
    torch.testing.assert_close(canvas, expected, atol=1e-3, rtol=0)


def test_resizing_is_bicubic_and_antialiased_as_in_pillow():
    image = noise(640, 480)
    expected = np.asarray(image.resize((224, 168), Image.Resampling.BICUBIC), dtype=np.float32)
    actual = pixels(run(image)[0])[:, 28:196].permute(1, 2, 0).numpy()
    assert np.abs(actual - expected).max() < 1.5  # rounding
    other = pixels(run(image, resample=Image.Resampling.BILINEAR)[0])[:, 28:196].permute(1, 2, 0).numpy()
    assert np.abs(other - expected).max() > 5


# Inputs


def test_a_batch_of_mixed_sizes_equals_single_images():
    images = [noise(64, 48), noise(30, 90), noise(64, 48).rotate(180), noise(224, 224), noise(7, 300)]
    single = torch.cat([run(image) for image in images])
    torch.testing.assert_close(run(images), single, rtol=0, atol=0)
    torch.testing.assert_close(run(images, disable_grouping=False), single, rtol=0, atol=0)


def test_arrays_and_tensors_equal_the_pil_image():
    image = noise(64, 48)
    array = np.array(image)
    batch = np.stack([array, array])
    expected = run(image)
    for same in (array, array.transpose(2, 0, 1), torch.from_numpy(array), torch.from_numpy(array).permute(2, 0, 1)):
        torch.testing.assert_close(run(same), expected, rtol=0, atol=0)
    torch.testing.assert_close(run(batch), torch.cat([expected, expected]), rtol=0, atol=0)
    gray = noise(64, 48, "L")
    torch.testing.assert_close(run(np.array(gray)[..., None]), run(gray), rtol=0, atol=0)


def test_return_types():
    images = [noise(64, 48), noise(48, 64)]
    unstacked = MMClfImageProcessor()(images).pixel_values
    array = MMClfImageProcessor()(images, return_tensors="np").pixel_values
    assert isinstance(array, np.ndarray) and array.shape == (2, 3, 224, 224) and array.dtype == np.float32
    torch.testing.assert_close(torch.stack(list(unstacked)), torch.from_numpy(array))


def encode(image, kind="PNG", **options):
    file = BytesIO()
    image.save(file, kind, **options)
    return file.getvalue()


@pytest.fixture
def sideways():
    """A JPEG stored lying on its side (orientation 6), white above and black below when upright."""
    upright = Image.new("RGB", (40, 80))
    upright.paste("white", (0, 0, 40, 40))
    exif = Image.Exif()
    exif[ORIENTATION] = 6
    return encode(upright.transpose(Image.Transpose.ROTATE_90), "JPEG", exif=exif.tobytes())


def test_exif_orientation_is_applied_to_images_and_paths(sideways, tmp_path):
    (tmp_path / "sideways.jpg").write_bytes(sideways)
    values = run(Image.open(BytesIO(sideways)))
    canvas = pixels(values[0])
    assert canvas[:, :100, 70:150].min() > 250 and canvas[:, 124:, 70:150].max() < 5
    assert canvas[:, :, :55].max() < 5  # upright: black left and right of it
    assert torch.equal(run(str(tmp_path / "sideways.jpg")), values)
    assert torch.equal(run([tmp_path / "sideways.jpg"]), values)


def test_orientation_is_applied_once(sideways):
    upright = to_rgb(Image.open(BytesIO(sideways)))
    assert upright.size == (40, 80)
    assert to_rgb(upright).size == (40, 80) and ORIENTATION not in upright.getexif()


@pytest.mark.parametrize("mode", ["RGB", "L", "CMYK"])
def test_both_decoders_give_pillow_s_pixels(mode, sideways, tmp_path, monkeypatch):
    pytest.importorskip("torchcodec")
    smooth = noise(9, 7).resize((90, 70)).convert(mode)
    smooth.save(tmp_path / "image.jpg", quality=80)
    (tmp_path / "sideways.jpg").write_bytes(sideways)
    for file in ("image.jpg", "sideways.jpg"):
        expected = np.asarray(to_rgb(Image.open(tmp_path / file)))
        fast = [read_image(tmp_path / file), read_image(BytesIO((tmp_path / file).read_bytes()))]
        with monkeypatch.context() as without:
            without.setattr(image_processing_mmclf, "decode_jpeg", None)
            slow = read_image(str(tmp_path / file))
        for pixels in (*fast, slow):
            assert np.array_equal(pixels.permute(1, 2, 0), expected)


def test_a_jpeg_is_decoded_to_the_smallest_scale_that_is_enough(tmp_path):
    smooth = noise(8, 6).resize((800, 600))
    smooth.save(tmp_path / "photo.jpg")
    smooth.save(tmp_path / "photo.png")
    exif = Image.Exif()
    exif[ORIENTATION] = 6
    smooth.save(tmp_path / "turned.jpg", exif=exif)
    for enough, edge in [(None, 600), (601, 600), (301, 600), (300, 300), (150, 150), (75, 75), (1, 75)]:
        photo = read_image(tmp_path / "photo.jpg", enough)
        assert photo.shape == (3, edge, edge * 4 // 3)
        expected = torch.from_numpy(np.array(smooth.resize((edge * 4 // 3, edge), Image.Resampling.BOX)))
        assert (photo.permute(1, 2, 0).float() - expected).abs().mean() < 2
        assert read_image(tmp_path / "turned.jpg", enough).shape == (3, edge * 4 // 3, edge)
        assert read_image(tmp_path / "photo.png", enough).shape == (3, 600, 800)


def test_paths_and_urls_keep_transparency_and_bit_depth(tmp_path):
    deep = Image.fromarray(np.full((20, 30), 32896, dtype=np.uint16))  # 128 in 8 bits
    server = http.server.ThreadingHTTPServer(
        ("127.0.0.1", 0), functools.partial(QuietHandler, directory=str(tmp_path))
    )
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        for name, image in {"alpha.png": noise(30, 20, "RGBA"), "deep.png": deep}.items():
            data = encode(image)
            (tmp_path / name).write_bytes(data)
            sources = [
                str(tmp_path / name),
                f"http://127.0.0.1:{server.server_port}/{name}",
                "data:image/png;base64," + base64.b64encode(data).decode(),
            ]
            assert torch.equal(run(sources), run([image] * 3))
    finally:
        server.shutdown()
        server.server_close()
    assert round(float(pixels(run(deep)[0])[0, 112, 112])) == 128


class QuietHandler(http.server.SimpleHTTPRequestHandler):
    def log_message(self, *args):
        pass


def test_many_paths_do_not_exhaust_file_handles(tmp_path):
    resource = pytest.importorskip("resource")
    noise(4, 4).save(tmp_path / "a.png")
    limits = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (128, limits[1]))
    try:
        assert len(MMClfImageProcessor().fetch_images([str(tmp_path / "a.png")] * 200)) == 200
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, limits)


def test_bad_inputs_are_named():
    with pytest.raises(ValueError, match="list is empty"):
        run([])
    for bad in (3, None, [noise(4, 4), None], {"image": noise(4, 4)}):
        with pytest.raises(TypeError, match="An image must be"):
            run(bad)
    with pytest.raises(ValueError, match="nowhere.png"):
        run("nowhere.png")
    for bad, reason in ((b"bytes", "not an image of a known format"), (b"", "the file is empty")):
        with pytest.raises(ValueError, match=f"^{reason}$"):
            run(bad)


def test_pixels_between_0_and_1_are_refused():
    """They would all be nearly black; floats up to 255 are pixels like others."""
    pixels = np.array(noise(224, 224))
    for floats in (pixels / 255, torch.from_numpy(pixels) / 255):
        with pytest.raises(ValueError, match="between 0 and 1; expected 0 to 255"):
            run(floats)
    torch.testing.assert_close(run(pixels.astype(np.float32)), run(pixels))


def test_grey_arrays():
    grey = noise(20, 30, "L")
    assert torch.equal(run(np.array(grey)), run(np.array(grey)[..., None]))


def test_encoded_bytes_and_undecoded_cells_are_the_image(tmp_path):
    image = noise(20, 30)
    path = tmp_path / "a.png"
    image.save(path)
    data, expected = path.read_bytes(), run(image)
    cells = [{"bytes": data, "path": "elsewhere.png"}, {"bytes": None, "path": str(path)}]
    for given in (data, bytearray(data), memoryview(data), BytesIO(data), *cells):
        assert torch.equal(run(given), expected)


# to_rgb


@pytest.mark.parametrize("mode", ["1", "L", "LA", "P", "PA", "RGB", "RGBA", "RGBa", "RGBX", "CMYK", "YCbCr", "HSV"])
def test_every_8_bit_mode_becomes_the_same_white_and_black(mode):
    for name, expected in {"white": (255, 255, 255), "black": (0, 0, 0)}.items():
        source = Image.new("L", (5, 3), name)
        via = {"RGBa": "RGBA", "PA": "LA", "HSV": "RGB"}.get(mode)
        image = (source.convert(via) if via else source).convert(mode)
        rgb = to_rgb(image)
        assert rgb.mode == "RGB" and rgb.size == (5, 3)
        assert np.abs(np.subtract(color(image), expected)).max() <= 1


def test_transparency_is_composited_on_white():
    assert color(Image.new("RGBA", (1, 1), (255, 0, 0, 0))) == (255, 255, 255)
    assert np.allclose(color(Image.new("RGBA", (1, 1), (255, 0, 0, 128))), (255, 127, 127), atol=1)
    assert color(Image.new("LA", (1, 1), (0, 0))) == (255, 255, 255)
    palette = Image.new("P", (2, 1))
    palette.putpalette([10, 20, 30, 40, 50, 60])
    palette.putpixel((1, 0), 1)
    assert color(palette) == (10, 20, 30)
    palette = Image.open(BytesIO(encode(palette, transparency=0)))
    assert palette.mode == "P"
    assert color(palette) == (255, 255, 255) and to_rgb(palette).getpixel((1, 0)) == (40, 50, 60)
    keyed = Image.open(BytesIO(encode(Image.new("RGB", (1, 1), (1, 2, 3)), transparency=(1, 2, 3))))
    assert keyed.mode == "RGB" and color(keyed) == (255, 255, 255)


@pytest.mark.parametrize(
    "dtype, values, expected",
    [
        (np.uint16, [0, 257, 32896, 65535], [0, 1, 128, 255]),
        (np.uint16, [0, 100, 200, 255], [0, 0, 1, 1]),  # 16 bits by type, however dark
        (np.int32, [-5, 0, 128, 255], [0, 0, 128, 255]),
        (np.int32, [0, 257, 32896, 65535], [0, 1, 128, 255]),
        (np.int32, [0, 250_000, 510_000, 1_000_000], [0, 64, 130, 255]),
        (np.float32, [-1, 0.0, 0.5, 1.0], [0, 0, 128, 255]),
        (np.float32, [np.nan, 0.5, 128, 200], [0, 0, 128, 200]),
        (np.float32, [0, 257, 32896, 65535], [0, 1, 128, 255]),
        (np.float32, [-1, -2, -3, 0], [0, 0, 0, 0]),
    ],
)
def test_deep_images_are_scaled_and_not_clipped(dtype, values, expected):
    image = Image.fromarray(np.array([values], dtype=dtype))
    assert image.mode in ("I;16", "I", "F")
    rgb = np.asarray(to_rgb(image))
    assert rgb.shape == (1, 4, 3) and rgb[0].tolist() == [[value] * 3 for value in expected]


def test_a_16_bit_png_and_a_rotated_16_bit_tiff_are_read(tmp_path):
    values = np.linspace(0, 65535, 6).astype(np.uint16).reshape(2, 3)
    png = Image.open(BytesIO(encode(Image.fromarray(values))))
    expected = (values / 257).round()
    assert np.array_equal(np.asarray(to_rgb(png))[..., 0], expected)
    tiff = Image.open(BytesIO(encode(Image.fromarray(values), "TIFF", tiffinfo={ORIENTATION: 3})))
    assert np.array_equal(np.asarray(to_rgb(tiff))[..., 0], expected[::-1, ::-1])


def test_cmyk_jpeg():
    data = encode(Image.new("CMYK", (16, 16), (0, 255, 255, 0)), "JPEG")
    image = Image.open(BytesIO(data))
    assert image.mode == "CMYK" and np.allclose(color(image), (255, 0, 0), atol=3)


@pytest.mark.parametrize("mode", ["L", "LA", "P", "RGBA", "CMYK", "I;16"])
def test_the_processor_and_to_rgb_agree(mode):
    image = noise(50, 30, "RGBA") if mode == "RGBA" else noise(50, 30, "L")
    image = Image.fromarray(np.asarray(image, dtype=np.uint16) * 257) if mode == "I;16" else image.convert(mode)
    assert torch.equal(run(image), run(to_rgb(image)))


# Configuration


def test_size_is_an_int_or_a_long_edge_and_can_be_given_per_call():
    image = noise(30, 50)
    expected = MMClfImageProcessor(size=64)(image, return_tensors="pt").pixel_values
    assert expected.shape == (1, 3, 64, 64)
    same = MMClfImageProcessor(size={"longest_edge": 64})(image, return_tensors="pt").pixel_values
    assert torch.equal(same, expected) and torch.equal(run(image, size=64), expected)
    assert MMClfImageProcessor().size["longest_edge"] == 224
    for bad in ({"height": 64, "width": 64}, {"shortest_edge": 64}, 0, -1, 2.5, "64", [64, 64]):
        with pytest.raises(ValueError, match="`size` must be"):
            MMClfImageProcessor(size=bad)


def test_mean_and_std_act():
    image = Image.new("RGB", (8, 8), (255, 0, 51))
    values = MMClfImageProcessor(size=8, image_mean=[0.5, 0.5, 0.2], image_std=[0.5, 0.25, 1.0])(image).pixel_values
    torch.testing.assert_close(values[0][:, 0, 0], torch.tensor([1.0, -2.0, 0.0]))


@pytest.fixture
def processor():
    return MMClfImageProcessor(size=48, image_mean=[0.1, 0.2, 0.3], image_std=[0.4, 0.5, 0.6], resample=2)


def assert_same(first, second):
    image = noise(30, 50)
    assert first.to_dict() == second.to_dict()
    assert torch.equal(first(image).pixel_values[0], second(image).pixel_values[0])


def test_saving_and_loading(processor, tmp_path):
    processor.save_pretrained(tmp_path)
    saved = json.loads((tmp_path / "preprocessor_config.json").read_text())
    assert saved["size"] == {"longest_edge": 48} and saved["image_mean"] == [0.1, 0.2, 0.3]
    assert_same(MMClfImageProcessor.from_pretrained(tmp_path), processor)
    smaller = MMClfImageProcessor.from_pretrained(tmp_path, size=16)
    assert smaller(noise(30, 50)).pixel_values[0].shape == (3, 16, 16)
    assert_same(pickle.loads(pickle.dumps(processor)), processor)


class RegisteredConfig(PreTrainedConfig):
    model_type = "image-processing-mmclf-test"


def test_loading_through_the_auto_class(processor, tmp_path):
    AutoImageProcessor.register(RegisteredConfig, image_processor_classes={"torchvision": MMClfImageProcessor})
    processor.save_pretrained(tmp_path)
    loaded = AutoImageProcessor.from_pretrained(tmp_path)
    assert type(loaded) is MMClfImageProcessor
    assert_same(loaded, processor)


class Pages(http.server.BaseHTTPRequestHandler):
    """A page of 100 bytes, and pages that redirect to it or to another scheme."""

    def do_GET(self):
        host = f"http://127.0.0.1:{self.server.server_port}"
        targets = {"/away": f"{host}/page", "/file": "file:///etc/hostname", "/local": "http://localhost/page"}
        target = targets.get(self.path)
        self.send_response(302 if target else 200)
        if target:
            self.send_header("Location", target)
        self.end_headers()
        self.wfile.write(b"x" * 100)

    def log_message(self, *_):
        pass


@pytest.fixture(scope="module")
def address():
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Pages) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_port}"
        server.shutdown()


def test_a_url_is_read_up_to_a_limit(address, monkeypatch):
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    assert download(f"{address}/page", 100) == b"x" * 100
    with pytest.raises(ValueError, match="more than 9.9e-05 MB"):
        download(f"{address}/page", 99)


@pytest.mark.parametrize("page, host", [("away", "127.0.0.1"), ("local", "localhost")])
def test_no_redirect_to_a_private_address(address, monkeypatch, page, host):
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    with pytest.raises(ValueError, match=f"it redirects to '{host}', which is a private address"):
        download(f"{address}/{page}")


def test_no_redirect_to_a_file(address, monkeypatch):
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    with pytest.raises(OSError, match="Redirection"):
        download(f"{address}/file")


def test_urls_can_be_forbidden(tmp_path):
    processor = MMClfImageProcessor(size=8, allow_urls=False)
    processor.save_pretrained(tmp_path)
    for given in (processor, MMClfImageProcessor.from_pretrained(tmp_path)):
        with pytest.raises(ValueError, match="URLs are not allowed here; give a file or its bytes"):
            given("http://127.0.0.1/a.png")
