"""Run a job from a script, as `ray job submit -- python -m jobs.run CONFIG [a.b=c …]` wants it.

The same as `gc2ray run`.
"""

from __future__ import annotations

import sys

from gc2ray.cli import app

if __name__ == "__main__":
    app(["run", *sys.argv[1:]])
