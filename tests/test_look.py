"""The page shows what is in a set, the worst first, and stands alone."""

import re
from html.parser import HTMLParser

import pytest
import torch
from test_quality import rolled
from test_shards import META, flip

from data_tools import figures
from data_tools.look import look
from data_tools.stats import Spread
from v4e.data.shards import Index, ShardWriter, index_path
from v4e.nouns import Clip


class Grey:
    """A codec that decodes to as many frames as the grid says, all grey."""

    def decode(self, z_BCthw: torch.Tensor) -> list[Clip]:
        frames = (z_BCthw.shape[2] - 1) * 4 + 1
        return [Clip(torch.full((frames, 3, 16, 16), 128, dtype=torch.uint8)) for _ in z_BCthw]


@pytest.fixture
def folder(tmp_path):
    with ShardWriter(tmp_path / "set", META, samples_per_shard=4) as writer:
        for n in range(8):
            writer.add(rolled(n, 0.1 * (8 - n), task=("add", "style<b>")[n % 2]))
    return tmp_path / "set"


class Reader(HTMLParser):
    """What a browser would see: tags that are closed in their order, texts, and everything with an address."""

    VOID = {"meta", "img", "input", "rect", "line", "circle", "br"}
    OPTIONAL = {"li", "tr", "td"}

    def __init__(self, page: str) -> None:
        super().__init__()
        self.open, self.texts, self.addresses, self.wrong = list[str](), list[str](), list[str](), list[str]()
        self.feed(page)

    def handle_starttag(self, tag, attrs):
        self.addresses += [v for k, v in attrs if k in ("src", "href", "action", "data", "srcset", "style")]
        if tag not in self.VOID | self.OPTIONAL:
            self.open.append(tag)

    def handle_endtag(self, tag):
        if tag not in self.VOID and (not self.open or self.open.pop() != tag):
            self.wrong.append(tag)

    def handle_data(self, data):
        self.texts.append(data)


def test_the_page_stands_alone(folder, tmp_path):
    page = look(folder, tmp_path / "deep" / "page.html", codec=Grey(), rows=4).read_text()
    reader = Reader(page)
    assert reader.open == [] and reader.wrong == []
    assert reader.addresses and all(a.startswith("data:image/png;base64,") for a in reader.addresses)
    assert not re.search(r"<script|<link|http|url\(|@import|\son\w+=", page)
    assert "style<b>" not in page and "style&lt;b&gt;" in page and "größer" in page


def test_the_worst_come_first(folder, tmp_path):
    page = look(folder, tmp_path / "page.html", codec=Grey(), rows=4).read_text()
    keys = re.findall(r"<code>(s\d+)</code>", page)
    assert keys[:2] == ["s0000", "s0001"] and len(keys) == len(set(keys)) == 4
    captions = re.findall(r"<figcaption>([^<]*)</figcaption>", page.partition("</section>")[0])
    assert captions[0] == "source" and captions[1:6] == [f"frame {n}" for n in (0, 2, 4, 6, 8)]
    assert captions[6] == "target" and captions[7] == "at noise 1.00" and captions[-1] == "roll-out&#x27;s end"


def test_each_task_can_be_chosen_without_a_script(folder, tmp_path):
    page = look(folder, tmp_path / "page.html", rows=8).read_text()
    chosen = re.findall(r"<input type=radio name=task id=([\w-]+)", page)
    assert chosen[0] == "every" and len(chosen) == 1 + 1 + 2  # all, families, tasks; "style<b>" is of none
    for code in chosen[1:]:
        assert f"body:has(#{code}:checked) section:not(.{code})," in page
        assert re.search(rf"<section class='[^']*\b{code}\b", page)


def test_a_damaged_sample_does_not_hide(folder, tmp_path):
    row = Index(index_path(folder / "000-000001.tar")).member(0, "rollout.safetensors")
    flip(folder / "000-000001.tar", row.offset + 60)
    page = look(folder, tmp_path / "page.html").read_text()
    assert "1 could not be read" in page and "key s0004" in page


def test_bars_and_histograms_are_to_scale():
    bars = figures.counts([("add", 40, "spatial"), ("tone", 10, "temporal")])
    wide = [float(w) for w in re.findall(r'<rect [^>]*width="([\d.]+)"', bars)]
    assert wide[0] == pytest.approx(4 * wide[1], abs=0.2) and 'class="temporal"' in bars
    values = [0.0] * 3 + [10.0] * 1
    drawn = figures.distribution(values, [[("add", Spread.of(values), "spatial")]], [0.0])
    tall = [float(h) for h in re.findall(r'class="bar"[^>]*height="([\d.]+)"', drawn)]
    assert tall == [pytest.approx(figures.HIGH), pytest.approx(figures.HIGH / 3, abs=0.1)]
    assert drawn.count('class="mark"') == 1 and "median 0" in drawn


def test_families_stand_above_tasks_and_apart_from_them(folder, tmp_path):
    page = look(folder, tmp_path / "page.html").read_text()
    (fidelity,) = re.findall(r"<h3>Fidelity, dB</h3>.*?</svg>", page)
    rows = re.findall(r'<text class="name" x="[\d.]+" y="([\d.]+)">([^<]+)</text>', fidelity)
    assert [name for _, name in rows] == ["spatial", "add", "style&lt;b&gt;"]
    first, second, third = (float(y) for y, _ in rows)
    assert (second - first, third - second) == (figures.ROW + figures.GAP, figures.ROW)


def test_equal_values_have_an_axis_too():
    assert figures.distribution([1.0, 1.0], [], []).count('class="tick"') >= 2
