"""Builds the compiled attention where there is a compiler for it; the rest is in pyproject.toml.

It is optional: without it gc2ray computes the same with torch's own attention. Only x86 is built
for, and only AVX2 is asked for: `gc2ray.models.layers.cpu_attention` looks at the processor before
use.
"""

import platform

from setuptools import Extension, setup

COMPILED_ATTENTION = Extension(
    "gc2ray.models.layers._cpu_attention",
    ["gc2ray/models/layers/cpu_attention.c"],
    extra_compile_args=[
        "-std=gnu11",
        "-O3",
        "-mavx2",
        "-mfma",
        "-ffp-contract=fast",
        "-fno-math-errno",
        "-fno-trapping-math",
        "-fopenmp",
    ],
    extra_link_args=["-fopenmp"],
    optional=True,
)

setup(ext_modules=[COMPILED_ATTENTION] if platform.machine() in ("x86_64", "AMD64") else [])
