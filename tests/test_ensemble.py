"""The ensemble against plain loops: calibration, averaging, doubt, attention; and every refusal."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from scipy.special import softmax
from scipy.stats import entropy, spearmanr
from support_runs import make_card, make_origin, make_run

from wsi_engine.classification.ensemble import Ensemble, load_ensemble
from wsi_engine.classification.prediction import calibrate, measure_entropy
from wsi_engine.errors import ModelError, SettingsError
from wsi_engine.models import create_head, load_head, save_head
from wsi_engine.runs import RunFolder

DIM = 24
TEMPERATURES = (1.0, 1.7, 0.6)


def make_bag(tiles: int, dim: int = DIM, seed: int = 0) -> np.ndarray:
    return (3 * np.random.default_rng(seed).standard_normal((tiles, dim))).astype(np.float16)


def load(run: Path) -> Ensemble:
    return load_ensemble(run, "cpu", "fp32")


@pytest.mark.parametrize("head", ["clam_sb", "clam_mb", "abmil", "dsmil", "transmil", "mean"])
def test_prediction_equals_a_plain_loop_over_folds(tmp_path: Path, head: str) -> None:
    classes = ("a", "b", "c")
    run = make_run(tmp_path / "run", make_origin(DIM), head, classes, TEMPERATURES)
    bag = make_bag(101)
    found = load(run).predict(bag, "grid")
    folds, weights = [], []
    for fold, temperature in enumerate(TEMPERATURES):
        network = load_head(RunFolder(run).head_file(fold))
        with torch.inference_mode():
            output = network(torch.from_numpy(bag).float())
        p = network.probabilities(output.logits).double().numpy()
        folds.append(softmax(np.log(p / p.sum()) / temperature))
        weights.append(softmax(output.attention.double().numpy(), axis=0))
    mean = np.mean(folds, axis=0)
    doubt = entropy(mean) / np.log(3)
    assert np.abs(found.fold_probabilities - folds).max() < 1e-6
    assert np.abs(found.probabilities - mean).max() < 1e-6
    assert found.label == classes[int(mean.argmax())]
    assert found.entropy == pytest.approx(doubt, abs=1e-6)
    assert found.disagreement == pytest.approx(doubt - np.mean([entropy(p) / np.log(3) for p in folds]), abs=1e-6)
    assert 0 < found.disagreement < found.entropy < 1
    assert found.attention.shape == (101, 3 if head in ("clam_mb", "dsmil") else 1)
    assert found.attention.dtype == np.float32
    assert np.abs(found.attention - np.mean(weights, axis=0)).max() < 1e-6
    assert found.attention.sum(axis=0) == pytest.approx(1, abs=1e-5)
    assert found.map_shown == (found.predicted if found.attention.shape[1] == 3 else 0)
    assert (found.grid_digest, found.model_digest) == ("grid", load(run).digest)


def test_a_bag_in_chunks_gives_the_same(tmp_path: Path) -> None:
    model = load(make_run(tmp_path / "run", make_origin(DIM)))
    bag = make_bag(3000)
    whole = model.predict(bag)
    for fold in model._folds:
        fold.head.chunk_tiles = 7
    chunked = model.predict(bag)
    assert np.abs(whole.probabilities - chunked.probabilities).max() < 1e-6
    assert np.abs(whole.attention - chunked.attention).max() < 1e-7


def test_float32_and_float16_features_of_equal_values_agree_and_are_left_alone(tmp_path: Path) -> None:
    model = load(make_run(tmp_path / "run", make_origin(DIM)))
    bag = make_bag(50)
    before = bag.copy()
    half, full = model.predict(bag), model.predict(bag.astype(np.float32))
    assert np.array_equal(half.probabilities, full.probabilities)
    assert np.array_equal(bag, before)
    bag.flags.writeable = False
    assert np.array_equal(model.predict(bag).attention, half.attention)
    fortran = np.asfortranarray(bag)
    assert np.array_equal(model.predict(fortran).attention, half.attention)


def test_one_head_is_an_ensemble_that_agrees_with_itself(tmp_path: Path) -> None:
    run = make_run(tmp_path / "run", make_origin(DIM))
    one = load(RunFolder(run).head_file(1))
    bag = make_bag(60)
    found = one.predict(bag)
    assert (one.folds, one.name) == (1, "head")
    assert found.disagreement == 0
    assert np.allclose(found.probabilities, load(run).predict(bag).fold_probabilities[1], atol=1e-12)
    assert one.digest != load(run).digest


def test_one_output_of_dsmil_stands_for_class_1_of_two(tmp_path: Path) -> None:
    torch.manual_seed(0)
    head = create_head("dsmil", DIM, 1).eval()
    file = tmp_path / "head.safetensors"
    save_head(head, file, make_card(make_origin(DIM), ("no", "yes"), 0, 1.0))
    bag = make_bag(40)
    with torch.inference_mode():
        expected = float(head(torch.from_numpy(bag).float()).logits.sigmoid()[0])
    found = load(file).predict(bag)
    assert found.probabilities == pytest.approx([1 - expected, expected], abs=1e-6)
    assert found.map_shown == 0


def test_calibration() -> None:
    p = np.array([0.7, 0.2, 0.1])
    assert calibrate(p, 1.0) == pytest.approx(p, abs=1e-12)
    assert calibrate(p, 2.0) == pytest.approx(np.sqrt(p) / np.sqrt(p).sum(), abs=1e-12)
    assert calibrate(np.array([0.9, 0.6]), 1.0) == pytest.approx([0.6, 0.4])  # sigmoids
    assert calibrate(np.array([1.0, 0.0]), 3.0) == pytest.approx([1, 0], abs=1e-12)
    assert calibrate(np.array([0.0, 0.0]), 1.0) == pytest.approx([0.5, 0.5])
    assert measure_entropy(np.array([0.5, 0.5])) == pytest.approx(1)
    assert measure_entropy(np.array([0.0, 1.0])) == 0
    assert measure_entropy(np.full(7, 1 / 7)) == pytest.approx(1)


@pytest.mark.parametrize("head", ["clam_sb", "clam_mb", "abmil"])
def test_bf16_stays_close_to_fp32(tmp_path: Path, head: str) -> None:
    from wsi_engine.encoders.precision import choose_precision

    if str(choose_precision("auto", torch.device("cpu"))) != "bf16":
        pytest.skip("this processor does not compute in bf16")
    run = make_run(tmp_path / "run", make_origin(256), head)
    bag = make_bag(2000, 256)
    exact, fast = load(run).predict(bag), load_ensemble(run, "cpu", "auto").predict(bag)
    assert np.abs(exact.probabilities - fast.probabilities).max() < 5e-3
    for a, b in zip(exact.attention.T, fast.attention.T, strict=True):
        assert a @ b / np.linalg.norm(a) / np.linalg.norm(b) > 0.9995
        assert spearmanr(a, b).statistic > 0.999
        assert len(np.unique(b)) > 1900  # bf16 itself would leave a few hundred different scores


def test_which_heads_are_lowered(tmp_path: Path) -> None:
    for head in ("dsmil", "transmil"):
        assert load_ensemble(make_run(tmp_path / head, make_origin(DIM), head), "cpu", "auto").precision == "fp32"
    with pytest.raises(SettingsError, match="not compiled"):
        load_ensemble(make_run(tmp_path / "run", make_origin(DIM)), "cpu", "bf16+compile")


@pytest.mark.parametrize("dtype", [np.float16, np.float32])
def test_features_that_are_not_finite_are_refused_by_tile(tmp_path: Path, dtype: type) -> None:
    model = load(make_run(tmp_path / "run", make_origin(DIM)))
    for bad in (np.nan, np.inf, -np.inf):
        bag = make_bag(2500).astype(dtype)
        bag[2100, 3] = bad
        with pytest.raises(ModelError, match=r"slide-7 are not finite \(tile 2100\)"):
            model.predict(bag, where="slide-7")
    if dtype is np.float32:
        large = np.full((3000, DIM), 3e36, np.float32)  # finite, though their sum is not
        assert np.isfinite(model.predict(large).probabilities).all()


def test_probabilities_that_are_not_finite_are_refused(tmp_path: Path) -> None:
    model = load(make_run(tmp_path / "run", make_origin(DIM), "mean"))
    model._folds[1].head.classifier.weight.fill_(10.0)
    with pytest.raises(ModelError, match=r"not finite for s2.*out of the range"):
        model.predict(np.full((3, DIM), 3e38, np.float32), where="s2")


def test_wrong_features_are_refused(tmp_path: Path) -> None:
    model = load(make_run(tmp_path / "run", make_origin(DIM)))
    with pytest.raises(ModelError, match="s1 has no tile"):
        model.predict(make_bag(0), where="s1")
    with pytest.raises(ModelError, match="25 numbers per tile and the model takes 24"):
        model.predict(make_bag(5, 25))
    with pytest.raises(ModelError, match="float16 or float32"):
        model.predict(make_bag(5).astype(np.float64))
    with pytest.raises(ModelError, match="float16 or float32"):
        model.predict(make_bag(5)[0])


def test_folds_that_do_not_agree_are_refused(tmp_path: Path) -> None:
    origin = make_origin(DIM)

    def run_with(name: str, second: Path) -> Path:
        run = make_run(tmp_path / name, origin)
        shutil.copy(RunFolder(second).head_file(1), RunFolder(run).head_file(1))
        return run

    cases = {
        "trained for the classes x, y": make_run(tmp_path / "a", origin, classes=("x", "y")),
        "mixes the heads abmil and clam_sb": make_run(tmp_path / "b", origin, "abmil"),
        "other weights": make_run(tmp_path / "c", replace(origin, weights_digest="b" * 64)),
        r"made-up \(32 numbers": make_run(tmp_path / "d", make_origin(32)),
        "at 1 mpp": make_run(tmp_path / "e", replace(origin, mpp=1.0)),
    }
    for number, (sentence, other) in enumerate(cases.items()):
        with pytest.raises(ModelError, match=sentence):
            load(run_with(f"run{number}", other))


def test_runs_that_cannot_be_used(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match="not a training run"):
        load(tmp_path)
    with pytest.raises(ModelError, match="no file of a head"):
        load(tmp_path / "none.safetensors")
    run = make_run(tmp_path / "run", make_origin(DIM))
    folder = RunFolder(run)
    folder.write_record(replace(folder.read_record(), complete=False))
    with pytest.raises(ModelError, match="not finished"):
        load(run)
    make_run(run, make_origin(DIM))
    folder.head_file(2).unlink()
    with pytest.raises(ModelError, match="no file of a head"):
        load(run)
    folder.head_file(2).write_bytes(b"{torn")
    with pytest.raises(ModelError, match="cannot be read"):
        load(run)
    bare = tmp_path / "bare.safetensors"
    save_head(create_head("mean", DIM, 2), bare)
    with pytest.raises(ModelError, match="does not tell which features"):
        load(bare)
    wrong = tmp_path / "wrong.safetensors"
    save_head(create_head("mean", DIM, 2), wrong, make_card(make_origin(DIM), ("a", "b", "c"), 0, 1.0))
    with pytest.raises(ModelError, match="2 classes, and its card says 24 and 3"):
        load(wrong)
    cold = tmp_path / "cold.safetensors"
    save_head(create_head("mean", DIM, 2), cold, make_card(make_origin(DIM), ("a", "b"), 0, -2.0))
    with pytest.raises(ModelError, match="temperature"):
        load(cold)


def test_the_digest_follows_heads_and_calibration(tmp_path: Path) -> None:
    run = make_run(tmp_path / "run", make_origin(DIM))
    same = shutil.copytree(run, tmp_path / "copy")
    assert load(run).digest == load(same).digest
    make_run(same, make_origin(DIM), temperatures=(1.0, 1.7, 0.61))
    assert load(run).digest != load(same).digest
    record = json.loads((run / "run.json").read_text())
    assert "digest" not in record  # it is of the files, not of a claim about them
