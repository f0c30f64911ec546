"""Logins in URLs are sent to their own server, and never shown or stored."""

import json
import re
from contextlib import closing
from types import SimpleNamespace

import pytest
from flaky_server import FlakyServer
from running import ROOT, run_python

from ds_classifier.common.urls import shown, without_logins
from ds_classifier.config import parse_training_command
from ds_classifier.data.convert.convert import convert
from ds_classifier.data.convert.sources import image_folder
from ds_classifier.data.foreign.index import index
from ds_classifier.data.remote.fetch import Patience, fetch_small, stream
from ds_classifier.data.shards import open_shards
from ds_classifier.data.splits import open_split
from ds_classifier.training.run_dir import launch_lines, write_run_files

FAST = dict(stall_timeout_s=0.5, retries=1, pause_s=0.02)
LOGIN = "me:se%20cret%40x"  # as written in a URL; the password is "se cret@x"
CONTENT = b"0123456789" * 1000


@pytest.mark.parametrize(
    ("url", "expected"),
    [
        ("http://me:secret@h/a/b", "http://***@h/a/b"),
        ("HTTPS://me:secret@h:80/a?token=secret", "HTTPS://***@h:80/a"),
        ("https://secret@h/a", "https://***@h/a"),
        ("http://me:secret@secret@h/a", "http://***@h/a"),
        ("http://me:se?cret@h/a", "http://***@h/a"),
        ("http://me:secret/secret@h/a", "http://***@h/a"),
        ("http://me:secret//x:secret@h/a", "http://***@h/a"),
        ("sftp://me:secret@h/{name}", "sftp://***@h/{name}"),
        ("pipe:curl -s https://me:secret@h/{name}", "pipe:curl -s https://***@h/{name}"),
        ("pipe:curl 'ftp://me:secret@h/a' http://u:secret@i/b", "pipe:curl 'ftp://***@h/a' http://***@i/b"),
        ("http://h:8080/a@b/c", "http://h:8080/a@b/c"),
        ("http://h/user:x@b/c", "http://h/user:x@b/c"),
        ("gs://bucket/a@b", "gs://bucket/a@b"),
        ("/data//me:x@y/z", "/data//me:x@y/z"),
        ("data/train", "data/train"),
    ],
)  # fmt: skip
def test_locations_are_shown_without_secrets(url, expected):
    assert shown(url) == expected


@pytest.fixture
def served(tmp_path, monkeypatch):
    """Start a server that requires LOGIN; yield it, its directory, and its URL with the login."""
    monkeypatch.setenv("no_proxy", "127.0.0.1,localhost")
    (tmp_path / "far").mkdir()
    with closing(FlakyServer(tmp_path / "far")) as server:
        server.login = "me:se cret@x"
        yield server, tmp_path / "far", server.url.replace("//", f"//{LOGIN}@")


def test_basic_authentication(served):
    server, far, url = served
    (far / "x.tar").write_bytes(CONTENT)
    options = dict(limit_bytes=1 << 20, patience=Patience(**FAST))
    assert fetch_small(f"{url}/x.tar", **options) == CONTENT
    server.faults["x.tar"] = ["reset"]
    assert b"".join(stream(f"{url}/x.tar", patience=Patience(**FAST))) == CONTENT
    assert server.requests[-1][1].startswith("bytes="), "the rest was not asked for"
    with pytest.raises(OSError, match=r"x\.tar: got no whole file in 1 try; last error: HTTP 401"):
        fetch_small(f"{server.url}/x.tar", **options)
    wrong = url.replace("cret", "wrong")
    with pytest.raises(OSError, match=r"//\*\*\*@127.*HTTP 401") as error:
        fetch_small(f"{wrong}/x.tar", **options)
    assert "wrong" not in str(error.value)


def test_a_login_is_not_sent_to_another_server(served, tmp_path):
    server, far, url = served
    (far / "x.tar").write_bytes(CONTENT)
    options = dict(limit_bytes=1 << 20, patience=Patience(**FAST))
    server.redirects = {"moved.tar": "/x.tar"}
    assert fetch_small(f"{url}/moved.tar", **options) == CONTENT
    with closing(FlakyServer(far)) as other:
        server.redirects = {"moved.tar": f"{other.url}/x.tar"}
        assert fetch_small(f"{url}/moved.tar", **options) == CONTENT
        assert other.logins == [None]


def test_logins_of_a_netrc_file_are_not_sent(served, tmp_path, monkeypatch):
    """The login of the URL counts, on a redirect too; without one, none is sent."""
    server, far, url = served
    (far / "x.tar").write_bytes(CONTENT)
    (tmp_path / "netrc").write_text("machine 127.0.0.1 login other password wrong\n")
    monkeypatch.setenv("NETRC", str(tmp_path / "netrc"))
    options = dict(limit_bytes=1 << 20, patience=Patience(**FAST))
    server.redirects = {"moved.tar": "/x.tar"}
    assert fetch_small(f"{url}/moved.tar", **options) == CONTENT
    with pytest.raises(OSError, match="HTTP 401"):
        fetch_small(f"{server.url}/x.tar", **options)
    assert server.logins[-1] is None


@pytest.mark.parametrize("proxy", ["socks5h://127.0.0.1:9", "http://"])
def test_a_proxy_that_cannot_be_used_is_named(served, monkeypatch, proxy):
    _, _, url = served
    for name in ("no_proxy", "NO_PROXY"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("http_proxy", proxy)
    with pytest.raises(OSError, match="the proxy in the environment") as error:
        fetch_small(f"{url}/x.tar", limit_bytes=9, patience=Patience(**FAST))
    assert "cret" not in str(error.value)


def test_a_redirect_to_no_valid_url_shows_no_login(served):
    server, _, url = served
    server.redirects = {"moved.tar": "http://me:secret/x@h/a"}
    with pytest.raises(OSError, match=r"moved\.tar: got no whole file in 1 try.*need %XX") as error:
        fetch_small(f"{url}/moved.tar", limit_bytes=9, patience=Patience(**FAST))
    assert "secret" not in str(error.value)


def test_no_file_or_message_has_a_login(served, folder, tmp_path):
    """Check the cache, the errors and verify for a split at such a URL; and the manifest."""
    server, far, url = served
    convert(image_folder(folder), tmp_path / "data", samples_per_shard=5)
    for file in (tmp_path / "data/train").iterdir():
        file.rename(far / file.name)
    cache = dict(cache_dir=tmp_path / "cache", **FAST)
    shards = open_split(url, **cache)
    assert len(shards.store.read(0, 0, 512)) == 512
    server.faults["train-000001.tar"] = ["wrong"] * 9
    with pytest.raises(
        OSError, match=r"//\*\*\*@127.*train-000001.tar: got no whole file"
    ) as error:
        shards.store.read(1, 0, 512)
    server.faults.clear()
    texts = [str(error.value), *map(str, (tmp_path / "cache").rglob("*"))]
    files = [path for path in (tmp_path / "cache").rglob("*") if path.is_file()]
    texts += [path.read_bytes().decode("latin1") for path in files]
    with pytest.raises(ValueError, match="password") as error:
        index(f"{url}/train-{{000000..000002}}.tar", tmp_path / "out")
    texts.append(str(error.value))
    with pytest.raises(ValueError, match="whose user and password were not kept") as error:
        open_split(without_logins(url), **cache)
    texts.append(str(error.value))
    script = ROOT / "launch" / "make_shards.py"
    done = run_python(script, "verify", url, f"{url}/gone", cwd=tmp_path)
    assert done.code == 2, done.output
    assert f"{shown(url)}: no problems" in done.lines
    texts.append(done.output)
    assert not re.search("cret|me:", "".join(texts))


@pytest.mark.parametrize("url", ["https://secret@h/{0..3}.tar", "http://me:p@secret@h/{0..3}.tar"])
def test_no_manifest_holds_a_token(tmp_path, url):
    with pytest.raises(ValueError, match="password") as error:
        index(url, tmp_path / "out")
    assert "secret" not in str(error.value)


def test_the_login_of_a_manifest_is_not_shown(folder, tmp_path):
    convert(image_folder(folder), tmp_path / "data")
    manifest = tmp_path / "data/train/manifest.json"
    fields = json.loads(manifest.read_text()) | {"location": "sftp://me:secret@h/x"}
    manifest.write_text(json.dumps(fields))
    with pytest.raises(ValueError, match=r"lie at sftp://\*\*\*@h/x"):
        open_shards(tmp_path / "data/train")


def test_the_files_of_a_run_hold_no_login(tmp_path):
    """See test_locations_are_shown_without_secrets for its messages."""
    url = "http://me:secret@h/{name}?sig=1"
    flags = ["--deepspeed_config", "x.json", "--data_dir", url, "--val_data_dir", url]
    settings = parse_training_command(flags).settings
    assert settings.data_dir == url
    resolved = SimpleNamespace(settings=settings, ds_config={})
    write_run_files(tmp_path / "run", resolved, launch_lines(["train.py", *flags], 1))
    for file in ("config.json", "command.sh"):
        kept = (tmp_path / "run" / file).read_text()
        assert "secret" not in kept
        assert kept.count("http://***@h/{name}?sig=1") == 2


def test_the_error_of_a_program_shows_no_login():
    url = "pipe:cat https://me:secret@h/x 2>/dev/null; exit 3"
    with pytest.raises(OSError, match=r"(?s)https://\*\*\*@h/x.*exit 3") as error:
        list(stream(url, patience=Patience(**FAST), allow_pipe=True))
    assert "secret" not in str(error.value)


@pytest.mark.parametrize("url", ["http://me:secret/x@h/a", "http://me:secret#x@h/a"])
def test_a_password_that_makes_the_url_invalid(url):
    with pytest.raises(OSError, match=r"//\*\*\*@h/a: got no whole.*need %XX") as error:
        fetch_small(url, limit_bytes=9, patience=Patience(**FAST))
    assert "secret" not in str(error.value)
