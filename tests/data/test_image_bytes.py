"""Images by their bytes or a local path: which paths are allowed, and how much is read."""

from __future__ import annotations

import errno
import os

import fsspec
import pytest

from gc2ray.core.config.input import ImageLimits
from gc2ray.core.errors import ConfigError, ShardError
from gc2ray.core.records import ImageRef
from gc2ray.data.image_bytes import read_bytes
from tests.support.images import PNG, POLICY, refusal_message


def test_null_image_is_refused():
    assert "null" in refusal_message(read_bytes, ImageRef(), POLICY)
    assert "null" in refusal_message(read_bytes, ImageRef(path=""), POLICY)


def test_zero_bytes_are_refused(tmp_path):
    assert "no bytes" in refusal_message(read_bytes, ImageRef(data=b""), POLICY)
    empty = tmp_path / "empty.png"
    empty.touch()
    policy = ImageLimits(roots=(str(tmp_path),))
    message = refusal_message(read_bytes, ImageRef(path=str(empty)), policy)
    assert "no bytes" in message
    assert "empty.png" in message


def test_too_many_bytes_are_refused(tmp_path):
    assert read_bytes(ImageRef(data=PNG), ImageLimits(max_bytes=len(PNG))) == PNG
    small = ImageLimits(max_bytes=len(PNG) - 1, roots=(str(tmp_path),))
    path = tmp_path / "image.png"
    path.write_bytes(PNG)
    for ref in (ImageRef(data=PNG), ImageRef(path=str(path))):
        assert f"more than {len(PNG) - 1} bytes" in refusal_message(read_bytes, ref, small)


class Endless(fsspec.AbstractFileSystem):
    """Files without end; it knows the size of `sized` ones only, and cannot read `broken` ones."""

    protocol = "endless"
    cachable = False
    taken = 0

    def info(self, path, **_):
        return {"name": path, "type": "file", "size": 10**9 if "sized" in path else None}

    def open(self, path, *_, **__):
        if "broken" in path:
            raise OSError(errno.EIO, "the disk is on fire")
        return self

    def read(self, count):
        Endless.taken += min(count, 7)
        return b"x" * min(count, 7)

    def __enter__(self):
        return self

    def __exit__(self, *_):
        return None


@pytest.fixture
def endless():
    fsspec.register_implementation("endless", Endless, clobber=True)
    Endless.taken = 0
    return Endless


def test_no_more_than_the_limit_is_read(endless):
    policy = ImageLimits(max_bytes=100, roots=("endless://",))
    assert "more than 100" in refusal_message(read_bytes, ImageRef(path="endless://a.png"), policy)
    assert endless.taken == 101


def test_a_file_of_known_excessive_size_is_not_read(endless):
    policy = ImageLimits(max_bytes=100, roots=("endless://",))
    assert "more than 100" in refusal_message(
        read_bytes, ImageRef(path="endless://sized.png"), policy
    )
    assert endless.taken == 0


@pytest.mark.usefixtures("endless")
def test_broken_storage_is_not_the_fault_of_the_row():
    policy = ImageLimits(roots=("endless://",))
    with pytest.raises(ShardError, match="broken") as caught:
        read_bytes(ImageRef(path=f"endless://broken{'x' * 500}.png"), policy)
    assert len(str(caught.value)) <= 200


def test_missing_file_is_refused(tmp_path):
    policy = ImageLimits(roots=(str(tmp_path), "memory://nothing"))
    for path in (str(tmp_path / "gone.png"), "gone.png", "memory://nothing/gone.png"):
        message = refusal_message(read_bytes, ImageRef(path=path), policy)
        assert "no such" in message
        assert "gone.png" in message


def test_directory_and_pipe_are_refused(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "folder").mkdir()
    policy = ImageLimits(roots=(str(tmp_path),))
    for name in ("pipe", "folder", "."):
        assert "not a file" in refusal_message(read_bytes, ImageRef(path=name), policy)


def test_paths_are_off_without_roots(tmp_path):
    path = tmp_path / "image.png"
    path.write_bytes(PNG)
    for there in (str(path), f"file://{path}", "image.png", "http://127.0.0.1/image.png"):
        message = refusal_message(read_bytes, ImageRef(path=there), POLICY)
        assert "by path are off; recipe.input.image_roots" in message


@pytest.fixture
def tree(tmp_path):
    """A root with a file and links out of and within it, and secrets beside it."""
    root, beside = tmp_path / "root", tmp_path / "root2"
    for folder in (root / "sub", beside):
        folder.mkdir(parents=True)
    (root / "sub" / "image.png").write_bytes(PNG)
    (tmp_path / "secret.png").write_bytes(b"secret")
    (beside / "secret.png").write_bytes(b"secret")
    (root / "link.png").symlink_to(tmp_path / "secret.png")
    (root / "door").symlink_to(beside)
    (root / "inside.png").symlink_to(root / "sub" / "image.png")
    return root


@pytest.mark.parametrize(
    "path",
    [
        "{root}/../secret.png",
        "{root}/sub/../../secret.png",
        "../secret.png",
        "sub/../../root2/secret.png",
        "{root}2/secret.png",
        "{root}/link.png",
        "link.png",
        "{root}/door/secret.png",
        "door/../secret.png",
        "file://{root}/../secret.png",
        "local://{root}2/secret.png",
        "/etc/hostname",
        "memory://{root}/sub/image.png",
        "simplecache::file://{root}/../secret.png",
        "filecache::{root}/sub/image.png",
        "{root}/sub/image.png\0",
        "http://127.0.0.1/{root}/sub/image.png",
        "door::zip/../../secret.png",
        "link.png/../../secret.png",
    ],
)
def test_path_outside_the_roots_is_refused(path, tree):
    policy = ImageLimits(roots=(str(tree),))
    message = refusal_message(read_bytes, ImageRef(path=path.format(root=tree)), policy)
    assert "outside" in message or "the path is refused" in message


@pytest.mark.parametrize(
    "path",
    [
        "{root}/sub/image.png",
        "sub/image.png",
        "file://{root}/sub/image.png",
        "inside.png",
        "door/../root/sub/image.png",
        "{root}/./sub//image.png",
    ],
)
def test_path_under_a_root_is_read(path, tree):
    (tree.parent / "other").mkdir()
    policy = ImageLimits(roots=(str(tree.parent / "other"), f"{tree}/"))
    assert read_bytes(ImageRef(path=path.format(root=tree)), policy) == PNG


@pytest.mark.parametrize(
    "path",
    [
        "link.png::zip",
        "{root}/link.png::zip",
        "link.png::",
        "::link.png",
        "::{root}/link.png",
        "sub/image.png::zip",
        "{root}/sub/image.png::file://{root}/link.png",
        "sub/image.png::simplecache",
        "simplecache::link.png",
        "simplecache::{root}/link.png",
        "zip::link.png",
        "memory::link.png",
        "file:link.png",
        "file:/{root}/link.png",
        "file::{root}/link.png",
        "environ::zip",
        "~/link.png",
        "link.png?",
        "link.png#x",
        "*.png",
        "li?k.png",
        "lin[k].png",
    ],
)
def test_a_local_path_is_neither_url_nor_pattern(path, tree):
    """Whatever a library would read into it: no such name is there, so there is no such file."""
    policy = ImageLimits(roots=(str(tree),))
    message = refusal_message(read_bytes, ImageRef(path=path.format(root=tree)), policy)
    assert "no such image file" in message or "outside" in message


@pytest.mark.parametrize("name", ["a::b.png", "::.png", "x::zip", "file:x.png", "~", "*?.png", "#"])
def test_a_name_may_have_any_characters(name, tree):
    (tree / name).write_bytes(PNG)
    policy = ImageLimits(roots=(str(tree),))
    for path in (name, f"{tree}/{name}"):
        assert read_bytes(ImageRef(path=path), policy) == PNG


def test_root_may_itself_be_a_link(tree):
    (tree.parent / "alias").symlink_to(tree)
    policy = ImageLimits(roots=(f"file://{tree.parent}/alias",))
    assert read_bytes(ImageRef(path=f"{tree.parent}/alias/sub/image.png"), policy) == PNG


def test_first_root_with_the_file_wins(tmp_path):
    for name in ("a", "b", "c"):
        (tmp_path / name).mkdir()
    for name in ("b", "c"):
        (tmp_path / name / "image.png").write_bytes(name.encode())
    policy = ImageLimits(roots=tuple(str(tmp_path / name) for name in ("a", "b", "c")))
    assert read_bytes(ImageRef(path="image.png"), policy) == b"b"


def test_unknown_protocol_is_a_configuration_error():
    policy = ImageLimits(roots=("nosuch://bucket",))
    with pytest.raises(ConfigError, match="nosuch"):
        read_bytes(ImageRef(path="nosuch://bucket/image.png"), policy)


def test_bytes_of_the_row_come_before_its_path():
    ref = ImageRef(data=PNG, path="/etc/hostname")
    assert read_bytes(ref, POLICY) == PNG


def test_messages_stay_short_and_on_one_line(tmp_path):
    policy = ImageLimits(roots=(str(tmp_path),))
    path = "folder/" * 40 + "the end\u2028.png"
    message = refusal_message(read_bytes, ImageRef(path=path), policy)
    assert message.endswith("the end .png")
    message = refusal_message(
        read_bytes, ImageRef(path="x" * 5000), policy
    )  # longer than a name may be
    assert "cannot read" in message
