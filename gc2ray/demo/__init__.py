"""The pocket model: a tiny LLaVA-NeXT that was really trained, and the scenes it was trained on.

`scenes` draws, `questions` asks, `rows` writes Parquet as users have it, `spec` builds the
untrained model and names the trained one that ships with the package (see `model/README.md`).
"""
