"""Checks of settings, made once, where a settings class is built."""

from __future__ import annotations

import math

from wsi_engine.models.heads.errors import HeadError


def check_count(name: str, value: object, least: int = 1) -> None:
    """Refuse anything but a whole number of at least ``least``."""
    if isinstance(value, bool) or not isinstance(value, int) or value < least:
        raise HeadError(f"{name} must be a whole number of at least {least}, not {value!r}")


def check_share(name: str, value: object, below_one: bool = False) -> None:
    """Refuse anything but a number from 0 to 1 (1 excluded with ``below_one``)."""
    number = isinstance(value, int | float) and not isinstance(value, bool)
    if not number or not math.isfinite(value) or not 0 <= value <= 1 or (below_one and value == 1):  # type: ignore[arg-type, operator]
        raise HeadError(f"{name} must be a number from 0 to {'below 1' if below_one else '1'}, not {value!r}")


def check_flag(name: str, value: object) -> None:
    """Refuse anything but True and False."""
    if not isinstance(value, bool):
        raise HeadError(f"{name} must be True or False, not {value!r}")


def check_widths(name: str, value: object) -> tuple[int, ...]:
    """Refuse anything but a list of whole numbers; gives a tuple, for a list is what JSON makes of one."""
    if not isinstance(value, list | tuple):
        raise HeadError(f"{name} must be a list of widths such as (512,), not {value!r}")
    for width in value:
        check_count(f"each of {name}", width)
    return tuple(value)
