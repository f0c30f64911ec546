"""Shards in object storage are read as those at http are; what goes wrong is one message."""

import os
import time
from pathlib import Path

import pytest
from object_storage import end_helpers
from stores import (
    FAST,
    SIZE,
    cached,
    correct,
    forked,
    kill,
    make_shards,
    outcomes,
    part,
    serving,
    wait_until,
)

from ds_classifier.data.remote import fetch, objects
from ds_classifier.data.remote.fetch import NotServed, Patience, fetch_small, stream
from ds_classifier.data.splits import open_split
from ds_classifier.data.store import ShardStore

ONCE = Patience(stall_timeout_s=5.0, retries=0)


@pytest.fixture(params=["s3", "gs", "az"])
def kind(request):
    return request.param


@pytest.fixture
def bucket(tmp_path, monkeypatch):
    """A server that answers as three kinds of storage do: (server, shards, function for a store).

    It looks at no signature; test_credentials has those.
    """
    pytest.importorskip("obstore", reason="obstore is not installed (extra cloud)")
    pytest.importorskip("botocore", reason="botocore is not installed (extra cloud)")
    shards = make_shards(tmp_path / "box", 3)
    with serving(tmp_path) as server:
        for name, value in {
            "AWS_ENDPOINT_URL": server.url, "GOOGLE_BASE_URL": server.url,
            "AZURE_STORAGE_ENDPOINT": server.url, "AZURE_STORAGE_ACCOUNT": "account",
            "AWS_SKIP_SIGNATURE": "true", "GOOGLE_SKIP_SIGNATURE": "true",
            "AZURE_SKIP_SIGNATURE": "true", "no_proxy": "127.0.0.1",
        }.items():  # fmt: skip
            monkeypatch.setenv(name, value)
        end_helpers()

        def store(kind="s3", **options) -> ShardStore:
            options = FAST | dict(cache_dir=tmp_path / "cache", stall_timeout_s=2.0) | options
            return ShardStore(f"{kind}://box", shards, **options)

        yield server, shards, store
        end_helpers()


@pytest.mark.parametrize(
    "faults",
    [[500, 503, "reset", "stall"], ["head"], ["drip"], ["long", "short", 429, "wrong", "close"]],
    ids=lambda faults: "-".join(map(str, faults)),
)
def test_downloads_recover_from_faults(bucket, faults):
    server, _, store = bucket
    server.faults["box/s-1.tar"] = list(faults)
    ours = store(retries=5)
    began = time.monotonic()
    assert correct(ours, 1)
    assert time.monotonic() - began < 15
    assert not part(ours, 1).exists()
    assert server.count("box/s-1.tar") == len(faults) + 1
    cut = {"reset", "close", "drip"} & set(faults)
    assert bool(cut) == any(asked for _, asked in server.requests)


def test_every_kind_of_storage_is_read_and_resumed(bucket, kind):
    server, _, store = bucket
    server.faults["box/s-1.tar"] = ["reset"]
    assert correct(store(kind), 1)
    assert [asked for _, asked in server.requests] == [None, f"bytes={SIZE // 2}-"]


def test_forked_workers_read_after_their_parent_has(bucket):
    """obstore would hang in them if it ran in this process."""
    server, _, store = bucket
    assert correct(store(), 0)
    assert outcomes(lambda: correct(store(), 1), 3) == [True] * 3
    assert server.count("box/s-1.tar") == 1
    assert correct(store(), 2)


def test_one_program_serves_many_shards_and_ends_with_its_parent(bucket):
    _, _, store = bucket
    correct(store(), 0)
    (helper,) = objects._idle
    correct(store(), 1)
    assert objects._idle == [helper]
    worker = forked(lambda: correct(store(), 2))
    wait_until(lambda: cached(store()) == [0, 1, 2])
    children = Path(f"/proc/{worker.pid}/task/{worker.pid}/children")
    (child,) = children.read_text().split()
    kill(worker)
    wait_until(lambda: not os.path.exists(f"/proc/{child}") or "Z" in _state(child))
    assert correct(store(), 0)


def _state(pid: str) -> str:
    return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]


def test_a_program_that_dies_is_started_again(bucket):
    _, _, store = bucket
    correct(store(), 0)
    objects._idle[0]._process.kill()
    assert correct(store(), 1)


def test_a_killed_download_is_resumed(bucket):
    server, _, store = bucket
    server.faults["box/s-0.tar"] = ["stall"]
    ours = store()
    process = forked(lambda: store(stall_timeout_s=30).read(0, 0, 10))
    wait_until(lambda: part(ours, 0).exists() and part(ours, 0).stat().st_size == SIZE // 2)
    kill(process)
    assert correct(ours, 0)
    assert server.requests[-1] == ("box/s-0.tar", f"bytes={SIZE // 2}-")


def test_an_object_that_is_replaced_between_runs_is_an_error(bucket, tmp_path):
    _, _, store = bucket
    (tmp_path / "box" / "s-0.tar").write_bytes(b"x" * SIZE)
    with pytest.raises(OSError, match=r"got sha256 .*; need"):
        store(retries=1).read(0, 0, 10)
    (tmp_path / "box" / "s-1.tar").write_bytes(b"x" * (SIZE + 1))
    with pytest.raises(OSError, match=f"got a file of {SIZE + 1} bytes; need {SIZE}"):
        store(retries=1).read(1, 0, 10)


def test_an_object_that_is_replaced_while_it_is_streamed_is_an_error(bucket):
    """Check that index cannot record the hash of a mixture."""
    server, _, _ = bucket
    server.faults["box/s-0.tar"] = ["reset"]
    chunks = stream("s3://box/s-0.tar", patience=Patience(2.0, 2, 0.02))
    next(chunks)
    server.tags["box/s-0.tar"] = "2"
    with pytest.raises(OSError, match="was replaced while it was read"):
        list(chunks)


# -------------------------------------------------------------------------------------- messages


@pytest.mark.parametrize(
    ("status", "code", "words"),
    [
        (403, "AccessDenied", r"HTTP 403 AccessDenied.*; do: ask for access"),
        (400, "ExpiredToken", "ExpiredToken.*; do: log in again"),
        (403, "InvalidAccessKeyId", "do: correct the credentials"),
        (403, "RequestTimeTooSkewed", "do: set the clock of this machine"),
        (
            301,
            "PermanentRedirect",
            "the bucket is in another region; do: name the bucket's region: export AWS_REGION=",
        ),
        (404, "NoSuchBucket", "do: create the bucket, or correct its name"),
        (404, "NoSuchKey", "HTTP 404 NoSuchKey .*; do: check the address"),
    ],
)
def test_a_refusal_says_what_to_do_after_one_try(s3, monkeypatch, status, code, words):
    monkeypatch.setenv("AWS_SESSION_TOKEN", "sessionsecret")
    s3.faults["GET", "x"] = [(status, code)] * 9
    with pytest.raises(NotServed, match=words) as raised:
        fetch_small("s3://bkt/x", limit_bytes=99)
    assert s3.count("GET", "x") == 1
    message = str(raised.value)
    assert message.startswith("s3://bkt/x: got no whole file in 1 try; last error: ")
    assert message.count("do:") == 1
    assert not any(secret in message for secret in ("secret", "KEYOFTHETEST", "Signature"))


def test_other_errors_are_tried_again(s3):
    s3.put("x", b"content")
    s3.faults["GET", "x"] = [(503, "SlowDown"), (500, "InternalError"), (429, "SlowDown"), "reset"]
    patience = Patience(2.0, 4, 0.01)
    assert fetch_small("s3://bkt/x", limit_bytes=99, patience=patience) == b"content"
    s3.faults["GET", "x"] = [(503, "SlowDown")] * 3
    with pytest.raises(OSError, match="in 3 tries; last error: HTTP 503 SlowDown") as raised:
        fetch_small("s3://bkt/x", limit_bytes=99, patience=Patience(2.0, 2, 0.01))
    assert not isinstance(raised.value, NotServed)


@pytest.mark.parametrize(
    ("url", "words"),
    [
        ("s3:/bkt/x", "got s3:/bkt/x; need s3://bkt/x"),
        ("https:/user:secret@host/x", "need https://.*@host/x"),
        ("s3://", "need s3://BUCKET/PATH"),
        ("s3:///x", "need s3://BUCKET/PATH"),
        ("s3://user:secret@bkt/x", "need s3://BUCKET/PATH"),
        ("gs://bkt:80/x", "need gs://BUCKET/PATH"),
        ("az://account/x?sig=secret", "need az://CONTAINER/PATH"),
        ("s3a://bkt/x", "got s3a://bkt/x; need s3://BUCKET/PATH"),
        ("gcs://bkt/x", "need gs://BUCKET/PATH"),
        ("abfss://box@account.dfs.core.windows.net/x", "need az://CONTAINER/PATH"),
        ("hf://datasets/name", "need hf://datasets/ORG/NAME/PATH"),
        ("hf://x", "need hf://datasets/ORG/NAME/PATH"),
        ("hf://dataset/org/name/x", "need hf://datasets/ORG/NAME/PATH"),
        ("hf://datasets/org/x.tar", "need hf://datasets/ORG/NAME/PATH"),
    ],
)
def test_a_url_that_cannot_be_meant_is_refused(url, words):
    with pytest.raises(ValueError, match=words) as raised:
        fetch_small(url, limit_bytes=9)
    assert "secret" not in str(raised.value)


@pytest.mark.parametrize("url", ["s3://", "s3:/bkt", "gcs://bkt/train", "abfs://box/train"])
def test_a_split_is_refused_by_the_url_that_was_typed(url):
    with pytest.raises(ValueError, match=f"got {url}; need ") as raised:
        open_split(url, cache_dir=Path("unused"))
    assert "manifest.json" not in str(raised.value)


@pytest.mark.parametrize(
    ("url", "name", "value", "words"),
    [
        (
            "s3://bkt/x",
            "AWS_ENDPOINT_URL",
            "localhost:9",
            "got the endpoint localhost:9; need a URL",
        ),
        ("s3://bkt/x", "AWS_ENDPOINT_URL", "http://[::", "obstore gave up: "),
        (
            "gs://bkt/x",
            "GOOGLE_APPLICATION_CREDENTIALS",
            "/no/such.json",
            "GOOGLE_APPLICATION_CREDENTIALS names /no/such.json, which is no file; do: correct",
        ),
    ],
)
def test_a_wrong_environment_is_named_after_one_try(url, name, value, words, monkeypatch):
    pytest.importorskip("obstore", reason="obstore is not installed (extra cloud)")
    pytest.importorskip("botocore", reason="botocore is not installed (extra cloud)")
    monkeypatch.setenv("AWS_SKIP_SIGNATURE", "true")
    monkeypatch.setenv(name, value)
    end_helpers()
    try:
        with pytest.raises(NotServed) as raised:
            fetch_small(url, limit_bytes=9, patience=Patience(5.0, 1, 0.01))
    finally:
        end_helpers()
    assert f"{url}: got no whole file in 1 try; last error: {words}" in str(raised.value)


@pytest.mark.parametrize("url", ["s3://bkt/x", "gs://bkt/x", "az://box/x"])
def test_without_the_extra_the_command_is_named(url, monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(ValueError, match=r"the package obstore.*pip install 'ds-classifier\["):
        fetch_small(url, limit_bytes=9)


def test_a_broken_installation_is_named_after_one_try(tmp_path, monkeypatch):
    pytest.importorskip("obstore", reason="obstore is not installed (extra cloud)")
    pytest.importorskip("botocore", reason="botocore is not installed (extra cloud)")
    (tmp_path / "obstore.py").write_text("raise ImportError('libssl.so.9: not found')")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    monkeypatch.setenv("AWS_REGION", "us-east-1")
    end_helpers()
    try:
        with pytest.raises(NotServed) as raised:
            fetch_small("s3://bkt/x", limit_bytes=9)
    finally:
        end_helpers()
    message = str(raised.value)
    assert "in 1 try; last error: obstore or botocore is installed, but does not load" in message
    assert "libssl.so.9: not found" in message
    assert "pip install --force-reinstall obstore botocore" in message


# ----------------------------------------------------------------------------------- credentials


def signed_with(s3) -> list[str | None]:
    """Return the access keys of the requests for an object."""
    s3.put("x", b"content")
    s3.requests.clear()
    end_helpers()
    with_key = []
    try:
        assert fetch_small("s3://bkt/x", limit_bytes=9, patience=ONCE) == b"content"
    except NotServed:  # moto refuses requests without a signature
        with_key.append("refused")
    return with_key + [who for method, key, who in s3.requests if key == "x"]


def test_credentials_come_from_the_environment(s3):
    assert signed_with(s3) == ["KEYOFTHETEST"]


def test_credentials_and_endpoint_come_from_a_profile(s3, monkeypatch, tmp_path):
    (tmp_path / "credentials").write_text(
        "[default]\naws_access_key_id = OTHER\naws_secret_access_key = s\n"
        "[lab]\naws_access_key_id = KEYOFLAB\naws_secret_access_key = s\n"
    )
    (tmp_path / "config").write_text(
        f"[profile lab]\nregion = eu-west-1\nendpoint_url = {s3.url}\n"
    )
    for name in ("ACCESS_KEY_ID", "SECRET_ACCESS_KEY", "ENDPOINT_URL", "REGION"):
        monkeypatch.delenv(f"AWS_{name}")
    monkeypatch.setenv("AWS_SHARED_CREDENTIALS_FILE", str(tmp_path / "credentials"))
    monkeypatch.setenv("AWS_CONFIG_FILE", str(tmp_path / "config"))
    monkeypatch.setenv("AWS_PROFILE", "lab")
    assert signed_with(s3) == ["KEYOFLAB"]
    monkeypatch.setenv("AWS_PROFILE", "absent")
    end_helpers()
    with pytest.raises(NotServed, match=r"profile .absent. could not be found.*; do: correct"):
        fetch_small("s3://bkt/x", limit_bytes=9)


def test_credentials_come_from_the_role_of_a_container(s3, monkeypatch):
    s3.credentials = {
        "AccessKeyId": "KEYOFROLE", "SecretAccessKey": "s", "Token": "t",
        "Expiration": "2099-01-01T00:00:00Z",
    }  # fmt: skip
    for name in ("ACCESS_KEY_ID", "SECRET_ACCESS_KEY"):
        monkeypatch.delenv(f"AWS_{name}")
    monkeypatch.setenv("AWS_CONTAINER_CREDENTIALS_FULL_URI", f"{s3.url}/role")
    assert signed_with(s3) == ["KEYOFROLE"]


def test_requests_are_not_signed_where_no_credentials_are_found(s3, monkeypatch):
    for name in ("ACCESS_KEY_ID", "SECRET_ACCESS_KEY"):
        monkeypatch.delenv(f"AWS_{name}")
    assert signed_with(s3) == ["refused", None]
    with pytest.raises(NotServed, match=r"HTTP 403.* no credentials were found .*AWS_PROFILE"):
        fetch_small("s3://bkt/x", limit_bytes=9)


def test_azure_takes_the_names_of_its_own_tools(bucket, monkeypatch):
    server, _, _ = bucket
    for name in ("STORAGE_ENDPOINT", "STORAGE_ACCOUNT", "SKIP_SIGNATURE"):
        monkeypatch.delenv(f"AZURE_{name}")
    key = "c2VjcmV0"
    text = f"AccountName=acc;AccountKey={key};BlobEndpoint={server.url}"
    monkeypatch.setenv("AZURE_STORAGE_CONNECTION_STRING", text)
    end_helpers()
    assert fetch_small("az://box/s-0.tar", limit_bytes=SIZE)
    assert server.logins[-1].startswith("SharedKey acc:")
    monkeypatch.setenv("AZURE_STORAGE_CONNECTION_STRING", text.replace("AccountName", "X"))
    end_helpers()
    with pytest.raises(NotServed, match="got no storage account; do: export AZURE_STORAGE_ACCOUNT"):
        fetch_small("az://box/s-0.tar", limit_bytes=SIZE)


# ---------------------------------------------------------------------------------- Hugging Face


def test_hugging_face_is_read_by_https_with_the_token(tmp_path, monkeypatch):
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    monkeypatch.setattr(fetch, "LONGEST_PAUSE_S", 0.02)
    for place in ("datasets/org/name/resolve/main/a", "datasets/org/name/resolve/v1.0/a"):
        (tmp_path / "far" / place).mkdir(parents=True)
        (tmp_path / "far" / place / "x.tar").write_bytes(place.encode())
    with serving(tmp_path / "far") as server:
        monkeypatch.setenv("HF_ENDPOINT", server.url)
        monkeypatch.setenv("HF_TOKEN", "hf_secret")
        got = fetch_small("hf://datasets/org/name/a/x.tar", limit_bytes=99)
        assert got == b"datasets/org/name/resolve/main/a"
        got = fetch_small("hf://datasets/org/name@v1.0/a/x.tar", limit_bytes=99)
        assert got == b"datasets/org/name/resolve/v1.0/a"
        assert server.logins == ["Bearer hf_secret"] * 2
        monkeypatch.delenv("HF_TOKEN")
        monkeypatch.setenv("HF_HOME", str(tmp_path))
        fetch_small("hf://datasets/org/name/a/x.tar", limit_bytes=99)
        (tmp_path / "token").write_text("hf_saved\n")
        fetch_small("hf://datasets/org/name/a/x.tar", limit_bytes=99)
        assert server.logins[2:] == [None, "Bearer hf_saved"]
        with pytest.raises(NotServed, match=r"HTTP 404 .*; do: check the name, or, .* HF_TOKEN"):
            fetch_small("hf://datasets/org/other/x.tar", limit_bytes=99)


def test_the_token_is_not_sent_to_another_host(tmp_path, monkeypatch):
    monkeypatch.setenv("no_proxy", "127.0.0.1,localhost")
    monkeypatch.setenv("HF_TOKEN", "hf_secret")
    (tmp_path / "x.tar").write_bytes(b"content")
    with serving(tmp_path) as far, serving(tmp_path) as hub:
        monkeypatch.setenv("HF_ENDPOINT", hub.url)
        other = far.url.replace("127.0.0.1", "localhost")
        hub.redirects["datasets/o/n/resolve/main/x.tar"] = f"{other}/x.tar"
        assert fetch_small("hf://datasets/o/n/x.tar", limit_bytes=99) == b"content"
        assert (hub.logins, far.logins) == (["Bearer hf_secret"], [None])
