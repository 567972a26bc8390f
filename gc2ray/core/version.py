"""The version of gc2ray, as `pyproject.toml` has it."""

__version__ = "0.2.0"
