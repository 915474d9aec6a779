"""A Hub-compatible server on 127.0.0.1, for tests: repositories, commits, LFS, revisions, cache.

    with HubServer(tokens={"hf_secret": "someone"}) as hub:
        subprocess.run(…, env={**os.environ, **hub.environment("hf_secret")})

Speaks what `huggingface_hub` asks of huggingface.co: `create_repo`, the commit API (preupload, LFS
batch, upload to a storage address, verify, one atomic commit), branches and tags, and downloads by
revision with ETag, commit header and redirects to the storage address. Nothing is written to disk.
"""

import base64
import hashlib
import json
import re
import threading
from collections.abc import Callable
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import parse_qs, unquote, urlsplit

import yaml

_LFS_BYTES = 1_000_000  # larger files, weights and pictures go to the storage address
_REPO = r"(?P<repo>[\w.-]+/[\w.-]+)"


def _git_oid(content: bytes) -> str:
    return hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()


def _sha256(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()


@dataclass
class StoredFile:
    content: bytes
    is_lfs: bool

    @property
    def etag(self) -> str:
        return _sha256(self.content) if self.is_lfs else _git_oid(self.content)


@dataclass
class Repository:
    private: bool
    commits: dict[str, dict[str, StoredFile]] = field(default_factory=dict)  # commit id -> files
    refs: dict[str, str] = field(default_factory=dict)  # branch or tag -> commit id
    titles: list[str] = field(default_factory=list)

    def commit(self, branch: str, files: dict[str, StoredFile], title: str) -> str:
        parent = self.refs.get(branch, "")
        content = json.dumps([parent, title, {path: file.etag for path, file in files.items()}])
        oid = hashlib.sha1(content.encode()).hexdigest()
        self.commits[oid] = files
        self.refs[branch] = oid
        self.titles.append(title)
        return oid

    def resolve(self, revision: str) -> str | None:
        oid = self.refs.get(revision, revision)
        return oid if oid in self.commits else None


class RefusedError(Exception):
    """An unsuccessful response."""

    def __init__(self, status: int, code: str = "", message: str = ""):
        self.status, self.code, self.message = status, code, message


class HubServer:
    """See the module. `requests` logs (method, path, status); `failures` answer in place of it."""

    def __init__(self, tokens: dict[str, str]):
        self.tokens = tokens  # token -> user name
        self.repositories: dict[str, Repository] = {}
        self.storage: dict[str, bytes] = {}  # LFS objects by sha256
        self.requests: list[tuple[str, str, int]] = []
        self.failures: list[tuple[str, int]] = []  # (expression over "METHOD path", status or 0)
        self.lock = threading.RLock()

        class Handler(_Handler):
            hub = self

        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self._server.daemon_threads = True
        self.url = f"http://127.0.0.1:{self._server.server_port}"
        # Another host, as the real one is: clients must not send their token there.
        self.storage_url = f"http://localhost:{self._server.server_port}/storage"

    def __enter__(self) -> "HubServer":
        threading.Thread(target=self._server.serve_forever, daemon=True).start()
        return self

    def __exit__(self, *_) -> None:
        self._server.shutdown()
        self._server.server_close()

    def environment(self, token: str | None, home: Any = None) -> dict[str, str]:
        """Environment variables of a process whose Hub is this server."""
        variables = {"HF_ENDPOINT": self.url, "HF_HUB_OFFLINE": "0", "HF_HUB_DISABLE_XET": "1"}
        variables |= {"HF_HUB_DISABLE_TELEMETRY": "1", "NO_PROXY": "127.0.0.1,localhost"}
        if token is not None:
            variables["HF_TOKEN"] = token
        if home is not None:
            variables["HF_HOME"] = str(home)
        return variables

    def files(self, repo: str, revision: str = "main") -> dict[str, bytes]:
        """The content of a repository's files at a revision."""
        repository = self.repositories[repo]
        oid = repository.resolve(revision)
        return {path: file.content for path, file in repository.commits[oid or ""].items()}


Answer = tuple[int, Any, dict[str, str]]  # status, JSON or bytes, headers


class _Handler(BaseHTTPRequestHandler):
    hub: HubServer
    protocol_version = "HTTP/1.1"

    def log_message(self, *_) -> None:
        pass

    def do_GET(self) -> None:
        self._handle()

    do_HEAD = do_POST = do_PUT = do_DELETE = do_GET  # noqa: N815

    def _handle(self) -> None:
        if "chunked" in self.headers.get("Transfer-Encoding", ""):
            self.body = b"".join(iter(self._read_chunk, b""))
        else:
            self.body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        self.path = unquote(self.path)
        address = f"{self.command} {self.path}"
        try:
            if self.headers["Host"].startswith("localhost") and "Authorization" in self.headers:
                raise RefusedError(400, message="a token was sent to the storage address")
            for pattern, status in self.hub.failures:
                if re.search(pattern, address):
                    raise RefusedError(status, message="broken on purpose")
            with self.hub.lock:
                status, answer, headers = self._route()
        except RefusedError as refused:
            status, answer = refused.status, {"error": refused.message}
            headers = {"X-Error-Code": refused.code, "X-Error-Message": refused.message}
        self.hub.requests.append((self.command, self.path, status))
        if status == 0:  # the line goes dead
            self.close_connection = True
            return
        content = answer if isinstance(answer, bytes) else json.dumps(answer).encode()
        self.send_response(status)
        for name, value in headers.items():
            if value:
                self.send_header(name, value)
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(content)

    def _read_chunk(self) -> bytes:
        chunk = self.rfile.read(int(self.rfile.readline(), 16))
        self.rfile.readline()
        return chunk

    @property
    def _user(self) -> str | None:
        """The user of a token; unknown tokens are refused."""
        header = self.headers.get("Authorization")
        if header is None:
            return None
        user = self.hub.tokens.get(header.removeprefix("Bearer "))
        if user is None:
            raise RefusedError(401, message="Invalid credentials in Authorization header")
        return user

    def _route(self) -> Answer:
        path = urlsplit(self.path).path
        routes: list[tuple[str, str, Callable[..., Answer]]] = [
            ("GET", "/api/whoami-v2", self._whoami),
            ("POST", "/api/repos/create", self._create),
            ("DELETE", "/api/repos/delete", self._delete),
            ("POST", "/api/validate-yaml", self._validate_yaml),
            ("POST", f"/api/models/{_REPO}/preupload/(?P<revision>.+)", self._preupload),
            ("POST", f"/api/models/{_REPO}/commit/(?P<revision>.+)", self._commit),
            ("POST", f"/api/models/{_REPO}/(branch|tag)/(?P<revision>.+)", self._create_ref),
            ("GET", f"/api/models/{_REPO}(/revision/(?P<revision>.+))?", self._info),
            ("GET", f"/api/models/{_REPO}/tree/(?P<revision>[^/]+)(?P<folder>/.*)?", self._tree),
            ("POST", f"/{_REPO}.git/info/lfs/objects/batch", self._lfs_batch),
            ("PUT", "/storage/(?P<oid>[0-9a-f]{64})", self._lfs_upload),
            ("POST", "/storage/verify", self._lfs_verify),
            ("GET", "/storage/(?P<oid>[0-9a-f]{64})", self._lfs_download),
            ("GET", f"/{_REPO}/resolve/(?P<revision>[^/]+)/(?P<file>.+)", self._resolve),
        ]
        method = "GET" if self.command == "HEAD" else self.command
        for route_method, pattern, answer in routes:
            match = re.fullmatch(pattern, path)
            if match and route_method == method:
                return answer(**{k: v for k, v in match.groupdict().items() if v is not None})
        raise RefusedError(404, "EntryNotFound", f"no such address: {self.command} {path}")

    def _repository(self, repo: str, write: bool = False) -> Repository:
        user, repository = self._user, self.hub.repositories.get(repo)
        owner = repo.split("/")[0]
        if repository is None or (repository.private and user != owner):
            raise RefusedError(401 if user is None else 404, "RepoNotFound", "Repository not found")
        if write and user != owner:
            raise RefusedError(403, message=f"no write access to {repo}")
        return repository

    def _commit_of(self, repository: Repository, revision: str) -> str:
        oid = repository.resolve(revision)
        if oid is None:
            raise RefusedError(404, "RevisionNotFound", f"Invalid rev id: {revision}")
        return oid

    def _whoami(self) -> Answer:
        if self._user is None:
            raise RefusedError(401, message="Invalid username or password.")
        token = {"role": "write", "displayName": "test"}
        user = {"type": "user", "name": self._user, "orgs": [], "auth": {"accessToken": token}}
        return 200, user, {}

    def _create(self) -> Answer:
        asked, user = json.loads(self.body), self._user
        if user is None:
            raise RefusedError(401, message="Invalid username or password.")
        if asked.get("organization") not in (None, user):
            raise RefusedError(403, message=f"no rights in the namespace {asked['organization']}")
        repo = f"{user}/{asked['name']}"
        exists = repo in self.hub.repositories
        if not exists:
            private = asked.get("visibility") == "private" or asked.get("private", False)
            created = self.hub.repositories[repo] = Repository(private)
            attributes = StoredFile(b"*.safetensors filter=lfs\n", is_lfs=False)
            created.commit("main", {".gitattributes": attributes}, "initial commit")
        return 409 if exists else 200, {"url": f"{self.hub.url}/{repo}", "name": repo}, {}

    def _delete(self) -> Answer:
        asked = json.loads(self.body)
        repo = f"{asked.get('organization') or self._user}/{asked['name']}"
        self._repository(repo, write=True)
        del self.hub.repositories[repo]
        return 200, b"", {}

    def _validate_yaml(self) -> Answer:
        front_matter = re.match(r"---\n(.*?)\n---", json.loads(self.body)["content"], re.DOTALL)
        try:
            metadata = yaml.safe_load(front_matter[1]) if front_matter else {}
        except yaml.YAMLError as error:
            return 400, {"errors": [{"message": str(error)}], "warnings": []}, {}
        warnings = [] if metadata else [{"message": "empty or missing yaml metadata in repo card"}]
        return 200, {"errors": [], "warnings": warnings}, {}

    def _preupload(self, repo: str, revision: str) -> Answer:
        repository = self._repository(repo, write=True)
        present = repository.commits[self._commit_of(repository, revision)]
        modes = [
            {
                "path": file["path"],
                "uploadMode": "lfs" if self._is_lfs(file["path"], file["size"]) else "regular",
                "shouldIgnore": False,
                "oid": present[file["path"]].etag if file["path"] in present else None,
            }
            for file in json.loads(self.body)["files"]
        ]
        return 200, {"files": modes}, {}

    @staticmethod
    def _is_lfs(path: str, size: int) -> bool:
        return path.endswith((".safetensors", ".bin", ".png")) or size > _LFS_BYTES

    def _lfs_batch(self, repo: str) -> Answer:
        self._repository(repo, write=True)
        objects = []
        for wanted in json.loads(self.body)["objects"]:
            upload = {"href": f"{self.hub.storage_url}/{wanted['oid']}"}
            actions = {"upload": upload, "verify": {"href": f"{self.hub.url}/storage/verify"}}
            known = wanted["oid"] in self.hub.storage
            objects.append(wanted if known else {**wanted, "actions": actions})
        return 200, {"transfer": "basic", "objects": objects}, {}

    def _lfs_upload(self, oid: str) -> Answer:
        if _sha256(self.body) != oid:
            raise RefusedError(400, message="the content is not what was announced")
        self.hub.storage[oid] = self.body
        return 200, b"", {}

    def _lfs_verify(self) -> Answer:
        announced = json.loads(self.body)
        if len(self.hub.storage.get(announced["oid"], b"")) != announced["size"]:
            raise RefusedError(422, message="the object is missing or has another size")
        return 200, {}, {}

    def _commit(self, repo: str, revision: str) -> Answer:
        repository = self._repository(repo, write=True)
        files = dict(repository.commits[self._commit_of(repository, revision)])
        title = ""
        for line in self.body.splitlines():
            item = json.loads(line)
            key, value = item["key"], item["value"]
            if key == "header":
                title = value["summary"]
            elif key == "file":
                content = base64.b64decode(value["content"])
                files[value["path"]] = StoredFile(content, is_lfs=False)
            elif key == "lfsFile":
                if value["oid"] not in self.hub.storage:
                    raise RefusedError(400, message=f"{value['path']} was not uploaded")
                files[value["path"]] = StoredFile(self.hub.storage[value["oid"]], is_lfs=True)
            elif key == "deletedFile":
                del files[value["path"]]
            else:
                raise RefusedError(400, message=f"unknown operation {key}")
        oid = repository.commit(revision, files, title)
        url = f"{self.hub.url}/{repo}/commit/{oid}"
        return 200, {"success": True, "commitOid": oid, "commitUrl": url}, {}

    def _create_ref(self, repo: str, revision: str) -> Answer:
        repository = self._repository(repo, write=True)
        asked = json.loads(self.body or b"{}")
        name = asked.get("tag", revision)
        start = revision if "tag" in asked else asked.get("startingPoint", "main")
        repository.refs.setdefault(name, self._commit_of(repository, start))
        return 200, {}, {}

    def _info(self, repo: str, revision: str = "main") -> Answer:
        repository = self._repository(repo)
        oid = self._commit_of(repository, revision)
        siblings = [{"rfilename": path} for path in sorted(repository.commits[oid])]
        info = {"id": repo, "modelId": repo, "sha": oid, "private": repository.private}
        return 200, {**info, "siblings": siblings, "tags": []}, {}

    def _tree(self, repo: str, revision: str, folder: str = "") -> Answer:
        repository = self._repository(repo)
        files = repository.commits[self._commit_of(repository, revision)]
        entries = []
        prefix = folder.strip("/") + "/" if folder.strip("/") else ""
        recursive = "recursive" in parse_qs(urlsplit(self.path).query)
        for path, file in sorted(files.items()):
            inside = path.startswith(prefix)
            if inside and (recursive or "/" not in path[len(prefix) :]):
                oid = _git_oid(file.content)
                entry = {"type": "file", "path": path, "size": len(file.content), "oid": oid}
                if file.is_lfs:
                    size = len(file.content)
                    entry["lfs"] = {"oid": file.etag, "size": size, "pointerSize": 130}
                entries.append(entry)
        if prefix and not entries:
            raise RefusedError(404, "EntryNotFound", f"{folder} does not exist")
        return 200, entries, {}

    def _resolve(self, repo: str, revision: str, file: str) -> Answer:
        repository = self._repository(repo)
        oid = self._commit_of(repository, revision)
        stored = repository.commits[oid].get(file)
        if stored is None:
            headers = {"X-Repo-Commit": oid, "X-Error-Code": "EntryNotFound"}
            return 404, {"error": "Entry not found"}, headers
        headers = {"X-Repo-Commit": oid, "ETag": f'"{stored.etag}"'}
        if stored.is_lfs:
            size = {"X-Linked-Size": str(len(stored.content))}
            location = {"Location": f"{self.hub.storage_url}/{stored.etag}"}
            return 302, b"", {**headers, "X-Linked-ETag": f'"{stored.etag}"', **size, **location}
        return 200, stored.content, headers

    def _lfs_download(self, oid: str) -> Answer:
        if oid not in self.hub.storage:
            raise RefusedError(404, "EntryNotFound", "no such object")
        return 200, self.hub.storage[oid], {"ETag": f'"{oid}"'}
