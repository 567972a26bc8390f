"""Requests to answers, with one loaded model."""
