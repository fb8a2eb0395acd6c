"""Which features of a cohort's stores are taken, and what is wrong with them."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Sequence

from wsi_engine.cohorts.findings import Problem, count, list_some
from wsi_engine.cohorts.inventory import StoredFeatures, StoreFacts
from wsi_engine.cohorts.roster import Roster
from wsi_engine.places import Place
from wsi_engine.store import features_key


def choose_features(
    roster: Roster, facts: Sequence[StoreFacts], folder: Place, encoder: str | None, problems: list[Problem]
) -> list[StoredFeatures | None]:
    """The features of each slide of a roster, None where there are none; what is wrong is added to ``problems``.

    Args:
        roster: N slides.
        facts: what the store of each holds, (N,).
        folder: where the stores are, for messages.
        encoder: whose features; None for the only ones there are.
        problems: filled.
    """
    if not folder.is_dir():
        cure = f"run wsi extract {_slides_of(roster)} -o {folder}, or name another folder"
        problems.append(Problem(f"there is no folder {folder}", cure=cure))
        return [None] * len(roster)
    key = features_key(encoder) if encoder else _find_encoder(facts, problems)
    named = encoder or key
    cure = f"run wsi extract {_slides_of(roster)} -o {folder}{f' --encoder {named}' if named else ''}"
    _report_stores(roster, facts, key, cure, problems)
    if key is None:
        return [None] * len(roster)
    chosen = [fact.complete.get(key) for fact in facts]
    _report_mixture(roster, chosen, problems)
    return chosen


def _find_encoder(facts: Sequence[StoreFacts], problems: list[Problem]) -> str | None:
    """The key of the only encoder there is; with several, a problem and None."""
    numbers = Counter(key for fact in facts for key in fact.complete)
    if len(numbers) < 2:
        return next(iter(numbers), None)
    held = tuple(f"{key}: {count(slides, 'slide')}" for key, slides in numbers.most_common())
    if any(len(fact.complete) > 1 for fact in facts):
        problems.append(Problem("the stores hold features of several encoders", held, "name one with --encoder"))
    else:
        problems.append(Problem("the encoders are mixed", held, "extract all slides with one of them"))
    return None


def _report_stores(
    roster: Roster, facts: Sequence[StoreFacts], key: str | None, cure: str, problems: list[Problem]
) -> None:
    """Slides that have no store, a store that is no good, or none of the features in it."""
    found: defaultdict[str, list[str]] = defaultdict(list)
    for row, fact in zip(roster, facts, strict=True):
        if not fact.exists:
            found["without a store"].append(row.slide_id)
        elif fact.fault:
            found["whose store cannot be used"].append(f"{row.slide_id}: {fact.fault}")
        elif key in fact.complete or (key is None and fact.complete):
            continue
        elif key in fact.partial or (key is None and fact.partial):
            found["whose features are not complete"].append(row.slide_id)
        else:
            held = f" (there: {list_some(sorted(fact.complete))})" if fact.complete else ""
            found[f"without features{f' of {key}' if key else ''}"].append(f"{row.slide_id}{held}")
    for kind, slides in found.items():
        # not "delete": another version's store may be worth keeping
        other = "extract them again, into another folder" if kind == "whose store cannot be used" else cure
        problems.append(Problem(f"{count(len(slides), 'slide')} {kind}", tuple(slides), other))


def _report_mixture(roster: Roster, chosen: Sequence[StoredFeatures | None], problems: list[Problem]) -> None:
    """Features of one encoder's name that are not of one kind."""
    kinds: defaultdict[tuple[object, ...], list[str]] = defaultdict(list)
    for row, features in zip(roster, chosen, strict=True):
        if features is not None:
            origin = features.origin
            kind = (origin.encoder, origin.dim, origin.weights_digest, origin.mpp, origin.tile_px)
            kinds[kind].append(row.slide_id)
    if len(kinds) < 2:
        return
    examples = []
    for (name, dim, digest, mpp, tile_px), slides in sorted(kinds.items(), key=lambda item: -len(item[1])):
        where = f"tiles of {tile_px} px at {mpp} mpp"
        made = f"{name}, {dim} numbers per tile, weights {str(digest)[:12]}…, {where}"
        examples.append(f"{count(len(slides), 'slide')}: {made} ({list_some(slides, 3)})")
    what = f"the features are of {len(kinds)} kinds"
    problems.append(Problem(what, tuple(examples), "extract all slides with the same weights at the same scale"))


def _slides_of(roster: Roster) -> str:
    """What to give to wsi extract: the cohort's CSV where it says where the slides are."""
    return roster.source if roster.source.endswith(".csv") and "slide" in roster.columns else "SLIDES"
