"""A small S3 server on this machine, in memory, that can cut connections.

It speaks what a client needs to read and write objects: HEAD, GET with a range, PUT, uploads in parts, DELETE, and
listing. A cut closes a connection at a random moment, both ways: before a request is read or midway through its body
(nothing is kept of it), after it was done but before its answer, or midway through the answer's body.

    with serving(FakeS3()) as server:
        server.environment()  # what a client needs in its environment
"""

from __future__ import annotations

import hashlib
import random
import re
import socket
import threading
import time
import urllib.parse
from collections.abc import Iterator
from contextlib import contextmanager
from email.utils import formatdate
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from xml.sax.saxutils import escape

KEY, SECRET = "fake-key", "fake-secret"
MOMENTS = ("unread", "reading", "unanswered", "answering")
_STATUS = {"NoSuchKey": 404, "NoSuchBucket": 404, "NoSuchUpload": 404, "AccessDenied": 403, "InvalidAccessKeyId": 403,
           "InvalidPart": 400, "InvalidRange": 416, "NotImplemented": 501}  # fmt: skip


class Cut(Exception):
    """This connection ends here."""


class Refused(Exception):
    """An error of S3, by its code."""


class FakeS3(ThreadingHTTPServer):
    """The server.

    Attributes:
        objects: {(bucket, key): (bytes, time)}. buckets: that exist; `read_only`: of these, where nothing is written.
        cutting: share of requests that are cut. cuts: what was cut, (moment, method, key) each.
        requests: how many were begun, by method.
    """

    daemon_threads = True
    request_queue_size = 128

    def __init__(self, buckets=("bucket",), cutting: float = 0.0, seed: int = 0):
        super().__init__(("127.0.0.1", 0), _Handler)
        self.objects: dict[tuple[str, str], tuple[bytes, float]] = {}
        self.buckets, self.read_only = set(buckets), set()
        self.cutting, self.cuts = cutting, []
        self.requests: dict[str, int] = {}
        self.parts: dict[str, dict[int, bytes]] = {}
        self.lock = threading.RLock()
        self._rng = random.Random(seed)

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_address[1]}"

    def environment(self) -> dict[str, str]:
        """Of a client."""
        return {"AWS_ENDPOINT_URL": self.url, "AWS_ACCESS_KEY_ID": KEY, "AWS_SECRET_ACCESS_KEY": SECRET,
                "AWS_REGION": "us-east-1", "AWS_EC2_METADATA_DISABLED": "true"}  # fmt: skip

    def names(self, prefix: str = "", bucket: str = "bucket") -> list[str]:
        """Keys of objects; not those that stand for folders."""
        with self.lock:
            return sorted(k for b, k in self.objects if b == bucket and k.startswith(prefix) and not k.endswith("/"))

    def put(self, name: str, data: bytes, bucket: str = "bucket") -> None:
        with self.lock:
            self.objects[bucket, name] = data, time.time()

    def put_folder(self, folder: Path, prefix: str) -> None:
        """Copies the files of a folder there."""
        for path in sorted(folder.rglob("*")):
            if path.is_file():
                self.put(f"{prefix}/{path.relative_to(folder).as_posix()}", path.read_bytes())

    def save(self, prefix: str, folder: Path) -> Path:
        """Copies objects into a folder."""
        for name in self.names(f"{prefix}/"):
            path = folder / name.removeprefix(f"{prefix}/")
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(self.objects["bucket", name][0])
        return folder

    def moment(self, method: str) -> tuple[str, float] | None:
        """Whether a request is cut: at which moment, and after what part of the body."""
        with self.lock:
            if self._rng.random() >= self.cutting:
                return None
            without = {"GET": "reading", "HEAD": "reading answering", "DELETE": "reading answering",
                       "PUT": "answering"}.get(method, "")  # fmt: skip
            return self._rng.choice([x for x in MOMENTS if x not in without.split()]), self._rng.random()

    def handle_error(self, request, client_address) -> None:
        """A client that hangs up is no error."""


@contextmanager
def serving(server: FakeS3) -> Iterator[FakeS3]:
    """The server, while the body runs."""
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True)
    thread.start()
    try:
        yield server
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: FakeS3
    disable_nagle_algorithm = True

    def log_message(self, *arguments) -> None:
        pass

    def _handle(self) -> None:
        server = self.server
        address = urllib.parse.urlsplit(self.path)
        self.query = dict(urllib.parse.parse_qsl(address.query, keep_blank_values=True))
        bucket, _, key = urllib.parse.unquote(address.path).lstrip("/").partition("/")
        with server.lock:
            server.requests[self.command] = server.requests.get(self.command, 0) + 1
        self.cut = server.moment(self.command)
        try:
            self._at("unread")
            data = self._body()
            try:
                status, headers, answer = self._answer(bucket, key, data)
            except Refused as error:
                code = str(error)
                status, headers = _STATUS[code], {}
                answer = f"<Error><Code>{code}</Code><Message>{code} it is</Message></Error>".encode()
            self._at("unanswered")
            self.send_response(status)
            if status != 204:
                headers = {"Content-Length": str(len(answer)), **headers}
            for name, value in headers.items():
                self.send_header(name, value)
            self.end_headers()
            if self.command != "HEAD" and answer:
                if self.cut is not None and self.cut[0] == "answering":
                    self.wfile.write(answer[: int(self.cut[1] * len(answer))])
                    self._at("answering")
                self.wfile.write(answer)
        except (Cut, OSError):
            self.close_connection = True
            try:
                self.connection.shutdown(socket.SHUT_RDWR)
            except OSError:
                pass

    do_GET = do_HEAD = do_PUT = do_POST = do_DELETE = _handle

    def _at(self, moment: str) -> None:
        if self.cut is not None and self.cut[0] == moment:
            with self.server.lock:
                self.server.cuts.append((moment, self.command, self.path))
            raise Cut

    def _body(self) -> bytes:
        if self.headers.get("Expect", "").lower() == "100-continue":
            self.send_response_only(100)
            self.end_headers()
        if "chunked" in self.headers.get("Transfer-Encoding", ""):
            data = b""
            while size := int(self.rfile.readline().split(b";")[0], 16):
                data += self.rfile.read(size)
                self.rfile.readline()
                if self.cut is not None and self.cut[0] == "reading":
                    self._at("reading")
            self.rfile.readline()
        else:
            size = int(self.headers.get("Content-Length") or 0)
            if size and self.cut is not None and self.cut[0] == "reading":
                self.rfile.read(int(self.cut[1] * size))
                self._at("reading")
            data = self.rfile.read(size)
            if len(data) < size:
                raise Cut
        if "aws-chunked" in self.headers.get("Content-Encoding", ""):
            data = _unchunked(data)
        return data

    def _answer(self, bucket: str, key: str, data: bytes) -> tuple[int, dict, bytes]:
        server, query, method = self.server, self.query, self.command
        found = re.search(r"Credential=([^/]*)/", self.headers.get("Authorization", ""))
        if found is None:
            raise Refused("AccessDenied")
        if found[1] != KEY:
            raise Refused("InvalidAccessKeyId")
        if bucket not in server.buckets:
            raise Refused("NoSuchBucket")
        if method in ("PUT", "POST", "DELETE") and bucket in server.read_only:
            raise Refused("AccessDenied")
        with server.lock:
            if not key:
                if method == "HEAD":
                    return 200, {}, b""
                if method == "GET":
                    return 200, {}, self._listed(bucket)
                if method == "POST" and "delete" in query:
                    names = [urllib.parse.unquote(x) for x in re.findall(r"<Key>(.*?)</Key>", data.decode())]
                    for name in names:
                        server.objects.pop((bucket, name), None)
                    return 200, {}, b"<DeleteResult></DeleteResult>"
                raise Refused("NotImplemented")
            if method == "PUT" and "partNumber" in query:
                parts = self._upload()
                parts[int(query["partNumber"])] = data
                return 200, {"ETag": _etag(data)}, b""
            if method == "PUT":
                server.objects[bucket, key] = (data, time.time())
                return 200, {"ETag": _etag(data)}, b""
            if method == "POST" and "uploads" in query:
                upload = f"upload-{len(server.parts)}-{server.requests['POST']}"
                server.parts[upload] = {}
                text = f"<InitiateMultipartUploadResult><UploadId>{upload}</UploadId></InitiateMultipartUploadResult>"
                return 200, {}, text.encode()
            if method == "POST" and "uploadId" in query:
                return 200, {}, self._complete(bucket, key, data)
            if method == "DELETE":
                if "uploadId" in query:
                    server.parts.pop(query["uploadId"], None)
                else:
                    server.objects.pop((bucket, key), None)
                return 204, {}, b""
            return self._read(bucket, key)

    def _upload(self) -> dict[int, bytes]:
        if self.query["uploadId"] not in self.server.parts:
            raise Refused("NoSuchUpload")
        return self.server.parts[self.query["uploadId"]]

    def _complete(self, bucket: str, key: str, data: bytes) -> bytes:
        parts = self._upload()
        numbers = [int(x) for x in re.findall(rb"<PartNumber>(\d+)</PartNumber>", data)]
        if not numbers or any(n not in parts for n in numbers):
            raise Refused("InvalidPart")
        whole = b"".join(parts[n] for n in numbers)
        self.server.objects[bucket, key] = (whole, time.time())
        del self.server.parts[self.query["uploadId"]]
        return f"<CompleteMultipartUploadResult><ETag>{_etag(whole)}</ETag></CompleteMultipartUploadResult>".encode()

    def _read(self, bucket: str, key: str) -> tuple[int, dict, bytes]:
        if (bucket, key) not in self.server.objects:
            raise Refused("NoSuchKey")
        data, at = self.server.objects[bucket, key]
        headers = {"ETag": _etag(data), "Last-Modified": formatdate(at, usegmt=True), "Accept-Ranges": "bytes"}
        asked = re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers.get("Range", ""))
        if asked is None:
            return 200, {**headers, "Content-Length": str(len(data))}, data
        first, last = int(asked[1]), min(int(asked[2] or len(data)), len(data) - 1)
        if first >= len(data):
            raise Refused("InvalidRange")
        return 206, {**headers, "Content-Range": f"bytes {first}-{last}/{len(data)}"}, data[first : last + 1]

    def _listed(self, bucket: str) -> bytes:
        query = self.query
        prefix, delimiter = query.get("prefix", ""), query.get("delimiter", "")
        most = min(int(query.get("max-keys", 1000)), 1000)
        after = query.get("continuation-token") or query.get("start-after") or ""
        rows: list[str] = []
        folders: set[str] = set()
        last, more = "", False
        for b, key in sorted(self.server.objects):
            if b != bucket or not key.startswith(prefix) or key <= after:
                continue
            inside, cut, _ = key[len(prefix) :].partition(delimiter) if delimiter else (key, "", "")
            if cut and (prefix + inside + cut in folders or after.startswith(prefix + inside + cut)):
                last = key
                continue
            if len(rows) == most:
                more = True
                break
            last = key
            if cut:
                folders.add(prefix + inside + cut)
                rows.append(f"<CommonPrefixes><Prefix>{escape(prefix + inside + cut)}</Prefix></CommonPrefixes>")
                continue
            data, at = self.server.objects[b, key]
            when = time.strftime("%Y-%m-%dT%H:%M:%S.000Z", time.gmtime(at))
            rows.append(
                f"<Contents><Key>{escape(key)}</Key><LastModified>{when}</LastModified><ETag>{escape(_etag(data))}"
                f"</ETag><Size>{len(data)}</Size><StorageClass>STANDARD</StorageClass></Contents>"
            )
        token = f"<NextContinuationToken>{escape(last)}</NextContinuationToken>" if more else ""
        return (
            '<?xml version="1.0" encoding="UTF-8"?><ListBucketResult>'
            f"<Name>{bucket}</Name><Prefix>{escape(prefix)}</Prefix><KeyCount>{len(rows)}</KeyCount>"
            f"<MaxKeys>{most}</MaxKeys><IsTruncated>{str(more).lower()}</IsTruncated>{token}{''.join(rows)}"
            "</ListBucketResult>"
        ).encode()


def _etag(data: bytes) -> str:
    return f'"{hashlib.md5(data).hexdigest()}"'


def _unchunked(data: bytes) -> bytes:
    """A body of `aws-chunked`: pieces with their lengths, then trailing headers."""
    found, at = b"", 0
    while True:
        end = data.index(b"\r\n", at)
        size = int(data[at:end].split(b";")[0], 16)
        if not size:
            return found
        found += data[end + 2 : end + 2 + size]
        at = end + 2 + size + 2
