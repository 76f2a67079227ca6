"""The image processor: it turns an image of any kind into a normalised square with the whole image in it.

This file is pushed to the Hub as code: it imports only third-party packages and its neighbours.
"""

import ipaddress
import math
import os
import socket
from collections.abc import Mapping
from contextlib import suppress
from io import BufferedIOBase, BytesIO
from typing import Any
from urllib.parse import urlsplit
from urllib.request import HTTPRedirectHandler, Request, build_opener

import numpy as np
import torch
from PIL import ExifTags, Image, ImageOps, UnidentifiedImageError
from torchvision.transforms.v2.functional import pil_to_tensor
from transformers.image_processing_backends import TorchvisionBackend
from transformers.image_utils import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD, SizeDict, is_valid_image, load_image

try:
    from torchcodec.decoders import decode_jpeg
except (ImportError, OSError, RuntimeError):  # not installed, or not for this torch: Pillow does it too, slower
    decode_jpeg = None

__all__ = ["MMClfImageProcessor", "read_image", "to_rgb"]

PIXEL_LIMIT = 100_000_000  # a file of a few kilobytes can have more pixels than fit in memory
URL_LIMIT = 50_000_000  # bytes


def to_rgb(image: Image.Image) -> Image.Image:
    """
    Turn a PIL image of any mode into an upright 8-bit RGB image.

    The EXIF orientation is applied. Transparency is composited on white, as transformers does. Images with more than
    8 bits are scaled, not clipped: 16-bit modes (`I;16`, ...) have 65535 as white; in mode `I` white is the first of
    255, 65535 and the largest value that no value exceeds, in mode `F` the same after 1.0. Negative values and NaN
    are black.

    Args:
        image (`PIL.Image.Image`):
            An image in any mode that Pillow reads from files. Of an animation the current frame is used.

    Returns:
        `PIL.Image.Image`: A new image, mode `RGB`, its width and height swapped where the orientation says so.
    """
    image = ImageOps.exif_transpose(image)
    if image.mode[0] in "IF":
        image = _to_8_bits(image)
    if image.has_transparency_data:
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
    return image if image.mode == "RGB" else image.convert("RGB")  # exif_transpose has already copied it


def _to_8_bits(image: Image.Image) -> Image.Image:
    values = np.nan_to_num(np.asarray(image, dtype=np.float32))
    whites = {"I": (255, 65535), "F": (1, 255, 65535)}.get(image.mode, (65535,))
    peak = values.max()
    white = next((white for white in whites if peak <= white), peak)
    return Image.fromarray((values.clip(0) * (255 / white)).round().astype(np.uint8))


def read_image(
    file: str | os.PathLike | BytesIO, short_edge: int | None = None, max_pixels: float | None = PIXEL_LIMIT
) -> torch.Tensor:
    """
    Decode an image file to upright 8-bit RGB pixels, as [`to_rgb`] does.

    Args:
        file (`str`, `os.PathLike` or `BytesIO`):
            In any format that Pillow reads.
        short_edge (`int`, *optional*):
            Pixels that are enough: a JPEG whose short edge has so many also at a half, a quarter or an eighth of its
            size is decoded to that, which is faster. Defaults to the full size.
        max_pixels (`float`, *optional*, defaults to 1e8):
            Images with more pixels are not decoded. `None` leaves Pillow's own limit alone.

    Returns:
        `torch.Tensor`: uint8, of shape (3, height, width).

    Raises:
        `ValueError`: if the image cannot be read or has too many pixels.
        `MemoryError`: if there is not enough memory.
    """
    try:
        with Image.open(file) as opened:
            return _decode(opened, file, short_edge, max_pixels)
    except UnidentifiedImageError:  # its message may hold no more than an address in memory
        size = file.getbuffer().nbytes if isinstance(file, BytesIO) else os.path.getsize(file)
        raise ValueError("not an image of a known format" if size else "the file is empty") from None
    except MemoryError:
        raise
    except Exception as error:  # Pillow's decoders raise nearly everything
        if isinstance(error, RuntimeError) and "alloc" in str(error):  # torch has no class for it
            raise MemoryError(str(error)) from error
        raise ValueError(str(error) or type(error).__name__) from error


def _decode(opened: Image.Image, file: Any, short_edge: int | None, max_pixels: float | None) -> torch.Tensor:
    size = opened.size
    if max_pixels is not None and math.prod(size) > max_pixels:
        raise ValueError(f"{size[0]} x {size[1]} pixels are more than the limit of {max_pixels / 1e6:g} megapixels")
    if short_edge is not None:
        opened.draft(None, (short_edge, short_edge))
    plain = opened.format == "JPEG" and opened.mode == "RGB" and opened.size == size
    if decode_jpeg and plain and opened.getexif().get(ExifTags.Base.Orientation, 1) == 1:
        with suppress(RuntimeError):  # Pillow says in one line what is wrong
            return decode_jpeg(file.getvalue() if isinstance(file, BytesIO) else file)  # the same pixels
    return pil_to_tensor(to_rgb(opened))


class _PublicRedirects(HTTPRedirectHandler):
    """Follow redirects to public addresses only: a web page must not make this machine read its own network."""

    def redirect_request(self, req: Request, fp: Any, code: int, msg: str, headers: Any, newurl: str) -> Any:
        host = urlsplit(newurl).hostname or ""
        try:
            found = {entry[4][0] for entry in socket.getaddrinfo(host, None)}
        except OSError as error:
            raise ValueError(f"it redirects to {host!r}, which has no address ({error})") from None
        if not all(ipaddress.ip_address(address).is_global for address in found):
            raise ValueError(f"it redirects to {host!r}, which is a private address")
        return super().redirect_request(req, fp, code, msg, headers, newurl)


def download(url: str, max_bytes: int = URL_LIMIT) -> bytes:
    """
    Read a URL of the scheme http, https or data. Redirects to private addresses are refused.

    Args:
        url (`str`): The URL. One that names a private address itself is read, because the caller has chosen it.
        max_bytes (`int`, *optional*, defaults to 5e7): The largest number of bytes.

    Raises:
        `ValueError`: if there are more bytes, or at a redirect to a private address.
        `OSError`: if the URL cannot be read.
    """
    with build_opener(_PublicRedirects).open(url, timeout=60) as response:
        content = response.read(max_bytes + 1)
    if len(content) > max_bytes:
        raise ValueError(f"more than {max_bytes / 1e6:g} MB")
    return content


def _fetch(source: str, allow_urls: bool) -> Any:
    # Not transformers' load_image where it can be helped: it drops transparency and clips 16 bits.
    if source.startswith(("http://", "https://", "data:")):
        if not (allow_urls or source.startswith("data:")):
            raise ValueError("URLs are not allowed here; give a file or its bytes")
        return read_image(BytesIO(download(source)))
    if os.path.isfile(source):
        return read_image(source)
    try:
        return load_image(source)  # bare base64
    except ValueError:
        raise ValueError(f"no such file, and neither a URL nor base64: {source[:200]!r}") from None


class MMClfImageProcessor(TorchvisionBackend):
    r"""
    Resize the long edge of an image to `size`, centre it on a black square and normalise it.

    Small images are enlarged; the short edge keeps the aspect ratio and is at least one pixel. The padding is black
    before normalisation. A path, a URL, an encoded file's bytes, a cell of `datasets`' undecoded `Image` column or a
    PIL image in any mode is first made upright RGB by [`to_rgb`]. Arrays and tensors have pixels from 0 to 255,
    (H, W), (H, W, C) or (C, H, W) with 1, 3 or 4 channels. Single images, lists of mixed sizes and arrays
    with a leading batch dimension are all accepted.

    Calling it returns a [`BatchFeature`] with `pixel_values`: with `return_tensors="pt"` (or `"np"`) a float32 tensor
    (array) of shape (batch, 3, size, size), without it a list of tensors of shape (3, size, size).

    Args:
        size (`int` or `dict[str, int]`, *optional*, defaults to `{"longest_edge": 224}`):
            Side of the square output in pixels, as a number or as `{"longest_edge": side}`.
        resample (`PIL.Image.Resampling` or `int`, *optional*, defaults to bicubic):
            Resampling filter; always antialiased.
        image_mean (`list[float]`, *optional*, defaults to ImageNet's):
            Mean of the red, green and blue channel, in units of the 0 to 1 range.
        image_std (`list[float]`, *optional*, defaults to ImageNet's):
            Standard deviation of the three channels, in the same units.
        allow_urls (`bool`, *optional*, defaults to `True`):
            Whether an image may be a URL; see [`download`] for what is read. It is saved with the processor.
        kwargs:
            The other arguments of transformers' image processors (`do_resize`, `do_rescale`, `rescale_factor`,
            `do_normalize`, `device`, ...). Each may also be given when calling the processor.

    Raises:
        `ValueError`: if `size` has another form, a list is empty, a string is not an image, or an image is damaged.
        `TypeError`: if an input is not an image.
    """

    size = {"longest_edge": 224}
    resample = Image.Resampling.BICUBIC
    image_mean = IMAGENET_DEFAULT_MEAN
    image_std = IMAGENET_DEFAULT_STD
    do_convert_rgb = True
    do_resize = True
    # transformers' centre crop pads what is smaller than `crop_size`, centred, black and before normalisation; its
    # `do_pad` would pad bottom right and after normalisation.
    do_center_crop = True
    do_rescale = True
    do_normalize = True
    allow_urls = True

    def _standardize_kwargs(self, size: Any = None, crop_size: Any = None, **kwargs) -> dict[str, Any]:
        given = dict(size) if isinstance(size, dict | SizeDict) else {"longest_edge": size}
        edge = given.get("longest_edge")
        if list(given) != ["longest_edge"] or not isinstance(edge, int) or edge < 1:
            raise ValueError(f'`size` must be a positive int or {{"longest_edge": int}}, got {size!r}')
        square = SizeDict(height=edge, width=edge)  # the canvas is never anything but `size`
        return super()._standardize_kwargs(size=SizeDict(longest_edge=edge), crop_size=square, **kwargs)

    def fetch_images(self, image_url_or_urls: Any) -> Any:
        """
        Load paths, URLs and bytes by [`read_image`], and return images as they are, in lists of any depth.

        Raises:
            `ValueError`: if a list is empty or an image cannot be read.
            `TypeError`: if an input is not an image.
        """
        images = image_url_or_urls
        if isinstance(images, Mapping) and {"bytes", "path"} & set(images):
            images = images["path"] if images.get("bytes") is None else images["bytes"]
        if isinstance(images, BufferedIOBase):
            images = images.read()
        if isinstance(images, bytes | bytearray | memoryview):
            return read_image(BytesIO(images))
        if isinstance(images, np.ndarray | torch.Tensor) and images.ndim == 2:
            return images[..., None]  # grey
        if isinstance(images, str | os.PathLike):
            return _fetch(os.fspath(images), self.allow_urls)
        if isinstance(images, list | tuple):
            if not images:
                raise ValueError("There is no image to process: the list is empty")
            return [self.fetch_images(image) for image in images]
        if not is_valid_image(images):
            kinds = "a path, a URL, a PIL image, encoded bytes, an array or a tensor"
            raise TypeError(f"An image must be {kinds}, got {type(images).__name__}")
        return images

    def process_image(self, image: Any, do_convert_rgb: bool | None = None, **kwargs) -> torch.Tensor:
        """
        Turn one image into a tensor of shape (channels, height, width), a PIL image by way of [`to_rgb`].

        Raises:
            `ValueError`: if the pixels lie between 0 and 1.
        """
        if isinstance(image, Image.Image):
            image, do_convert_rgb = to_rgb(image), False
        elif (
            isinstance(image, torch.Tensor)
            and image.dtype == torch.uint8
            and image.shape[0] == 3 < image.shape[-1] - 1
        ):
            return image.to(kwargs.get("device"))  # as files are read; transformers would copy it into another layout
        elif torch.as_tensor(image).is_floating_point() and 0 < image.max() <= 1:
            raise ValueError("got pixels between 0 and 1; expected 0 to 255: multiply them by 255")
        return super().process_image(image, do_convert_rgb=do_convert_rgb, **kwargs)

    def resize(self, image: torch.Tensor, size: SizeDict, **kwargs) -> torch.Tensor:
        """Resize images of shape (..., height, width) so that their long edge measures `size.longest_edge`."""
        long_edge = max(image.shape[-2:])
        height, width = (max(1, round(edge * size.longest_edge / long_edge)) for edge in image.shape[-2:])
        return super().resize(image, SizeDict(height=height, width=width), **kwargs)
