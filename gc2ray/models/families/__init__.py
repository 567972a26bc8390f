"""Model architectures, which `gc2ray.models.registry` lists, and tiny models for tests."""
