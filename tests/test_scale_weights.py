"""The built-in weights of scale attention: where they are, what they say of themselves, and that they find nuclei."""

from __future__ import annotations

import numpy as np

from wsi_engine.metrics.nuclei import aji, dice
from wsi_engine.models.scale_files import SCALE_FILE
from wsi_engine.nuclei.method import create_method
from wsi_engine.nuclei.scale_method import BUILTIN_WEIGHTS, ScaleMethod
from wsi_engine.nuclei.scale_settings import ScaleTrainingSettings
from wsi_engine.nuclei.segmentation import segment_nuclei
from wsi_engine.synthetic import SlideSpec, SyntheticSlide


def test_the_method_has_weights_of_its_own() -> None:
    method = create_method("scale-attention", device="cpu")
    assert isinstance(method, ScaleMethod)
    assert method.to_json() == ScaleMethod(BUILTIN_WEIGHTS, "cpu").to_json()
    assert method.reference is None  # no look to bring slides to
    assert method.network.settings.receptive_field == 167


def test_the_weights_say_how_they_were_made() -> None:
    card = SCALE_FILE.read_card(BUILTIN_WEIGHTS)
    recipe = card["training"]["settings"]
    assert set(recipe) == set(ScaleTrainingSettings().recipe())
    assert 0 < recipe["stain_epochs"] < recipe["epochs"] == card["epoch"]  # scales were learnt, to the end
    assert BUILTIN_WEIGHTS.stat().st_size < 2_000_000
    described = BUILTIN_WEIGHTS.with_suffix(".md").read_text(encoding="utf-8")
    assert "Apache-2.0" in described
    for option in ("stain_epochs", "epochs", "batches", "batch_size", "crop_px", "share"):
        value = recipe[option] if option != "share" else card["share"]
        assert f"--{option.replace('_', '-')} {value}" in described
    assert f"seed {recipe['seed']}" in described


def test_painted_nuclei_are_found() -> None:
    slide = SyntheticSlide(SlideSpec(width=1600, height=1200, mpp=0.25, coverage=1, seed=4))
    truth = slide.truth.labels(600, 400, 320, 320).astype(np.int32)
    found = segment_nuclei(slide.paint(600, 400, 320, 320), ScaleMethod(device="cpu", precision="fp32"), 0.25).labels()
    assert aji(truth, found) > 0.3
    assert dice(truth, found) > 0.6
