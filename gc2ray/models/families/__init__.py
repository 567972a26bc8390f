"""Model architectures, one file each; `gc2ray.models.registry` lists them."""
