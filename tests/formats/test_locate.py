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
from qjax.evaluate.shapes import Shape, llama
from qjax.evaluate.synthetic import save_synthetic
from qjax.formats.gguf.header import read_header
from qjax.formats.locate import EMBEDDED, locate

GGUF = b"GGUF" + bytes(60)
SHARDS = [f"big-{i:05d}-of-00003.gguf" for i in (1, 2, 3)]
FOLDER = ["config.json", "generation_config.json", "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json"]
FOLDER += ["chat_template.jinja", "model.safetensors.index.json"]
FOLDER += [f"model-{i:05d}-of-00002.safetensors" for i in (1, 2)]
OTHERS = ["pytorch_model.bin", "original/consolidated.00.pth", "model.onnx", "onnx/config.json"]
OTHERS += ["consolidated.safetensors", "training_args.bin"]


def named(*names: str) -> dict[str, bytes]:
    return {name: GGUF + name.encode() for name in names}


REPOSITORIES: dict[str, dict[str, bytes]] = {
    "ann/one": {"README.md": b"# one", "one.Q4_0.gguf": GGUF + b"one"},
    "ann/none": {"model.safetensors": b"..."},
    "ann/pickled": named("config.json", "pytorch_model.bin"),
    "ann/many": {f"m.{kind}.gguf": GGUF + kind.encode() for kind in ("Q4_0", "Q4_K_M", "Q8_0")},
    "ann/split": {
        **named(*SHARDS),
        # Another model whose name starts alike.
        **named(*(f"big-chat-{i:05d}-of-00002.gguf" for i in (1, 2))),
        "folder/small.Q8_0.gguf": GGUF + b"small",
    },
    "ann/half": named(*SHARDS[:2]),
    "ann/floats": named(*FOLDER, *OTHERS),
    "ann/both": named("config.json", "model.safetensors", "model.fp16.safetensors", "both.Q4_0.gguf"),
    "ann/private": named("m.gguf"),
    "ann/terms": named("m.gguf"),
    "ann/large": {"m.gguf": bytes(range(256)) * 100_000},
}
# In this revision every file has other bytes.
TAG = "v1.0/a+b"
COMMITS = {"main": "c" * 40, TAG: "d" * 40}


def body_of(repo: str, name: str, commit: str) -> bytes:
    return REPOSITORIES[repo][name] + (b"tagged" if commit == COMMITS[TAG] else b"")


class Hub(BaseHTTPRequestHandler):
    """As much of the Hub's HTTP interface as a download takes: a repository's facts, and its files."""

    asked: ClassVar[list[str]] = []
    # How many bytes of a large file are sent before the connection breaks, each time.
    broken_after: ClassVar[list[int]] = []
    down: ClassVar[bool] = False

    def log_message(self, format: str, *args: Any) -> None:
        pass

    def answer(self, code: int, headers: Mapping[str, str], body: bytes, sent: int | None = None) -> None:
        self.send_response(code)
        for name, value in ({"Content-Length": str(len(body))} | dict(headers)).items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body[:sent])

    def refuse(self, code: int, error: str) -> None:
        self.answer(code, {"X-Error-Code": error, "X-Error-Message": error}, b"")

    def json(self, value: Any) -> None:
        self.answer(200, {"Content-Type": "application/json"}, json.dumps(value).encode())

    def do_HEAD(self) -> None:
        self.do_GET()

    def do_GET(self) -> None:
        # A revision is one part of the path, its slashes quoted.
        parts = [unquote(part) for part in urlsplit(self.path).path.removeprefix("/").split("/")]
        about = parts[:2] == ["api", "models"]
        parts = parts[2:] if about else parts
        repo, (what, revision), rest = "/".join(parts[:2]), (*parts[2:4], "", "main")[:2], "/".join(parts[4:])
        self.asked.append(f"{self.command} {'about ' if about else ''}{repo} {rest}".strip())
        commit = COMMITS.get(revision, revision)
        if repo == "ann/gated" or (repo == "ann/terms" and not about):
            self.refuse(403, "GatedRepo")
        elif repo == "ann/broken":
            self.refuse(418, "Teapot")
        elif self.down:
            self.refuse(503, "Down")
        elif repo not in REPOSITORIES or (
            repo == "ann/private" and self.headers["Authorization"] != "Bearer hf_the_token"
        ):
            # The Hub does not say which of the two it is.
            self.refuse(401, "RepoNotFound")
        elif commit not in COMMITS.values():
            self.refuse(404, "RevisionNotFound")
        elif about and what == "tree":
            files = {name: body_of(repo, name, commit) for name in REPOSITORIES[repo]}
            self.json([{"type": "file", "path": n, "size": len(b), "oid": tag_of(b)} for n, b in files.items()])
        elif about:
            siblings = [{"rfilename": name} for name in REPOSITORIES[repo]]
            self.json({"id": repo, "sha": commit, "private": False, "tags": [], "siblings": siblings})
        elif rest in REPOSITORIES[repo]:
            self.send_file(body_of(repo, rest, commit), commit)
        else:
            self.refuse(404, "EntryNotFound")

    def send_file(self, body: bytes, commit: str) -> None:
        headers = {"ETag": f'"{tag_of(body)}"', "X-Repo-Commit": commit, "Accept-Ranges": "bytes"}
        sent = self.broken_after.pop(0) if self.command == "GET" and len(body) > 1000 and self.broken_after else None
        first, _, last = (self.headers["Range"] or "bytes=0-").removeprefix("bytes=").partition("-")
        start, stop = int(first), min(int(last or len(body) - 1) + 1, len(body))
        if start or last:
            self.asked[-1] += f" from {start}" + (f" to {stop}" if last else "")
            headers["Content-Range"] = f"bytes {start}-{stop - 1}/{len(body)}"
        self.answer(206 if start or last else 200, headers, body[start:stop], sent)


def tag_of(body: bytes) -> str:
    return hashlib.sha1(body).hexdigest()


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
PLAN = """
import json, sys
from qjax.errors import QjaxError
from qjax.formats import headers
from qjax.runs.plan import plan_model
headers.FIRST_BYTES = 4096
for name in sys.argv[1:]:
    try:
        print("path", json.dumps(plan_model(name, devices="cpu:0=1GiB,cuda:0=1GiB")["devices"]))
    except QjaxError as error:
        print("error", error)
"""
Ask = Callable[..., list[tuple[str, str]]]


@pytest.fixture
def ask(endpoint: str, tmp_path: Path) -> Ask:
    """`ask("owner/name", ...)`: what `locate` gives for each, as ("path" or "error", text)."""

    def run(*names: str, script: str = ASK, **variables: str) -> list[tuple[str, str]]:
        kept = {name: value for name, value in os.environ.items() if not name.startswith(("HF_", "HUGGING"))}
        own = {"HF_ENDPOINT": endpoint, "HF_HOME": str(tmp_path / "hub"), "HF_HUB_DISABLE_TELEMETRY": "1"}
        root = str(Path(__file__).resolve().parents[2])
        proxies = dict.fromkeys(("http_proxy", "HTTP_PROXY", "all_proxy", "ALL_PROXY"), "")
        done = subprocess.run(
            [sys.executable, "-c", script, *names],
            env=kept | proxies | own | {"PYTHONPATH": root} | variables,
            cwd=tmp_path,
            capture_output=True,
            text=True,
            check=False,
            timeout=100,
        )
        assert done.returncode == 0, done.stderr
        # No progress bar where there is no terminal.
        assert "%|" not in done.stderr
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
    assert [line for line in Hub.asked if line.startswith("GET ann")] == ["GET ann/one one.Q4_0.gguf"]


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
    many, split, none, pickled, half = ask("ann/many", "ann/split", "ann/none", "ann/pickled", "ann/half")
    assert many == (
        "error",
        "Hub repository ann/many: 3 models there; name one as ann/many:FILE: m.Q4_0.gguf, m.Q4_K_M.gguf, m.Q8_0.gguf",
    )
    assert split == (
        "error",
        f"Hub repository ann/split: 3 models there; name one as ann/split:FILE: {SHARDS[0]}, "
        "big-chat-00001-of-00002.gguf, folder/small.Q8_0.gguf",
    )
    assert none == (
        "error",
        "Hub repository ann/none: no .gguf file there, nor config.json; qjax reads GGUF files and Hugging Face folders",
    )
    assert pickled == (
        "error",
        "Hub repository ann/pickled: no model.safetensors there; "
        "qjax reads GGUF files and Hugging Face folders with safetensors, never pickles (.bin, .pth)",
    )
    assert half == ("error", f"Hub repository ann/half: 1 of 3 shards are missing, {SHARDS[2]} first")


def test_all_shards_of_a_split_model_come(ask: Ask) -> None:
    [(kind, path)] = ask(f"ann/split:{SHARDS[0]}")
    assert kind == "path"
    assert Path(path).name == SHARDS[0]
    assert sorted(entry.name for entry in Path(path).parent.iterdir()) == SHARDS
    assert [path.read_bytes() for path in sorted(Path(path).parent.iterdir())] == [GGUF + s.encode() for s in SHARDS]


def test_only_what_a_folder_needs_comes(ask: Ask) -> None:
    [(kind, folder)] = ask("ann/floats")
    assert kind == "path"
    assert sorted(path.name for path in Path(folder).rglob("*")) == sorted(FOLDER)
    assert all((Path(folder) / name).read_bytes() == GGUF + name.encode() for name in FOLDER)


def test_safetensors_by_wish(ask: Ask) -> None:
    gguf, folder, none = ask("ann/both", "ann/both@main:safetensors", "ann/many:safetensors")
    assert Path(gguf[1]).name == "both.Q4_0.gguf"
    assert sorted(path.name for path in Path(folder[1]).glob("*.*")) == [
        "both.Q4_0.gguf",
        "config.json",
        "model.safetensors",
    ]
    assert none[0] == "error"
    assert "no config.json there" in none[1]


def test_a_revision(ask: Ask) -> None:
    wishes = (f"ann/one@{TAG}", f"ann/many@{'d' * 40}:q8_0", "ann/one", "ann/one@v2")
    tagged, by_commit, main, none = ask(*wishes)
    assert Path(tagged[1]).read_bytes() == GGUF + b"onetagged"
    assert Path(by_commit[1]).read_bytes() == GGUF + b"Q8_0tagged"
    assert Path(main[1]).read_bytes() == GGUF + b"one"
    assert none == (
        "error",
        "ann/one@v2: there is no such file here, and on the Hub it has no branch, tag or commit 'v2'",
    )
    # Each is kept for itself.
    assert ask(*wishes[:3], HF_HUB_OFFLINE="1") == [tagged, by_commit, main]


def test_a_private_repository_takes_the_token(ask: Ask) -> None:
    told = (
        "ann/private: there is no such file here, and no such public repository on the Hub (is it private? set HF_TOKEN"
    )
    for variables in ({}, {"HF_TOKEN": "hf_another_token"}):
        [(kind, text)] = ask("ann/private", **variables)
        assert kind == "error"
        assert text.startswith(told)
        assert "hf_another_token" not in text
    [(kind, path)] = ask("ann/private", HF_TOKEN="hf_the_token")
    assert kind == "path"
    assert Path(path).read_bytes() == GGUF + b"m.gguf"


def test_a_broken_connection_goes_on_where_it_stopped(ask: Ask) -> None:
    Hub.asked.clear()
    Hub.broken_after[:] = [12_000_000, 11_000_000]
    [(kind, path)] = ask("ann/large")
    assert kind == "path"
    assert Path(path).read_bytes() == REPOSITORIES["ann/large"]["m.gguf"]
    first, second, third = (line for line in Hub.asked if line.startswith("GET ann"))
    assert first == "GET ann/large m.gguf"
    # Only what the Hub's library had not written yet comes twice.
    starts = [int(line.removeprefix("GET ann/large m.gguf from ")) for line in (second, third)]
    assert 10_000_000 < starts[0] <= 12_000_000 < 20_000_000 < starts[1] <= 23_000_000


def test_what_is_not_there_is_one_line(ask: Ask) -> None:
    missing, gated, terms, broken = ask("ann/nothing", "ann/gated", "ann/terms", "ann/broken:q8_0")
    assert missing[0] == gated[0] == terms[0] == broken[0] == "error"
    assert missing[1].startswith("ann/nothing: there is no such file here, and no such public repository on the Hub")
    assert gated[1].startswith("ann/gated: there is no such file here, and on the Hub it is gated: accept its terms")
    assert terms[1].startswith("ann/terms: there is no such file here, and on the Hub it is gated: accept its terms")
    assert broken[1].startswith("ann/broken:q8_0: there is no such file here, and it cannot be fetched from the Hub: ")
    assert "418" in broken[1]


def test_a_hub_out_of_reach(ask: Ask) -> None:
    nowhere = {"HF_ENDPOINT": "http://127.0.0.1:9"}
    [(kind, text)] = ask("ann/one", **nowhere)
    assert kind == "error"
    assert text.startswith("ann/one: there is no such file here, and it cannot be fetched from the Hub: ")
    assert "refused" in text
    wishes = ("ann/one", "ann/many:q8_0", "ann/floats", f"ann/split:{SHARDS[0]}")
    fetched = ask(*wishes)
    # What was fetched once is found again.
    assert ask(*wishes, "ann/many", "ann/many:Q8", **nowhere) == [*fetched, fetched[1], fetched[1]]
    assert ask(*wishes, HF_HUB_OFFLINE="1") == fetched
    # What is not there whole is none.
    (Path(fetched[2][1]) / FOLDER[-1]).unlink()
    Path(fetched[3][1]).with_name(SHARDS[1]).unlink()
    folder, split, other = ask("ann/floats", f"ann/split:{SHARDS[0]}", "ann/many:q4", **nowhere)
    assert folder[0] == split[0] == other[0] == "error"
    assert f"refused; in its cache: Hub repository ann/floats: 1 of 2 shards are missing, {FOLDER[-1]}" in folder[1]
    assert f"1 of 3 shards are missing, {SHARDS[1]}" in split[1]
    assert "no .gguf file there has 'q4' in its name" in other[1]


def test_a_hub_that_is_down_is_out_of_reach(ask: Ask, monkeypatch: pytest.MonkeyPatch) -> None:
    fetched = ask("ann/one")
    monkeypatch.setattr(Hub, "down", True)
    one, many = ask("ann/one", "ann/many:q8_0")
    assert [one] == fetched
    assert many[0] == "error"
    assert "503" in many[1]


def test_a_file_is_itself_whatever_its_name(tmp_path: Path) -> None:
    path = tmp_path / "model.bin"
    path.write_bytes(b"")
    assert locate(path) == path
    assert locate(str(path)) == path


def test_a_folder_with_one_model_or_one_split_model(tmp_path: Path) -> None:
    (tmp_path / "notes.txt").write_text("")
    with pytest.raises(QjaxError, match=r"no \.gguf file there, nor config\.json; qjax reads"):
        locate(tmp_path)
    (tmp_path / "config.json").write_text("{}")
    assert locate(tmp_path) == tmp_path
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


@pytest.mark.parametrize(
    "name",
    [
        "no-such",
        "no/such/file",
        "no/such.gguf",
        "../no",
        "a b/c",
        "\0",
        "x/y:",
        "x/y@",
        "x/y@../z",
        "x/y@a b",
        "x/y@a:",
        "",
    ],
)
def test_what_cannot_be_an_id_never_asks_the_hub(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("qjax.formats.locate.fetch", lambda wish: pytest.fail("asked"))
    with pytest.raises(QjaxError, match=r"no such file; give|no \.gguf file there"):
        locate(name)


def test_a_plan_is_made_of_headers_alone(ask: Ask, tmp_path: Path) -> None:
    """More is asked for until the header is whole, and nothing of what is behind it; what is in the cache is not."""
    path = tmp_path / "m.gguf"
    save_synthetic(
        path, Shape("small", llama(layers=2, hidden=256, heads=4, kv_heads=2, ffn=512, vocab=4000, context=128)), "q4_0"
    )
    REPOSITORIES["ann/planned"] = {"m.gguf": path.read_bytes()}
    Hub.asked.clear()
    [(_, found)] = ask("ann/planned", script=PLAN)
    [(_, local)] = ask(str(path), script=PLAN)
    assert found == local
    asked = [line.rpartition(" ")[2] for line in Hub.asked if line.startswith("GET ann/planned")]
    start = read_header(path.read_bytes(), path).data_start
    assert [int(count) for count in asked] == [4096 * 4**i for i in range(len(asked))]
    assert len(asked) > 1
    assert int(asked[-1]) // 4 < start <= int(asked[-1])
    ask("ann/planned")
    Hub.asked.clear()
    assert ask("ann/planned", script=PLAN) == [("path", local)]
    assert Hub.asked == []


@pytest.mark.parametrize("name", ["hf-float", "hf-gptq-w4g128"])
def test_a_plan_of_a_folder(ask: Ask, interop: Path, name: str) -> None:
    """Of floats headers alone; what is packed is fetched, since its data tells how."""
    REPOSITORIES["ann/folder"] = {entry.name: entry.read_bytes() for entry in (interop / name).iterdir()}
    Hub.asked.clear()
    [(_, found)] = ask("ann/folder", script=PLAN)
    whole = [line for line in Hub.asked if line == "GET ann/folder model.safetensors"]
    assert len(whole) == (name != "hf-float")
    [(_, local)] = ask(str(interop / name), script=PLAN)
    assert found == local


def test_a_hub_without_the_model_has_no_headers(ask: Ask) -> None:
    [(kind, text)] = ask("ann/nowhere", script=PLAN)
    assert kind == "error"
    assert "no such public repository" in text
