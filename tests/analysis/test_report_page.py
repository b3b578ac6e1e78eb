"""The page of an analysis: complete, on its own, and without what was not measured."""

from __future__ import annotations

import base64
import re
import xml.etree.ElementTree as ElementTree
from dataclasses import replace

import pytest

pytest.importorskip("matplotlib")

from diffusers_bitsfusion.analysis import plots as figures
from diffusers_bitsfusion.analysis.allocate import RULES
from diffusers_bitsfusion.analysis.report_page import write_report
from diffusers_bitsfusion.analysis.results import Analysis

from .conftest import DEAD


@pytest.fixture(scope="module")
def page(full, estimates, tmp_path_factory) -> str:
    path = tmp_path_factory.mktemp("report") / "report.html"
    write_report(full, path, estimates=list(estimates.values()))
    return path.read_text(encoding="utf-8")


def test_it_needs_no_other_file_and_no_network(page):
    assert not re.findall(r'(?:src|href)=(?!"data:)', page) and "<script" not in page
    pictures = re.findall(r'src="data:image/svg\+xml;base64,([^"]+)"', page)
    assert len(pictures) == 5
    for picture in pictures:
        assert ElementTree.fromstring(base64.b64decode(picture)).tag.endswith("svg")


def test_it_shows_layers_rules_and_how_other_methods_rank_them(full, estimates, page):
    worst = max(full.sensitivity(1), key=full.sensitivity(1).get)
    assert f"<td>{worst}</td>" in page and all(f"<td>{rule}</td>" in page for rule in RULES)
    assert all(f"<td>{method}</td>" in page for method in estimates)
    assert "24 layers" in page and "prompts 3" in page


def test_every_point_of_the_first_picture_names_its_layer(full, page):
    first = re.findall(r'<embed title="Sensitivity[^>]*src="data:image/svg\+xml;base64,([^"]+)"', page)
    svg = "{http://www.w3.org/2000/svg}"
    titles = [each.text for each in ElementTree.fromstring(base64.b64decode(first[0])).iter(f"{svg}title")]
    expected = {
        f"{name}, n = {n}: {full.sensitivity(n)[name]:.3g}" for n in full.header.bits for name in full.header.layers
    }
    dead = {title for title in expected if title.endswith(": 0")}
    assert set(titles) == expected - dead and len(titles) == len(expected - dead) > 50


def test_pictures_are_described_and_fit_a_phone(page):
    assert len(re.findall(r'(?:alt|<embed title)="\w[^"]+"', page)) == 5 and 'alt=""' not in page
    assert "width=device-width" in page and "bitsfusion allocate . --target-bits" in page


def test_the_mid_block_stands_between_down_and_up(full):
    names = figures.execution_order(["down_blocks.0.a", "up_blocks.0.a", "mid_block.a", "x", "down_blocks.1.a"])
    assert names == ["x", "down_blocks.0.a", "down_blocks.1.a", "mid_block.a", "up_blocks.0.a"]


def test_the_same_analysis_gives_the_same_page(full, estimates, page, tmp_path):
    write_report(full, tmp_path / "again.html", estimates=list(estimates.values()))
    assert (tmp_path / "again.html").read_text() == page


def test_an_estimate_has_a_page_too_and_names_are_escaped(estimates, tmp_path):
    header = replace(estimates["weight"].header, model={"class": "<b>", "fingerprint": "0"})
    write_report(Analysis(header, estimates["weight"].records), tmp_path / "page.html")
    page = (tmp_path / "page.html").read_text()
    assert "weight method" in page and "&lt;b&gt;" in page and "<b>" not in page


@pytest.mark.parametrize(
    ("layer", "kind", "block"),
    [
        (DEAD, "attn2.to_out", "mid"),
        ("down_blocks.0.resnets.1.conv1", "conv1", "down 0"),
        ("up_blocks.2.attentions.0.transformer_blocks.0.ff.net.0.proj", "ff.net.proj", "up 2"),
        ("up_blocks.2.upsamplers.0.conv", "upsamplers.conv", "up 2"),
        ("transformer_blocks.11.attn1.to_q", "attn1.to_q", "transformer"),
    ],
)
def test_layers_are_sorted_by_what_they_do_and_where_they_are(layer, kind, block):
    assert (figures.kind_of(layer), figures.block_of(layer)) == (kind, block)
