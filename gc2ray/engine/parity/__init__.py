"""Comparison with stock transformers: `gc2ray check`."""
