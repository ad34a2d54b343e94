"""Models by name: a stand-in of the Hugging Face hub on this machine serves a small checkpoint, well and badly."""

from __future__ import annotations

import hashlib
import json
import os
import subprocess
import sys
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
from checkpoints import random_tensors, write_checkpoint
from configs import CONFIGS
from gguf_rig import gguf_metadata, gguf_tensors, split_gguf, write_model

from hybrid.errors import ConfigError
from hybrid.weights.hub import Repository, local_model, parse_name

pytest.importorskip("huggingface_hub")
COMMIT = "0123456789abcdef0123456789abcdef01234567"
WEIGHTS, EXTRA = (
    "model.safetensors",
    (
        "pytorch_model.bin",
        "modeling.py",
        "original/model.safetensors",
        "x.gguf",
        "consolidated.safetensors",
    ),
)
FETCH = """
import json, sys
from pathlib import Path
from huggingface_hub import constants
from hybrid.errors import HybridError
from hybrid.weights.hub import local_model
constants.DOWNLOAD_CHUNK_SIZE = 65536  # what was received in whole pieces is kept
for name in sys.argv[1:]:
    seen = []
    try:
        folder = local_model(Path(name), lambda what, done, total: seen.append((what, done, total)))
        names = sorted(str(path.relative_to(folder)) for path in folder.rglob("*"))
        print(json.dumps({"names": names, "folder": str(folder), "last": seen[-1:]}))
    except HybridError as error:
        print(json.dumps({"error": str(error)}))
"""


class Hub(ThreadingHTTPServer):
    """org/whole and org/moved (behind a redirect) are sound; the others fail as their names say."""

    daemon_threads = True

    def __init__(self, files: dict[str, bytes]) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.files = files
        self.asked: list[tuple[str, str, str | None]] = []  # method, path, range

    @property
    def address(self) -> str:
        return f"http://127.0.0.1:{self.server_port}"


class Handler(BaseHTTPRequestHandler):
    server: Hub
    protocol_version = "HTTP/1.1"

    def log_message(self, *_: object) -> None:
        pass

    def do_HEAD(self) -> None:
        self.do_GET()

    def do_GET(self) -> None:
        path = self.path.split("?")[0]
        self.server.asked.append((self.command, path, self.headers["Range"]))
        parts = path.strip("/").split("/")
        if parts[:2] == ["api", "models"]:
            self._tell(f"{parts[2]}/{parts[3]}", parts[4:])
        elif parts[0] == "store":
            self._send(self.server.files["/".join(parts[1:])])
        elif len(parts) > 4 and parts[2] == "resolve":
            self._resolve(parts[1], "/".join(parts[4:]))
        else:
            self._fail(404, "EntryNotFound")

    def _tell(self, name: str, rest: list[str]) -> None:
        if rest[:1] == ["revision"] and rest[1] not in ("main", "v2", COMMIT):
            return self._fail(404, "RevisionNotFound")
        if name == "org/private" and self.headers["Authorization"] != "Bearer right":
            return self._fail(401, "RepoNotFound")
        if name == "org/missing":
            return self._fail(404, "RepoNotFound")
        if name == "org/gated":
            return self._fail(403, "GatedRepo")
        files = {n: d for n, d in self.server.files.items() if name != "org/binary" or n != WEIGHTS}
        if rest[:1] == ["tree"]:
            tree = [{"type": "file", "path": n, "size": len(d), "oid": _etag(d)} for n, d in files.items()]
            return self._send(json.dumps(tree).encode(), "application/json")
        info = {"id": name, "modelId": name, "sha": COMMIT, "private": False, "tags": [], "downloads": 0, "likes": 0}
        info["siblings"] = [{"rfilename": n} for n in files]
        self._send(json.dumps(info).encode(), "application/json")

    def _resolve(self, name: str, file: str) -> None:
        data = self.server.files.get(file)
        if data is None:
            return self._fail(404, "EntryNotFound")
        if name == "moved":
            return self._send(data, redirect=f"{self.server.address}/store/{file}")
        if name == "lying" and file == WEIGHTS:
            return self._send(data, says=len(data) + 1000)
        if name == "cut" and file == WEIGHTS and self.command == "GET" and self.headers["Range"] is None:
            return self._send(data, cut=len(data) // 2)
        self._send(data)

    def _send(
        self, data: bytes, kind: str = "application/octet-stream", redirect: str = "", says: int = 0, cut: int = 0
    ) -> None:
        start = int(wanted[6:].split("-")[0]) if (wanted := self.headers["Range"] or "") else 0
        self.send_response(302 if redirect else 206 if wanted else 200)
        self.send_header("Content-Type", kind)
        self.send_header("X-Repo-Commit", COMMIT)
        self.send_header("ETag", f'"{_etag(data)}"')
        self.send_header("Accept-Ranges", "bytes")
        if redirect:
            self.send_header("Location", redirect)
            self.send_header("X-Linked-Size", str(len(data)))
            self.send_header("X-Linked-ETag", f'"{_etag(data)}"')
        if wanted:
            self.send_header("Content-Range", f"bytes {start}-{len(data) - 1}/{len(data)}")
        body = b"" if redirect else data[start:]
        self.send_header("Content-Length", str((says or len(data)) - start if not redirect else 0))
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(body[: cut or None])
            self.close_connection = bool(cut or says)

    def _fail(self, status: int, code: str) -> None:
        self.send_response(status)
        self.send_header("X-Error-Code", code)
        self.send_header("X-Error-Message", "no")
        self.send_header("Content-Length", "0")
        self.end_headers()


def _etag(data: bytes) -> str:
    return hashlib.sha1(data).hexdigest()


@pytest.fixture(scope="module")
def hub(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Hub]:
    source = write_checkpoint(tmp_path_factory.mktemp("hub") / "hf", "qwen3_moe")
    files = {path.name: path.read_bytes() for path in source.iterdir()}
    files |= dict.fromkeys(EXTRA, b"never fetched")
    files["tokenizer_config.json"] = b"{}"
    server = Hub(files)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield server
    server.shutdown()
    server.server_close()


def run(hub: Hub, home: Path, *command: str, **variables: str) -> subprocess.CompletedProcess[str]:
    environment = {name: value for name, value in os.environ.items() if not name.startswith("HF_")}
    environment |= {"HF_ENDPOINT": hub.address, "HF_HOME": str(home), "HF_HUB_DISABLE_TELEMETRY": "1", **variables}
    command = (sys.executable, *command)
    return subprocess.run(command, env=environment, capture_output=True, text=True, check=False, timeout=120)


def fetch(hub: Hub, home: Path, *names: str, **variables: str) -> list[dict]:
    result = run(hub, home, "-c", FETCH, *names, **variables)
    assert result.returncode == 0 and "Traceback" not in result.stderr, result.stderr
    return [json.loads(line) for line in result.stdout.splitlines()]


def test_a_repository_is_fetched_once_and_only_what_is_needed(hub: Hub, tmp_path: Path) -> None:
    hub.asked.clear()
    whole, moved, again = fetch(hub, tmp_path, "org/whole", "hf:org/moved@v2", "org/whole")
    wanted = ["config.json", "model.safetensors", "tokenizer_config.json"]
    assert whole["names"] == moved["names"] == again["names"] == wanted
    assert (Path(moved["folder"]) / WEIGHTS).read_bytes() == hub.files[WEIGHTS]
    assert whole["last"][0][0] == "fetching org/whole"
    assert not [path for _, path, _ in hub.asked if path.endswith(EXTRA[:2] + EXTRA[3:]) or "original" in path]
    whose = [path for method, path, _ in hub.asked if method == "GET" and path.startswith("/org/whole/resolve/")]
    assert whose[-1].endswith(WEIGHTS)  # the weights come last, when all else has been looked at
    assert [method for method, path, _ in hub.asked if path == f"/org/whole/resolve/{COMMIT}/{WEIGHTS}"].count(
        "GET"
    ) == 1
    (offline,) = fetch(hub, tmp_path, "org/whole", HF_HUB_OFFLINE="1")
    assert offline["names"] == wanted


def test_refusals_are_one_line_with_what_to_do(hub: Hub, tmp_path: Path) -> None:
    names = ["org/missing", "org/gated", "org/private", "org/whole@v9", "org/binary", "org/lying"]
    wrong = dict(zip(names, fetch(hub, tmp_path, *names), strict=True))
    expected = {
        "org/missing": ["no such directory", f"repository of {hub.address}", "spelling", "HF_TOKEN"],
        "org/gated": ["granted by its owner", "HF_TOKEN"],
        "org/private": ["no such directory", "HF_TOKEN"],
        "org/whole@v9": ["no revision 'v9'"],
        "org/binary": ["no safetensors", "GGUF"],
        "org/lying": ["fetching it failed", "resumes"],
    }
    for name, words in expected.items():
        line = wrong[name]["error"]
        assert all(word in line for word in words) and "\n" not in line, line
    (private,) = fetch(hub, tmp_path, "org/private", HF_TOKEN="right")
    assert WEIGHTS in private["names"]
    (offline,) = fetch(hub, tmp_path, "org/other", HF_HUB_OFFLINE="1")
    assert "HF_HUB_OFFLINE is set" in offline["error"]


def test_a_cut_connection_is_resumed_where_it_ended(hub: Hub, tmp_path: Path) -> None:
    hub.asked.clear()
    (found,) = fetch(hub, tmp_path, "org/cut")
    if "error" in found:  # versions of huggingface_hub that do not try again on their own
        assert "fetching it failed" in found["error"] and "resumes" in found["error"]
        (found,) = fetch(hub, tmp_path, "org/cut")
    assert (Path(found["folder"]) / WEIGHTS).read_bytes() == hub.files[WEIGHTS]
    start, end = (range for method, path, range in hub.asked if method == "GET" and path.endswith(WEIGHTS))
    assert start is None and end.startswith(f"bytes={len(hub.files[WEIGHTS]) // 2 // 65536 * 65536}-")


def test_commands_take_names(hub: Hub, tmp_path: Path) -> None:
    cli, cache = ("-m", "hybrid.cli"), {"XDG_CACHE_HOME": str(tmp_path / "cache"), "HYBRID_DEVICE": "cpu"}
    assert "qwen3_moe" in run(hub, tmp_path, *cli, "run", "--model-path", "org/whole", "--dry-run", **cache).stdout
    assert not list(tmp_path.rglob(WEIGHTS))  # a plan needs config.json alone
    store = str(tmp_path / "store")
    packed = run(hub, tmp_path, *cli, "pack", "--input-path", "org/whole", "--output-path", store, **cache)
    assert (packed.returncode, packed.stdout) == (0, f"{store}: packed\n"), packed.stderr
    gguf = run(hub, tmp_path, *cli, "run", "--model-path", "org/whole:x.bin", "--prompt", "x", **cache)
    assert gguf.returncode == 2 and "as org/name:FILE.gguf" in gguf.stderr and gguf.stderr.count("\n") == 1


def test_a_gguf_file_may_be_named(hub: Hub, tmp_path: Path) -> None:
    config = {**CONFIGS["llama"], "attention_bias": False}
    tensors = random_tensors(config)
    whole = write_model(tmp_path / "a.gguf", config, tensors)
    parts = split_gguf(tmp_path / "b.gguf", gguf_metadata(config), gguf_tensors(config, tensors), 2)
    more = {"sub/a.gguf": whole.read_bytes()} | {part.name: part.read_bytes() for part in parts}
    hub.files |= more
    try:
        found = fetch(hub, tmp_path, "org/whole:sub/a.gguf", f"org/whole:{parts[1].name}", "org/whole:c.gguf")
    finally:
        for name in more:
            del hub.files[name]
    assert [Path(one["folder"]).name for one in found[:2]] == ["a.gguf", parts[0].name]
    assert Path(found[1]["folder"]).with_name(parts[1].name).read_bytes() == parts[1].read_bytes()
    assert "the repository has no file c.gguf" in found[2]["error"]
    assert not list(tmp_path.rglob(WEIGHTS))


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"tekken.json": b"{}"}, ["org/whole/tekken.json: the tokenizer in it cannot be used", "another copy"]),
        ({"config.json": b'{"model_type": "gpt2"}'}, ["model_type 'gpt2' is not supported"]),
        (
            {
                "config.json": json.dumps(
                    {**CONFIGS["qwen3_moe"], "quantization_config": {"quant_method": "hqq"}}
                ).encode()
            },
            ["quant_method 'hqq'"],
        ),
    ],
)
def test_what_cannot_run_is_refused_before_weights_are_fetched(
    hub: Hub, tmp_path: Path, changes: dict[str, bytes], words: list[str]
) -> None:
    before, hub.files = hub.files, {**hub.files, **changes}
    hub.asked.clear()
    try:
        (found,) = fetch(hub, tmp_path, "org/whole")
    finally:
        hub.files = before
    assert all(word in found["error"] for word in words) and "\n" not in found["error"], found
    assert not [path for _, path, _ in hub.asked if path.endswith(".safetensors")]


def test_what_is_a_name() -> None:
    assert parse_name("org/name") == parse_name("hf:org/name") == Repository("org/name")
    assert parse_name("hf:Org/na.me-1@refs/pr/1") == Repository("Org/na.me-1", "refs/pr/1")
    assert parse_name("org/name@v2:Q4/a.gguf") == Repository("org/name", "v2", "Q4/a.gguf")
    for path in ("/org/name", "./org/name", "../name", "name", "a/b/c", "~/name", "org/", "org/a b"):
        assert parse_name(path) is None
    for text in ("hf:name", "hf:a/b/c", "hf:"):
        with pytest.raises(ConfigError, match="is no name of a repository"):
            parse_name(text)


def test_a_directory_wins_over_a_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "org/name").mkdir(parents=True)
    assert local_model(Path("org/name")) == Path("org/name")
