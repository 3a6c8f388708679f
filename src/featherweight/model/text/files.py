"""Files of text as they lie on disk."""

from __future__ import annotations

import gzip
import lzma
from collections.abc import Callable
from pathlib import Path

from featherweight.errors import FeatherError

UNPACK: dict[str, Callable[[bytes], bytes]] = {".xz": lzma.decompress, ".gz": gzip.decompress}


def read_text(path: Path, error: type[FeatherError], what: str = "text") -> str:
    """A UTF-8 text file, plain or compressed with xz or gzip (by suffix); `error` where it cannot be read as one.

    what : the file's name in "cannot read the ..."
    """
    try:
        return UNPACK.get(path.suffix, bytes)(path.read_bytes()).decode("utf-8")
    except UnicodeDecodeError as reason:
        raise error(f"the text {path} is not UTF-8 (byte {reason.start}): convert it first") from None
    except (lzma.LZMAError, gzip.BadGzipFile, EOFError) as reason:
        raise error(f"the text {path} is not a whole {path.suffix} file ({reason})") from None
    except FileNotFoundError:
        raise error(f"there is no {what} file {path}") from None
    except IsADirectoryError:
        raise error(f"the {what} {path} is a folder: give a file") from None
    except OSError as reason:
        raise error(f"cannot read the {what} {path}: {reason.strerror or reason}") from None
