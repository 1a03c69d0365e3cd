"""An in-memory Google Cloud Storage server on localhost.

The server implements the JSON API as used by gcsfs, google-cloud-storage, TensorStore and
ArrayRecord: three types of uploads, range reads, paged listings, deletions, and generation
conditions for atomic writes.
"""

import contextlib
import http.server
import itertools
import json
import re
import threading
from typing import Any, NamedTuple
from urllib.parse import parse_qsl, quote, unquote, urlsplit

import pytest

PAGE = 40  # objects per page; small, so listings have several pages
ROUTES = {
    "describe_bucket": r"GET /storage/v1/b/([^/]+)",
    "list_objects": r"GET /storage/v1/b/([^/]+)/o",
    "read": r"GET (?:/download)?/storage/v1/b/([^/]+)/o/([^/]+)",
    "delete": r"DELETE /storage/v1/b/([^/]+)/o/([^/]+)",
    "upload": r"(?:POST|PUT) /upload/storage/v1/b/([^/]+)/o",
}
REASONS = {
    400: "the request is unknown to this server",
    403: "no access to the bucket's metadata and listing",
    404: "there is no such bucket or object",
    304: "it has not changed",
    412: "the generation does not match",
    416: "the range cannot be satisfied",
}

Answer = tuple[int, bytes, dict[str, str]]
"""Status, body and headers."""
Objects = dict[str, "Blob"]


class Blob(NamedTuple):
    """An object; every write changes the generation."""

    data: bytes
    generation: int


class FakeGcs(http.server.ThreadingHTTPServer):
    """A running server; as a context manager, all clients use the server.

    The bucket `forbidden` denies all access; `nameless` denies access to the metadata.
    """

    def __init__(self, *buckets: str):
        super().__init__(("localhost", 0), Handler)
        self.objects: dict[str, Objects] = {name: {} for name in buckets}
        self.requests: list[str] = []
        self.uploads: dict[str, bytes] = {}
        self.numbers = itertools.count(1)
        self.lock = threading.Lock()
        self.url = f"http://localhost:{self.server_port}"
        self.environ = {
            "STORAGE_EMULATOR_HOST": self.url,  # gcsfs and google-cloud-storage
            "CLOUD_STORAGE_EMULATOR_ENDPOINT": self.url,  # ArrayRecord
            "TENSORSTORE_GCS_HTTP_URL": self.url,
            "GOOGLE_AUTH_TOKEN_FOR_TESTING": "anyone",  # TensorStore
            # gcsfs would request the bucket type over gRPC; this server has no gRPC.
            "GCSFS_EXPERIMENTAL_ZB_HNS_SUPPORT": "false",
        }
        threading.Thread(target=self.serve_forever, daemon=True).start()

    def __enter__(self) -> "FakeGcs":
        self.patch = pytest.MonkeyPatch()
        for name, value in self.environ.items():
            self.patch.setenv(name, value)
        return self

    def __exit__(self, *_: object) -> None:
        self.patch.undo()
        self.shutdown()
        self.server_close()

    def put(self, bucket: str, name: str, data: bytes) -> Blob:
        """Writes an object without a request, as another host would."""
        self.objects[bucket][name] = blob = Blob(data, next(self.numbers))
        return blob


class Handler(http.server.BaseHTTPRequestHandler):
    """Answers the requests on a connection."""

    protocol_version = "HTTP/1.1"
    wbufsize = -1  # A single packet per answer; a second packet waits for an acknowledgment.
    server: FakeGcs

    def handle(self) -> None:
        """Answers until the client closes the connection, possibly within an answer."""
        with contextlib.suppress(ConnectionError):
            super().handle()

    def respond(self) -> None:
        """Answers a request."""
        self.body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        with self.server.lock:
            self.server.requests.append(f"{self.command} {unquote(self.path)}")
            answer = self.find_answer()
        status, body, headers = answer
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name, value)
        if status not in (204, 304):
            self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    do_GET = do_POST = do_PUT = do_DELETE = respond

    def find_answer(self) -> Answer:
        """Returns the answer to the request."""
        url = urlsplit(self.path)
        self.query = dict(parse_qsl(url.query))
        for route, pattern in ROUTES.items():
            if match := re.fullmatch(pattern, f"{self.command} {url.path}"):
                bucket, *names = map(unquote, match.groups())
                if bucket not in self.server.objects:
                    return refuse(403 if bucket == "forbidden" else 404)
                return getattr(self, route)(bucket, self.server.objects[bucket], *names)
        return refuse(400)

    def describe_bucket(self, bucket: str, objects: Objects) -> Answer:
        described = {"kind": "storage#bucket", "id": bucket, "name": bucket}
        return refuse(403) if bucket == "nameless" else as_json(described)

    def list_objects(self, bucket: str, objects: Objects) -> Answer:
        prefix, delimiter = self.query.get("prefix", ""), self.query.get("delimiter", "\n")
        first = max(self.query.get("startOffset", ""), self.query.get("pageToken", ""))
        size = min(PAGE, int(self.query.get("maxResults", PAGE)))
        items, prefixes = [], []
        page: dict[str, Any] = {"kind": "storage#objects", "items": items, "prefixes": prefixes}
        for name, blob in sorted(objects.items()):
            if not name.startswith(prefix) or name >= self.query.get("endOffset", "\U0010ffff"):
                continue
            before, cut, _ = name[len(prefix) :].partition(delimiter)
            shown = prefix + before + cut
            if shown < first or shown in prefixes:
                continue
            if len(items) + len(prefixes) == size:
                return as_json(page | {"nextPageToken": shown})
            prefixes.append(shown) if cut else items.append(describe(bucket, name, blob))
        return as_json(page)

    def read(self, bucket: str, objects: Objects, name: str) -> Answer:
        if name not in objects:
            return refuse(404)
        if status := self.check(objects, name):
            return refuse(status)
        data, generation = objects[name]
        if self.query.get("alt") != "media":
            return as_json(describe(bucket, name, objects[name]))
        headers = {"x-goog-generation": str(generation)}
        span = re.fullmatch(r"bytes=(\d*)-(\d*)", self.headers.get("Range", ""))
        if span is None:
            return 200, data, headers
        first, last = span.groups()
        start = int(first) if first else max(len(data) - int(last), 0)
        stop = min(int(last) + 1, len(data)) if first and last else len(data)
        if start >= stop:
            return refuse(416)
        headers["Content-Range"] = f"bytes {start}-{stop - 1}/{len(data)}"
        return 206, data[start:stop], headers

    def delete(self, bucket: str, objects: Objects, name: str) -> Answer:
        if status := self.check(objects, name):
            return refuse(status)
        return (204, b"", {}) if objects.pop(name, None) else refuse(404)

    def upload(self, bucket: str, objects: Objects) -> Answer:
        name, data = self.query.get("name", ""), self.body
        if upload := self.query.get("upload_id"):
            data = self.server.uploads[upload] = self.server.uploads[upload] + data
            if self.headers["Content-Range"].endswith("/*"):
                return 308, b"", {"Range": f"bytes=0-{len(data) - 1}"}
        elif self.query["uploadType"] == "resumable":
            upload = str(next(self.server.numbers))
            self.server.uploads[upload] = b""
            name = name or json.loads(data)["name"]
            more = f"&upload_id={upload}&name={quote(name, safe='')}"
            return 200, b"", {"Location": self.server.url + self.path + more}
        elif self.query["uploadType"] == "multipart":
            described, data = split_parts(self.headers["Content-Type"], data)
            name = json.loads(described)["name"]
        if status := self.check(objects, name):
            return refuse(status)
        return as_json(describe(bucket, name, self.server.put(bucket, name, data)))

    def check(self, objects: Objects, name: str) -> int:
        """Returns the error status for a failed precondition, or 0."""
        generation = str(objects[name].generation if name in objects else 0)
        if self.query.get("ifGenerationMatch", generation) != generation:
            return 412
        return 304 if self.query.get("ifGenerationNotMatch") == generation else 0

    def log_message(self, format: str, *args: Any) -> None:
        """Logs nothing."""


def describe(bucket: str, name: str, blob: Blob) -> dict[str, str]:
    """Returns an object's API metadata; each generation is a second later."""
    minutes, seconds = divmod(blob.generation, 60)
    return {
        "bucket": bucket,
        "name": name,
        "size": str(len(blob.data)),
        "generation": str(blob.generation),
        "updated": f"2026-01-01T{minutes // 60:02}:{minutes % 60:02}:{seconds:02}.000Z",
    }


def split_parts(content_type: str, body: bytes) -> list[bytes]:
    """Returns both parts of a multipart upload."""
    (boundary,) = re.findall(r'boundary="?([^";]+)', content_type)
    _, *parts, _ = body.split(b"--" + boundary.encode())
    end = b"\r\n" if parts[0].startswith(b"\r\n") else b"\n"
    return [part.split(end + end, 1)[1].removesuffix(end) for part in parts]


def as_json(value: Any, status: int = 200) -> Answer:
    """Returns an answer with a JSON body."""
    return status, json.dumps(value).encode(), {"Content-Type": "application/json"}


def refuse(status: int) -> Answer:
    """Returns an error answer."""
    error = {"code": status, "message": REASONS[status]}
    return (304, b"", {}) if status == 304 else as_json({"error": error}, status)
