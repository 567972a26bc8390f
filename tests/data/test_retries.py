"""Which trouble passes, by what is raised."""

from __future__ import annotations

import errno
from unittest.mock import Mock

import aiohttp
import pytest
from aiohttp.client_reqrep import ConnectionKey
from botocore.exceptions import ClientError, EndpointConnectionError, NoCredentialsError
from huggingface_hub.errors import HfHubHTTPError, OfflineModeIsEnabled
from huggingface_hub.errors import HTTPError as HubError

from gc2ray.data.retries import is_transient


def answered(status: int) -> aiohttp.ClientResponseError:
    """As the web's filesystem raises it."""
    return aiohttp.ClientResponseError(Mock(), (), status=status)


def refused(status: int) -> ClientError:
    """As botocore raises it."""
    response = {"Error": {"Code": "x"}, "ResponseMetadata": {"HTTPStatusCode": status}}
    return ClientError(response, "PutObject")  # type: ignore[arg-type]


def hub_error(status: int) -> HfHubHTTPError:
    """As the hub's client raises it."""
    return HfHubHTTPError("no", response=Mock(status_code=status))


def because(error: Exception, cause: Exception) -> Exception:
    """As a filesystem concludes it from another."""
    error.__cause__ = cause
    return error


PASSES = {
    "timeout": TimeoutError(),
    "reset": ConnectionResetError(),
    "busy": OSError(errno.EBUSY, "Service Unavailable"),
    "no endpoint": EndpointConnectionError(endpoint_url="http://s3"),
    "web, disconnected": aiohttp.ServerDisconnectedError(),
    "web, cut short": aiohttp.ClientPayloadError("not enough data"),
    "web, nobody there": aiohttp.ClientConnectorError(Mock(spec=ConnectionKey), OSError()),
    "web, 503": answered(503),
    "web, 429": answered(429),
    "web, concluded from 500": because(FileNotFoundError("a.png"), answered(500)),
    "web, concluded from a drop": because(FileNotFoundError("a.png"), ConnectionResetError()),
    "hub, nobody there": HubError("connection refused"),
    "hub, 503": hub_error(503),
    "s3, 503": because(OSError(errno.EBUSY, "Slow Down"), refused(503)),
    "s3, 409": because(OSError(errno.EBUSY, "conflict"), refused(409)),
}
STAYS = {
    "missing": FileNotFoundError("a.png"),
    "forbidden": PermissionError("no"),
    "no space": OSError(errno.ENOSPC, "full"),
    "no credentials": NoCredentialsError(),
    "web, 403": answered(403),
    "web, 302": answered(302),
    "web, no URL": aiohttp.InvalidURL("http:///"),
    "web, concluded from 403": because(FileNotFoundError("a.png"), answered(403)),
    "hub, 401": hub_error(401),
    "hub, offline": OfflineModeIsEnabled("HF_HUB_OFFLINE is set"),
    "s3, 404": because(FileNotFoundError("a"), refused(404)),
    "s3, expired": because(OSError(errno.EINVAL, "Bad Request"), refused(400)),
    "s3, full": because(OSError(errno.EIO, "full"), refused(507)),
    "a bug": ValueError("x"),
}


@pytest.mark.parametrize("error", PASSES.values(), ids=PASSES)
def test_temporary_errors_are_transient(error: Exception) -> None:
    assert is_transient(error)


@pytest.mark.parametrize("error", STAYS.values(), ids=STAYS)
def test_lasting_errors_are_not_transient(error: Exception) -> None:
    assert not is_transient(error)
