"""Splits: no patient in two parts, every class in its share, the same whatever the order of the slides."""

from __future__ import annotations

import itertools
from collections import Counter

import numpy as np
import pytest
from hypothesis import given as with_data
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st

from wsi_engine.cohorts.sites import share_sites
from wsi_engine.cohorts.splits import Fold, SplitSettings, split_patients
from wsi_engine.errors import InputError, SettingsError

Cohort = tuple[list[int], list[str]]


@st.composite
def cohorts(draw: st.DrawFn, least: int = 6) -> Cohort:
    """Labels and patients: 2–4 classes of at least ``least`` patients, 1–3 slides each, in any order."""
    slides = []
    for label in range(draw(st.integers(2, 4))):
        for number in range(draw(st.integers(least, 15))):
            slides += [(label, f"p{label}-{number}")] * draw(st.integers(1, 3))
    shuffled = draw(st.permutations(slides))
    return [label for label, _ in shuffled], [patient for _, patient in shuffled]


def parts_of(fold: Fold) -> tuple[tuple[int, ...], ...]:
    return fold.train, fold.validation, fold.test


def patients_per_class(places: tuple[int, ...], labels: list[int], patients: list[str]) -> Counter[int]:
    return Counter(label for label, _ in {(labels[place], patients[place]) for place in places})


def assert_sound(folds: tuple[Fold, ...], labels: list[int], patients: list[str]) -> None:
    """Parts are disjoint in slides and patients, and hold every slide."""
    for fold in folds:
        assert sorted(itertools.chain(*parts_of(fold))) == list(range(len(labels)))
        people = [{patients[place] for place in part} for part in parts_of(fold)]
        assert not any(one & other for one, other in itertools.combinations(people, 2))
        assert all(part == tuple(sorted(part)) for part in parts_of(fold))
        assert {labels[place] for place in fold.train} == set(labels)


@with_data(cohorts(), st.integers(2, 6), st.integers(0, 5))
@hypothesis_settings(max_examples=60, deadline=None)
def test_k_fold(cohort: Cohort, n_folds: int, seed: int) -> None:
    labels, patients = cohort
    folds = split_patients(labels, patients, SplitSettings(folds=n_folds, seed=seed))
    assert len(folds) == n_folds
    assert_sound(folds, labels, patients)
    assert sorted(itertools.chain(*(fold.test for fold in folds))) == list(range(len(labels)))
    total = patients_per_class(tuple(range(len(labels))), labels, patients)
    tested = [patients_per_class(fold.test, labels, patients) for fold in folds]
    for label, number in total.items():
        assert {some[label] for some in tested} <= {number // n_folds, -(-number // n_folds)}
        for fold, some in zip(folds, tested, strict=True):
            validated = patients_per_class(fold.validation, labels, patients)[label]
            assert validated == max(1, min(int(0.15 * number + 0.5), number - some[label] - 1))
    sizes = [sum(some.values()) for some in tested]
    assert max(sizes) - min(sizes) <= 1


@with_data(cohorts(least=3), st.integers(0, 5))
@hypothesis_settings(max_examples=40, deadline=None)
def test_monte_carlo(cohort: Cohort, seed: int) -> None:
    labels, patients = cohort
    settings = SplitSettings("monte-carlo", folds=4, validation=0.1, test=0.3, seed=seed)
    folds = split_patients(labels, patients, settings)
    assert len(folds) == 4
    assert_sound(folds, labels, patients)
    total = patients_per_class(tuple(range(len(labels))), labels, patients)
    for fold, (label, number) in itertools.product(folds, total.items()):
        assert patients_per_class(fold.test, labels, patients)[label] == max(
            1, min(int(0.3 * number + 0.5), number - 2)
        )
        assert patients_per_class(fold.validation, labels, patients)[label] == max(1, int(0.1 * number + 0.5))
    longer = split_patients(labels, patients, SplitSettings("monte-carlo", 6, 0.1, 0.3, seed=seed))
    assert longer[:4] == folds  # each draw is its own


@with_data(cohorts(), st.randoms(use_true_random=False), st.sampled_from(["k-fold", "monte-carlo", "by site"]))
@hypothesis_settings(max_examples=40, deadline=None)
def test_the_order_of_the_slides_does_not_matter(cohort: Cohort, random: object, kind: str) -> None:
    labels, patients = cohort
    by_site = kind == "by site"
    settings = SplitSettings("k-fold" if by_site else kind, folds=3, by_site=by_site, seed=7)  # type: ignore[arg-type]
    sites = [f"s{patient[-1]}" for patient in patients]
    order = list(range(len(labels)))
    random.shuffle(order)  # type: ignore[attr-defined]
    first = split_patients(labels, patients, settings, sites)
    second = split_patients(
        [labels[at] for at in order], [patients[at] for at in order], settings, [sites[at] for at in order]
    )
    for one, other in zip(first, second, strict=True):
        for part, moved in zip(parts_of(one), parts_of(other), strict=True):
            assert {patients[at] for at in part} == {patients[order[at]] for at in moved}


def many_patients(numbers: tuple[int, ...] = (40, 25, 10)) -> Cohort:
    labels = [label for label, number in enumerate(numbers) for _ in range(number)]
    return labels, [f"p{at}" for at in range(len(labels))]


def test_the_seed_alone_decides() -> None:
    labels, patients = many_patients()
    draws = [split_patients(labels, patients, SplitSettings(seed=seed)) for seed in (0, 0, 1, 2)]
    assert draws[0] == draws[1]
    assert len({draw[0].test for draw in draws}) == 3
    assert split_patients(np.array(labels), patients, SplitSettings()) == draws[0]
    carlo = split_patients(labels, patients, SplitSettings("monte-carlo", folds=5))
    assert len({fold.test for fold in carlo}) == 5
    # the draw is fixed for good: it rests on SHA-256, not on a library's random numbers
    assert [patients[at] for at in draws[0][0].test[-3:]] == ["p63", "p69", "p74"]


def test_every_patient_is_drawn_as_often_as_another() -> None:
    labels, patients = many_patients((10, 10))
    drawn = Counter(
        at for seed in range(400) for at in split_patients(labels, patients, SplitSettings(seed=seed))[0].validation
    )
    expected = 400 * 4 / 20
    chi_square = sum((drawn[at] - expected) ** 2 / expected for at in range(20))
    assert chi_square < 50  # 19 degrees of freedom: exceeded by chance once in 7,000 times, and the draws are fixed


def test_balance_is_that_of_scikit_learn_or_better() -> None:
    from sklearn.model_selection import StratifiedGroupKFold

    rng = np.random.default_rng(3)
    labels, patients = [], []
    for at in range(97):
        label, slides = int(rng.choice(3, p=[0.6, 0.3, 0.1])), int(rng.integers(1, 4))
        labels += [label] * slides
        patients += [f"p{at}"] * slides

    def unevenness(tests: list[tuple[int, ...]]) -> float:
        counts = np.array([[patients_per_class(test, labels, patients)[c] for c in range(3)] for test in tests])
        return float((counts.std(axis=0) / counts.mean(axis=0)).sum())

    ours = [fold.test for fold in split_patients(labels, patients, SplitSettings())]
    theirs = StratifiedGroupKFold(5, shuffle=True, random_state=0).split(np.zeros(len(labels)), labels, patients)
    assert unevenness(ours) <= unevenness([tuple(test) for _, test in theirs]) + 1e-9
    slides = [len(test) for test in ours]
    assert max(slides) - min(slides) <= 8  # of 39 on average


def test_a_patient_of_several_classes_counts_as_one_of_the_rarest() -> None:
    labels, patients = many_patients((12, 6))
    labels += [0, 1] * 4  # four patients with a slide of either class
    patients += [f"m{at // 2}" for at in range(8)]
    folds = split_patients(labels, patients, SplitSettings(folds=5))
    assert_sound(folds, labels, patients)
    rare = {f"p{at}" for at in range(12, 18)} | {f"m{at}" for at in range(4)}
    assert [len({patients[at] for at in fold.test} & rare) for fold in folds] == [2] * 5


def test_small_classes() -> None:
    labels, patients = many_patients((9, 2))
    with pytest.raises(InputError, match="class 1 has 2 patients, fewer than the 3 folds: take fewer folds"):
        split_patients(labels, patients, SplitSettings(folds=3))
    with pytest.raises(InputError, match='class "rare" has 2 patients'):
        split_patients(labels, patients, SplitSettings(folds=3), classes=["common", "rare"])
    for fold in split_patients(labels, patients, SplitSettings(folds=2)):  # one to test on, one to train on
        assert [patients_per_class(part, labels, patients)[1] for part in parts_of(fold)] == [1, 0, 1]
    with pytest.raises(InputError, match="class 1 has 1 patient, fewer than the 2 parts"):
        split_patients([0, 0, 0, 1], list("abcd"), SplitSettings("monte-carlo"))
    with pytest.raises(InputError, match="fold 0 has no slide to validate on"):
        split_patients([0, 0, 1, 1], list("abcd"), SplitSettings(folds=2))


def test_nothing_to_split() -> None:
    with pytest.raises(InputError, match="there is no slide to split"):
        split_patients([], [], SplitSettings())
    with pytest.raises(InputError, match='all slides are of one class, "b"'):
        split_patients([1] * 9, [str(at) for at in range(9)], SplitSettings(), classes=["a", "b"])
    with pytest.raises(SettingsError, match="labels hold the class -1"):
        split_patients([-1, 0], ["a", "b"], SplitSettings())
    with pytest.raises(SettingsError, match="patients must have one value for each of the 2 labels, not 1"):
        split_patients([0, 1], ["a"], SplitSettings())
    for settings, name in ((SplitSettings(by_site=True), "sites"), (SplitSettings("column"), "given")):
        with pytest.raises(SettingsError, match=f"needs {name}"):
            split_patients(*many_patients(), settings)


COLUMN = SplitSettings("column")


def test_column() -> None:
    labels, patients = [0, 1, 0, 1, 0, 1, 0], list("abcdefg")
    says = ["train", "Train ", "val", "validation", "test", "TEST", None]
    assert split_patients(labels, patients, COLUMN, given=says) == (Fold((0, 1), (2, 3), (4, 5)),)
    untested = split_patients(labels, patients, COLUMN, given=["train", "train", "val", *[None] * 4])
    assert untested == (Fold((0, 1), (2,), ()),)


@pytest.mark.parametrize(
    ("says", "message"),
    [
        (["train", "train", "val", "tets"], r'column "split" has unknown values \(tets\): write train, val or test'),
        (["train", "val", "val", "test"], r'1 patient in several parts of column "split" \(a: train, val\)'),
        (["train", "train", "test", "test"], 'column "split" names no slide val'),
        (["val", "val", "train", "test"], "fold 0 has no slide of class 0 to train on"),
    ],
)
def test_a_column_that_cannot_be_used(says: list[str | None], message: str) -> None:
    with pytest.raises(InputError, match=message):
        split_patients([0, 0, 1, 1], ["a", "a", "b", "c"], COLUMN, given=says)


def make_sites(n_sites: int, seed: int, size: int = 12) -> tuple[list[int], list[str], list[str]]:
    """Sites of different size and with different shares of two classes."""
    rng = np.random.default_rng(seed)
    labels, patients, sites = [], [], []
    for site in range(n_sites):
        share = rng.uniform(0.2, 0.8)
        for at in range(int(rng.integers(3, size))):
            labels.append(int(at >= 2 and rng.random() < share) if at != 1 else 1)
            patients.append(f"{site}-{at}")
            sites.append(f"site{site:02}")
    return labels, patients, sites


@pytest.mark.parametrize("kind", ["k-fold", "monte-carlo"])
@pytest.mark.parametrize(("n_sites", "seed"), [(3, 0), (5, 1), (12, 2), (30, 3)])
def test_sites_stay_whole(kind: str, n_sites: int, seed: int) -> None:
    labels, patients, sites = make_sites(n_sites, seed)
    settings = SplitSettings(kind, folds=3, by_site=True, seed=seed)  # type: ignore[arg-type]
    folds = split_patients(labels, patients, settings, sites)
    assert_sound(folds, labels, patients)
    for fold in folds:
        there = [{sites[place] for place in part} for part in parts_of(fold)]
        assert all(there)
        assert not any(one & other for one, other in itertools.combinations(there, 2))
        for part, share in ((fold.validation, 0.15), (fold.test, 1 / 3 if kind == "k-fold" else 0.2)):
            got = len(part) / len(labels)
            assert n_sites < 12 or abs(got - share) < 0.06
    if kind == "k-fold":
        assert sorted(itertools.chain(*(fold.test for fold in folds))) == list(range(len(labels)))


def test_sites_are_shared_out_as_well_as_every_way_of_doing_it() -> None:
    """Against all 3^7 ways, with the measure that counts: unevenness where no part lacks a class."""
    for seed in range(12):
        rng = np.random.default_rng(seed)
        counts = rng.integers(1, 20, (7, 2))
        shares = np.array([[1 / 3] * 3, [0.65, 0.15, 0.2]][seed % 2])

        def unevenness(parts: np.ndarray, counts: np.ndarray = counts, shares: np.ndarray = shares) -> float:
            sums = np.array([counts[parts == part].sum(axis=0) for part in range(3)])
            if not sums.all():
                return np.inf
            return float(np.square(sums / counts.sum(axis=0) - shares[:, None]).sum())

        every = [unevenness(np.array(parts)) for parts in itertools.product(range(3), repeat=7)]
        orders = [rng.permutation(7).tolist() for _ in range(8)]
        got = unevenness(share_sites(counts, shares.tolist(), orders))
        assert got <= min(every) + 1e-12


def test_no_fold_is_without_a_site() -> None:
    """Sites of one class each: a part of two, beside one with nobody, lacks no more classes than two of one."""
    counts = np.array([[5, 0], [0, 5], [1, 1]])
    for order in itertools.permutations(range(3)):
        assert sorted(share_sites(counts, [1 / 3] * 3, [order])) == [0, 1, 2]


def test_a_class_at_two_sites_is_trained_on_in_every_fold() -> None:
    labels, patients, sites = [], [], []
    for site in range(6):
        for at in range(8):
            labels.append(int(site < 2 and at < 4))
            patients.append(f"{site}-{at}")
            sites.append(f"s{site}")
    folds = split_patients(labels, patients, SplitSettings(folds=3, by_site=True), sites)
    for fold in folds:
        assert any(labels[place] for place in fold.train)
    one_site = [int(site == "s0" and label) for site, label in zip(sites, labels, strict=True)]
    with pytest.raises(InputError, match=r"fold \d has no slide of class 1 to train on"):
        split_patients(one_site, patients, SplitSettings(folds=3, by_site=True), sites)


def test_sites_that_cannot_be_used() -> None:
    labels, patients, sites = make_sites(4, 0)
    settings = SplitSettings(folds=5, by_site=True)
    with pytest.raises(
        InputError, match=r"4 sites where a split by site needs 5.* \(site00; site01; site02 and 1 more\)"
    ):
        split_patients(labels, patients, settings, sites)
    two = [f"s{at % 2}" for at in range(len(labels))]
    with pytest.raises(InputError, match="2 sites where a split by site needs 3"):
        split_patients(labels, patients, SplitSettings(folds=2, by_site=True), two)
    twice = [*patients[:-1], patients[0]]
    with pytest.raises(InputError, match=r"1 patient at several sites \(0-0: site00, site03\)"):
        split_patients(labels, twice, settings, sites)
    with pytest.raises(InputError, match=r"1 patient without a site \(0-0\)"):
        split_patients(labels, patients, settings, ["", *sites[1:]])


def test_repeated_draws_by_site_differ() -> None:
    labels, patients, sites = make_sites(20, 5)
    folds = split_patients(labels, patients, SplitSettings("monte-carlo", folds=6, by_site=True), sites)
    assert len({fold.test for fold in folds}) > 3


@pytest.mark.parametrize(
    ("asked", "message"),
    [
        ({"kind": "loo"}, "a split is k-fold, monte-carlo, column, not 'loo'"),
        ({"folds": 1}, "a k-fold split needs at least 2 folds, not 1"),
        ({"kind": "monte-carlo", "folds": 0}, "needs at least 1 fold, not 0"),
        ({"validation": 0.0}, "between 0 and 1, not 0.0 and 0.2"),
        ({"test": float("nan")}, "between 0 and 1"),
        ({"folds": 2, "validation": 0.5}, "nothing is left to train on"),
        ({"kind": "monte-carlo", "validation": 0.5, "test": 0.5}, "nothing is left to train on"),
        ({"kind": "column", "by_site": True}, "by_site has no meaning"),
        ({"seed": -1}, "must not be negative"),
    ],
)
def test_settings_out_of_range(asked: dict[str, object], message: str) -> None:
    with pytest.raises(SettingsError, match=message):
        SplitSettings(**asked)  # type: ignore[arg-type]
