"""Files of a data set in its folder or its archive, as frames. Next: ``movielens.py``."""

from __future__ import annotations

import io
import tarfile
import zipfile
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from distill.data.cache import content_hash
from distill.data.frames import columns_of, need_polars
from distill.errors import DataError
from distill.paths import cache_folder, replacing

if TYPE_CHECKING:
    import polars


class Archive:
    """The files below a folder, or in a zip or tar file, by the last part of their name.

    Args:
        path: The folder, the file, or the address (https://...) of one, which is fetched once and kept in
            the cache.

    Raises:
        DataError: There is no such folder or file, it cannot be fetched, or it is no archive.
    """

    def __init__(self, path: str | Path):
        self.path = _fetched(path) if isinstance(path, str) and "://" in path else Path(path).expanduser()
        if self.path.is_dir():
            self.files = {file.name: str(file) for file in sorted(self.path.rglob("*")) if file.is_file()}
        elif self.path.is_file():
            try:
                self.files = {Path(name).name: name for name in self._names() if not name.endswith("/")}
            except (zipfile.BadZipFile, tarfile.TarError, OSError, EOFError) as error:
                raise DataError(f"{self.path}: no zip or tar archive ({error}). Fetch it again.") from error
        else:
            raise DataError(f"there is no folder or archive {path} (looked for in {Path.cwd()}).")

    def _names(self) -> list[str]:
        if zipfile.is_zipfile(self.path):
            with zipfile.ZipFile(self.path) as archive:
                return archive.namelist()
        with tarfile.open(self.path) as packed:
            return [member.name for member in packed if member.isfile()]

    def __contains__(self, name: str) -> bool:
        return name in self.files

    def place(self, name: str) -> str:
        return f"{self.path}, {name}"

    def parquet(self, name: str) -> polars.LazyFrame:
        return self._frame(name, lambda: need_polars().scan_parquet(self._open(name)))

    def csv(self, name: str) -> polars.LazyFrame:
        """A csv file with a header."""
        return self._frame(
            name, lambda: need_polars().scan_csv(self._open(name), infer_schema_length=100_000)
        )

    def table(self, name: str, separator: str, columns: Sequence[str]) -> polars.LazyFrame:
        """A Latin-1 file without header, its values cut by ``separator`` and never quoted."""
        pl = need_polars()
        text = self._bytes(name).decode("latin-1")
        if len(separator) > 1:
            text, separator = text.replace(separator, "\x1f"), "\x1f"
        return self._frame(
            name,
            lambda: pl.read_csv(
                io.BytesIO(text.encode()),
                separator=separator,
                quote_char=None,
                has_header=False,
                new_columns=list(columns),
                infer_schema_length=100_000,
            ).lazy(),
        )

    def _frame(self, name: str, read) -> polars.LazyFrame:
        try:
            frame = read()
        except (need_polars().exceptions.PolarsError, OSError) as error:
            raise DataError(
                f"{self.place(name)}: the file cannot be read ({str(error).splitlines()[0]})."
            ) from error
        columns_of(frame, self.place(name))
        return frame

    def _open(self, name: str) -> str | io.BytesIO:
        return self.files[name] if self.path.is_dir() else io.BytesIO(self._bytes(name))

    def _bytes(self, name: str) -> bytes:
        if self.path.is_dir():
            return Path(self.files[name]).read_bytes()
        if zipfile.is_zipfile(self.path):
            with zipfile.ZipFile(self.path) as archive:
                return archive.read(self.files[name])
        with tarfile.open(self.path) as packed:
            file = packed.extractfile(self.files[name])
            assert file is not None  # members that are files alone are listed
            return file.read()


def _fetched(address: str) -> Path:
    """Where the file of an address lies, downloaded if it was not before."""
    path = cache_folder() / "archives" / f"{content_hash([address])[:16]}-{Path(address).name}"
    if not path.exists():
        with replacing(path) as new:
            try:
                torch.hub.download_url_to_file(address, str(new))
            except (OSError, ValueError) as error:
                raise DataError(
                    f"{address} cannot be fetched ({error}). Fetch it by other means, and give the path of "
                    f"the file or its folder."
                ) from error
    return path
