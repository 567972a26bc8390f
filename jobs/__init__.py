"""Thin scripts for a cluster and a terminal; the work is in the package."""
