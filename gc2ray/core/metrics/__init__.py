"""Scores of answers against right answers."""
