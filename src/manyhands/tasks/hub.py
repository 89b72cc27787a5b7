"""Models and tokenizers by name: a directory of one's own, or what the Hugging Face Hub has under that name.

Only data files are fetched, never code and never a pickle. What was fetched once is found again without a network.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Final

from huggingface_hub import snapshot_download
from huggingface_hub.errors import HfHubHTTPError, HFValidationError

from manyhands.errors import DataError

TOKENIZER_FILES: Final = (
    "tokenizer.json",
    "tokenizer_config.json",
    "vocab.json",
    "merges.txt",
    "config.json",
)
WEIGHT_FILES: Final = ("config.json", "*.safetensors", "*.safetensors.index.json")

_NAME = re.compile(r"[A-Za-z0-9][\w.-]*(/[A-Za-z0-9][\w.-]*)?")


def local_copy(name: str, files: Sequence[str], *, setting: str) -> Path:
    """Where `name` is on this machine: itself if it is a path that exists, else the Hub's files of these patterns.

    Raises DataError, naming `setting`, where neither is to be had.
    """
    path = Path(name).expanduser()
    if path.exists():
        return path
    if not _NAME.fullmatch(name):
        raise DataError(
            f"{setting} {name!r}: {path} does not exist; give a path that does, or OWNER/NAME as on the "
            "Hugging Face Hub"
        )
    try:
        return Path(snapshot_download(name, allow_patterns=list(files)))
    except (OSError, ValueError, HfHubHTTPError, HFValidationError) as error:
        reason = " ".join(str(error).split())[:200]
        raise DataError(
            f"{setting} {name!r}: no such path, and the Hugging Face Hub does not give it: {reason}. Where there "
            f"is no network, run `hf download {name} --local-dir DIRECTORY` where there is one, and give that one"
        ) from error
