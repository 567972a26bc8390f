"""Formats of input files, one file each."""
