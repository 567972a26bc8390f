"""Where a process of gc2ray begins: the script, and `python -m gc2ray` where it is not on the path.

Nothing is imported before signals are heard: what is behind it takes a second.
"""

from gc2ray.core.process import run_process


def main() -> None:
    """The `gc2ray` command."""
    run_process(_command)


def _command() -> None:
    from gc2ray.cli.app import app

    app()


if __name__ == "__main__":
    main()
