"""Formats of input files; `gc2ray.data.formats.registry` lists them."""
