"""One store, part by part: what is complete must be whole, and fit the grid that it was made on."""

from __future__ import annotations

from typing import Any

from wsi_engine.errors import StoreError
from wsi_engine.extents import read_json
from wsi_engine.integrity.arrays import ArrayFiles, verify_array
from wsi_engine.integrity.report import Finding, Kind, PartReport
from wsi_engine.nuclei.instances import MEASUREMENTS
from wsi_engine.places import Place, list_files, list_folders, list_names
from wsi_engine.store import FeatureStore

_COLUMNS = ("offsets", "points", "centroid", "area_um2", "score", *MEASUREMENTS)

_AGAIN = {"features": "wsi extract", "attention": "wsi classify", "nuclei": "wsi nuclei"}
"""Which command makes a part of a store."""


def check_store(path: Place) -> PartReport:
    """Verify all files of a store, and that its parts fit together."""
    check = _StoreCheck(path)
    check.run()
    return PartReport(tuple(check.findings), check.files, check.bytes)


class _StoreCheck:
    """Goes through one store and keeps what it finds."""

    def __init__(self, path: Place) -> None:
        self._path = path
        self._grids: dict[str, tuple[str, int]] = {}
        self.findings: list[Finding] = []
        self.files = self.bytes = 0

    def run(self) -> None:
        """Everything, grids first."""
        if not self._open():
            return
        self._check_tissue()
        for folder in self._folders("tiles"):
            self._check_grid(folder)
        for folder in self._folders("features"):
            self._check_features(folder)
        for folder in self._folders("attention"):
            self._check_attention(folder)
        for folder in self._folders("nuclei"):
            self._check_nuclei(folder)

    def _open(self) -> bool:
        """Whether it is a store that can be looked at."""
        try:
            self._store = FeatureStore.open(self._path)
            _ = self._store.slide
        except StoreError as error:
            begun = all(name.endswith(".partial") for name in list_files(self._path))
            if begun:
                self._add("unfinished", self._path, "is a store that was only just begun", "run the same command again")
            else:
                self._add("damaged", self._path, f"cannot be used: {error}", "delete it and run wsi extract again")
            return False
        self._find_strays(self._path)
        return True

    def _check_tissue(self) -> None:
        folder = self._path / "tissue" / "mask"
        if not folder.is_dir():
            return
        self._find_strays(folder.parent)
        cure = f"delete {self._path} and run wsi extract again"
        attrs = self._read_array(folder, "digest", cure)
        if attrs is None:
            return
        try:
            tissue = self._store.tissue()
            whole = tissue is not None and tissue.digest == attrs["digest"]
        except StoreError as error:
            self._add("damaged", folder, str(error), cure)
            return
        if not whole:
            self._add("damaged", folder, "is not the mask that was stored (its digest differs)", cure)

    def _check_grid(self, folder: Place) -> None:
        origins, cure = folder / "origins", f"delete {self._path} and run wsi extract again"
        attrs = self._read_array(origins, "digest", cure)
        if attrs is None:
            return
        try:
            grid = self._store.grid(folder.name)
        except StoreError as error:
            self._add("damaged", origins, str(error), cure)
            return
        self._grids[folder.name] = grid.digest, len(grid)

    def _check_features(self, folder: Place) -> None:
        values, partial = folder / "values", folder / "partial"
        if self._attributes(values).get("complete") is True:
            self._read_on_grid(values)
            if partial.is_dir():
                self._add(
                    "leftover", partial, "is of features that are complete", "run wsi extract again, or delete it"
                )
            return
        if self._is_spoilt(values, self._cure(folder)):
            return
        torn = self._verify(partial, {}) if _metadata(partial) else None
        said = ""
        if torn:
            said = f": {torn.files - len(torn.problems)} batches are stored"
            said += f", and {len(torn.problems)} torn ones are made again" if torn.problems else ""
        self._add("unfinished", folder, f"is not complete{said}", "run wsi extract again to finish it")

    def _check_attention(self, folder: Place) -> None:
        values = folder / "values"
        if self._attributes(values).get("complete") is True:
            self._read_on_grid(values)
        elif not self._is_spoilt(values, self._cure(folder)):
            self._add("unfinished", folder, "is not complete", "run wsi classify again to finish it")

    def _check_nuclei(self, folder: Place) -> None:
        attrs = self._attributes(folder)
        if attrs.get("complete") is not True:
            if not self._is_spoilt(folder, self._cure(folder)):
                self._add("unfinished", folder, "is not complete", "run wsi nuclei again to finish it")
            return
        before, rows, cure = len(self.findings), attrs.get("count"), self._cure(folder)
        lengths = {}
        for column in _COLUMNS:
            metadata = _metadata(folder / column)
            if not metadata:
                self._add(
                    "damaged", folder / column, "is missing, or has no zarr.json that can be read", self._cure(folder)
                )
                continue
            self._report(folder / column, self._verify(folder / column, metadata), cure)
            lengths[column] = (metadata.get("shape") or [-1])[0]
        if len(self.findings) > before:
            return
        if not isinstance(rows, int):
            self._add("damaged", folder, "does not say how many nuclei it holds", cure)
            return
        wanted = dict.fromkeys(_COLUMNS, rows) | {"offsets": rows + 1, "points": lengths["points"]}
        try:
            last = int(self._store.read(f"nuclei/{folder.name}/offsets")[-1])
        except StoreError as error:
            self._add("damaged", folder / "offsets", str(error), cure)
            return
        if lengths != wanted or last != lengths["points"]:
            self._add("damaged", folder, "has columns whose lengths do not fit together", cure)

    def _read_on_grid(self, values: Place) -> None:
        """A complete array with a row for each tile."""
        cure = self._cure(values.parent)
        attrs = self._read_array(values, "complete", cure)
        if attrs is None:
            return
        grid = self._grids.get(str(attrs.get("grid")))
        if grid is None:
            what = f"was made on the grid {attrs.get('grid')}, which is not there or damaged"
            self._add("damaged", values, what, f"delete {self._path} and run wsi extract again")
        elif (attrs.get("grid_digest"), _metadata(values)["shape"][0]) != grid:
            self._add("damaged", values, "was made on other tiles than its grid has", cure)

    def _read_array(self, folder: Place, mark: str, cure: str) -> dict[str, Any] | None:
        """Attributes of an array that counts and is whole, or None; ``mark`` is the attribute that is written last."""
        metadata = _metadata(folder)
        attrs: dict[str, Any] = metadata.get("attributes", {})
        if self._is_spoilt(folder, cure):
            return None
        if mark not in attrs:
            self._add("unfinished", folder, "is not complete", "run the same command again to finish it")
            return None
        before = len(self.findings)
        self._report(folder, self._verify(folder, metadata, folder.parent.parent.name == "features"), cure)
        return None if any(one.kind == "damaged" for one in self.findings[before:]) else attrs

    def _is_spoilt(self, folder: Place, cure: str) -> bool:
        """Whether a group or array has metadata that cannot be read; what was only begun has none."""
        spoilt = not _metadata(folder) and (folder / "zarr.json").exists()
        if spoilt:
            self._add("damaged", folder, "has a zarr.json that cannot be read", cure)
        return spoilt

    def _verify(self, folder: Place, metadata: dict[str, Any], whole: bool = False) -> ArrayFiles:
        """The files of an array; what it lacks of being one is a problem of its ``zarr.json``."""
        try:
            found = verify_array(folder, metadata or _metadata(folder), whole)
        except (LookupError, TypeError, ValueError, AttributeError):
            return ArrayFiles([("zarr.json", "describes no array")])
        except OSError as error:
            return ArrayFiles([(error.filename or "zarr.json", f"cannot be read ({error.strerror or error})")])
        self.files += found.files
        self.bytes += found.bytes
        return found

    def _report(self, folder: Place, found: ArrayFiles, cure: str) -> None:
        for name, what in found.problems:
            self._add("damaged", folder / name, what, cure)
        for name in found.strays:
            self._add("leftover", folder / name, "belongs to nothing in the store", "delete it")

    def _folders(self, part: str) -> list[Place]:
        """What a group of the store holds, sorted."""
        group = self._path / part
        folders = [group / name for name in list_folders(group)]
        if folders:
            self._find_strays(group)
        for folder in folders:
            self._find_strays(folder)
        return folders

    def _find_strays(self, group: Place) -> None:
        """Files in a group that are none of Zarr's: drafts of killed writers."""
        for entry in [group / name for name in sorted(list_names(group))]:
            if entry.is_file() and entry.name != "zarr.json":
                self._add("leftover", entry, "is a draft of a writer that was killed", "delete it")

    def _attributes(self, folder: Place) -> dict[str, Any]:
        return dict(_metadata(folder).get("attributes") or {})

    def _cure(self, folder: Place) -> str:
        return f"delete {folder} and run {_AGAIN[folder.parent.name]} again"

    def _add(self, kind: Kind, path: Place, what: str, cure: str) -> None:
        self.findings.append(Finding(kind, str(path), what, cure))


def _metadata(folder: Place) -> dict[str, Any]:
    """The ``zarr.json`` of a group or array; empty where there is none that can be read."""
    try:
        value = read_json(folder / "zarr.json")
    except (OSError, ValueError):
        return {}
    sound = isinstance(value, dict) and isinstance(value.get("attributes", {}), dict)
    return value if sound else {}
