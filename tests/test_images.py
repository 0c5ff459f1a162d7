"""Pictures against diffusers' own conversion; damaged, huge and unwritable files; metadata."""

from __future__ import annotations

import errno
import json
import os
import stat
import struct
import zlib
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import assume, given
from hypothesis import strategies as st
from PIL import Image, ImageFont, ImageOps, PngImagePlugin

from fastsd import images
from fastsd.errors import FastsdError, NumericsError, UsageError
from fastsd.images import (
    contact_sheet,
    digest,
    feathered,
    format_parameters,
    make_folder,
    parse_parameters,
    read_image,
    read_metadata,
    save_png,
    to_pil,
    to_tensor,
    widen,
)

METADATA: dict[str, Any] = {
    "prompt": "a red apple, on a table\n一只猫: “quoted”",
    "negative_prompt": "fog,\nblurry",
    "seed": 7,
    "steps": 20,
    "sampler": "euler_a",
    "sampler_title": "Euler a",
    "schedule_type": "Karras",
    "guidance_scale": 7.0,
    "eta": 0.0,
    "height": 512,
    "width": 768,
    "timesteps": None,
    "model": "my, model",
    "backend": "eager",
    "precision": "fp32",
    "versions": {"fastsd": "0.1.0", "torch": "2.13.0"},
}


def noise_picture(width: int = 40, height: int = 24, seed: int = 0) -> Image.Image:
    rng = np.random.default_rng(seed)
    return Image.fromarray(rng.integers(0, 256, (height, width, 3), dtype=np.uint8))


# --- tensors and PIL -----------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_to_pil_rounds_as_diffusers(dtype: torch.dtype) -> None:
    """Bit for bit, on random values, on every half step and beyond both ends."""
    from diffusers.image_processor import VaeImageProcessor

    halves = torch.arange(-8, 2 * 255 + 8) / 255 - 1  # k / 2 after scaling, and outside [-1, 1]
    decoded = torch.randn((2, 3, 64, 64), generator=torch.Generator().manual_seed(0))
    decoded[0, 0].flatten()[: len(halves)] = halves
    decoded = decoded.to(dtype)
    theirs = VaeImageProcessor().postprocess(decoded, output_type="pil")
    ours = to_pil((decoded / 2 + 0.5).clamp(0, 1))
    for a, b in zip(ours, theirs, strict=True):
        np.testing.assert_array_equal(np.asarray(a), np.asarray(b))


def test_to_tensor_is_diffusers_and_the_inverse() -> None:
    from diffusers.image_processor import VaeImageProcessor

    pictures = [noise_picture(seed=0), noise_picture(seed=1)]
    ours = to_tensor(pictures)
    theirs = VaeImageProcessor(do_resize=False).preprocess(pictures)
    torch.testing.assert_close(2 * ours - 1, theirs, rtol=0, atol=0)
    assert [a.tobytes() for a in to_pil(ours)] == [b.tobytes() for b in pictures]
    assert to_tensor(pictures[0]).shape == (1, 3, 24, 40)
    with pytest.raises(UsageError, match="several sizes"):
        to_tensor([noise_picture(8, 8), noise_picture(8, 16)])


def test_numpy_pictures() -> None:
    array = np.asarray(noise_picture())[None]
    assert to_pil(array)[0].tobytes() == noise_picture().tobytes()
    assert to_pil(array.astype(np.float32) / 255)[0].tobytes() == noise_picture().tobytes()


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -0.01, 1.01])
def test_values_outside_are_never_a_picture(value: float) -> None:
    picture = torch.zeros(1, 3, 8, 8)
    picture[0, 1, 2, 3] = value
    with pytest.raises(NumericsError, match="expected 0 to 1"):
        to_pil(picture)


# --- what users give a Pipeline ------------------------------------------------------------------


@pytest.mark.parametrize("size", [None, (64, 48), (16, 16)])
@pytest.mark.parametrize("mode", ["RGB", "L", "P", "1"])
def test_to_tensor_is_diffusers(mode: str, size: tuple[int, int] | None) -> None:
    """Bit for bit, resized or not; a mask, in grey, too."""
    from diffusers.image_processor import VaeImageProcessor

    given = noise_picture().convert(mode)
    height, width = size or (24, 40)
    ours = to_tensor(given, size=size)
    theirs = VaeImageProcessor(do_convert_rgb=True).preprocess(given.convert("RGB"), height, width)
    torch.testing.assert_close(2 * ours - 1, theirs, rtol=0, atol=0)
    ours = to_tensor(given, channels=1, size=size)
    processor = VaeImageProcessor(do_normalize=False, do_convert_grayscale=True)
    theirs = processor.preprocess(given.convert("L"), height, width)
    torch.testing.assert_close(ours, theirs, rtol=0, atol=0)


def test_masks_as_arrays() -> None:
    expected = to_tensor(noise_picture().convert("L"), channels=1)
    array = np.asarray(noise_picture().convert("L"))
    forms = [array, array[None], array[..., None], array[None, ..., None]]
    for form in [*forms, *(torch.from_numpy(np.array(f)) for f in (array, array[None]))]:
        assert torch.equal(to_tensor(form, channels=1), expected)
    two = np.stack([array, array])
    assert to_tensor(two, channels=1).shape == (2, 1, 24, 40)
    assert to_tensor([array, two], channels=1).shape == (3, 1, 24, 40)


def test_digests_name_pictures() -> None:
    given = to_tensor([noise_picture(), noise_picture(seed=1), noise_picture().rotate(180)])
    assert len({digest(picture) for picture in given}) == 3
    assert digest(given[0]) == digest(to_tensor(np.asarray(noise_picture()))[0])
    assert digest(given[0]) != digest(given[0].reshape(3, 40, 24))


def test_widen_repeats_the_edge_and_masks_it() -> None:
    given = to_tensor(noise_picture())
    canvas, mask = widen(given, (3, 0, 5, 2))
    expected = np.pad(given.numpy(), ((0, 0), (0, 0), (0, 2), (3, 5)), "edge")
    np.testing.assert_array_equal(canvas.numpy(), expected)
    assert mask.shape == (1, 1, 26, 48) and float(mask.sum()) == 26 * 48 - 24 * 40
    assert not mask[..., :24, 3:43].any()


@pytest.mark.parametrize("pixels", range(0, 12))
def test_feathered(pixels: int) -> None:
    """1 in the mask, exactly 0 beyond the feather, falling evenly between, at the frame too."""
    mask = torch.zeros(2, 1, 40, 40)
    mask[0, :, 15:25, 17:21], mask[1, :, :, :4] = 1, 1
    soft = feathered(mask, pixels)
    assert torch.equal(soft[mask == 1], torch.ones(int(mask.sum())))
    distance = torch.maximum(
        torch.maximum(15 - torch.arange(40), torch.arange(40) - 24).clamp(min=0)[:, None],
        torch.maximum(17 - torch.arange(40), torch.arange(40) - 20).clamp(min=0)[None],
    )
    assert ((soft[0, 0] > 0) == (distance <= pixels)).all()
    fall = soft[1, 0, 20, 3 : 3 + pixels + 2]  # from the mask's last pixel to the first kept one
    assert (fall.diff() <= 0).all() and (fall.diff().diff()[2:].abs() < 1e-6).all()
    assert torch.equal(soft[1, 0, 0], soft[1, 0, 20])


# --- reading -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("format_", "mode"),
    [
        *(("PNG", mode) for mode in ("RGB", "L", "RGBA", "P", "1", "LA")),
        *(("JPEG", mode) for mode in ("RGB", "L", "CMYK")),
        *(("WEBP", mode) for mode in ("RGB", "RGBA")),
    ],
)
def test_reads_every_mode_as_rgb(format_: str, mode: str, tmp_path: Path) -> None:
    path = tmp_path / "picture"  # by content, not by extension
    picture = noise_picture().convert(mode)
    picture.save(path, format_)
    read = read_image(path)
    assert read.mode == "RGB" and read.size == (40, 24)
    if format_ == "PNG":
        np.testing.assert_array_equal(np.asarray(read), np.asarray(picture.convert("RGB")))


def test_turns_upright(tmp_path: Path) -> None:
    exif = Image.Exif()
    exif[0x0112] = 6  # rotated by 90 degrees
    noise_picture(40, 24).save(tmp_path / "a.jpg", exif=exif)
    assert read_image(tmp_path / "a.jpg").size == (24, 40)


@pytest.mark.parametrize("orientation", range(1, 9))
def test_files_are_turned_as_pillow_turns_them(orientation: int, tmp_path: Path) -> None:
    exif = Image.Exif()
    exif[0x0112] = orientation
    noise_picture(40, 24).save(tmp_path / "a.png", exif=exif)
    with Image.open(tmp_path / "a.png") as photo:
        expected = np.asarray(ImageOps.exif_transpose(photo))
    np.testing.assert_array_equal(np.asarray(read_image(tmp_path / "a.png")), expected)


def test_a_pil_picture_is_drawn_on_as_it_lies(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """As in diffusers: a mask may have been made of its pixels. But that is said."""
    exif = Image.Exif()
    exif[0x0112] = 6
    noise_picture(40, 24).save(tmp_path / "a.png", exif=exif)
    with Image.open(tmp_path / "a.png") as photo:
        torch.testing.assert_close(to_tensor(photo), to_tensor(noise_picture(40, 24)))
    assert "read_image turns pictures" in caplog.text


@pytest.mark.filterwarnings("ignore::UserWarning:PIL")  # its own words on it
def test_damaged_exif_leaves_a_picture_as_it_is(tmp_path: Path) -> None:
    exif = Image.Exif()
    exif[0x0112] = 6
    exif[0x9286] = b"a comment"
    noise_picture(40, 24).save(tmp_path / "a.jpg", exif=exif)
    data = (tmp_path / "a.jpg").read_bytes()
    rng = np.random.default_rng(0)
    start, end = data.index(b"Exif"), data.index(b"Exif") + 80
    read = 0
    for _ in range(300):
        broken = bytearray(data)
        for at in rng.integers(start + 6, end, 3):
            broken[at] = rng.integers(256)
        (tmp_path / "b.jpg").write_bytes(broken)
        with suppress(UsageError):  # where Pillow cannot tell a JPEG by what is left
            read += sorted(read_image(tmp_path / "b.jpg").size) == [24, 40]
    assert read > 200


def test_sixteen_bits_are_scaled_not_cut(tmp_path: Path) -> None:
    deep = np.arange(0, 65536, 64, dtype=np.uint16).reshape(32, 32)
    Image.fromarray(deep).save(tmp_path / "a.png")
    read = np.asarray(read_image(tmp_path / "a.png"))
    np.testing.assert_array_equal(read[..., 0], (deep / 257).round())
    with (
        Image.open(tmp_path / "a.png") as scan,
        pytest.raises(UsageError, match=r"scale its values to 8 bits, or read its file with"),
    ):
        to_tensor(scan)
    with pytest.raises(UsageError, match=r"mask_image.convert\('L'\)"):
        to_tensor(Image.new("CMYK", (8, 8)), what="mask_image", channels=1)


def test_a_file_cut_off_is_an_error_of_ours(tmp_path: Path) -> None:
    noise_picture(400, 240).save(tmp_path / "a.png")
    data = (tmp_path / "a.png").read_bytes()
    (tmp_path / "half.png").write_bytes(data[: len(data) // 2])
    with (
        Image.open(tmp_path / "half.png") as half,
        pytest.raises(UsageError, match="image cannot be decoded"),
    ):
        to_tensor(half)


def test_reads_the_first_frame(tmp_path: Path) -> None:
    frames = [Image.new("RGB", (8, 8), color) for color in ("red", "blue")]
    frames[0].save(tmp_path / "a.png", save_all=True, append_images=frames[1:])
    assert read_image(tmp_path / "a.png").getpixel((0, 0)) == (255, 0, 0)


def png_claiming(width: int, height: int) -> bytes:
    """A PNG's header and nothing behind it: whoever decodes it allocates its size first."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return (
            struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))
        )

    header = chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0))
    return b"\x89PNG\r\n\x1a\n" + header + chunk(b"IDAT", zlib.compress(b"")) + chunk(b"IEND", b"")


@pytest.mark.parametrize("side", [4001, 60_000, 2**31 - 1])
def test_size_is_checked_before_decoding(side: int, tmp_path: Path) -> None:
    (tmp_path / "bomb.png").write_bytes(png_claiming(side, side))
    with pytest.raises(UsageError, match="limit|too large"):
        read_image(tmp_path / "bomb.png")


def test_the_limit_is_the_callers(tmp_path: Path) -> None:
    noise_picture(40, 24).save(tmp_path / "a.png")
    assert read_image(tmp_path / "a.png", max_pixels=40 * 24).size == (40, 24)
    with pytest.raises(UsageError, match="40x24"):
        read_image(tmp_path / "a.png", max_pixels=40 * 24 - 1)


def test_damaged_and_foreign_files(tmp_path: Path) -> None:
    """Each is one clear error, and none leaves a file open (warnings are errors here)."""
    noise_picture().save(tmp_path / "whole.png")
    whole = (tmp_path / "whole.png").read_bytes()
    noise_picture().save(tmp_path / "a.gif")
    noise_picture().save(tmp_path / "a.tiff")
    (tmp_path / "empty.png").write_bytes(b"")
    (tmp_path / "text.png").write_text("not a picture")
    (tmp_path / "vector.svg").write_text("<svg xmlns='http://www.w3.org/2000/svg'/>")
    for cut in (4, 20, 40, len(whole) // 2):
        (tmp_path / f"cut-{cut}.png").write_bytes(whole[:cut])
    (tmp_path / "folder.png").mkdir()
    files = [path for path in tmp_path.iterdir() if path.name != "whole.png"]
    for path in [*files, tmp_path / "missing.png"]:
        with pytest.raises(UsageError, match=path.name):
            read_image(path)
        if "cut-" not in path.name:
            with pytest.raises(UsageError, match=path.name):
                read_metadata(path)


# --- writing -------------------------------------------------------------------------------------


def test_save_png_keeps_pixels_and_metadata(tmp_path: Path) -> None:
    path = tmp_path / "new" / "folders" / "一只猫.png"
    save_png(noise_picture(), path, METADATA)
    assert read_metadata(path) == METADATA
    with Image.open(path) as image:
        assert image.info["parameters"] == format_parameters(METADATA)
        assert image.tobytes() == noise_picture().tobytes()
    assert [p.name for p in path.parent.iterdir()] == [path.name]
    if os.name == "posix":
        mask = os.umask(0)
        os.umask(mask)
        assert stat.S_IMODE(path.stat().st_mode) == 0o666 & ~mask  # not a temporary file's 0600


def test_save_png_replaces(tmp_path: Path) -> None:
    for seed in (0, 1):
        save_png(noise_picture(seed=seed), tmp_path / "a.png")
    assert read_image(tmp_path / "a.png").tobytes() == noise_picture(seed=1).tobytes()
    with pytest.raises(UsageError, match="does not say how it was drawn"):
        read_metadata(tmp_path / "a.png")


def test_a_failed_write_leaves_the_old_file_and_no_other(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "a.png"
    save_png(noise_picture(), path, METADATA)
    before = path.read_bytes()

    def full(descriptor: int) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(FastsdError, match=r"cannot write .*a\.png: No space left on device"):
        save_png(noise_picture(seed=1), path, METADATA)
    assert path.read_bytes() == before and list(tmp_path.iterdir()) == [path]


def test_unwritable_places(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").write_text("")
    (tmp_path / "folder.png").mkdir()
    for path in (tmp_path / "file" / "a.png", tmp_path / "folder.png"):
        with pytest.raises(FastsdError, match="cannot (write|make)"):
            save_png(noise_picture(), path)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["file", "folder.png"]
    monkeypatch.setattr(os, "access", lambda *_: False)  # as it is for anyone but root
    with pytest.raises(FastsdError, match="cannot write to the folder"):
        make_folder(tmp_path)


# --- metadata ------------------------------------------------------------------------------------


def test_the_text_is_the_web_uis() -> None:
    assert format_parameters(METADATA) == (
        "a red apple, on a table\n一只猫: “quoted”\n"
        "Negative prompt: fog,\nblurry\n"
        "Steps: 20, Sampler: Euler a, Schedule type: Karras, CFG scale: 7, Seed: 7, Size: 768x512, "
        'Model: "my, model", RNG: CPU, Version: fastsd 0.1.0'
    )


def test_reads_what_the_web_ui_writes(tmp_path: Path) -> None:
    """From a file, with what only the web UI knows in it."""
    text = (
        "masterpiece, (best quality:1.2)\nsecond line\n"
        "Negative prompt: lowres, bad anatomy\nworst quality\n"
        "Steps: 28, Sampler: DPM++ 2M, Schedule type: Karras, CFG scale: 5.5, Seed: 1234567890, "
        "Size: 832x1216, Model hash: 1a2b3c4d5e, Model: some_model-v1.0, Clip skip: 2, "
        'Lora hashes: "one: 0123456789ab, two: ba9876543210", Version: v1.10.1'
    )
    chunks = PngImagePlugin.PngInfo()
    chunks.add_text("parameters", text)
    noise_picture().save(tmp_path / "a.png", pnginfo=chunks)
    assert read_metadata(tmp_path / "a.png") == {
        "prompt": "masterpiece, (best quality:1.2)\nsecond line",
        "negative_prompt": "lowres, bad anatomy\nworst quality",
        "steps": 28,
        "sampler": "DPM++ 2M",
        "schedule_type": "Karras",
        "guidance_scale": 5.5,
        "seed": 1234567890,
        "model": "some_model-v1.0",
        "version": "v1.10.1",
        "width": 832,
        "height": 1216,
    }


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("", {"prompt": "", "negative_prompt": ""}),
        ("only a prompt", {"prompt": "only a prompt", "negative_prompt": ""}),
        ("a: b, c", {"prompt": "a: b, c", "negative_prompt": ""}),
        ("x\nNegative prompt: y", {"prompt": "x", "negative_prompt": "y"}),
        ("Steps: ?, Seed: 1e9, CFG scale: x, Size: 3xy", {"prompt": "", "negative_prompt": ""}),
        (
            'p\nSteps: 1, Seed: 2, Model: "unclosed, Size: 8x8\n',
            {
                "prompt": "p",
                "negative_prompt": "",
                "steps": 1,
                "seed": 2,
                "model": '"unclosed',
                "width": 8,
                "height": 8,
            },
        ),
    ],
)
def test_odd_texts(text: str, expected: dict[str, Any]) -> None:
    assert parse_parameters(text) == expected


TEXTS = st.text(st.characters(exclude_categories=["Cs"]), max_size=60) | st.sampled_from(
    [
        "a, b: c",
        '"',
        "一只猫，红苹果",
        "line\n\nline",
        "\\",
        "Steps: 1, Seed: 2, Size: 3x4",
        " x\r\n",
    ]
)


@given(
    prompt=TEXTS,
    negative=TEXTS,
    model=TEXTS.filter(bool),
    sampler=TEXTS.filter(bool),
    steps=st.integers(1, 1000),
    seed=st.integers(0, 2**63 - 1),
    guidance=st.floats(allow_nan=False, allow_infinity=False),
    size=st.tuples(st.integers(8, 9999), st.integers(8, 9999)),
)
def test_parameters_come_back(
    prompt: str,
    negative: str,
    model: str,
    sampler: str,
    steps: int,
    seed: int,
    guidance: float,
    size: tuple[int, int],
) -> None:
    """All that the text holds, whatever the prompts hold: newlines, commas, quotes, Chinese."""
    assume(not any(line.startswith("Negative prompt:") for line in prompt.split("\n")))
    metadata = {
        "prompt": prompt,
        "negative_prompt": negative,
        "steps": steps,
        "sampler": sampler,
        "guidance_scale": guidance,
        "seed": seed,
        "model": model,
        "width": size[0],
        "height": size[1],
    }
    parsed = parse_parameters(format_parameters(metadata))
    assert parsed == {**metadata, "rng": "CPU", "version": "fastsd"}


@given(st.dictionaries(TEXTS, TEXTS | st.integers() | st.none()), TEXTS)
def test_json_comes_back(extra: dict[str, Any], prompt: str) -> None:
    metadata = {"prompt": prompt, "extra": extra}
    chunks = [data for _, data, *_ in images._chunks(metadata).chunks if data[:7] == b"fastsd\0"]
    assert [json.loads(data[7:]) for data in chunks] == [metadata]


@given(TEXTS, st.sampled_from(["", "Steps: 1, Seed: 2, Size: 3x4, ", 'a: "', 'a: "\\", ']))
def test_no_text_breaks_the_parser(text: str, start: str) -> None:
    metadata = parse_parameters(start + text)
    assert isinstance(metadata["prompt"], str) and isinstance(metadata["negative_prompt"], str)


@pytest.mark.parametrize("unit", ["a", "a ", "a,", 'a: "', 'a:"\\",', "a: b,", '"', ", "])
def test_hostile_lines_take_little_time(unit: str) -> None:
    import time

    start = time.process_time()
    parse_parameters(unit * (images._LONGEST_LINE // len(unit)))
    parse_parameters(unit * 1_000_000)
    assert time.process_time() - start < 2


@pytest.mark.parametrize("chunk", ["", "[", "[]", "1", "[" * 100_000, '"text"'])
def test_a_changed_json_chunk(chunk: str, tmp_path: Path) -> None:
    chunks = PngImagePlugin.PngInfo()
    chunks.add_text("fastsd", chunk)
    noise_picture().save(tmp_path / "a.png", pnginfo=chunks)
    with pytest.raises(UsageError, match="not a JSON object"):
        read_metadata(tmp_path / "a.png")


def test_a_text_bomb_is_refused(tmp_path: Path) -> None:
    chunks = PngImagePlugin.PngInfo()
    chunks.add_text("parameters", "a" * 50_000_000, zip=True)
    noise_picture().save(tmp_path / "a.png", pnginfo=chunks)
    with pytest.raises(UsageError, match="too large|too much|damaged"):
        read_metadata(tmp_path / "a.png")


# --- contact sheets ------------------------------------------------------------------------------


def test_contact_sheet_places_every_picture() -> None:
    pictures = [Image.new("RGB", (32, 20), (i, 0, 0)) for i in range(5)]
    sheet = contact_sheet(pictures, [f"picture {i}" for i in range(5)], columns=3, margin=4)
    assert sheet.size == (3 * 36 + 4, 2 * (20 + 28 + 4) + 4)
    for i in range(5):
        x, y = 4 + i % 3 * 36, 4 + i // 3 * 52
        inside = sheet.crop((x, y, x + 32, y + 20))
        assert inside.tobytes() == pictures[i].tobytes()
        caption = sheet.crop((x, y + 20, x + 32, y + 48)).convert("L")
        shades = np.asarray(caption)
        assert shades.min() < 100 and shades.max() == 255  # written, dark on white
    assert sheet.getpixel((2 * 36 + 4, 56)) == (255, 255, 255)


def test_contact_sheet_enlarges_by_whole_factors() -> None:
    small, large = Image.new("RGB", (30, 20), "red"), Image.new("RGB", (400, 200), "blue")
    small.putpixel((0, 0), (0, 255, 0))
    sheet = contact_sheet([small, large], ["", ""], columns=1, margin=0, side=100)
    assert sheet.size == (100, 2 * (60 + 28))
    x = (100 - 90) // 2
    assert sheet.crop((x, 0, x + 3, 3)).getcolors() == [(9, (0, 255, 0))]
    assert sheet.crop((x + 3, 0, x + 90, 60)).getcolors() == [(87 * 60, (255, 0, 0))]
    assert sheet.getpixel((0, 88 + 10 + 25)) == (0, 0, 255)  # 100 x 50, at the bottom of its place


def test_captions_are_legible_whatever_the_fonts(monkeypatch: pytest.MonkeyPatch) -> None:
    assert images._legible("a red apple", 14)[0] == "a red apple"
    monkeypatch.setattr(images, "_FONTS", ("no such font.ttf",))
    text, font = images._legible("一只 cat é", 14)
    assert text == "... cat ..."
    assert not images._missing(text, font)


def test_a_caption_is_written_in_a_font_that_has_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whatever fonts this machine has: one is made that has Chinese, of a font that has not."""
    fonttools = pytest.importorskip("fontTools.ttLib", reason="comes with matplotlib")
    matplotlib = pytest.importorskip("matplotlib", reason="the extra `bench` is not installed")
    font = fonttools.TTFont(Path(matplotlib.get_data_path()) / "fonts/ttf/DejaVuSans.ttf")
    for table in font["cmap"].tables:
        if table.isUnicode():
            table.cmap[ord("猫")] = "C"
    font.save(tmp_path / "chinese.ttf")
    monkeypatch.setattr(images, "_FONTS", ("no such font.ttf", str(tmp_path / "chinese.ttf")))
    text, chosen = images._legible("猫 cat", 14)
    assert text == "猫 cat" and isinstance(chosen, ImageFont.FreeTypeFont)
    assert chosen.path == str(tmp_path / "chinese.ttf")


def test_captions_are_cut_to_the_width() -> None:
    _, font = images._legible("", 14)
    assert images._fit("short", font, 100) == "short"
    cut = images._fit("a very long caption " * 10, font, 100)
    assert cut.endswith("...") and font.getlength(cut) <= 100


@pytest.mark.parametrize(("count", "captions", "columns"), [(0, 0, 1), (2, 1, 1), (1, 1, 0)])
def test_contact_sheet_refuses(count: int, captions: int, columns: int) -> None:
    with pytest.raises(UsageError, match="one caption a picture"):
        contact_sheet([noise_picture()] * count, [""] * captions, columns=columns)
