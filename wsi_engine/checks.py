"""Checks that settings share: each refuses a value with one sentence that names the setting."""

from __future__ import annotations

import math

from wsi_engine.errors import SettingsError


def check_count(name: str, value: object, least: int, most: int | None = None) -> None:
    """Refuse anything but a whole number of at least ``least``, and at most ``most`` where it is given."""
    whole = isinstance(value, int) and not isinstance(value, bool)
    if not whole or value < least or (most is not None and value > most):  # type: ignore[operator]
        span = f"of at least {least}" if most is None else f"from {least} to {most}"
        raise SettingsError(f"{name} must be a whole number {span}, not {value!r}")


def check_number(name: str, value: object, above: bool = False) -> None:
    """Refuse anything but a finite number of at least 0; with ``above`` 0 itself too."""
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
        raise SettingsError(f"{name} must be a number, not {value!r}")
    if value < 0 or (above and value == 0):
        raise SettingsError(f"{name} must be {'above 0' if above else 'at least 0'}, not {value!r}")


def check_choice(name: str, value: object, choices: tuple[str, ...]) -> None:
    """Refuse anything but one of ``choices``."""
    if value not in choices:
        raise SettingsError(f"{name} {value!r} is unknown; use one of {', '.join(choices)}")
