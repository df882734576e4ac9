"""A hub of one process: the few endpoints that huggingface_hub's own client asks, over HTTP, on this machine."""

from __future__ import annotations

import base64
import hashlib
import json
import threading
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import parse_qs, unquote, urlsplit


@dataclass
class Repo:
    """Commits, oldest first, of a branch: (id, {path: bytes})."""

    branches: dict[str, list[tuple[str, dict[str, bytes]]]] = field(default_factory=dict)
    private: bool = False

    def at(self, revision: str):
        """The commit of a branch or id, or None."""
        if revision in self.branches:
            return self.branches[revision][-1]
        return next((c for b in self.branches.values() for c in b if c[0] == revision), None)

    def commit(self, files: dict[str, bytes], branch: str = "main") -> str:
        commits = self.branches.setdefault(branch, [])
        name = hashlib.sha1(repr((branch, len(commits), sorted(files))).encode()).hexdigest()
        commits.append((name, files))
        return name


class Hub:
    """The server.

    Attributes:
        repos: {owner/name: Repo}. log: (method, path) of every request.
        refuse: {owner/name: (status, code)} answered in place of everything. broken: paths whose bodies end halfway.
        claimed: {path: bytes} sizes listed in place of the true ones.
    """

    def __init__(self):
        self.repos: dict[str, Repo] = {}
        self.log: list[tuple[str, str]] = []
        self.refuse: dict[str, tuple[int, str]] = {}
        self.broken: set[str] = set()
        self.claimed: dict[str, int] = {}
        self.deny_writes = False
        self.server = ThreadingHTTPServer(("127.0.0.1", 0), type("Handler", (_Handler,), {"hub": self}))
        self.endpoint = f"http://127.0.0.1:{self.server.server_port}"
        self.thread = threading.Thread(target=self.server.serve_forever, daemon=True)
        self.thread.start()

    def close(self) -> None:
        self.server.shutdown()
        self.server.server_close()
        self.thread.join()

    def files(self, repo: str, revision: str = "main") -> dict[str, bytes]:
        return self.repos[repo].at(revision)[1]

    def downloaded(self) -> list[str]:
        """Paths of files whose bytes were asked for."""
        return [path.split("/resolve/")[1].split("/", 1)[1] for method, path in self.log
                if method == "GET" and "/resolve/" in path]  # fmt: skip


class _Handler(BaseHTTPRequestHandler):
    hub: Hub
    protocol_version = "HTTP/1.1"

    def log_message(self, *args) -> None:
        pass

    def answer(self, value, status: int = 200, headers: dict[str, str] | None = None) -> None:
        body = value if isinstance(value, bytes) else json.dumps(value).encode()
        self.send_response(status)
        for name, text in {"Content-Length": str(len(body)), **(headers or {})}.items():
            self.send_header(name, text)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def fail(self, status: int, code: str = "") -> None:
        self.answer({"error": code or "no"}, status, {"X-Error-Code": code, "X-Error-Message": code or "no"})

    def do_GET(self) -> None:
        path = unquote(urlsplit(self.path).path).strip("/").removeprefix("datasets/")
        self.hub.log.append((self.command, path))
        parts = path.split("/")
        name = "/".join(parts[2:4] if parts[0] == "api" else parts[:2])
        if name in self.hub.refuse:
            return self.fail(*self.hub.refuse[name])
        repo = self.hub.repos.get(name)
        if repo is None:
            return self.fail(404, "RepoNotFound")
        what, rest = (parts[4:5] or [""])[0] if parts[0] == "api" else "resolve", parts[5 if parts[0] == "api" else 3 :]
        revision = rest[0] if rest else "main"
        commit = repo.at(revision)
        if commit is None:
            return self.fail(404, "RevisionNotFound")
        oid, files = commit
        if what in ("", "revision"):
            siblings = [{"rfilename": p, "size": self.hub.claimed.get(p, len(x))} for p, x in files.items()]
            return self.answer({"id": name, "modelId": name, "sha": oid, "private": repo.private, "siblings": siblings})
        if what == "tree":
            return self.answer([{"type": "file", "path": p, "size": len(x), "oid": hashlib.sha1(x).hexdigest()}
                                for p, x in files.items()])  # fmt: skip
        inside = "/".join(rest[1:])
        if inside not in files:
            return self.fail(404, "EntryNotFound")
        body, headers = files[inside], {"X-Repo-Commit": oid, "ETag": f'"{hashlib.sha1(files[inside]).hexdigest()}"'}
        if inside in self.hub.broken and self.command == "GET":
            self.send_response(200)
            for key, text in {**headers, "Content-Length": str(len(body))}.items():
                self.send_header(key, text)
            self.end_headers()
            self.wfile.write(body[: len(body) // 2])
            self.wfile.flush()
            self.close_connection = True
            return self.connection.shutdown(2)
        return self.answer(body, headers=headers)

    do_HEAD = do_GET

    def do_POST(self) -> None:
        path = unquote(urlsplit(self.path).path).strip("/")
        self.hub.log.append(("POST", path))
        body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        if path == "api/validate-yaml":
            return self.answer({"errors": [], "warnings": []})
        if self.hub.deny_writes:
            return self.fail(403)
        if path == "api/repos/create":
            asked = json.loads(body)
            name = f"{asked['organization']}/{asked['name']}" if asked.get("organization") else asked["name"]
            if name in self.hub.repos:
                return self.answer({"url": f"{self.hub.endpoint}/{name}", "error": "You already created it"}, 409)
            self.hub.repos[name] = Repo(private=bool(asked.get("private") or asked.get("visibility") == "private"))
            self.hub.repos[name].commit({".gitattributes": b"*.safetensors filter=lfs\n"})
            return self.answer({"url": f"{self.hub.endpoint}/{name}", "name": name})
        parts = path.split("/")
        name, what, revision = "/".join(parts[2:4]), parts[4], parts[5]
        if name in self.hub.refuse:
            return self.fail(*self.hub.refuse[name])
        repo = self.hub.repos[name]
        if what == "branch":
            if revision in repo.branches:
                return self.fail(409)
            repo.branches[revision] = [repo.branches["main"][-1]]
            return self.answer({})
        if what == "preupload":
            return self.answer({"files": [{"path": x["path"], "uploadMode": "regular", "shouldIgnore": False}
                                          for x in json.loads(body)["files"]]})  # fmt: skip
        assert what == "commit" and "create_pr" not in parse_qs(urlsplit(self.path).query)
        lines = [json.loads(line) for line in body.splitlines()]
        head = lines[0]["value"]
        if head.get("parentCommit") not in (None, repo.at(revision)[0]):
            return self.fail(412)
        files = dict(repo.at(revision)[1])
        for line in lines[1:]:
            if line["key"] == "deletedFile":
                del files[line["value"]["path"]]
            else:
                assert line["key"] == "file"
                files[line["value"]["path"]] = base64.b64decode(line["value"]["content"])
        oid = repo.commit(files, revision)
        return self.answer({"success": True, "commitOid": oid, "commitUrl": f"{self.hub.endpoint}/{name}/commit/{oid}"})
