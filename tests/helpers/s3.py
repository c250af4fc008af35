"""An S3 bucket on loopback, by moto. pyarrow's own client speaks to it: empty objects are folders, and uploads have parts."""

from __future__ import annotations

import contextlib
import logging
import urllib.request
from collections.abc import Iterator
from dataclasses import dataclass

import pytest
from pyarrow.fs import FileSystem


@dataclass(frozen=True)
class Bucket:
    """A bucket named "bucket" on a server of this process."""

    port: int

    def uri(self, path: str) -> str:
        """The URI of a path in the bucket."""
        return f"s3://bucket/{path}?endpoint_override=127.0.0.1%3A{self.port}&scheme=http&region=us-east-1"

    @contextlib.contextmanager
    def access_denied(self) -> Iterator[None]:
        """During the block the server knows no account, so that it refuses every request."""
        self._check_accounts_after("0")
        try:
            yield
        finally:
            self._check_accounts_after("inf")

    def _check_accounts_after(self, n_requests: str) -> None:
        request = urllib.request.Request(
            f"http://127.0.0.1:{self.port}/moto-api/reset-auth",
            data=n_requests.encode(),
            headers={"Content-Type": "text/plain"},  # moto reads the body, not a form.
        )
        urllib.request.urlopen(request, timeout=20).close()


@contextlib.contextmanager
def s3_bucket() -> Iterator[Bucket]:
    """An empty bucket for as long as the block lasts, with credentials for it in the environment."""
    from moto.server import ThreadedMotoServer

    server = ThreadedMotoServer("127.0.0.1", 0, verbose=False)
    with pytest.MonkeyPatch.context() as patch:
        for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
            patch.setenv(name, "test")
        patch.setenv("AWS_EC2_METADATA_DISABLED", "true")
        # Its access log would stand among the messages of the tests.
        patch.setattr(logging.getLogger("werkzeug"), "disabled", True)
        server.start()
        try:
            bucket = Bucket(server.get_host_and_port()[1])
            filesystem, _ = FileSystem.from_uri(f"{bucket.uri('')}&allow_bucket_creation=true")
            filesystem.create_dir("bucket")
            yield bucket
        finally:
            server.stop()
