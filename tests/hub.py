"""A small Hub: serves repositories from a directory over HTTP, as far as ``huggingface_hub`` asks."""

from __future__ import annotations

import hashlib
import json
import re
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

COMMIT = "0123456789abcdef0123456789abcdef01234567"


@dataclass
class Hub:
    """Repositories lie in ``root/org/name``; ``requests`` are the paths asked for; ``gated`` are closed."""

    root: Path
    url: str = ""
    requests: list[str] = field(default_factory=list)
    gated: set[str] = field(default_factory=set)

    def fetched(self) -> set[str]:
        """Files whose contents were sent."""
        return {
            path.rpartition(f"{COMMIT}/")[2] for path in self.requests if path.startswith("GET") and "/resolve/" in path
        }


def _handler(hub: Hub) -> type[BaseHTTPRequestHandler]:
    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def log_message(self, *_: Any) -> None: ...

        def _send(self, status: int, body: bytes, **headers: str) -> None:
            self.send_response(status)
            for name, value in headers.items():
                self.send_header(name.replace("_", "-"), value)
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            if self.command == "GET":
                self.wfile.write(body)

        def do_GET(self) -> None:
            hub.requests.append(f"{self.command} {self.path}")
            about = re.fullmatch(r"/api/models/([^/]+/[^/]+)(?:/revision/([^/?]+))?(?:\?.*)?", self.path)
            file = re.fullmatch(r"/([^/]+/[^/]+)/resolve/([^/]+)/(.+)", self.path)
            repo = (about or file or [None, ""])[1]
            if repo in hub.gated:
                self._send(403, b"{}", X_Error_Code="GatedRepo", X_Error_Message="closed")
            elif not repo or not (hub.root / repo).is_dir():
                self._send(404, b"{}", X_Error_Code="RepoNotFound")
            elif about is not None:
                self._about(repo, about[2])
            elif file is not None:
                self._file(hub.root / repo / file[3], file[2])

        do_HEAD = do_GET

        def _about(self, repo: str, revision: str | None) -> None:
            if revision not in (None, "main", "v1", COMMIT):
                self._send(404, b"{}", X_Error_Code="RevisionNotFound")
                return
            root = hub.root / repo
            files = sorted(p.relative_to(root).as_posix() for p in root.rglob("*") if p.is_file())
            siblings = [{"rfilename": name} for name in files]
            document = {"id": repo, "modelId": repo, "sha": COMMIT, "siblings": siblings, "tags": [], "downloads": 0}
            self._send(200, json.dumps(document).encode(), Content_Type="application/json")

        def _file(self, path: Path, revision: str) -> None:
            if not path.is_file():
                self._send(404, b"", X_Error_Code="EntryNotFound", X_Repo_Commit=COMMIT)
                return
            body = path.read_bytes()
            digest = hashlib.sha256(body).hexdigest()
            self._send(200, body, ETag=f'"{digest}"', X_Repo_Commit=COMMIT, Accept_Ranges="bytes")

    return Handler


@contextmanager
def serve(root: Path) -> Iterator[Hub]:
    """A Hub of the repositories in ``root``, until the end of the body."""
    hub = Hub(root)
    server = ThreadingHTTPServer(("127.0.0.1", 0), _handler(hub))
    server.daemon_threads = True
    hub.url = f"http://127.0.0.1:{server.server_address[1]}"
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02})
    thread.start()
    try:
        yield hub
    finally:
        server.shutdown()
        server.server_close()
        thread.join()
