"""A Hub of this machine's own: as much of the server's side as pushing and loading need, on 127.0.0.1, in memory.

Every file arrives base64 in the commit (`uploadMode: regular`), so there is neither LFS nor xet.
"""

import base64
import contextlib
import hashlib
import json
import os
import re
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import unquote, urlsplit

MODEL = r"/api/models/(?P<id>[^/]+/[^/]+)"


class Hub:
    """The repositories: id -> file name -> bytes, and the number of commits of each."""

    def __init__(self):
        self.files: dict[str, dict[str, bytes]] = {}
        self.commits: dict[str, int] = {}
        self.lock = threading.Lock()

    def sha(self, repo: str) -> str:
        """The commit id of a repository's present state."""
        return hashlib.sha1(f"{repo} {self.commits[repo]}".encode()).hexdigest()

    @contextlib.contextmanager
    def serve(self) -> Iterator[str]:
        """The address while the block runs."""
        server = ThreadingHTTPServer(("127.0.0.1", 0), type("Handler", (_Handler,), {"hub": self}))
        server.daemon_threads = True
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True)
        thread.start()
        try:
            yield f"http://127.0.0.1:{server.server_address[1]}"
        finally:
            server.shutdown()
            server.server_close()
            thread.join()


def environment(address: str, home) -> dict[str, str]:
    """What a client's process needs set before it starts: this Hub, an empty cache, one thread, no proxy in between."""
    kept = {key: value for key, value in os.environ.items() if not key.startswith(("HF_", "HUGGING"))}
    mine = {"HF_ENDPOINT": address, "HF_HOME": str(home), "HF_TOKEN": "hf_loopback", "HF_HUB_DISABLE_TELEMETRY": "1"}
    return kept | mine | {"NO_PROXY": "127.0.0.1", "no_proxy": "127.0.0.1", "OMP_NUM_THREADS": "1"}


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    hub: Hub

    def log_message(self, *_):
        pass

    def do_GET(self):
        self.dispatch("GET")

    do_HEAD = do_GET

    def do_POST(self):
        self.dispatch("POST")

    def dispatch(self, method: str) -> None:
        body = self.read_body()
        path = unquote(urlsplit(self.path).path)
        for verb, pattern, answer in ROUTES:
            found = re.fullmatch(pattern, path)
            if verb == method and found:
                return answer(self, body, **found.groupdict())
        self.send_json({"error": f"no such call: {method} {path}"}, 404)

    def read_body(self) -> bytes:
        if self.headers.get("Transfer-Encoding") != "chunked":
            return self.rfile.read(int(self.headers.get("Content-Length") or 0))
        parts = []
        while size := int(self.rfile.readline().split(b";")[0], 16):
            parts.append(self.rfile.read(size))
            self.rfile.readline()
        self.rfile.readline()
        return b"".join(parts)

    def send(self, content: bytes, status: int = 200, **headers: str) -> None:
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name.replace("_", "-"), value)
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(content)

    def send_json(self, value, status: int = 200, **headers: str) -> None:
        self.send(json.dumps(value).encode(), status, Content_Type="application/json", **headers)

    def missing_repository(self, repo: str) -> bool:
        if repo in self.hub.files:
            return False
        self.send_json({"error": "Repository not found"}, 404, X_Error_Code="RepoNotFound")
        return True

    # ------------------------------------------------------------------------------------------------ calls

    def create(self, body: bytes) -> None:
        wanted = json.loads(body)
        repo = f"{wanted.get('organization') or 'me'}/{wanted['name']}"
        with self.hub.lock:
            known = repo in self.hub.files
            self.hub.files.setdefault(repo, {})
            self.hub.commits.setdefault(repo, 0)
        address = f"http://{self.headers['Host']}/{repo}"
        self.send_json({"url": address, "name": repo, "id": repo}, 409 if known else 200)

    def validate(self, body: bytes) -> None:
        self.send_json({"errors": [], "warnings": []})

    def preupload(self, body: bytes, id: str) -> None:
        if not self.missing_repository(id):
            names = [file["path"] for file in json.loads(body)["files"]]
            plain = {"uploadMode": "regular", "shouldIgnore": False, "oid": None}
            self.send_json({"files": [{"path": name, **plain} for name in names]})

    def commit(self, body: bytes, id: str) -> None:
        if self.missing_repository(id):
            return
        with self.hub.lock:
            for line in map(json.loads, body.splitlines()):
                value = line["value"]
                if line["key"] == "file":
                    self.hub.files[id][value["path"]] = base64.b64decode(value["content"])
                elif line["key"] == "deletedFile":
                    self.hub.files[id].pop(value["path"])
            self.hub.commits[id] += 1
            sha = self.hub.sha(id)
        address = f"http://{self.headers['Host']}/{id}/commit/{sha}"
        self.send_json({"success": True, "commitOid": sha, "commitUrl": address, "hookOutput": ""})

    def info(self, body: bytes, id: str) -> None:
        if not self.missing_repository(id):
            names = [{"rfilename": name} for name in self.hub.files[id]]
            self.send_json({"id": id, "modelId": id, "sha": self.hub.sha(id), "siblings": names, "private": False})

    def tree(self, body: bytes, id: str, folder: str = "") -> None:
        if self.missing_repository(id):
            return
        if folder:
            return self.send_json({"error": "no such folder"}, 404, X_Error_Code="EntryNotFound")
        files = self.hub.files[id].items()
        self.send_json([{"type": "file", "path": name, "size": len(data), "oid": blob(data)} for name, data in files])

    def resolve(self, body: bytes, id: str, name: str) -> None:
        if self.missing_repository(id):
            return
        data, headers = self.hub.files[id].get(name), {"X_Repo_Commit": self.hub.sha(id)}
        if data is None:
            return self.send_json({"error": "Entry not found"}, 404, X_Error_Code="EntryNotFound", **headers)
        self.send(data, ETag=f'"{blob(data)}"', Content_Type="application/octet-stream", **headers)


def blob(data: bytes) -> str:
    """git's name of a file's content."""
    return hashlib.sha1(b"blob %d\0" % len(data) + data).hexdigest()


ROUTES = (
    ("POST", r"/api/repos/create", _Handler.create),
    ("POST", r"/api/validate-yaml", _Handler.validate),
    ("POST", MODEL + r"/preupload/[^/]+", _Handler.preupload),
    ("POST", MODEL + r"/commit/[^/]+", _Handler.commit),
    ("GET", MODEL + r"(/revision/[^/]+)?", _Handler.info),
    ("GET", MODEL + r"/tree/[^/]+(/(?P<folder>.+))?", _Handler.tree),
    ("GET", r"/(?P<id>[^/]+/[^/]+)/resolve/[^/]+/(?P<name>.+)", _Handler.resolve),
)
