"""Pictures: tensors to PIL and back, reading with limits, PNG files that say how they were drawn.

A PNG that we write holds two text chunks: `parameters`, as AUTOMATIC1111's web UI writes it and
people's tools read it, and `fastsd`, a JSON object with everything that a Pipeline was told.
Knows nothing of models and samplers; torch is imported only where a tensor is asked for.
"""

from __future__ import annotations

import itertools
import json
import logging
import os
import re
import secrets
import struct
from collections.abc import Iterable, Mapping, Sequence
from contextlib import suppress
from numbers import Integral
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from PIL import ExifTags, Image, ImageDraw, ImageFont, PngImagePlugin, UnidentifiedImageError

from fastsd.errors import FastsdError, NumericsError, UsageError

if TYPE_CHECKING:
    from torch import Tensor

log = logging.getLogger("fastsd")

FORMATS = ("PNG", "JPEG", "WEBP")  # of the forty that Pillow decodes, the ones people draw from
MAX_PIXELS = 16_000_000
LONGEST_SIDE = 2**31  # in pixels: more than Pillow counts, or any memory holds
JSON_CHUNK = "fastsd"
TEXT_CHUNK = "parameters"


# --- tensors and PIL ------------------------------------------------------------------------------


def to_pil(pictures: Tensor | np.ndarray) -> list[Image.Image]:
    """Convert a batch of pictures in [0, 1] to RGB, each value v to round(255 v), halves to even.

    pictures: torch (B, 3, H, W) of any float dtype, or numpy (B, H, W, 3), float or already uint8.
    Raises NumericsError for NaN and for values outside [0, 1], which uint8 would wrap.
    """
    if isinstance(pictures, np.ndarray):
        array = pictures
        if array.dtype != np.uint8:
            _check_range(float(array.min()), float(array.max()))
            array = (array * 255).round().astype(np.uint8)
    else:  # rounded where it lies: a quarter of the bytes leave a GPU
        pictures = pictures.detach().float()
        _check_range(*(float(end) for end in pictures.aminmax()))
        array = to_uint8(pictures).cpu().numpy()
    return [Image.fromarray(picture) for picture in array]


def to_uint8(pictures: Tensor) -> Tensor:
    """Round pictures (B, 3, H, W), fp32 in [0, 1], to uint8 (B, H, W, 3), each v to 255 v."""
    return (pictures * 255).round().byte().permute(0, 2, 3, 1).contiguous()


def _check_range(low: float, high: float) -> None:
    if not (low >= 0 and high <= 1):  # NaN fails both
        raise NumericsError(
            f"a picture holds values from {low} to {high}, expected 0 to 1; "
            "clamp it, or find where NaN first appears"
        )


# --- what users give a Pipeline -------------------------------------------------------------------

MODES = ("1", "L", "P", "RGB")  # and those with transparency, if nothing is transparent
CHANNELS = {3: "RGB", 1: "L"}  # how many a picture has, and a mask -> PIL's name


def to_tensor(
    given: Any, *, what: str = "image", channels: int = 3, size: tuple[int, int] | None = None
) -> Tensor:
    """Check what a user gave as pictures; return (P, channels, H, W), float32 in [0, 1].

    given: one or a list of PIL pictures; numpy (H, W, C), (B, H, W, C) or, for masks, without C;
    torch (C, H, W), (B, C, H, W) or, for masks, without C. Arrays are float in [0, 1] or uint8.
    size: (H, W); PIL pictures are resized to it as in diffusers, arrays must have it.
    Raises UsageError that names `what`.
    """
    import torch

    batch = list(given) if isinstance(given, (list, tuple)) else [given]
    if not batch:
        raise UsageError(f"{what} is an empty list; give at least one picture")
    tensors = [_one_to_tensor(picture, what, channels, size) for picture in batch]
    sizes = {(tensor.shape[-1], tensor.shape[-2]) for tensor in tensors}
    if len(sizes) != 1:
        raise UsageError(f"{what} holds pictures of several sizes, {sorted(sizes)}; resize them")
    pictures = torch.cat(tensors)
    if size is not None and tuple(pictures.shape[-2:]) != size:
        raise UsageError(
            f"{what} has {pictures.shape[-1]}x{pictures.shape[-2]} pixels, expected "
            f"{size[1]}x{size[0]}; resize it, or give a PIL picture, which is resized for you"
        )
    return pictures


def _one_to_tensor(picture: Any, what: str, channels: int, size: tuple[int, int] | None) -> Tensor:
    import torch

    if isinstance(picture, Image.Image):
        return _pil_to_tensor(picture, what, channels, size)
    if not isinstance(picture, (np.ndarray, torch.Tensor)):
        raise UsageError(
            f"{what} must be a PIL picture, a numpy array or a torch tensor, "
            f"not {type(picture).__name__}; read files with fastsd.images.read_image"
        )
    kind = str(picture.dtype).removeprefix("torch.")
    if kind != "uint8" and "float" not in kind:
        raise UsageError(f"{what} holds {kind}; give floats from 0 to 1, or uint8")
    if isinstance(picture, np.ndarray):
        tensor, axis, order = torch.from_numpy(np.array(picture)), -1, f"H, W, {channels}"
    else:
        tensor, axis, order = picture.detach().cpu(), -3, f"{channels}, H, W"
    if channels == 1 and (tensor.ndim == 2 or (tensor.ndim == 3 and tensor.shape[axis] != 1)):
        tensor = tensor.unsqueeze(axis)
    if tensor.ndim not in (3, 4) or tensor.shape[axis] != channels or not tensor.numel():
        shape = tuple(picture.shape)
        raise UsageError(f"{what} has shape {shape}, expected ({order}) or (B, {order})")
    tensor = tensor.movedim(axis, -3).float()
    if kind == "uint8":
        tensor = tensor / 255
    low, high = float(tensor.min()), float(tensor.max())
    if not (low >= 0 and high <= 1):  # NaN fails both
        raise UsageError(
            f"{what} holds values from {low:g} to {high:g}, expected 0 to 1, with no NaN; "
            "scale or clamp it"
        )
    return tensor.reshape(-1, channels, *tensor.shape[-2:])


def _pil_to_tensor(
    picture: Image.Image, what: str, channels: int, size: tuple[int, int] | None
) -> Tensor:
    import torch

    try:
        picture.load()
    except (OSError, SyntaxError, ValueError) as error:  # what Pillow raises, of files cut off too
        raise UsageError(f"{what} cannot be decoded ({error}); open or save it again") from None
    if _turn(picture) is not None:  # as in diffusers; a mask may be of the pixels as they lie
        log.warning(
            "%s is drawn on as its pixels lie, not upright as its EXIF says; "
            "fastsd.images.read_image turns pictures",
            what,
        )
    if picture.mode in ("RGBA", "LA", "PA") or "transparency" in picture.info:
        alpha = picture.convert("RGBA").getchannel("A")
        if alpha.getextrema() != (255, 255):
            raise UsageError(
                f"{what} has transparent pixels, and nothing says what is behind them; paste it "
                "on a background, or give its transparency as mask_image"
            )
    elif picture.mode not in MODES:
        raise UsageError(
            f"{what} has mode {picture.mode!r}, expected one of {', '.join(MODES)}; "
            + (
                "scale its values to 8 bits, or read its file with fastsd.images.read_image"
                if picture.mode[0] in "IF"  # which convert() cuts at 255
                else f"convert it: {what}.convert({CHANNELS[channels]!r})"
            )
        )
    if 0 in picture.size:
        raise UsageError(f"{what} has {picture.width}x{picture.height} pixels; it is empty")
    picture = picture.convert(CHANNELS[channels])
    if size is not None and picture.size != size[::-1]:
        picture = picture.resize(size[::-1], Image.Resampling.LANCZOS)
    array = np.asarray(picture, np.float32).reshape(picture.height, picture.width, channels)
    return torch.from_numpy(array / 255).permute(2, 0, 1)[None].contiguous()


def digest(picture: Tensor) -> str:
    """Return the SHA-256 of a picture (C, H, W) in [0, 1] as 8-bit values, and of its shape."""
    import hashlib

    values = (picture.detach().cpu() * 255).round().byte().permute(1, 2, 0).numpy()
    return hashlib.sha256(repr(values.shape).encode() + values.tobytes()).hexdigest()


def widen(pictures: Tensor, borders: Sequence[int]) -> tuple[Tensor, Tensor]:
    """Make room around pictures: the canvas (B, C, H', W') and a mask (1, 1, H', W') of the new.

    borders: pixels to add on the left, top, right and bottom. New pixels repeat the nearest old
    one, so that an encoder sees no edge where the picture ends.
    """
    import torch
    from torch.nn.functional import pad

    sides = list(borders) if isinstance(borders, Iterable) else []
    whole = all(isinstance(side, Integral) and not isinstance(side, bool) for side in sides)
    if not (len(sides) == 4 and whole and min(sides) >= 0 and 0 < max(sides) < LONGEST_SIDE):
        raise UsageError(
            f"outpaint takes the pixels to add on the left, top, right and bottom, whole numbers "
            f"of 0 or more, below {LONGEST_SIDE} and not all 0, not {borders!r}"
        )
    left, top, right, bottom = map(int, sides)
    frame = (left, right, top, bottom)
    canvas = pad(pictures, frame, mode="replicate")
    mask = pad(torch.zeros(1, 1, *pictures.shape[-2:], dtype=torch.float32), frame, value=1.0)
    return canvas, mask


def feathered(mask: Tensor, pixels: int) -> Tensor:
    """Let a mask (B, 1, H, W) of 0 and 1 fall off outside its edge, to 0 beyond `pixels`.

    1 in the mask, falling evenly with the distance to it (the longer of dx and dy), and exactly 0
    farther than `pixels` away.
    """
    from torch.nn.functional import avg_pool2d, max_pool2d, pad

    if pixels < 1:
        return mask
    # A dilated mask, blurred by a box: their widths add up to the feather's. One axis at a time.
    blur = pixels // 2
    grown = pixels - blur
    for axis in (0, 1):
        width, sides = [1, 1], [0, 0]
        width[axis], sides[axis] = 2 * grown + 1, grown
        mask = max_pool2d(mask, width, stride=1, padding=sides)
    mask = pad(mask, (blur,) * 4, mode="replicate")
    for width in ([2 * blur + 1, 1], [1, 2 * blur + 1]):
        mask = avg_pool2d(mask, width, stride=1)
    return mask


# --- reading --------------------------------------------------------------------------------------


def read_image(path: str | Path, *, max_pixels: int = MAX_PIXELS) -> Image.Image:
    """Read a PNG, JPEG or WEBP as RGB, upright as its EXIF says; of an animation, the first frame.

    The size is checked before anything is decoded. Raises UsageError for a file that is missing, of
    another format, damaged, or larger than `max_pixels`.
    """
    with _open(path, FORMATS) as image:
        width, height = image.size
        if width * height > max_pixels:
            raise UsageError(
                f"{path} has {width}x{height} pixels, the limit is {max_pixels}; make it smaller"
            )
        try:
            turn = _turn(image)
            upright = image if turn is None else image.transpose(turn)
            if upright.mode[0] == "I":  # 16 bits, of which convert() would cut all above 255
                upright = Image.fromarray((np.asarray(upright) / 257).round().astype(np.uint8))
            return upright.convert("RGB")
        except (OSError, SyntaxError, ValueError) as error:  # what Pillow's decoders raise
            raise UsageError(f"{path} is damaged ({error}); save it again") from None


_TURNS = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}


def _turn(image: Image.Image) -> Image.Transpose | None:
    """What turns a picture upright; None if it is, or if its EXIF is damaged.

    ImageOps.exif_transpose would write the rest of the EXIF anew, which fails where that is odd.
    """
    try:
        return _TURNS.get(image.getexif().get(ExifTags.Base.Orientation, 1))
    except (AttributeError, KeyError, OSError, SyntaxError, TypeError, ValueError, struct.error):
        return None


def _open(path: str | Path, formats: tuple[str, ...]) -> Image.Image:
    """Read the header of a picture in one of `formats`; pixels are decoded later."""
    try:
        return Image.open(path, formats=formats)
    except UnidentifiedImageError:
        reason = f"it is not a {' or '.join(formats)} picture"
    except (Image.DecompressionBombError, Image.DecompressionBombWarning) as error:
        reason = f"it is too large: {error}"
    except OSError as error:
        reason = error.strerror or str(error)
    except (SyntaxError, ValueError) as error:
        reason = f"it is damaged: {error}"
    raise UsageError(f"cannot read {path}: {reason}; give a {' or '.join(formats)} file")


# --- writing --------------------------------------------------------------------------------------


def save_png(
    image: Image.Image, path: str | Path, metadata: Mapping[str, Any] | None = None
) -> None:
    """Write `image` to `path` with `metadata` in it; nobody ever sees half a file.

    The folder is made if it is missing and an existing file is replaced. metadata: plain JSON data.
    Raises FastsdError where the file cannot be written.
    """
    path = Path(path)
    make_folder(path.parent)
    temporary = path.parent / f".{secrets.token_hex(8)}.tmp"  # short: names are limited in length
    try:
        with open(temporary, "xb") as file:
            image.save(file, "PNG", pnginfo=None if metadata is None else _chunks(metadata))
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except OSError as error:
        raise FastsdError(
            f"cannot write {path}: {error.strerror or error}; choose another place"
        ) from None
    finally:
        temporary.unlink(missing_ok=True)


def make_folder(folder: Path) -> None:
    """Make `folder` ready for writing or raise FastsdError; call it before a long drawing."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise FastsdError(
            f"cannot make the folder {folder}: {error.strerror or error}; choose another place"
        ) from None
    if not os.access(folder, os.W_OK):
        raise FastsdError(f"cannot write to the folder {folder}; choose another place")


def _chunks(metadata: Mapping[str, Any]) -> PngImagePlugin.PngInfo:
    chunks = PngImagePlugin.PngInfo()
    chunks.add_text(TEXT_CHUNK, format_parameters(metadata))
    chunks.add_text(JSON_CHUNK, json.dumps(dict(metadata)))  # ASCII, so that any reader decodes it
    return chunks


# --- metadata -------------------------------------------------------------------------------------


def read_metadata(path: str | Path) -> dict[str, Any]:
    """Return what a PNG says of how it was drawn: the `fastsd` chunk, or what `parameters` tells.

    Raises UsageError for a file that is not a PNG, or holds neither.
    """
    with _open(path, ("PNG",)) as image:
        chunks = image.info
    if JSON_CHUNK in chunks:
        with suppress(ValueError, RecursionError):
            metadata = json.loads(chunks[JSON_CHUNK])
            if isinstance(metadata, dict):
                return metadata
        raise UsageError(f"the {JSON_CHUNK!r} chunk of {path} is not a JSON object; it was changed")
    if TEXT_CHUNK in chunks:
        return parse_parameters(chunks[TEXT_CHUNK])
    raise UsageError(
        f"{path} does not say how it was drawn: it has neither a {JSON_CHUNK!r} nor a "
        f"{TEXT_CHUNK!r} chunk; a program that shrinks pictures may have dropped them"
    )


# Name in the convention -> our name and type, in the order in which they are written.
_FIELDS: dict[str, tuple[str, type[Any]]] = {
    "Steps": ("steps", int),
    "Sampler": ("sampler", str),
    "Schedule type": ("schedule_type", str),
    "CFG scale": ("guidance_scale", float),
    "Seed": ("seed", int),
    "Size": ("size", str),
    "Denoising strength": ("strength", float),
    "Model": ("model", str),
    "RNG": ("rng", str),
    "Version": ("version", str),
}
_NEGATIVE = "Negative prompt:"
# The web UI's own pattern, tied to the start of an entry so that a hostile line takes linear time.
_ENTRY = re.compile(r'(?:^|(?<=,))\s*(\w[\w \-/]+):\s*("(?:\\.|[^\\"])+"|[^,]*)(?:,|$)')
_LONGEST_LINE = 16_384


def format_parameters(metadata: Mapping[str, Any]) -> str:
    """Write metadata as the web UI does: the prompt, the negative prompt, one line of settings.

    `RNG: CPU` is always said: without it, readers assume noise drawn on a GPU.
    """
    values = {
        **metadata,
        "sampler": metadata.get("sampler_title", metadata.get("sampler")),
        "size": f"{metadata['width']}x{metadata['height']}" if "width" in metadata else None,
        "rng": "CPU",
        "version": f"fastsd {metadata.get('versions', {}).get('fastsd', '')}".strip(),
    }
    settings = [
        f"{title}: {_quote(_plain(values[name]))}"
        for title, (name, _) in _FIELDS.items()
        if values.get(name) not in (None, "")
    ]
    lines = [str(metadata.get("prompt") or "")]
    if metadata.get("negative_prompt"):
        lines.append(f"{_NEGATIVE} {metadata['negative_prompt']}")
    return "\n".join([*lines, ", ".join(settings)])


def parse_parameters(text: str) -> dict[str, Any]:
    """Read the web UI's text back into our names; settings that we do not have are left out.

    What format_parameters wrote comes back equal, but for one thing that the convention cannot say:
    a line of the prompt itself that starts with "Negative prompt:" counts as the negative prompt.
    """
    *lines, last = text.rstrip("\n").split("\n")
    entries = _ENTRY.findall(last) if len(last) <= _LONGEST_LINE else []
    if len(entries) < 3:  # no settings: the web UI's own rule
        lines, entries = [*lines, last], []
    start = next((i for i, line in enumerate(lines) if line.startswith(_NEGATIVE)), len(lines))
    negative = "\n".join(lines[start:]).removeprefix(_NEGATIVE).removeprefix(" ")
    metadata: dict[str, Any] = {"prompt": "\n".join(lines[:start]), "negative_prompt": negative}
    for title, value in entries:
        if title in _FIELDS:
            name, type_ = _FIELDS[title]
            with suppress(ValueError):  # another program's idea of a number
                metadata[name] = type_(_unquote(value))
    width, x, height = metadata.pop("size", "").partition("x")
    if x and width.isdecimal() and height.isdecimal():
        metadata |= {"width": int(width), "height": int(height)}
    return metadata


def _plain(value: object) -> str:
    """Write 7.0 as 7, as the web UI does; anything else as it stands."""
    return str(int(value)) if isinstance(value, float) and value.is_integer() else str(value)


def _quote(value: str) -> str:
    ambiguous = set(value) & set(',:\n"') or value != value.strip()
    return json.dumps(value, ensure_ascii=False) if ambiguous else value


def _unquote(value: str) -> str:
    if value.startswith('"'):
        with suppress(ValueError):
            return str(json.loads(value))
    return value


# --- contact sheets -------------------------------------------------------------------------------

# Tried in this order for captions beyond the bundled font, which knows little more than ASCII:
# what Linux distributions, macOS and Windows call their fonts, those with Chinese after the first.
_FONTS = (
    "DejaVuSans.ttf",
    "NotoSansCJK-Regular.ttc",
    "NotoSansCJKsc-Regular.otf",
    "NotoSansSC-Regular.otf",
    "SourceHanSansSC-Regular.otf",
    "wqy-microhei.ttc",
    "wqy-zenhei.ttc",
    "DroidSansFallbackFull.ttf",
    "uming.ttc",
    "PingFang.ttc",
    "Hiragino Sans GB.ttc",
    "STHeiti Light.ttc",
    "msyh.ttc",
    "simsun.ttc",
    "Arial Unicode.ttf",
    "unifont.otf",
    "unifont.ttf",
)
_Font = ImageFont.FreeTypeFont | ImageFont.ImageFont


def contact_sheet(
    pictures: Sequence[Image.Image],
    captions: Sequence[str],
    *,
    columns: int = 4,
    margin: int = 8,
    font_size: int = 14,
    side: int | None = None,
) -> Image.Image:
    """Lay pictures in a grid on white, each with its caption below, cut to the picture's width.

    side: pixels; larger pictures are shrunk to it, smaller ones grow by a whole factor, so that
    single pixels can be judged; None lays them as they are.

    Characters that no font of this machine has are left out, "..." in the place of each run.
    """
    if not pictures or len(pictures) != len(captions) or columns < 1:
        raise UsageError(
            f"a contact sheet needs one caption a picture and a column or more; "
            f"{len(pictures)} pictures, {len(captions)} captions and {columns} columns were given"
        )
    if side is not None:
        pictures = [_resized(picture, side) for picture in pictures]
    columns = min(columns, len(pictures))
    rows = -(-len(pictures) // columns)
    width = max(picture.width for picture in pictures)
    height = max(picture.height for picture in pictures)
    step_x, step_y = width + margin, height + 2 * font_size + margin
    sheet = Image.new("RGB", (columns * step_x + margin, rows * step_y + margin), "white")
    draw = ImageDraw.Draw(sheet)
    for index, (picture, caption) in enumerate(zip(pictures, captions, strict=True)):
        x = margin + index % columns * step_x
        y = margin + index // columns * step_y
        sheet.paste(picture, (x + (width - picture.width) // 2, y + height - picture.height))
        text, font = _legible(" ".join(caption.split()), font_size)
        draw.text((x, y + height + font_size // 4), _fit(text, font, width), "black", font)
    return sheet


def _resized(picture: Image.Image, side: int) -> Image.Image:
    longest = max(picture.size)
    if longest > side:
        shrunk = [max(1, n * side // longest) for n in picture.size]
        return picture.resize((shrunk[0], shrunk[1]), Image.Resampling.LANCZOS)
    factor = side // longest
    return picture.resize(
        (factor * picture.width, factor * picture.height), Image.Resampling.NEAREST
    )


def _legible(text: str, size: int) -> tuple[str, _Font]:
    """Choose a font that has every character; failing that, leave the missing ones out."""
    bundled = ImageFont.load_default(size=size)
    for font in (bundled, *_installed_fonts(size)):
        if not _missing(text, font):
            return text, font
    missing = _missing(text, bundled)
    runs = itertools.groupby(text, missing.__contains__)
    return "".join("..." if lacking else "".join(run) for lacking, run in runs), bundled


def _installed_fonts(size: int) -> Iterable[_Font]:
    for name in _FONTS:
        with suppress(OSError):
            yield ImageFont.truetype(name, size)


def _missing(text: str, font: _Font) -> set[str]:
    """The characters that `font` draws as its box for unknown ones."""
    box = bytes(font.getmask("\uffff"))  # a code point that never has a glyph
    return {c for c in set(text) if bytes(font.getmask(c)) == box}


def _fit(text: str, font: _Font, width: int) -> str:
    if font.getlength(text) <= width:
        return text
    while text and font.getlength(text + "...") > width:
        text = text[:-1]
    return text + "..."
