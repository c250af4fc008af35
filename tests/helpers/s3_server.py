"""The part of S3's REST interface that pyarrow's client speaks, over a dict: for tests, on loopback, signatures unread.

The client is the real one, so what is tested is how pyarrow's `s3://` behaves: empty objects as folders, multipart uploads, listings by
prefix, times of whole seconds. The server is no proof of what Amazon's does.
"""

from __future__ import annotations

import hashlib
import re
import threading
import time
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from email.utils import formatdate
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import parse_qs, unquote, urlsplit
from xml.sax.saxutils import escape

NAMESPACE = 'xmlns="http://s3.amazonaws.com/doc/2006-03-01/"'


class Bucket(dict[str, tuple[bytes, float]]):
    """Key -> (content, seconds since the epoch, whole)."""

    def __init__(self) -> None:
        super().__init__()
        self.parts: dict[str, dict[int, bytes]] = {}
        self.away = False


@contextmanager
def s3_server() -> Iterator[tuple[Bucket, str]]:
    """A bucket, and the query of URIs that lead to it: ``s3://key:secret@bucket/path?QUERY``."""
    bucket = Bucket()
    handler = type("BucketHandler", (_Handler,), {"bucket": bucket})
    server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield bucket, f"endpoint_override=127.0.0.1%3A{server.server_port}&scheme=http&region=us-east-1"
    finally:
        server.shutdown()
        server.server_close()


class _Handler(BaseHTTPRequestHandler):
    bucket: Bucket
    protocol_version = "HTTP/1.1"

    def log_message(self, *_: object) -> None:
        pass

    def _parsed(self) -> tuple[str | None, dict[str, str]]:
        """The key, None for the bucket itself, and the query."""
        parts = urlsplit(self.path)
        query = {key: values[0] for key, values in parse_qs(parts.query, keep_blank_values=True).items()}
        _, _, key = unquote(parts.path).lstrip("/").partition("/")
        return key or None, query

    def _body(self) -> bytes:
        if self.headers.get("Transfer-Encoding", "").lower() == "chunked":
            body = b""
            while size := int(self.rfile.readline().strip(), 16):
                body += self.rfile.read(size)
                self.rfile.readline()
            self.rfile.readline()
        else:
            body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        if "aws-chunked" in self.headers.get("Content-Encoding", ""):
            return _unchunked(body)
        return body

    def _answer(self, status: int, body: bytes = b"", **headers: str) -> None:
        self.send_response(status)
        length = headers.pop("length", str(len(body)))
        for name, value in {"Content-Length": length, "x-amz-request-id": "1", **headers}.items():
            self.send_header(name.replace("_", "-"), value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def _error(self, status: int, code: str) -> None:
        self._answer(
            status,
            f"<Error><Code>{code}</Code><Message>{code}</Message></Error>".encode(),
            Content_Type="application/xml",
        )

    def _put(self, key: str, content: bytes) -> str:
        self.bucket[key] = (content, float(int(time.time())))
        return f'"{hashlib.md5(content).hexdigest()}"'

    def do_GET(self) -> None:
        key, query = self._parsed()
        if self.bucket.away:
            self._error(400, "AccessDenied")
        elif key is None:
            self._list(query)
        elif key not in self.bucket:
            self._error(404, "NoSuchKey")
        else:
            content, written = self.bucket[key]
            about = {
                "Last_Modified": formatdate(written, usegmt=True),
                "ETag": '"x"',
                "Content_Type": "application/octet-stream",
            }
            if found := re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers.get("Range", "")):
                start, stop = int(found[1]), min(int(found[2] or len(content)) + 1, len(content))
                self._answer(
                    206, content[start:stop], Content_Range=f"bytes {start}-{stop - 1}/{len(content)}", **about
                )
            else:
                self._answer(200, content, length=str(len(content)), **about)

    def do_HEAD(self) -> None:
        key, _ = self._parsed()
        self._answer(200) if key is None else self.do_GET()

    def do_PUT(self) -> None:
        key, query = self._parsed()
        body = self._body()
        if self.bucket.away:
            self._error(403, "AccessDenied")
        elif key is None:
            self._answer(200)
        elif "partNumber" in query:
            self.bucket.parts[query["uploadId"]][int(query["partNumber"])] = body
            self._answer(200, ETag=f'"{hashlib.md5(body).hexdigest()}"')
        else:
            self._answer(200, ETag=self._put(key, body))

    def do_POST(self) -> None:
        key, query = self._parsed()
        body = self._body()
        if self.bucket.away:
            self._error(403, "AccessDenied")
        elif "uploads" in query:
            upload = uuid.uuid4().hex
            self.bucket.parts[upload] = {}
            answer = f"<InitiateMultipartUploadResult {NAMESPACE}><Bucket>b</Bucket><Key>{escape(key or '')}</Key>"
            self._answer(200, f"{answer}<UploadId>{upload}</UploadId></InitiateMultipartUploadResult>".encode())
        elif "uploadId" in query and key is not None:
            parts = self.bucket.parts.pop(query["uploadId"])
            etag = self._put(key, b"".join(parts[number] for number in sorted(parts)))
            answer = f"<CompleteMultipartUploadResult {NAMESPACE}><Bucket>b</Bucket><Key>{escape(key)}</Key>"
            self._answer(200, f"{answer}<ETag>{escape(etag)}</ETag></CompleteMultipartUploadResult>".encode())
        elif "delete" in query:
            for name in re.findall(r"<Key>(.*?)</Key>", body.decode()):
                self.bucket.pop(name, None)
            self._answer(200, f"<DeleteResult {NAMESPACE}></DeleteResult>".encode())
        else:
            self._error(501, "NotImplemented")

    def do_DELETE(self) -> None:
        key, query = self._parsed()
        if "uploadId" in query:
            self.bucket.parts.pop(query["uploadId"], None)
        elif key is not None:
            self.bucket.pop(key, None)
        self._answer(204)

    def _list(self, query: dict[str, str]) -> None:
        prefix, delimiter = query.get("prefix", ""), query.get("delimiter", "")
        contents, prefixes = [], set()
        for key, (content, written) in sorted(self.bucket.items()):
            if not key.startswith(prefix):
                continue
            head, found, _ = key[len(prefix) :].partition(delimiter) if delimiter else (key, "", "")
            if found:
                prefixes.add(prefix + head + delimiter)
                continue
            stamp = time.strftime("%Y-%m-%dT%H:%M:%S.000Z", time.gmtime(written))
            contents.append(
                f"<Contents><Key>{escape(key)}</Key><LastModified>{stamp}</LastModified><ETag>x</ETag><Size>{len(content)}</Size></Contents>"
            )
        common = "".join(f"<CommonPrefixes><Prefix>{escape(p)}</Prefix></CommonPrefixes>" for p in sorted(prefixes))
        text = f"<ListBucketResult {NAMESPACE}><Name>b</Name><Prefix>{escape(prefix)}</Prefix><KeyCount>{len(contents) + len(prefixes)}</KeyCount>"
        text += f"<MaxKeys>1000</MaxKeys><IsTruncated>false</IsTruncated>{''.join(contents)}{common}</ListBucketResult>"
        self._answer(200, text.encode(), Content_Type="application/xml")


def _unchunked(body: bytes) -> bytes:
    """The content of a body in signed chunks: ``size;chunk-signature=...`` before each, in hexadecimal."""
    content, at = b"", 0
    while at < len(body):
        end = body.index(b"\r\n", at)
        size = int(body[at:end].partition(b";")[0], 16)
        if size == 0:
            break
        content += body[end + 2 : end + 2 + size]
        at = end + 2 + size + 2
    return content
