"""Errors of storages are recognised without importing the libraries that raise them."""

from __future__ import annotations

import subprocess
import sys

import pytest

from gc2ray.core.errors import storage_errors


def in_a_new_process(script: str) -> str:
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert done.stderr == ""
    return done.stdout.strip()


def test_errors_are_known_before_their_libraries_are_imported() -> None:
    script = "import sys; from gc2ray.core.errors import storage_errors as errors; print(errors(),"
    script += " {'aiohttp', 'botocore', 'huggingface_hub'} & {*sys.modules})"
    assert in_a_new_process(script) == "(<class 'OSError'>,) set()"


def test_errors_of_a_library_are_known_from_when_it_is_imported() -> None:
    script = "import sys; from gc2ray.core.errors import storage_errors as errors\n"
    script += "errors(); import botocore.exceptions\n"
    script += "print([kind.__name__ for kind in errors()])"
    assert in_a_new_process(script) == "['OSError', 'BotoCoreError']"


def test_every_storage_error_is_caught() -> None:
    from aiohttp import ServerDisconnectedError
    from botocore.exceptions import NoCredentialsError
    from huggingface_hub.errors import HTTPError  # type: ignore[attr-defined]  # of its library

    for error in (OSError(), ServerDisconnectedError(), NoCredentialsError(), HTTPError("no")):
        with pytest.raises(storage_errors()):
            raise error
