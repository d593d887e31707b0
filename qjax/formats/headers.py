"""A model's headers without its weights: all that a plan is made of, also of a model that is still on the Hub."""

import functools
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from qjax.errors import FormatError, QjaxError
from qjax.formats.gguf.header import read_header
from qjax.formats.hub import HubId, cached_model, fetch, hub_id, snapshot
from qjax.formats.huggingface.checkpoint import open_checkpoint
from qjax.formats.locate import locate
from qjax.formats.mapped import map_file

# What is asked for first of a file, and four times as much as long as the header is longer; of safetensors it says.
FIRST_BYTES = 1 << 20
MOST_BYTES = 1 << 28
_FLOATS = {"F16", "BF16", "F32", "F64"}


@contextmanager
def located_headers(model: str | Path) -> Iterator[Path]:
    """`locate` for who reads headers alone: of weights on the Hub that are not in its cache nothing else is fetched.

    They stand in files of the true lengths, zeros behind the header, which are gone when the context ends. What a
    checkpoint packed as no GGUF type is, its data tells: that is fetched whole.

    Raises:
      QjaxError: see `locate`.
    """
    wish = None if model == "embedded" or Path(model).exists() else hub_id(str(model))
    if wish is None or isinstance(known := cached_model(wish), Path):
        yield locate(model) if wish is None else known
        return
    with tempfile.TemporaryDirectory() as folder:
        path = fetch(wish, functools.partial(_headers, Path(folder)))
        yield path if path.is_file() or _of_floats(path) else fetch(wish)


def _headers(folder: Path, wish: HubId, files: list[str]) -> Path:
    """The files in the folder, of weights the headers."""
    weights = [name for name in files if Path(name).suffix in (".gguf", ".safetensors")]
    others = [name for name in files if name not in weights]
    found = snapshot(wish, others) if others else folder
    for name in files:
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        if name in weights:
            _header(wish, name, path)
        else:
            shutil.copyfile(found / name, path)
    return folder


def _header(wish: HubId, name: str, path: Path) -> None:
    data, count = b"", FIRST_BYTES
    while True:
        more, total = _part(wish, name, len(data), count)
        data += more
        with path.open("wb") as file:
            file.write(data)
            file.truncate(total)
        if path.suffix == ".safetensors":
            wanted = 8 + int.from_bytes(data[:8], "little")
        else:
            wanted = len(data) if _ends_within(path, len(data)) else 4 * count
        if wanted <= len(data) or len(data) >= total:
            return
        if wanted > MOST_BYTES:
            raise FormatError(f"{wish.where}: {name}: a header of {wanted} bytes is none: the file is damaged")
        count = wanted


def _ends_within(path: Path, count: int) -> bool:
    """Whether the header of a GGUF file ends before zeros stand for the rest."""
    try:
        return read_header(map_file(path, "a GGUF file"), path).data_start <= count
    except FormatError:
        return False


def _part(wish: HubId, name: str, start: int, stop: int) -> tuple[bytes, int]:
    """The bytes `start` to `stop` of a file, and how many it has."""
    from huggingface_hub import hf_hub_url
    from huggingface_hub.utils import build_hf_headers, get_session, hf_raise_for_status

    url = hf_hub_url(wish.repo, name, revision=wish.revision)
    headers = build_hf_headers() | {"Range": f"bytes={start}-{stop - 1}"}
    with get_session().stream("GET", url, headers=headers, follow_redirects=True) as answer:
        hf_raise_for_status(answer)
        span = answer.headers.get("Content-Range", "")
        if answer.status_code != 206 or not span.rpartition("/")[2].isdigit():
            raise QjaxError(f"{wish.where}: parts of {name} cannot be had: fetch the model, and name its path")
        return answer.read(), int(span.rpartition("/")[2])


def _of_floats(folder: Path) -> bool:
    return {tensor.dtype for tensor in open_checkpoint(folder).tensors.values()} <= _FLOATS
