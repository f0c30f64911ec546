"""The program that speaks to object storage, with obstore; objects.py starts it and talks to it.

obstore runs threads of its own, which do not survive a fork: a call in a forked loader worker would
wait for ever. So it runs in a process of its own, which imports nothing of this package.

stdin has one request per line, as JSON: {"do": "get", "url": ..., "start": ...}; the actions are
the functions below. stdout has frames: one letter, four bytes of length, and the content:
S the store and its credentials were found, H head (JSON), D data, E end, F failure (JSON: reason,
final, restart, advice).
"""

import configparser
import functools
import http.client
import json
import os
import re
import shutil
import sys
from concurrent.futures import ThreadPoolExecutor
from datetime import datetime, timedelta, timezone

SETTLED = timedelta(minutes=8)  # botocore renews credentials at least 10 minutes before their end
PART = 16 << 20  # bytes of a part of an upload; 10,000 parts are allowed
# Error codes of S3, Google's XML interface and Azure -> what to do. None of them passes by itself.
ADVICE = {
    "NoSuchBucket": "create the bucket, or correct its name in the URL",
    "ContainerNotFound": "create the container, or correct its name in the URL",
    "AccessDenied": "ask for access to it, or choose other credentials ({where})",
    "AllAccessDisabled": "ask for access to it, or choose other credentials ({where})",
    "InvalidAccessKeyId": "correct the credentials ({where})",
    "SignatureDoesNotMatch": "correct the credentials ({where})",
    "InvalidToken": "log in again, or renew the credentials ({where})",
    "ExpiredToken": "log in again, or renew the credentials ({where})",
    "TokenRefreshRequired": "log in again, or renew the credentials ({where})",
    "AuthenticationFailed": "correct or renew the credentials ({where}), and set the clock",
    "NoAuthenticationInformation": "set credentials ({where})",
    "PublicAccessNotPermitted": "set credentials ({where})",
    "InsufficientAccountPermissions": "ask for access to it, or choose other credentials ({where})",
    "AuthorizationPermissionMismatch": "ask for a role that may read and write blobs",
    "AuthorizationFailure": "ask for access from this network",
    "RequestTimeTooSkewed": "set the clock of this machine",
    "PermanentRedirect": "name the bucket's region: export AWS_REGION=...",
    "AuthorizationHeaderMalformed": "name the bucket's region: export AWS_REGION=...",
    "IllegalLocationConstraintException": "name the bucket's region: export AWS_REGION=...",
    "QuotaExceeded": "make room in the storage",
}
WHERE = {
    "s3": "AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, or AWS_PROFILE, or aws configure",
    "gs": "GOOGLE_APPLICATION_CREDENTIALS, or gcloud auth application-default login; for a public "
    "bucket: export GOOGLE_SKIP_SIGNATURE=true",
    "az": "AZURE_STORAGE_ACCOUNT with AZURE_STORAGE_KEY or AZURE_STORAGE_SAS_TOKEN, or az login; "
    "for a public container: export AZURE_SKIP_SIGNATURE=true",
}
UNSIGNED: set[str] = set()  # schemes for which no credentials were found
AGAIN_BY_PIP = "pip install --force-reinstall obstore botocore"
AGAIN = (408, 416, 425, 429)  # statuses 4xx after which another try may succeed


class Refused(Exception):
    """Raised for what another try will not mend. advice: what to do."""

    def __init__(self, reason: str, advice: str):
        super().__init__(reason)
        self.advice = advice


# ----------------------------------------------------------------------------------- credentials


@functools.cache
def bucket_store(scheme: str, bucket: str):
    """Return obstore's store of a bucket, with the credentials that the user's own tools find."""
    from obstore import store

    config, credentials = {"s3": _s3, "gs": _gs, "az": _az}[scheme](bucket)
    kinds = {"s3": store.S3Store, "gs": store.GCSStore, "az": store.AzureStore}
    endpoint = config.get("endpoint") or config.get("base_url") or ""
    return kinds[scheme](
        bucket,
        config=config,
        client_options={"allow_http": endpoint.startswith("http://"), "timeout": "7days"},
        retry_config={"max_retries": 0},  # fetch.py tries again
        **({"credential_provider": credentials} if credentials else {}),
    )


def _s3(bucket: str):
    """Return the settings of an S3 bucket and a function that returns credentials.

    The chain is botocore's, as in the AWS CLI: environment, profile, SSO, container, instance.
    Without any credentials the requests are not signed, as public buckets allow.
    """
    import botocore.exceptions
    import botocore.session

    try:
        session = botocore.session.Session()
        profile = session.get_scoped_config()
        found = None if _true("AWS_SKIP_SIGNATURE") else session.get_credentials()
        region = session.get_config_variable("region")
    except (botocore.exceptions.BotoCoreError, configparser.Error) as error:
        raise Refused(str(error), f"correct the credentials ({WHERE['s3']})") from None
    endpoint = (
        os.environ.get("AWS_ENDPOINT_URL_S3")
        or os.environ.get("AWS_ENDPOINT_URL")
        or profile.get("endpoint_url")
    )
    if endpoint and not endpoint.startswith(("http://", "https://")):
        raise Refused(
            f"got the endpoint {endpoint}; need a URL",
            f"export AWS_ENDPOINT_URL=https://{endpoint}, or http://, or correct it in the profile",
        )
    region = os.environ.get("AWS_REGION") or region
    if not region:
        region = "us-east-1" if endpoint else _region_of(bucket)
    config = {"region": region} | ({"endpoint": endpoint} if endpoint else {})
    if found is None:
        UNSIGNED.add("s3")
        return config | {"skip_signature": True}, None

    def credentials() -> dict:
        try:
            frozen = found.get_frozen_credentials()
        except botocore.exceptions.BotoCoreError as error:
            raise Refused(str(error), f"log in again ({WHERE['s3']})") from None
        return {
            "access_key_id": frozen.access_key,
            "secret_access_key": frozen.secret_key,
            "token": frozen.token,
            "expires_at": datetime.now(timezone.utc) + SETTLED,
        }

    credentials()  # an error inside of obstore would lose its text
    return config, credentials


def _region_of(bucket: str) -> str:
    """Ask AWS for the region of a bucket, which it tells to everybody."""
    connection = http.client.HTTPSConnection("s3.amazonaws.com", timeout=10)
    try:
        connection.request("HEAD", f"/{bucket}")
        return connection.getresponse().headers.get("x-amz-bucket-region") or "us-east-1"
    except (OSError, http.client.HTTPException):
        return "us-east-1"  # the request that follows reports what is wrong
    finally:
        connection.close()


def _gs(bucket: str):
    """Return the settings of a Google bucket; obstore reads the rest from the environment."""
    file = os.environ.get("GOOGLE_APPLICATION_CREDENTIALS")
    if file and not os.path.isfile(file):
        raise Refused(
            f"GOOGLE_APPLICATION_CREDENTIALS names {file}, which is no file", "correct or unset it"
        )
    config = {"base_url": url} if (url := os.environ.get("GOOGLE_BASE_URL")) else {}
    return config | ({"skip_signature": True} if _true("GOOGLE_SKIP_SIGNATURE") else {}), None


def _az(container: str):
    """Return the settings of an Azure container, by the names of the Azure CLI and of obstore."""
    text = os.environ.get("AZURE_STORAGE_CONNECTION_STRING", "")
    parts = dict(part.split("=", 1) for part in text.split(";") if "=" in part)
    names = {
        "account_name": ("AccountName", "AZURE_STORAGE_ACCOUNT", "AZURE_STORAGE_ACCOUNT_NAME"),
        "account_key": ("AccountKey", "AZURE_STORAGE_KEY", "AZURE_STORAGE_ACCOUNT_KEY"),
        "sas_key": ("SharedAccessSignature", "AZURE_STORAGE_SAS_TOKEN", "AZURE_STORAGE_SAS_KEY"),
        "endpoint": ("BlobEndpoint", "AZURE_STORAGE_ENDPOINT"),
    }
    known = parts | os.environ
    config = {
        key: next(known[name] for name in spellings if known.get(name))
        for key, spellings in names.items()
        if any(known.get(name) for name in spellings)
    }
    if "account_name" not in config:
        raise Refused(
            "got no storage account",
            "export AZURE_STORAGE_ACCOUNT=NAME, or AZURE_STORAGE_CONNECTION_STRING",
        )
    if _true("AZURE_SKIP_SIGNATURE"):
        return config | {"skip_signature": True}, None
    others = ("AZURE_CLIENT_ID", "AZURE_STORAGE_CLIENT_ID", "IDENTITY_ENDPOINT", "MSI_ENDPOINT")
    keyed = config.keys() & {"account_key", "sas_key"} or any(map(os.environ.get, others))
    if not keyed and shutil.which("az"):
        config["use_azure_cli"] = True
    return config, None


def _true(name: str) -> bool:
    return os.environ.get(name, "").lower() in ("1", "true", "yes")


# --------------------------------------------------------------------------------------- actions


def get(store, key: str, request: dict) -> None:
    """Send an object from byte `start` on: its head, then its bytes."""
    import obstore

    start = request["start"]
    options = {"options": {"range": {"offset": start}}} if start else {}
    result = obstore.get(store, key, **options)
    head = {"start": result.range[0], "total": result.meta["size"], "tag": result.meta["e_tag"]}
    send(b"H", head)
    for chunk in result.stream(min_chunk_size=1):  # as they come, so that a slow one is no stall
        send(b"D", chunk)


def put(store, key: str, request: dict) -> None:
    """Write the file `path` as an object, which appears when it is complete."""
    import obstore

    with open(request["path"], "rb") as file:
        obstore.put(store, key, file, chunk_size=PART, max_concurrency=4)


def names(store, key: str, request: dict) -> None:
    """Send the names and sizes of all objects under KEY/, as one head."""
    import obstore

    found = {}
    for batch in obstore.list(store, prefix=key.rstrip("/") or None):
        for entry in batch:
            found[entry["path"].removeprefix(key.rstrip("/")).lstrip("/")] = entry["size"]
    send(b"H", found)


def download(store, key: str, request: dict) -> None:
    """Write small objects, `names` under KEY/, as files of the directory `path`."""
    import obstore

    def fetch(name: str) -> None:
        content = obstore.get(store, _joined(key, name)).bytes()
        with open(os.path.join(request["path"], name), "wb") as file:
            file.write(content)

    with ThreadPoolExecutor(16) as threads:
        list(threads.map(fetch, request["names"]))


def delete(store, key: str, request: dict) -> None:
    """Delete objects of the bucket: `names`, under KEY/."""
    import obstore

    obstore.delete(store, [_joined(key, name) for name in request["names"]])


def _joined(key: str, name: str) -> str:
    return f"{key}/{name}".lstrip("/")


ACTIONS = {action.__name__: action for action in (get, put, names, download, delete)}


# -------------------------------------------------------------------------------------- failures


def failure(scheme: str, error: BaseException) -> dict:
    """Return reason, final, restart and advice for an error, without secrets."""
    if isinstance(error, Refused):
        return dict(reason=str(error), final=True, advice=error.advice)
    if not isinstance(error, Exception):  # a panic of obstore's, as at a wrong endpoint
        return dict(reason=f"obstore gave up: {error}", final=True)
    if isinstance(error, ImportError):
        reason = f"obstore or botocore is installed, but does not load ({error})"
        return dict(reason=reason, final=True, advice=f"install both again ({AGAIN_BY_PIP})")
    text = str(error).split("Debug source")[0]
    code = re.search(r"<Code>(\w+)</Code>", text)
    message = re.search(r"<Message>([^<]*)</Message>", text)
    status = re.search(r"status code: (\d{3})|\b(\d{3}) [A-Z][a-z]+", text)
    status = int(status[1] or status[2]) if status else 0
    if isinstance(error, OSError) and error.filename:  # the file to upload
        return dict(reason=f"{error.filename}: {error.strerror}", final=True)
    if code is None and isinstance(error, FileNotFoundError):
        return dict(reason="HTTP 404 no such object", final=True)
    if code is None and not status:
        return _without_answer(scheme, text)
    reason = f"HTTP {status}" if status else "refused"
    if code:
        said = message[1].splitlines()[0].rstrip(".") if message and message[1] else ""
        reason += f" {code[1]}" + (f" ({said})" if said else "")
    if status in (401, 403) and scheme in UNSIGNED:
        reason += ", and no credentials were found to sign the request with"
    known = code and code[1] in ADVICE
    advice = ADVICE[code[1]] if known else ADVICE["AccessDenied"] if status in (401, 403) else ""
    # A token in a file may be renewed while a run goes on; one in the environment may not.
    renewable = code and code[1] == "ExpiredToken" and "AWS_SESSION_TOKEN" not in os.environ
    final = bool(known or (300 <= status < 500 and status not in AGAIN)) and not renewable
    restart = status == 416 or "non-partial" in text.lower()
    return dict(
        reason=reason, final=final, restart=restart, advice=advice.format(where=WHERE[scheme])
    )


def _without_answer(scheme: str, text: str) -> dict:
    """Return the failure of a request without an answer, such as a broken connection."""
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    reason = re.sub(r"\?[^\s\"')]*", "?...", lines[0] if lines else "no reason given")
    tokens = ("metadata.google", "169.254.169.254", "token request", "az account", "credential")
    if any(word in text.lower() for word in tokens):
        return dict(
            reason="got no credentials", final=True, advice=f"set credentials ({WHERE[scheme]})"
        )
    if "redirect without location" in text.lower():
        return dict(
            reason="the bucket is in another region", final=True, advice=ADVICE["PermanentRedirect"]
        )
    cause = re.search(r"(?i)connection re\w+|dns error|timed out|broken pipe|certificate\w*", text)
    reason = cause[0].lower() if cause else reason[:200]
    return dict(reason=reason, restart="partial" in text.lower())


def send(kind: bytes, content: bytes | dict = b"") -> None:
    """Write a frame to stdout."""
    data = json.dumps(content).encode() if isinstance(content, dict) else content
    header = kind + len(data).to_bytes(4, "little")
    written = os.writev(1, [header, data]) - len(header)  # a pipe takes 5 bytes whole
    while written < len(data):
        written += os.write(1, memoryview(data)[written:])


def main() -> None:
    """Answer requests until stdin ends."""
    for line in sys.stdin:
        request = json.loads(line)
        scheme, _, place = request["url"].partition("://")
        bucket, _, key = place.partition("/")
        scheme = scheme.lower()
        try:
            store = bucket_store(scheme, bucket)
            send(b"S")
            ACTIONS[request["do"]](store, key, request)
        except BrokenPipeError:
            return
        except BaseException as error:  # obstore has many, and panics; the parent raises its own
            send(b"F", failure(scheme, error))
            bucket_store.cache_clear()  # the next try reads the credentials again
        else:
            send(b"E")


if __name__ == "__main__":
    sys.path.pop(0)  # the directory of this file
    main()
