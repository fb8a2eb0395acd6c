"""Formats of other tools of the field, read and written losslessly; one file each."""
