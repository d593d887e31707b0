"""Where a model is: paths, folders, and ids of a Hub that is a small server here."""

import hashlib
import json
import os
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator, Mapping
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any, ClassVar
from urllib.parse import unquote, urlsplit

import pytest

from qjax.errors import QjaxError
from qjax.formats.locate import EMBEDDED, locate

COMMIT = "c" * 40
GGUF = b"GGUF" + bytes(60)
SHARDS = [f"big-{i:05d}-of-00003.gguf" for i in (1, 2, 3)]
REPOSITORIES: dict[str, dict[str, bytes]] = {
    "ann/one": {"README.md": b"# one", "one.Q4_0.gguf": GGUF + b"one"},
    "ann/none": {"model.safetensors": b"..."},
    "ann/many": {f"m.{kind}.gguf": GGUF + kind.encode() for kind in ("Q4_0", "Q4_K_M", "Q8_0")},
    "ann/split": {
        **{name: GGUF + name.encode() for name in SHARDS},
        # Another model whose name starts alike.
        **{f"big-chat-{i:05d}-of-00002.gguf": GGUF for i in (1, 2)},
        "folder/small.Q8_0.gguf": GGUF + b"small",
    },
}


class Hub(BaseHTTPRequestHandler):
    """As much of the Hub's HTTP interface as a download takes: a repository's facts, and its files."""

    asked: ClassVar[list[str]] = []

    def log_message(self, format: str, *args: Any) -> None:
        pass

    def answer(self, code: int, headers: Mapping[str, str], body: bytes) -> None:
        self.send_response(code)
        for name, value in ({"Content-Length": str(len(body))} | dict(headers)).items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def refuse(self, code: int, error: str) -> None:
        self.answer(code, {"X-Error-Code": error, "X-Error-Message": error}, b"")

    def do_HEAD(self) -> None:
        self.do_GET()

    def do_GET(self) -> None:
        path = unquote(urlsplit(self.path).path)
        self.asked.append(f"{self.command} {path}")
        api, files = path.removeprefix("/api/models/"), path.removeprefix("/").split("/resolve/main/")
        if path.startswith("/api/models/ann/gated"):
            self.refuse(403, "GatedRepo")
        elif path.startswith("/api/models/ann/broken"):
            self.refuse(418, "Teapot")
        elif path.startswith("/api/models/") and api in REPOSITORIES:
            siblings = [{"rfilename": name} for name in REPOSITORIES[api]]
            facts = {"id": api, "sha": COMMIT, "private": False, "tags": [], "siblings": siblings}
            self.answer(200, {"Content-Type": "application/json"}, json.dumps(facts).encode())
        elif len(files) == 2 and files[1] in REPOSITORIES.get(files[0], {}):
            body = REPOSITORIES[files[0]][files[1]]
            tag = hashlib.sha1(body).hexdigest()
            self.answer(200, {"ETag": f'"{tag}"', "X-Repo-Commit": COMMIT, "Accept-Ranges": "bytes"}, body)
        else:
            self.refuse(404, "RepoNotFound")


@pytest.fixture(scope="module")
def endpoint() -> Iterator[str]:
    server = ThreadingHTTPServer(("127.0.0.1", 0), Hub)
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    yield f"http://127.0.0.1:{server.server_port}"
    server.shutdown()
    server.server_close()
    thread.join()


# The Hub's library reads its variables when it is imported, so each question takes a process, and all of a test's
# questions one.
ASK = """
import sys
from qjax.errors import QjaxError
from qjax.formats.locate import locate
for name in sys.argv[1:]:
    try:
        print("path", locate(name))
    except QjaxError as error:
        print("error", error)
"""
Ask = Callable[..., list[tuple[str, str]]]


@pytest.fixture
def ask(endpoint: str, tmp_path: Path) -> Ask:
    """`ask("owner/name", ...)`: what `locate` gives for each, as ("path" or "error", text)."""

    def run(*names: str, **variables: str) -> list[tuple[str, str]]:
        kept = {name: value for name, value in os.environ.items() if not name.startswith(("HF_", "HUGGING"))}
        own = {"HF_ENDPOINT": endpoint, "HF_HOME": str(tmp_path / "hub"), "HF_HUB_DISABLE_TELEMETRY": "1"}
        root = str(Path(__file__).resolve().parents[2])
        proxies = dict.fromkeys(("http_proxy", "HTTP_PROXY", "all_proxy", "ALL_PROXY"), "")
        done = subprocess.run(
            [sys.executable, "-c", ASK, *names],
            env=kept | proxies | own | {"PYTHONPATH": root} | variables,
            cwd=tmp_path,
            capture_output=True,
            text=True,
            check=False,
            timeout=100,
        )
        assert done.returncode == 0, done.stderr
        answers = [line.split(" ", 1) for line in done.stdout.splitlines()]
        assert len(answers) == len(names), done.stdout
        return [(kind, text) for kind, text in answers]

    return run


def test_the_only_model_of_a_repository(ask: Ask) -> None:
    Hub.asked.clear()
    [(kind, path), again] = ask("ann/one", "ann/one:one.Q4_0.gguf")
    assert kind == "path"
    assert Path(path).name == "one.Q4_0.gguf"
    assert Path(path).read_bytes() == GGUF + b"one"
    assert again == (kind, path)
    # Nothing else is fetched, and nothing twice.
    assert [line for line in Hub.asked if line.startswith("GET /ann")] == ["GET /ann/one/resolve/main/one.Q4_0.gguf"]


def test_a_part_of_the_name_chooses(ask: Ask) -> None:
    answers = ask("ann/many:q8_0", "ann/many:m.Q4_K_M.gguf", "ann/split:small", "ann/many:q4", "ann/many:q6_k")
    assert [Path(text).name for kind, text in answers if kind == "path"] == [
        "m.Q8_0.gguf",
        "m.Q4_K_M.gguf",
        "small.Q8_0.gguf",
    ]
    assert answers[3] == (
        "error",
        "Hub repository ann/many: 2 models there; name one as ann/many:FILE: m.Q4_0.gguf, m.Q4_K_M.gguf",
    )
    assert answers[4] == (
        "error",
        "Hub repository ann/many: no .gguf file there has 'q6_k' in its name; "
        "there are m.Q4_0.gguf, m.Q4_K_M.gguf, m.Q8_0.gguf",
    )


def test_many_models_are_listed(ask: Ask) -> None:
    many, split, none = ask("ann/many", "ann/split", "ann/none")
    assert many == (
        "error",
        "Hub repository ann/many: 3 models there; name one as ann/many:FILE: m.Q4_0.gguf, m.Q4_K_M.gguf, m.Q8_0.gguf",
    )
    assert split == (
        "error",
        f"Hub repository ann/split: 3 models there; name one as ann/split:FILE: {SHARDS[0]}, "
        "big-chat-00001-of-00002.gguf, folder/small.Q8_0.gguf",
    )
    assert none == ("error", "Hub repository ann/none: no .gguf file there; qjax reads GGUF files")


def test_all_shards_of_a_split_model_come(ask: Ask) -> None:
    [(kind, path)] = ask(f"ann/split:{SHARDS[0]}")
    assert kind == "path"
    assert Path(path).name == SHARDS[0]
    assert sorted(entry.name for entry in Path(path).parent.iterdir()) == SHARDS
    assert [path.read_bytes() for path in sorted(Path(path).parent.iterdir())] == [GGUF + s.encode() for s in SHARDS]


def test_what_is_not_there_is_one_line(ask: Ask) -> None:
    missing, gated, broken = ask("ann/nothing", "ann/gated", "ann/broken:q8_0")
    assert missing[0] == gated[0] == broken[0] == "error"
    assert missing[1].startswith("ann/nothing: there is no such file here, and no such public repository on the Hub")
    assert gated[1].startswith("ann/gated: there is no such file here, and on the Hub it is gated: accept its terms")
    assert broken[1].startswith("ann/broken: there is no such file here, and it cannot be fetched from the Hub: ")
    assert "418" in broken[1]


def test_a_hub_out_of_reach(ask: Ask) -> None:
    nowhere = {"HF_ENDPOINT": "http://127.0.0.1:9"}
    [(kind, text)] = ask("ann/one", **nowhere)
    assert kind == "error"
    assert text.startswith("ann/one: there is no such file here, and it cannot be fetched from the Hub: ")
    assert "refused" in text
    fetched = ask("ann/one", "ann/many:q8_0")
    # What was fetched once is found again.
    assert ask("ann/one", "ann/many", "ann/many:Q8", **nowhere) == [*fetched, fetched[1]]
    assert ask("ann/one", HF_HUB_OFFLINE="1") == fetched[:1]


def test_a_file_is_itself_whatever_its_name(tmp_path: Path) -> None:
    path = tmp_path / "model.bin"
    path.write_bytes(b"")
    assert locate(path) == path
    assert locate(str(path)) == path


def test_a_folder_with_one_model_or_one_split_model(tmp_path: Path) -> None:
    (tmp_path / "notes.txt").write_text("")
    with pytest.raises(QjaxError, match=r"no \.gguf file there; qjax reads GGUF files"):
        locate(tmp_path)
    for name in SHARDS:
        (tmp_path / name).write_bytes(b"")
    assert locate(tmp_path) == tmp_path / SHARDS[0]
    for i in range(9):
        (tmp_path / f"b{i}.gguf").write_bytes(b"")
    with pytest.raises(QjaxError, match=r"10 models there; name one by its path: b0.gguf, .*, b7.gguf, \.\.\.$"):
        locate(str(tmp_path))


def test_the_embedded_model_is_part_of_the_package() -> None:
    assert locate("embedded") == EMBEDDED
    assert EMBEDDED.parent.parent.name == "qjax"


@pytest.mark.parametrize("name", ["no-such", "no/such/file", "no/such.gguf", "../no", "a b/c", "\0", "x/y:", ""])
def test_what_cannot_be_an_id_never_asks_the_hub(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("qjax.formats.locate.fetch", lambda repo, file: pytest.fail("asked"))
    with pytest.raises(QjaxError, match=r"no such file; give|no \.gguf file there"):
        locate(name)
