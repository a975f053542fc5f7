"""The guides' examples run as printed. Beside the README's tests, so that two processes may share them."""

import re

import pytest

from tests.test_readme import ROOT, examples


def test_the_engine_guide_runs_as_printed(tmp_path, monkeypatch, capsys):
    (code,) = examples((ROOT / "docs" / "engine.md").read_text(encoding="utf-8"))
    monkeypatch.chdir(tmp_path)
    names = {"__name__": "guide"}
    exec(compile(code, "engine.md", "exec"), names)
    assert "True" in capsys.readouterr().out
    expected = names["engine"].explain(names["images"], 1).weights
    assert names["again"].explain(names["images"], 1).weights.equal(expected)


def test_the_guide_to_ones_own_model_runs_as_printed(tmp_path, monkeypatch, capsys):
    for package in ("timm", "transformers", "open_clip"):
        pytest.importorskip(package)
    text = (ROOT / "docs" / "own_model.md").read_text(encoding="utf-8")
    monkeypatch.chdir(tmp_path)
    names = {"__name__": "own_model"}
    for code in examples(text):
        exec(compile(code, "own_model.md", "exec"), names)
    explanation = names["explanation"]
    assert explanation.of == "texts"
    assert explanation.contributions.shape == (2, 2, 64, 64)
    assert float(explanation.completeness_error().max()) < 1e-4
    assert names["again"](names["images"]).shape == (2, 10)
    assert (tmp_path / "own.png").stat().st_size > 0
    for link in re.findall(r"\]\(([^)#]+)", text):
        assert (ROOT / "docs" / link).is_file(), link
