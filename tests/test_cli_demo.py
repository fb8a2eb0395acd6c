"""``wsi demo`` where the published weights can be fetched, and where they cannot."""

from __future__ import annotations

from pathlib import Path

import pytest

import wsi_engine.cli.demo as demo
from wsi_engine.errors import WeightsError


@pytest.mark.parametrize("offline", [False, True])
def test_resnet_is_loaded_once(
    offline: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    asked: list[str | None] = []

    def extract(path: str, out: Path, encoder: str, weights: str | None, slide_mpp: float | None) -> str:
        asked.append(weights)
        if offline and weights is None:
            raise WeightsError("no hub")
        return f"{path} {encoder} {weights} {slide_mpp}"

    monkeypatch.setattr(demo, "_extract", extract)
    monkeypatch.setattr("wsi_engine.encoders.create_encoder", None)  # not to be called beside the extraction
    report = demo._extract_resnet("a.svs", tmp_path, 0.5)
    assert report == f"a.svs resnet50 {'random:0' if offline else None} 0.5"
    assert asked == [None, "random:0"][: 1 + offline]
    assert ("cannot be fetched" in capsys.readouterr().err) == offline
