"""One training run: its files can be read, are those that it ended with, and are all there."""

from __future__ import annotations

import zipfile
from pathlib import Path

from safetensors import SafetensorError, safe_open

from wsi_engine.errors import WsiError
from wsi_engine.integrity.report import Finding, Kind, PartReport
from wsi_engine.predictions import PredictionTable
from wsi_engine.runs import DIGESTS, ENCODER_NAME, HEAD_NAME, PROMPTS_NAME, RunFolder, RunRecord, file_digest

_TRAIN = "repeat the command that trained it, with this folder as it is, to train the rest"


def check_run(path: Path) -> PartReport:
    """Verify the files of a training run, by the digests that it ended with where there are any."""
    check = _RunCheck(RunFolder(path))
    check.run()
    return PartReport(tuple(check.findings), check.files, check.bytes)


class _RunCheck:
    """Goes through one run and keeps what it finds."""

    def __init__(self, run: RunFolder) -> None:
        self._run = run
        self.findings: list[Finding] = []
        self.files = self.bytes = 0

    def run(self) -> None:
        """Everything."""
        try:
            record = self._run.read_record()
        except WsiError as error:
            self._add("damaged", self._run.record_file, f"cannot be used: {error}", "train again in another folder")
            return
        if not record.complete:
            self._add("unfinished", self._run.path, f"is not complete ({self._count(record)})", _TRAIN)
        self._check_tables(record)
        for number in range(record.folds):
            self._check_fold(number, record)
        self._check_digests(record)

    def _check_tables(self, record: RunRecord) -> None:
        for path in (self._run.predictions_file, self._run.validation_file):
            if path.exists():
                self._count_file(path)
                try:
                    PredictionTable.read(path)
                except (WsiError, ValueError) as error:
                    self._spoilt(path, f"cannot be used: {error}", record)
            elif record.complete:
                self._spoilt(path, "is missing", record)
        if not self._run.splits_file.exists():
            self._spoilt(self._run.splits_file, "is missing", record)

    def _check_fold(self, number: int, record: RunRecord) -> None:
        folder, state = self._run.fold(number), self._run.state_file(number)
        for name in (HEAD_NAME, PROMPTS_NAME, ENCODER_NAME):
            path = folder / name
            if path.exists():
                self._check_tensors(path, record)
            elif name == HEAD_NAME and record.complete:
                self._spoilt(path, "is missing", record)
        if state.exists() and record.complete:
            self._add("leftover", state, "is of a fold that is done", "delete it")
        elif state.exists() and not _is_sound_zip(state):
            self._add("damaged", state, "is torn or rotten", "delete it and train again: that fold begins anew")

    def _check_tensors(self, path: Path, record: RunRecord) -> None:
        self._count_file(path)
        try:
            with safe_open(path, framework="np"):
                pass
        except (SafetensorError, OSError) as error:
            self._spoilt(path, f"is torn or rotten ({error})", record)

    def _check_digests(self, record: RunRecord) -> None:
        """Files that are no longer what they were when the run ended; those named before are not named again."""
        named = {finding.path for finding in self.findings}
        digests = record.summary.get(DIGESTS)
        for name, digest in (digests if isinstance(digests, dict) else {}).items():
            path = self._run.path / name
            if str(path) in named:
                continue
            try:
                same = file_digest(path) == digest
            except FileNotFoundError:
                if record.complete:
                    self._spoilt(path, "is missing", record)
            except OSError as error:
                self._spoilt(path, f"cannot be read ({error.strerror or error})", record)
            else:
                if not same:
                    self._spoilt(path, "is not what it was when the run ended (its digest differs)", record)

    def _spoilt(self, path: Path, what: str, record: RunRecord) -> None:
        """Something is wrong with a file; of a run that is not complete, it is made again."""
        if record.complete:
            self._add("damaged", path, what, "restore it from a copy, or train again in another folder")
        else:
            self._add("unfinished", path, what, _TRAIN)

    def _count(self, record: RunRecord) -> str:
        heads = sum(self._run.head_file(number).exists() for number in range(record.folds))
        return f"{heads} of {record.folds} folds have a head"

    def _count_file(self, path: Path) -> None:
        self.files += 1
        self.bytes += path.stat().st_size

    def _add(self, kind: Kind, path: Path, what: str, cure: str) -> None:
        self.findings.append(Finding(kind, str(path), what, cure))


def _is_sound_zip(path: Path) -> bool:
    """What ``torch.save`` writes is a ZIP archive with a checksum for each file in it."""
    try:
        with zipfile.ZipFile(path) as archive:
            return archive.testzip() is None
    except Exception:  # of a damaged archive it raises almost anything
        return False
