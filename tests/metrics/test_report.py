"""One structure, two forms; the sections are made of what the measures really return."""

import base64
import re
from html.parser import HTMLParser

import numpy as np
import pytest
import torch
from PIL import Image

from dldm_pipeline.data.phantom import simulate_subject
from dldm_pipeline.metrics.alignment import evaluate_alignment
from dldm_pipeline.metrics.features import FeatureExtractor
from dldm_pipeline.metrics.fidelity import evaluate_fidelity
from dldm_pipeline.metrics.images import Slices
from dldm_pipeline.metrics.report import (
    PAPER,
    SECOND,
    Picture,
    Section,
    Table,
    alignment_section,
    claims,
    disentanglement_section,
    fidelity_section,
    mean_scores,
    paper_section,
    plot_scores,
    plot_steps,
    show,
    steps_section,
    systems_sheet,
    to_html,
    to_markdown,
)

NAMES = ["T1", "WB"]


@pytest.fixture(scope="module")
def subjects() -> tuple[np.ndarray, np.ndarray]:
    """Thirty simulated subjects: images in [0, 1] and masks."""
    drawn = [simulate_subject((1, i), 48, NAMES) for i in range(30)]
    return np.stack([one.images for one in drawn]), np.stack([one.mask for one in drawn])


@pytest.fixture(scope="module")
def fidelity(subjects) -> dict[str, dict]:
    """The DLDM draws real subjects, StyleGAN2 blurred ones."""
    extractor = FeatureExtractor(
        "tiny", "blocks", 32, 64, lambda x: torch.nn.functional.avg_pool2d(x[:, :1] / 255, 4).flatten(1), "0" * 64
    )
    images = np.rint(subjects[0] * 255).astype(np.uint8)
    names = [f"s{i}" for i in range(30)]
    systems = {"DLDM": images[20:], "StyleGAN2": images[20:] // 2 + 40}
    return {
        name: evaluate_fidelity(
            Slices(images[:10], names[:10]), Slices(drawn), NAMES, extractor, Slices(images[10:20], names[10:20]),
            num_resamples=4, epochs=1, num_pairs=8, progress=False,
        )
        for name, drawn in systems.items()
    }  # fmt: skip


class Page(HTMLParser):
    """Reads a page: its cells, its links, and whether its tags are closed."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open, self.cells, self.links = [], [], []
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        self.links += [value for name, value in attrs if name in ("src", "href")]
        if tag not in ("html", "meta", "img"):
            self.open.append(tag)
        if tag in ("td", "th"):
            self.cells.append("")

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        if self.open and self.open[-1] in ("td", "th"):
            self.cells[-1] += data


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (None, "-"), (float("nan"), "-"), (3, "3"), ("a", "a"), (0.0, "0.000"), (1.23456, "1.235"), (0.98, "0.980"),
        (0.012345, "0.0123"), (-0.0005, "-0.0005"), (19.04, "19.040"),
    ],
)  # fmt: skip
def test_cells(value, text):
    assert show(value) == text


def test_both_forms_say_the_same(tmp_path):
    Image.new("L", (4, 3), 200).save(tmp_path / "picture.png")
    sections = [
        Section("A & B", ["Some `code` <here>."]),
        Section("Table", [Table(["", "x|y"], [["row", 1.5], ["a|b", None]], "What it means.")]),
        Section("Picture", [Picture(tmp_path / "picture.png", "Grey", "nothing but grey.")]),
    ]
    text = to_markdown("Report", sections, tmp_path)
    assert "# Report\n\n## A & B\n\nSome `code` <here>.\n" in text
    assert "What it means.\n\n|  | x|y |\n|---|---:|\n| row | 1.500 |\n| a\\|b | - |" in text
    assert "![Grey](picture.png)\n\nGrey: nothing but grey." in text
    page = to_html("Report", sections)
    assert "<h2>A &amp; B</h2>" in page and "<p>Some <code>code</code> &lt;here&gt;.</p>" in page
    read = Page(page)
    assert read.cells == ["", "x|y", "row", "1.500", "a|b", "-"] and read.open == []
    (link,) = read.links
    assert base64.b64decode(link.removeprefix("data:image/png;base64,")) == (tmp_path / "picture.png").read_bytes()


def test_the_papers_claims():
    paper = claims(PAPER)
    assert paper["frechet_ratio"] == pytest.approx(0.24, abs=0.002)
    assert paper["precision_gain"] == pytest.approx(0.23437) and paper["recall_gain"] == pytest.approx(0.27792)
    own = {"frechet_distance": 2.0, "precision": 0.9, "recall": 0.8}
    floor = {"frechet_distance": 1.0, "precision": 0.95, "recall": 1.0}
    assert claims({"DLDM": own, SECOND: floor}) == {"precision_share": 0.9 / 0.95, "recall_share": 0.8}


def test_the_papers_table_and_the_scores(fidelity, tmp_path):
    means = mean_scores(fidelity)
    assert list(means) == ["DLDM", "StyleGAN2", SECOND] and claims(means)["frechet_ratio"] < 1
    table, claimed = paper_section(fidelity).parts
    assert table.header[1:3] == ["paper: clean-FID", "ours: Fréchet distance (blocks)"]
    rows = {row[0]: row[1:] for row in table.rows}
    assert rows["DLDM"][0] == "0.00070" and rows["DLDM"][1] == means["DLDM"]["frechet_distance"]
    assert rows["StyleGAN2"][2] == "0.67771" and rows[SECOND][0] is None
    assert "no FID" in table.meaning and claimed.rows[0][1] == pytest.approx(0.239, abs=1e-3)

    plot_scores(fidelity, tmp_path / "scores.png")
    _, average, picture, each = fidelity_section(fidelity, {"scores": tmp_path / "scores.png"}).parts
    assert average.header == ["", "DLDM", "StyleGAN2", SECOND, "best"] and len(average.rows) == 8
    assert re.fullmatch(r"\S+ \[\S+, \S+\]", average.rows[0][1])
    assert average.rows[6][-1] == fidelity["DLDM"]["diversity_real"]["mean"]
    assert len(each.rows) == 8 * 3 and each.header == ["", *NAMES, "mean"]
    assert each.rows[1][1] == fidelity["StyleGAN2"]["scores"]["frechet_distance"]["T1"]["value"]
    assert len(np.unique(np.asarray(Image.open(picture.path).convert("RGB")).reshape(-1, 3), axis=0)) > 8


def test_alignment_shows_every_measure_there_is(subjects):
    images, masks = subjects
    real = evaluate_alignment(images[:10], masks[:10], NAMES, progress=False)
    other = evaluate_alignment(images[10:20], masks[10:20], NAMES, reference=real, progress=False)
    unmasked = np.zeros(10, dtype=bool)
    without = evaluate_alignment(images[20:], masks[20:], NAMES, has_mask=unmasked, reference=real, progress=False)
    section = alignment_section({"validation": real, "DLDM": other, "plain LDM": without}, {})
    tables = {table.header[0]: table for table in section.parts}
    assert {"Edges", "Mutual information", "Enhancement"} <= set(tables)
    rows = {row[0]: row[1:] for row in tables["Edges"].rows}
    assert rows["validation subjects"] == list(real["edge_correlation"].values())
    assert rows["reference: shuffled validation subjects"][0] < rows["DLDM"][0]
    assert re.fullmatch(r"[+-]\d+\.\d %", rows["DLDM, change"][0])
    assert show({row[0]: row[1] for row in tables["Enhancement"].rows}["plain LDM"]) == "-"
    # A measure that this file has never heard of.
    new = {name: one | {"new_measure": {"A": 1.0, "B": 3.0}} for name, one in (("validation", real), ("DLDM", other))}
    table = next(t for t in alignment_section(new, {}).parts if t.header[0] == "new measure")
    assert table.header == ["new measure", "A", "B", "mean"] and table.rows[0][-1] == 2.0


def test_disentanglement_left_out():
    assert disentanglement_section({"left_out": "too few"}).parts == ["Left out: too few"]


def test_steps(tmp_path):
    scores = dict(kernel_distance=0.1, precision=0.5, recall=0.6)
    entries = [
        {"num_inference_steps": n, "seconds_per_subject": 0.1 * n, "frechet_distance": 10.0 / n, **scores}
        for n in (5, 10)
    ]
    steps = {"num_subjects": 4, "entries": entries, "floor": {"frechet_distance": 0.5, **scores}}
    plot_steps(steps, tmp_path / "steps.png")
    table, picture = steps_section(steps, tmp_path / "steps.png").parts
    assert [row[:2] for row in table.rows] == [
        [5, 2.0],
        [10, 1.0],
        [SECOND, 0.5],
    ] and "On 4 subjects only" in table.meaning
    assert Image.open(picture.path).width >= 400
    plot_steps(steps | {"floor": None}, tmp_path / "alone.png")
    assert len(steps_section(steps | {"floor": None}, tmp_path / "alone.png").parts[0].rows) == 2


def test_sheet_of_systems(subjects, tmp_path):
    images = np.rint(subjects[0] * 255).astype(np.uint8)
    present = np.ones((30, 2), dtype=bool)
    present[0, 1] = False
    systems_sheet(images, present, {"DLDM": images[:5], "plain LDM": images[5:6]}, NAMES, tmp_path / "sheet.png")
    page = np.asarray(Image.open(tmp_path / "sheet.png").convert("L"), dtype=int)
    tile = 3 * 48  # enlarged to about 128
    assert page.shape[0] == pytest.approx(5 * tile, abs=60)  # two real, two DLDM, one plain LDM
    top = page.shape[0] - 5 * (tile + 3)
    assert page[top : top + tile, -tile:].std() < 3 < page[top + tile + 6 : top + 2 * tile, -tile:].std()
