"""A local S3 server."""

import pytest


@pytest.fixture(scope="session")
def s3_server():
    """A local S3 server, which takes a second to start."""
    for package in ("obstore", "botocore", "moto"):
        pytest.importorskip(package, reason=f"{package} is not installed (extras cloud and dev)")
    from object_storage import S3Server

    server = S3Server()
    yield server
    server.close()


@pytest.fixture
def s3(s3_server, monkeypatch):
    """A local S3 server with an empty bucket "bkt", for s3:// URLs."""
    from object_storage import found_by_environment

    from ds_classifier.data.remote import fetch, mirror

    monkeypatch.setattr(mirror, "PATIENCE", fetch.Patience(retries=3, pause_s=0.02))
    monkeypatch.setattr(mirror, "UPLOAD_S", 3.0)
    with found_by_environment(s3_server, monkeypatch):
        yield s3_server
