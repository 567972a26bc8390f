"""Methods of compression, one file each; `gc2ray.compression.registry` lists them."""
