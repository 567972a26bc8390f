"""Rows in, objects out, on any storage."""
