"""The demo model, a tiny LLaVA-NeXT that was really trained; its scenes; and `gc2ray demo`.

`scenes` samples, `drawing` draws and `questions` asks; `photos` has backgrounds, where they are
installed; `rows` writes Parquet as users have it. `spec` builds the untrained model and names the
trained one that ships with the package (see `model/README.md`). `demo` runs a job with all of it.
"""
