"""Tokenizers that exist already: tokenizer.json, GPT-2's vocab.json with merges.txt, or any fast one of
`transformers`.

Whatever its form, it becomes one `tokenizers` object, saved with the run as one tokenizer.json. What would change
the ids of a text on the way (truncation, padding) is switched off.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, Final

from tokenizers import AddedToken, decoders, models, pre_tokenizers
from tokenizers import Tokenizer as FastTokenizer

from manyhands.config import did_you_mean
from manyhands.errors import DataError
from manyhands.tasks.hub import TOKENIZER_FILES, local_copy

SETTING: Final = "task.tokenizer.path"
USUAL_ENDS: Final = ("<|endoftext|>", "</s>", "<|end_of_text|>", "<eos>")
"""Where nothing names the end of a text: the first of these that the tokenizer has."""


def load_tokenizer(name: str, end: str | None) -> tuple[FastTokenizer, str]:
    """The tokenizer at `name` (a file, a directory, a name on the Hub), and its token for the end of a text.

    Raises DataError for one that is missing, broken, or that runs code of its own, and for an unknown `end`.
    """
    place = local_copy(name, TOKENIZER_FILES, setting=SETTING)
    directory = place if place.is_dir() else place.parent
    configuration = _configuration(directory)
    tokenizer = _read(place, configuration)
    tokenizer.no_truncation()
    tokenizer.no_padding()
    return tokenizer, _end_of(tokenizer, end, configuration, name)


def _read(place: Path, configuration: dict[str, Any]) -> FastTokenizer:
    if place.is_file():
        return _from_json(place)
    if (place / "tokenizer.json").is_file():
        return _from_json(place / "tokenizer.json")
    if (place / "vocab.json").is_file() and (place / "merges.txt").is_file():
        return _byte_level(place, configuration)
    if configuration or (place / "config.json").is_file():
        return _from_transformers(place)
    raise DataError(
        f"{SETTING} {str(place)!r} holds no tokenizer: expected tokenizer.json, or vocab.json and merges.txt"
    )


def _from_json(file: Path) -> FastTokenizer:
    try:
        return FastTokenizer.from_file(str(file))
    except Exception as error:  # tokenizers raises bare Exceptions
        raise DataError(
            f"{SETTING} {file}: {error}; expected a tokenizer.json of the package tokenizers"
        ) from error


def _byte_level(directory: Path, configuration: dict[str, Any]) -> FastTokenizer:
    """GPT-2's form: byte-level BPE with its regular expression."""
    vocabulary, merges = directory / "vocab.json", directory / "merges.txt"
    try:
        tokenizer = FastTokenizer(models.BPE.from_file(str(vocabulary), str(merges)))
    except Exception as error:  # tokenizers raises bare Exceptions
        raise DataError(
            f"{SETTING} {directory}: {error}; expected vocab.json and merges.txt as GPT-2 has them"
        ) from error
    prefix = bool(configuration.get("add_prefix_space", False))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=prefix)
    tokenizer.decoder = decoders.ByteLevel()
    special = [token for token in USUAL_ENDS if tokenizer.token_to_id(token) is not None]
    tokenizer.add_special_tokens([AddedToken(token, normalized=False, special=True) for token in special])
    return tokenizer


def _from_transformers(directory: Path) -> FastTokenizer:
    from transformers import AutoTokenizer, PreTrainedTokenizerFast

    try:
        loaded = AutoTokenizer.from_pretrained(directory, local_files_only=True, trust_remote_code=False)
    except (OSError, ValueError, ImportError, KeyError) as error:
        raise DataError(
            f"{SETTING} {directory}: transformers cannot load it: {' '.join(str(error).split())[:200]}; "
            "give a tokenizer.json"
        ) from error
    if not isinstance(loaded, PreTrainedTokenizerFast):
        raise DataError(
            f"{SETTING} {directory} is a {type(loaded).__name__}, which has no fast form: give a tokenizer.json"
        )
    found: FastTokenizer = loaded.backend_tokenizer
    return found


def _configuration(directory: Path) -> dict[str, Any]:
    """tokenizer_config.json, {} where there is none. Raises DataError if it names code to run."""
    file = directory / "tokenizer_config.json"
    if not file.is_file():
        return {}
    try:
        found = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise DataError(f"{file}: {error}; fetch the tokenizer again") from error
    if not isinstance(found, dict):
        raise DataError(
            f"{file} is a JSON {type(found).__name__}, expected an object; fetch the tokenizer again"
        )
    if found.get("auto_map"):
        raise DataError(
            f"{file} names code to run (auto_map), which is never run here: give a tokenizer that needs none"
        )
    return found


def _end_of(tokenizer: FastTokenizer, end: str | None, configuration: dict[str, Any], name: str) -> str:
    """As the plan says, else the tokenizer's configuration, else a usual one."""
    if end is None:
        named = configuration.get("eos_token")
        end = named.get("content") if isinstance(named, dict) else named
    if end is None:
        end = next((token for token in USUAL_ENDS if tokenizer.token_to_id(token) is not None), None)
    if end is None:
        raise DataError(
            f"{SETTING} {name!r}: nothing says which token ends a text; set task.tokenizer.end to one of its tokens"
        )
    if tokenizer.token_to_id(end) is None:
        special = [token.content for token in tokenizer.get_added_tokens_decoder().values()]
        raise DataError(
            f"{SETTING} {name!r} has no token {end!r} to end a text; set task.tokenizer.end."
            f"{did_you_mean(end, special[:20])}"
        )
    return end
