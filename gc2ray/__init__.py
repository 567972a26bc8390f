"""gc2ray: offline captioning and question answering with compressed high-resolution VLMs on Ray."""

__version__ = "0.2.0"
