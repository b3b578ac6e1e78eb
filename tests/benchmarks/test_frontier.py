"""The frontier's picture is drawn from the tables that the pages have."""

import pytest

from benchmarks.frontier import draw, points

PAGE = """# Results

## Some bits

| | UNet file, kB | score | PSNR, dB |
|---|---|---|---|
| full precision | 5711 | 0.855 (0.827 to 0.883) | |
| **calibrated, seed 0** | **1,002** | **0.610** (0.575 to 0.645) | 21.86 |
| control: full precision, trained | 5711 | 0.886 | 31.41 |

### Beside others

| | seeds | UNet file, kB | score | CLIP score | PSNR, dB |
|---|---|---|---|---|---|
| SDNQ uint2 | 1 | 3287 | 0.762 (0.730 to 0.792) | 52.5 | 21.19 |

## More bits

| by bits | UNet file, kB | score | PSNR, dB |
|---|---|---|---|
| uniform 4 | 1402 | 0.858 (0.832 to 0.887) | 29.39 |
"""


def test_points_are_the_rows_below_the_heading(tmp_path):
    page = tmp_path / "page.md"
    page.write_text(PAGE)
    testbed, found = points(f"shapes={page}#Some bits")
    assert testbed == "shapes"
    assert [(point.method, point.size, point.score, point.psnr) for point in found] == [
        ("full precision", 5711, (0.855, 0.827, 0.883), None),
        ("calibrated", 1002, (0.610, 0.575, 0.645), 21.86),
        ("SDNQ", 3287, (0.762, 0.730, 0.792), 21.19),
    ]


def test_the_picture_has_every_method_and_is_small(tmp_path):
    page, out = tmp_path / "page.md", tmp_path / "frontier.svg"
    page.write_text(PAGE)
    assert [point.size for point in points(f"shapes={page}#More bits")[1]] == [1402]
    draw([f"shapes={page}#Some bits", f"shapes={page}#More bits"], out)
    assert 0 < out.stat().st_size < 1_000_000


def test_a_heading_that_is_not_there_is_refused(tmp_path):
    page = tmp_path / "page.md"
    page.write_text(PAGE)
    with pytest.raises(ValueError, match="0 headings begin with 'Fewer bits'"):
        points(f"shapes={page}#Fewer bits")
