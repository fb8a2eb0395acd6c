"""Numbers of heads: those of the published networks, and those of the formulas."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import pytest
import torch
from numpy.lib.npyio import NpzFile
from support_heads import assert_close, bag, small_head
from torch import Tensor

from wsi_engine.models import load_head
from wsi_engine.models.heads.nystrom import NystromAttention, pseudo_inverse
from wsi_engine.models.heads.pooling import SoftmaxPool
from wsi_engine.models.heads.smooth_svm import HARD_LEAD, SmoothTop1SVM, smooth_top1_svm_rows

CLAM = ("clam_sb_small_gated", "clam_sb_big_ungated_subtyping", "clam_mb_small_gated_subtyping")
DSMIL = ("dsmil_nonlinear", "dsmil_linear_query_passing_v")


@pytest.fixture(scope="module")
def golden(shared_data: Path) -> Path:
    folder = shared_data.parent / "golden"
    if not folder.is_dir():
        pytest.skip(f"needs the golden numbers in {folder}")
    return folder


def published_state(numbers: NpzFile) -> dict[str, Tensor]:
    state = {name[6:]: torch.from_numpy(numbers[name]) for name in numbers.files if name.startswith("param/")}
    return {name: value.float() if value.is_floating_point() else value for name, value in state.items()}


# the published numbers


@pytest.mark.parametrize("name", CLAM)
def test_clam_agrees_with_the_golden_numbers(golden: Path, name: str) -> None:
    numbers = np.load(golden / f"{name}.npz")
    training = {"subtyping": bool(numbers["meta/subtyping"]), "k": int(numbers["meta/k_sample"])}
    head = load_head(published_state(numbers), **training)
    assert head.options["size"] == str(numbers["meta/size"])
    assert head.options["gated"] == bool(numbers["meta/gated"])
    assert head.name == str(numbers["meta/kind"]).lower()
    output = head(torch.from_numpy(numbers["in/features"]))
    assert_close(output.logits, numbers["out/logits"][0])
    assert_close(head.probabilities(output.logits), numbers["out/probabilities"][0])
    assert_close(output.attention, numbers["out/attention_raw"].T)
    assert_close(output.embedding, numbers["out/bag_embedding"])
    for label in range(int(numbers["meta/n_classes"])):
        instance = head.instance_loss(output, label)
        assert_close(instance, numbers[f"out/instance_loss_label{label}"])
        bag_loss = -math.log(numbers["out/probabilities"][0, label])
        assert head.loss(output, label).item() == pytest.approx(0.7 * bag_loss + 0.3 * instance.item(), abs=1e-5)
        assert head.bag_loss(output, label).item() == pytest.approx(bag_loss, abs=1e-5)


@pytest.mark.parametrize("name", DSMIL)
def test_dsmil_agrees_with_the_golden_numbers(golden: Path, name: str) -> None:
    numbers = np.load(golden / f"{name}.npz")
    head = load_head(published_state(numbers))
    assert head.options["nonlinear"] == bool(numbers["meta/nonlinear"])
    assert head.options["passing_v"] == bool(numbers["meta/passing_v"])
    output = head(torch.from_numpy(numbers["in/features"]))
    assert_close(output.logits, numbers["out/bag_logits"][0])
    assert_close(output.instance_logits, numbers["out/instance_logits"])
    assert_close(output.weights(), numbers["out/attention"])
    assert_close(output.embedding, numbers["out/bag_embedding"][0])


def test_transmil_agrees_with_the_golden_numbers(golden: Path) -> None:
    numbers = np.load(golden / "transmil_odd_bag.npz")
    head = load_head(published_state(numbers))
    assert_close(head(torch.from_numpy(numbers["in/features"])).logits, numbers["out/logits"][0])


def test_smooth_svm_agrees_with_the_golden_numbers(golden: Path) -> None:
    numbers = np.load(golden / "smooth_top1_svm.npz")
    scores, labels = torch.from_numpy(numbers["in/scores"]), torch.from_numpy(numbers["in/labels"])
    lead = (scores.topk(2, dim=1).values.diff(dim=1).abs() >= HARD_LEAD).squeeze(1)
    assert 0 < int(lead.sum()) < len(lead)  # both forms are in the file
    assert_close(smooth_top1_svm_rows(scores, labels), numbers["out/loss_per_row"])
    assert_close(SmoothTop1SVM()(scores, labels), numbers["out/loss_mean"])


# oracles


def test_smooth_svm_against_a_plain_loop() -> None:
    alpha, tau = 0.7, 0.4
    scores = 3 * torch.randn(40, 5, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    labels = torch.arange(40) % 5
    wanted = []
    for row, label in zip(scores.tolist(), labels.tolist(), strict=True):
        margins = [x + (alpha if j != label else 0) - row[label] for j, x in enumerate(row)]
        first, second = sorted(row, reverse=True)[:2]
        hard = first - second >= tau * math.log(1000)
        wanted.append(max(margins) if hard else tau * math.log(sum(math.exp(m / tau) for m in margins)))
    assert_close(smooth_top1_svm_rows(scores, labels, alpha, tau), wanted, 1e-9)


def test_clam_losses_against_a_plain_loop() -> None:
    for name in ("clam_sb", "clam_mb"):
        head = small_head(name, subtyping=True, k=4)
        output, label = head(bag(30)), 2
        total = 0.0
        for c in range(3):
            order = output.attention[:, c if name == "clam_mb" else 0].argsort(descending=True).tolist()
            hidden = head.score_tiles(bag(30))[0]
            tiles = order[:4] + (order[-4:] if c == label else [])
            targets = torch.tensor([int(c == label)] * 4 + [0] * (len(tiles) - 4))
            logits = head.instance_classifiers[c](hidden[tiles])
            total += SmoothTop1SVM()(logits, targets).item() / 3
        assert head.instance_loss(output, label).item() == pytest.approx(total, abs=1e-5)


def test_abmil_against_the_formula() -> None:
    for gated in (False, True):
        head, features = small_head("abmil", hidden=(), attention=6, gated=gated), bag(9)
        state = head.state_dict()
        if gated:
            left = torch.tanh(features @ state["attention.attention_a.0.weight"].T)
            right = torch.sigmoid(features @ state["attention.attention_b.0.weight"].T)
            scores = (left * right) @ state["attention.attention_c.weight"].T
        else:
            left = torch.tanh(features @ state["attention.module.0.weight"].T)
            scores = left @ state["attention.module.3.weight"].T
        wanted = (scores.softmax(0) * features).sum(0)
        output = head(features)
        assert_close(output.embedding[0], wanted, 1e-5)
        assert_close(output.attention, scores, 1e-5)
        assert_close(output.logits, wanted @ state["classifier.weight"].T, 1e-5)


def test_mean_pools_evenly() -> None:
    head, features = small_head("mean"), bag(9)
    output = head(features)
    assert_close(output.embedding[0], features.mean(0), 1e-6)
    assert_close(output.weights(), np.full((9, 1), 1 / 9), 1e-7)


def test_nystrom_is_exact_attention_where_every_token_is_a_landmark() -> None:
    torch.manual_seed(0)
    attention = NystromAttention(dim=16, heads=2, landmarks=8, dropout=0.0).double().eval()
    tokens = torch.randn(8, 16, dtype=torch.float64)
    q, k, v = attention.to_qkv(tokens).reshape(8, 3, 2, 8).permute(1, 2, 0, 3)
    exact = (q @ k.mT / math.sqrt(8)).softmax(-1)
    wanted = attention.to_out((exact @ v + attention.res_conv(v[None])[0]).transpose(0, 1).flatten(1))
    got, paid = attention(tokens, watched=3)
    # six steps of the pseudo-inverse are not enough for equality: near is what the method promises
    assert float((paid - exact.mean(0)[3]).abs().max()) < 0.2
    assert float((got - wanted).abs().max()) < 0.2 * float(wanted.abs().max())
    assert float(paid.sum()) == pytest.approx(1, abs=0.05)


def test_the_pseudo_inverse_converges() -> None:
    matrices = torch.randn(3, 12, 12, generator=torch.Generator().manual_seed(0), dtype=torch.float64).softmax(-1)
    exact = torch.linalg.pinv(matrices)
    errors = [float((pseudo_inverse(matrices, steps) - exact).norm() / exact.norm()) for steps in (2, 6, 20)]
    assert errors[0] > errors[1] > errors[2]
    assert errors[2] < 1e-6


@pytest.mark.parametrize("tiles", [1, 2, 3, 4, 5, 10, 17])
def test_transmil_attention_is_that_of_the_matrices(tiles: int) -> None:
    """The class token's row of softmax·pinv·softmax, written out, with the shares of repeated tiles added up."""
    head, features = small_head("transmil"), bag(tiles)
    kept: dict[str, Tensor] = {}
    handle = head.layer2.norm.register_forward_hook(lambda *call: kept.update(tokens=call[2]))
    output = head(features)
    handle.remove()
    attention = head.layer2.attn
    tokens = kept["tokens"]
    filled = -len(tokens) % 16
    padded = torch.cat([tokens.new_zeros(filled, 32), tokens])
    q, k, _ = attention.to_qkv(padded).reshape(-1, 3, 4, 8).permute(1, 2, 0, 3)
    q = q / math.sqrt(8)
    q_marks, k_marks = (x.reshape(4, 16, -1, 8).mean(2) for x in (q, k))
    middle = pseudo_inverse((q_marks @ k_marks.mT).softmax(-1))
    whole = (q @ k_marks.mT).softmax(-1) @ middle @ (q_marks @ k.mT).softmax(-1)
    row = whole.mean(0)[filled, filled + 1 :]
    shares = row[:tiles].clone()
    shares[: len(row) - tiles] += row[tiles:]
    assert_close(output.attention.exp()[:, 0], shares.clamp_min(1e-12), 1e-5)


def test_softmax_pool_survives_huge_scores() -> None:
    scores = torch.tensor([[1e4, -1e4], [-1e4, 0.0], [1e4, 1e4], [3.0, 2.0]])
    values = torch.arange(8.0).reshape(4, 2)
    pool = SoftmaxPool()
    for i in range(4):
        pool.add(scores[i : i + 1], values[i : i + 1])
    assert_close(pool.mean(), scores.softmax(0).T @ values, 1e-5)
