"""Errors of the heads; each message is one sentence: what is wrong, where, what to do."""


class HeadError(ValueError):
    """A head cannot be built as asked, or cannot take these features or this label."""


class CheckpointError(HeadError):
    """A file or state dict cannot be read as a head."""
