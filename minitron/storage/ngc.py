"""NVIDIA's catalog (NGC): download a model version's files, resume after an interruption, check their SHA-256.

An address is `ngc://org/team/model:version` or, without a team, `ngc://org/model:version`. NGC_API_KEY holds the key; a
public model needs none. NGC_API_URL names another server.
"""

import base64
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
from minitron.storage.hashing import hash_file
from minitron.storage.layout import select_model_files

_ADDRESS = re.compile(r"ngc://([\w.-]+)/(?:([\w.-]+)/)?([\w.-]+):([\w.-]+)")
_CHUNK, _TIMEOUT = 1 << 16, 60


class _File(NamedTuple):
    path: str
    url: str
    sha256: str | None


def check_address(address: str) -> str:
    """Return an address unchanged: a version in the catalog never changes.

    Raises:
        ConfigError: the address does not have the form above.
    """
    if not _ADDRESS.fullmatch(address):
        raise ConfigError(f"{address}: not a model in NVIDIA's catalog; give ngc://org/team/model:version")
    return address


def download_model(address: str, target: Path) -> None:
    """Download the files of a model version into a directory; resume the files of an earlier attempt.

    Raises:
        ConfigError: the catalog refuses the key, or has no such version.
        RunError: the catalog cannot be reached, or a file does not match its checksum.
    """
    session = _open_session()
    try:
        files = list(_list_files(session, address))
        wanted = select_model_files(file.path for file in files)
        for file in files:
            if file.path in wanted:
                _download_file(session, file, target)
    except requests.RequestException as error:
        raise RunError(
            f"{address}: not fetched ({type(error).__name__}); check the network and run it again"
        ) from error


def _open_session() -> requests.Session:
    session = requests.Session()
    retries = Retry(5, backoff_factor=1, status_forcelist=(429, 500, 502, 503, 504), raise_on_status=False)
    for scheme in ("https://", "http://"):
        session.mount(scheme, HTTPAdapter(max_retries=retries))
    return session


def _list_files(session: requests.Session, address: str) -> Iterator[_File]:
    """Yield the files that the catalog lists, page by page; their URLs are signed and need no key."""
    match = _ADDRESS.fullmatch(check_address(address))
    assert match
    org, team, model, version = match.groups()
    parent = f"org/{org}/team/{team}" if team else f"org/{org}"
    base = os.environ.get("NGC_API_URL", "https://api.ngc.nvidia.com")
    key = os.environ.get("NGC_API_KEY")
    page, pages = 0, 1
    while page < pages:
        answer = session.get(
            f"{base}/v2/{parent}/models/{model}/{version}/files",
            params={"page-number": page},
            headers={"Authorization": f"Bearer {key}"} if key else {},
            timeout=_TIMEOUT,
        )
        _check_status(address, answer, key)
        listing: dict[str, Any] = answer.json()
        checksums = listing.get("sha256_base64") or [None] * len(listing["urls"])
        yield from map(_File, listing["filepath"], listing["urls"], checksums)
        pages = (listing.get("paginationInfo") or {}).get("totalPages", 1)
        page += 1


def _check_status(address: str, answer: requests.Response, key: str | None) -> None:
    if answer.status_code in (401, 403):
        state = "the catalog refuses the key in NGC_API_KEY" if key else "NGC_API_KEY is not set"
        raise ConfigError(f"{address}: {state} (status {answer.status_code}); give a key that may read the model")
    if answer.status_code == 404:
        raise ConfigError(f"{address}: the catalog has no such version; check org, team, model and version")
    if not answer.ok:
        raise RunError(f"{address}: the catalog answered with status {answer.status_code}; run it again later")


def _download_file(session: requests.Session, file: _File, target: Path) -> None:
    path = target / file.path
    if not path.resolve().is_relative_to(target.resolve()):
        raise RunError(f"{file.path}: the catalog names a file outside the model; do not use it")
    if path.is_file():
        return
    partial = path.with_name(f"{path.name}.part")
    partial.parent.mkdir(parents=True, exist_ok=True)
    offset = partial.stat().st_size if partial.is_file() else 0
    with session.get(file.url, headers={"Range": f"bytes={offset}-"}, stream=True, timeout=_TIMEOUT) as answer:
        if answer.status_code != 416:  # 416: nothing is missing
            answer.raise_for_status()
            offset = offset if answer.status_code == 206 else 0
            _write_chunks(answer, partial, offset)
    _verify_checksum(file, partial)
    partial.rename(path)


def _write_chunks(answer: requests.Response, partial: Path, offset: int) -> None:
    total = offset + int(answer.headers.get("Content-Length", 0))
    name = partial.name.removesuffix(".part")
    with partial.open("ab") as stream, tqdm(total=total, initial=offset, desc=name, unit="B", unit_scale=True) as bar:
        stream.truncate(offset)
        for chunk in answer.iter_content(_CHUNK):
            stream.write(chunk)
            bar.update(len(chunk))


def _verify_checksum(file: _File, partial: Path) -> None:
    actual = base64.b64encode(bytes.fromhex(hash_file(partial))).decode()
    if file.sha256 and actual != file.sha256:
        partial.unlink()
        raise RunError(f"{file.path}: damaged: SHA-256 {actual} is not the catalog's {file.sha256}; run it again")
