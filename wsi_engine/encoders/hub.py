"""The Hugging Face hub: find a published file of weights in the local cache, or download it, or fail at once."""

from __future__ import annotations

import threading
import urllib.error
import urllib.request
from pathlib import Path

from huggingface_hub import constants, hf_hub_download, try_to_load_from_cache
from huggingface_hub.errors import (
    EntryNotFoundError,
    GatedRepoError,
    LocalEntryNotFoundError,
    RepositoryNotFoundError,
)

from wsi_engine.encoders.base import EncoderCard
from wsi_engine.errors import WeightsError, first_line

FILENAMES = ("model.safetensors", "pytorch_model.bin")
"""Names under which weights are published, the preferred first."""

PROBE_SECONDS = 4.0
"""How long the hub may take to answer before it counts as unreachable; downloads themselves may take hours."""


def fetch_weights(card: EncoderCard) -> Path:
    """Path of the published weights of ``card``, downloaded into the hub's cache where they are not there yet.

    A cached file is taken as it is, without asking the hub for a newer one.

    Raises:
        WeightsError: the hub cannot be reached, asks for a licence to be accepted, or has no such file.
    """
    if not card.source:
        raise WeightsError(f"encoder {card.name!r} has no published weights; {ways_out(card)}")
    return _find_cached(card.source) or _download(card)


def ways_out(card: EncoderCard) -> str:
    """What to do without weights: the second half of a sentence."""
    online = "go online"
    if card.gated:
        online += f", accept the licence at https://huggingface.co/{card.source} and run `hf auth login`"
    return (
        f"{online}, or give a file with `--weights FILE`, or `--weights random:0` for a smoke test, "
        "or use `--encoder texture`, which needs no weights"
    )


def hub_answers(timeout: float = PROBE_SECONDS) -> bool:
    """Whether the hub answers at all within ``timeout`` seconds, name look-up included.

    The hub's client retries for most of a minute where there is no network; this asks once.
    """
    if constants.HF_HUB_OFFLINE:
        return False
    answered = threading.Event()
    url = constants.ENDPOINT

    def ask() -> None:
        try:
            with urllib.request.urlopen(urllib.request.Request(url, method="HEAD"), timeout=timeout):
                answered.set()
        except urllib.error.HTTPError:
            answered.set()
        except (OSError, ValueError):
            return

    asking = threading.Thread(target=ask, name="hub-probe", daemon=True)
    asking.start()
    asking.join(timeout)
    return answered.is_set()


def _find_cached(repository: str) -> Path | None:
    """The newest cached file of weights of a repository, or None."""
    for filename in FILENAMES:
        found = try_to_load_from_cache(repository, filename)
        if isinstance(found, str):
            return Path(found)
    return None


def _download(card: EncoderCard) -> Path:
    """Download the first of :data:`FILENAMES` that the repository holds."""
    missing = f"no weights for encoder {card.name!r}: "
    if not hub_answers():
        raise WeightsError(
            f"{missing}{constants.ENDPOINT} cannot be reached and {card.source} is not in the local cache; "
            f"{ways_out(card)}"
        )
    for filename in FILENAMES:
        try:
            return Path(hf_hub_download(card.source, filename))
        except (GatedRepoError, RepositoryNotFoundError) as error:
            raise WeightsError(
                f"{missing}{card.source} is gated or private and access was refused; accept the licence at "
                f"https://huggingface.co/{card.source} and run `hf auth login`, or {ways_out(card)}"
            ) from error
        except LocalEntryNotFoundError as error:
            raise WeightsError(f"{missing}the download of {card.source} failed; {ways_out(card)}") from error
        except EntryNotFoundError:
            continue
        except Exception as error:
            raise WeightsError(
                f"{missing}the download of {card.source} failed ({first_line(error)}); {ways_out(card)}"
            ) from error
    raise WeightsError(f"{missing}{card.source} holds none of {', '.join(FILENAMES)}; {ways_out(card)}")
