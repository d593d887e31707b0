"""A folder to a Hub that is a small server here: what it is asked, what arrives, and what is said if it refuses."""

import base64
import json
import os
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any, ClassVar

import pytest

from qjax.errors import QjaxError
from qjax.formats.push import push_folder

PUSH = """
import sys
from qjax.errors import QjaxError
from qjax.formats.push import push_folder
for repo in sys.argv[2:]:
    try:
        print("path", push_folder(sys.argv[1], repo, message="new"))
    except QjaxError as error:
        print("error", error)
"""


class Hub(BaseHTTPRequestHandler):
    """As much of the Hub's HTTP interface as an upload of small files takes."""

    asked: ClassVar[list[str]] = []
    files: ClassVar[dict[str, bytes]] = {}
    bodies: ClassVar[dict[str, bytes]] = {}

    def log_message(self, format: str, *args: Any) -> None:
        pass

    def answer(self, code: int, value: Any) -> None:
        body = json.dumps(value).encode()
        self.send_response(code)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def do_GET(self) -> None:
        self.asked.append(f"GET {self.path}")
        self.answer(200, {"id": "ann/new", "sha": "c" * 40, "siblings": [], "private": False, "tags": []})

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        self.asked.append(f"POST {self.path}")
        self.bodies[self.path] = body
        if self.headers["Authorization"] != "Bearer hf_the_token":
            self.answer(401, {"error": "who are you"})
        elif "closed" in self.path or (b'"name": "closed"' in body or b'"name":"closed"' in body):
            self.answer(403, {"error": "not yours"})
        elif self.path == "/api/repos/create":
            self.answer(200, {"url": f"http://{self.headers['Host']}/ann/new"})
        elif "/preupload/" in self.path:
            wanted = json.loads(body)["files"]
            self.answer(
                200, {"files": [{"path": f["path"], "uploadMode": "regular", "shouldIgnore": False} for f in wanted]}
            )
        elif "/commit/" in self.path:
            for line in body.splitlines():
                entry = json.loads(line)
                if entry["key"] == "file":
                    self.files[entry["value"]["path"]] = base64.b64decode(entry["value"]["content"])
            url = f"http://{self.headers['Host']}/ann/new/commit/{'c' * 40}"
            self.answer(200, {"commitUrl": url, "commitOid": "c" * 40, "pullRequestUrl": None})
        else:
            self.answer(200, {})


Run = Callable[..., subprocess.CompletedProcess[str]]


@pytest.fixture
def run(tmp_path: Path) -> Iterator[Run]:
    """`run(argument of Python's, ..., VARIABLE=...)`: Python in a process of its own, which knows this Hub alone."""
    server = ThreadingHTTPServer(("127.0.0.1", 0), Hub)
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()

    def call(*argv: Any, **variables: str) -> subprocess.CompletedProcess[str]:
        # The Hub's library reads its variables when it is imported.
        kept = {name: value for name, value in os.environ.items() if not name.startswith(("HF_", "HUGGING"))}
        own = {"HF_ENDPOINT": f"http://127.0.0.1:{server.server_port}", "HF_HOME": str(tmp_path / "hub")}
        own |= {"HF_HUB_DISABLE_TELEMETRY": "1", "PYTHONPATH": str(Path(__file__).resolve().parents[2])}
        proxies = dict.fromkeys(("http_proxy", "HTTP_PROXY", "all_proxy", "ALL_PROXY"), "")
        command = [sys.executable, *map(str, argv)]
        environment = kept | proxies | own | variables
        return subprocess.run(command, env=environment, capture_output=True, text=True, check=False, timeout=100)

    yield call
    server.shutdown()
    server.server_close()
    thread.join()


@pytest.fixture
def push(run: Run) -> Callable[..., list[str]]:
    def call(folder: Path, *repos: str, **variables: str) -> list[str]:
        done = run("-c", PUSH, folder, *repos, **variables)
        assert done.returncode == 0, done.stderr
        return done.stdout.splitlines()

    return call


def test_a_folder_arrives(push: Callable[..., list[str]], tmp_path: Path) -> None:
    folder = tmp_path / "out"
    folder.mkdir()
    (folder / "config.json").write_text("{}")
    (folder / "README.md").write_text("# out")
    answers = push(folder, "ann/new", "ann/closed", HF_TOKEN="hf_the_token")
    assert answers[0].startswith("path http://127.0.0.1:")
    assert answers[0].endswith("/ann/new")
    assert {name: Hub.files[name] for name in ("config.json", "README.md")} == {
        "config.json": b"{}",
        "README.md": b"# out",
    }
    assert any(line.startswith("POST /api/models/ann/new/commit/main") for line in Hub.asked)
    assert answers[1].startswith("error ann/closed: the Hub refuses (403)")
    (answer,) = push(folder, "ann/new")
    assert "HF_TOKEN" in answer
    (answer,) = push(folder, "ann/new", HF_TOKEN="hf_the_token", HF_ENDPOINT="http://127.0.0.1:1")
    assert answer.startswith("error ann/new: it cannot be uploaded")


def test_the_command(run: Run, tmp_path: Path) -> None:
    """Says where it is, or in one line why not."""
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "config.json").write_text('{"by": "the command"}')
    command = ("-m", "qjax.cli", "push", tmp_path / "out")
    done = run(*command, "ann/new", "--private", "--revision", "dev", "--message", "a word", HF_TOKEN="hf_the_token")
    assert (done.returncode, done.stdout) == (0, f"{done.stdout.partition('/ann/')[0]}/ann/new\n"), done.stderr
    assert Hub.files["config.json"] == b'{"by": "the command"}'
    made = json.loads(Hub.bodies["/api/repos/create"])
    # By the version of the Hub's library.
    assert made.get("private") is True or made.get("visibility") == "private"
    header = json.loads(Hub.bodies["/api/models/ann/new/commit/dev"].splitlines()[0])
    assert header["value"]["summary"] == "a word"
    done = run(*command, "ann/new", "--json", HF_TOKEN="hf_the_token")
    assert json.loads(done.stdout).keys() == {"path", "repo", "url"}
    for argv, words in (
        (("ann/closed",), "ann/closed: the Hub refuses (401)"),
        (("ann/new@dev", "--revision", "dev"), "names a branch already"),
        (("new",), "expected a repository's id"),
        (("ann/new", "--revision", "a b"), "expected a repository's id"),
    ):
        done = run(*command, *argv)
        assert (done.returncode, done.stdout) == (2, "")
        assert done.stderr.startswith("qjax: error: ")
        assert words in done.stderr
        assert done.stderr.count("\n") == 1


def test_what_is_nothing_to_upload(tmp_path: Path) -> None:
    with pytest.raises(QjaxError, match="nothing to upload"):
        push_folder(tmp_path, "ann/new")
    with pytest.raises(QjaxError, match="owner/name"):
        push_folder(tmp_path, "new")
