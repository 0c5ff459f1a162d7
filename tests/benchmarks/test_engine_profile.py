"""The profile is read off oneDNN's own words."""

from __future__ import annotations

import pytest

from fastsd.benchmarks.engine_profile import operations, read_last_call, report

HEAD = "onednn_verbose,v1,primitive,exec,cpu"
CONVOLUTION = (
    f"{HEAD},convolution,brgconv_1x1:avx512_core_vnni,forward_inference,src:u8::blocked:acdb::f0 "
    "wei:s8:a:blocked:AcdB64a4b::f8:zpm1 dst:f32::blocked:acdb::f0,attr-scratchpad:user,"
    "alg:convolution_direct,mb2_ic320oc640_ih64oh32kh3sh2dh0ph1_iw64ow32kw3sw2dw0pw1,2.5"
)
MATRIX = (
    f"{HEAD},matmul,brg_matmul:avx512_core_bf16,undef,src:bf16:a:blocked:ab::f0 "
    "wei:bf16::blocked:BA16a64b4a::f0 dst:f32:a:blocked:ab::f0,,,"
    "8x1280:1280x320,0.5"
)
REORDER = f"{HEAD},reorder,jit:uni,undef,src:f32::blocked:abcd::f0 dst:f32,,,2x3x4x5,0.1"


def test_operations_are_counted_from_the_shape() -> None:
    assert operations("8x1280:1280x320") == 2 * 8 * 1280 * 320
    assert operations("4x8x1280:4x1280x320") == 2 * 4 * 8 * 1280 * 320
    assert operations("mb4096ic512oc512") == 2 * 4096 * 512 * 512
    convolved = operations("mb2_ic320oc640_ih64oh32kh3sh2dh0ph1_iw64ow32kw3sw2dw0pw1")
    assert convolved == 2 * 2 * 320 * 640 * 32 * 32 * 9
    assert operations("2x3x4x5") == 0


def test_the_last_call_is_told_by_precision_and_product() -> None:
    lines = [
        "warm",
        MATRIX,
        "run 9.0",
        CONVOLUTION,
        CONVOLUTION,
        MATRIX,
        REORDER,
        "run 0.01",
        "own a 1",
    ]
    products, seconds = read_last_call(lines)
    assert seconds == 0.01
    times = {(p.precision, p.shape.split("_")[0]): t for p, t in products.items()}
    assert times == {("int8", "mb2"): [0.0025, 0.0025], ("bf16", "8x1280:1280x320"): [0.0005]}
    ceilings = {"int8": 4e12, "bf16": 2e11, "fp32": 1e11}
    text = report("unet", products, seconds, {"attention": 0.001}, ceilings)
    assert "| int8 products | 5.0 | 50% | 3020 | 75% |" in text
    assert "| attention | 1.0 | 10% | | |" in text
    assert "| element-wise, and the rest | 3.5 | 35% | | |" in text
    (row,) = (line for line in text if line.startswith("| bf16 8x1280"))
    assert row == "| bf16 8x1280:1280x320 | 1 | 0.5 | 13 | 7% |"


@pytest.mark.parametrize("line", ("", "run", "onednn_verbose,v1,info,oneDNN v3.7.1"))
def test_other_lines_are_no_products(line: str) -> None:
    with pytest.raises(IndexError):
        read_last_call([line])
