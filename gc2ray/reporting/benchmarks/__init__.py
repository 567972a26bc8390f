"""Public benchmarks on which answers are scored, one file each: its rows, prompts and metric.

Empty until the first benchmark is added. A new benchmark is a module of its own here; metrics that
it needs stand in `gc2ray.core.metrics`.
"""
