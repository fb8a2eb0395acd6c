"""Whether what is on disk is whole: stores, training runs, and what killed processes left behind."""

from __future__ import annotations

from wsi_engine.integrity.folders import CheckProgress, check_stores
from wsi_engine.integrity.report import CheckReport, Finding

__all__ = ["CheckProgress", "CheckReport", "Finding", "check_stores"]
