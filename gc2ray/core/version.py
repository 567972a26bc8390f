"""The version of gc2ray; `pyproject.toml` reads it from here."""

__version__ = "0.2.0"
