"""NVIDIA's catalogue: the files of a model version, downloaded again from where they broke off, checked by SHA-256.

An address is `ngc://org/team/model:version` or, without a team, `ngc://org/model:version`. The key is NGC_API_KEY; a
public model needs none. NGC_API_URL names another server.
"""

import base64
import hashlib
import os
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import requests
from requests.adapters import HTTPAdapter
from tqdm import tqdm
from urllib3.util import Retry

from minitron.errors import ConfigError, RunError

_ADDRESS = re.compile(r"ngc://([\w.-]+)/(?:([\w.-]+)/)?([\w.-]+):([\w.-]+)")
_CHUNK, _TIMEOUT = 1 << 16, 60


class _File(NamedTuple):
    path: str
    url: str
    sha256: str | None


def check_address(address: str) -> str:
    """Return an address, which names one version for ever.

    Raises:
        ConfigError: it is not of the form above.
    """
    if not _ADDRESS.fullmatch(address):
        raise ConfigError(f"{address}: not a model of NVIDIA's catalogue; give ngc://org/team/model:version")
    return address


def download(address: str, target: Path) -> None:
    """Put the files of a model version into a directory; what an earlier attempt left there is continued.

    Raises:
        ConfigError: the catalogue refuses the key, or has no such version.
        RunError: it cannot be reached, or a file is not what its checksum says.
    """
    session = _session()
    try:
        for file in _files(session, address):
            _download(session, file, target)
    except requests.RequestException as error:
        raise RunError(
            f"{address}: not fetched ({type(error).__name__}); check the network and run it again"
        ) from error


def _session() -> requests.Session:
    session = requests.Session()
    retries = Retry(5, backoff_factor=1, status_forcelist=(429, 500, 502, 503, 504), raise_on_status=False)
    for scheme in ("https://", "http://"):
        session.mount(scheme, HTTPAdapter(max_retries=retries))
    return session


def _files(session: requests.Session, address: str) -> Iterator[_File]:
    """Ask the catalogue for the files, page by page; their URLs are signed and need no key."""
    match = _ADDRESS.fullmatch(check_address(address))
    assert match
    org, team, model, version = match.groups()
    where = f"org/{org}/team/{team}" if team else f"org/{org}"
    base = os.environ.get("NGC_API_URL", "https://api.ngc.nvidia.com")
    key = os.environ.get("NGC_API_KEY")
    page, pages = 0, 1
    while page < pages:
        answer = session.get(
            f"{base}/v2/{where}/models/{model}/{version}/files",
            params={"page-number": page},
            headers={"Authorization": f"Bearer {key}"} if key else {},
            timeout=_TIMEOUT,
        )
        _check_status(address, answer, key)
        found: dict[str, Any] = answer.json()
        checksums = found.get("sha256_base64") or [None] * len(found["urls"])
        yield from map(_File, found["filepath"], found["urls"], checksums)
        pages = (found.get("paginationInfo") or {}).get("totalPages", 1)
        page += 1


def _check_status(address: str, answer: requests.Response, key: str | None) -> None:
    if answer.status_code in (401, 403):
        state = "the key in NGC_API_KEY is refused" if key else "NGC_API_KEY is not set"
        raise ConfigError(f"{address}: {state} (status {answer.status_code}); mount a key that may read the model")
    if answer.status_code == 404:
        raise ConfigError(f"{address}: the catalogue has no such version; check org, team, model and version")
    if not answer.ok:
        raise RunError(f"{address}: the catalogue answers {answer.status_code}; run it again later")


def _download(session: requests.Session, file: _File, target: Path) -> None:
    path = target / file.path
    if not path.resolve().is_relative_to(target.resolve()):
        raise RunError(f"{file.path}: the catalogue names a file outside the model; do not use it")
    if path.is_file():
        return
    partial = path.with_name(f"{path.name}.part")
    partial.parent.mkdir(parents=True, exist_ok=True)
    there = partial.stat().st_size if partial.is_file() else 0
    with session.get(file.url, headers={"Range": f"bytes={there}-"}, stream=True, timeout=_TIMEOUT) as answer:
        if answer.status_code != 416:  # 416: all of it is there
            answer.raise_for_status()
            there = there if answer.status_code == 206 else 0
            _write(answer, partial, there)
    _check_sum(file, partial)
    partial.rename(path)


def _write(answer: requests.Response, partial: Path, there: int) -> None:
    total = there + int(answer.headers.get("Content-Length", 0))
    name = partial.name.removesuffix(".part")
    with partial.open("ab") as stream, tqdm(total=total, initial=there, desc=name, unit="B", unit_scale=True) as bar:
        stream.truncate(there)
        for chunk in answer.iter_content(_CHUNK):
            stream.write(chunk)
            bar.update(len(chunk))


def _check_sum(file: _File, partial: Path) -> None:
    with partial.open("rb") as stream:
        found = base64.b64encode(hashlib.file_digest(stream, "sha256").digest()).decode()
    if file.sha256 and found != file.sha256:
        partial.unlink()
        raise RunError(f"{file.path}: SHA-256 {found} is not the catalogue's {file.sha256}: damaged; run it again")
