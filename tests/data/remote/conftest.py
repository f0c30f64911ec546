"""A local S3 server."""

import pytest


@pytest.fixture
def s3(monkeypatch):
    """A local S3 server with an empty bucket "bkt", for s3:// URLs."""
    for package in ("obstore", "botocore", "moto"):
        pytest.importorskip(package, reason=f"{package} is not installed (extras cloud and dev)")
    from object_storage import s3_server

    from ds_classifier.data.remote import fetch, mirror

    monkeypatch.setattr(mirror, "PATIENCE", fetch.Patience(retries=3, pause_s=0.02))
    monkeypatch.setattr(mirror, "UPLOAD_S", 3.0)
    with s3_server(monkeypatch) as server:
        yield server
