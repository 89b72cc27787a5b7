"""Text from a checkpoint: what a person looks at after a run of the language model task.

Works on the directory that `save_pretrained` wrote (any causal model of transformers), offline. One token
at a time over a window of the model's context length, so a sample may be longer than the context.
"""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any, Final

import torch

from manyhands.config import shown
from manyhands.errors import DataError
from manyhands.tasks.causal_models import context_of, quietly
from manyhands.tasks.language_model.saved import load_language_model, load_tokenizer

_NAMED: Final = 12
"""So many unknown characters are named at most."""


@quietly()
def sample_text(
    directory: Path,
    *,
    prompt: str = "",
    tokens: int = 200,
    temperature: float = 0.8,
    top_k: int = 50,
    seed: int = 1337,
) -> str:
    """`prompt` and up to `tokens` more tokens, until the model ends the text.

    temperature 0 takes the likeliest token; top_k 0 allows all. The same seed gives the same text on the same
    machine. Raises DataError for a directory that is no checkpoint of a language model, and for a prompt with
    characters that its tokenizer does not know.
    """
    model = load_language_model(directory).eval()
    tokenizer = load_tokenizer(directory)
    context = context_of(model.config) or 0  # 0: all of it
    end = tokenizer.eos_token_id
    ids = _encoded(tokenizer, prompt, directory) if prompt else []
    if not ids and end is None:
        raise DataError(f"the tokenizer in {directory} has no end-of-text token to start from; give a prompt")
    window = list(ids) or [end]
    generator = torch.Generator().manual_seed(seed)
    with torch.inference_mode():
        for _ in range(tokens):
            logits_V = (
                model(input_ids=torch.tensor([window[-context:]]), use_cache=False).logits[0, -1].float()
            )
            chosen = _choose(logits_V, temperature, top_k, generator)
            if chosen == end:
                break
            ids.append(chosen)
            window.append(chosen)
    return str(tokenizer.decode(ids, skip_special_tokens=True))


def _encoded(tokenizer: Any, prompt: str, directory: Path) -> list[int]:
    """Raises DataError for what would be lost: mapped to the unknown token, or dropped without one."""
    encode = partial(tokenizer, add_special_tokens=False, verbose=False)
    ids: list[int] = list(encode(prompt)["input_ids"])
    if not tokenizer.is_fast:  # which do not tell where a token is from
        return ids
    places: list[tuple[int, int]] = encode(prompt, return_offsets_mapping=True)["offset_mapping"]
    pieces = [(token, prompt[start:end]) for token, (start, end) in zip(ids, places, strict=True)]
    unknown, name = tokenizer.unk_token_id, tokenizer.unk_token  # by its name a prompt may have it
    lost = [piece for token, piece in pieces if token == unknown and piece != name]
    kept = {at for start, end in places for at in range(start, end)}
    left = [c for at, c in enumerate(prompt) if at not in kept and not c.isspace()]
    lost += [c for c in left if not encode(c)["input_ids"]]  # else it became one with another, as accents do
    if lost:
        distinct = [repr(piece) for piece in dict.fromkeys(lost)]
        more = f" and {len(distinct) - _NAMED} more" if len(distinct) > _NAMED else ""
        raise DataError(
            f"the prompt {shown(prompt)} has {', '.join(distinct[:_NAMED])}{more}, which the tokenizer in "
            f"{directory} does not know: leave that out; a tokenizer of characters knows those of its training text"
        )
    return ids


def _choose(logits_V: torch.Tensor, temperature: float, top_k: int, generator: torch.Generator) -> int:
    if temperature <= 0:
        return int(logits_V.argmax())
    logits_V = logits_V / temperature
    if 0 < top_k < logits_V.numel():
        least = torch.topk(logits_V, top_k).values[-1]
        logits_V = logits_V.masked_fill(logits_V < least, -torch.inf)
    return int(torch.multinomial(torch.softmax(logits_V, dim=-1), 1, generator=generator))
