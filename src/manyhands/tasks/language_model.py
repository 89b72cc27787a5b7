"""The language model task: text in, a causal model of `transformers` out.

`prepare` runs once per run: it reads the text, makes the tokenizer, tokenizes, and writes the materials
(train.tokens, validation.tokens, tokenizer.json, split.json, model.json) and the first weights. `open`
needs the materials and nothing else: a client never reads the text. Same plan and same text: same bytes of
every material.

A sample is block_size tokens and the one after them; samples do not overlap in what they predict. The loss
is the mean cross-entropy in nats per token, computed in fp32.

Shapes: B samples, T = block_size tokens, V vocabulary.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from tokenizers import Tokenizer as FastTokenizer
from transformers import PreTrainedTokenizerFast

from manyhands.data.text import Document, read_corpus
from manyhands.data.tokens import TokenArray, open_tokens, sample_count, windows, write_tokens
from manyhands.errors import DataError, PlanError
from manyhands.plan.descriptor import Parameter
from manyhands.plan.schema import Plan
from manyhands.plan.tasks import LanguageModelTask
from manyhands.tasks.model_configuration import build_model, model_configuration, without_progress_bars
from manyhands.tasks.protocol import TRAINING, VALIDATION, Batch, Loss, Metrics, Prepared, Task
from manyhands.tasks.tokenizer import END, UNKNOWN, encode, end_id_of, make_tokenizer

TRAIN_TOKENS, VALIDATION_TOKENS = "train.tokens", "validation.tokens"
TOKENIZER, SPLIT, MODEL = "tokenizer.json", "split.json", "model.json"
FIRST_WEIGHTS = "first.safetensors"


class LanguageModelFamily:
    """How language models are prepared and opened."""

    def prepare(self, plan: Plan, directory: Path) -> Prepared:
        """Write materials and first weights into `directory`. Raises DataError for the text, PlanError for
        the model.
        """
        task = _settings(plan)
        directory.mkdir(parents=True, exist_ok=True)
        # No tokenizer gives more tokens than bytes: this catches what cannot do before any work is done.
        corpus = read_corpus(task.text, minimum_bytes=task.block_size + 1)
        texts = [document.text for document in corpus.training]
        tokenizer = make_tokenizer(task.tokenizer, texts)
        tokenizer.save(str(directory / TOKENIZER), pretty=False)
        vocabulary = tokenizer.get_vocab_size(with_added_tokens=True)

        counts = {}
        for name, documents in ((TRAIN_TOKENS, corpus.training), (VALIDATION_TOKENS, corpus.validation)):
            chunks = encode(tokenizer, [document.text for document in documents])
            counts[name] = write_tokens(directory / name, chunks, vocabulary)
            if sample_count(counts[name], task.block_size) == 0:
                raise DataError(
                    f"task.text.path {task.text.path!r}: {counts[name]} tokens for {name.split('.')[0]}, one sample "
                    f"needs {task.block_size + 1}: give more text, or make task.block_size smaller"
                )
        configuration = model_configuration(task, vocabulary, end_id_of(tokenizer))
        _write_json(directory / MODEL, configuration)
        _write_json(
            directory / SPLIT,
            _split_record(corpus.source, corpus.unreadable, corpus.training, corpus.validation, counts),
        )

        model = _first_model(configuration, plan)
        parameters = dict(model.named_parameters())
        save_file(
            {name: tensor.detach().contiguous() for name, tensor in parameters.items()},
            directory / FIRST_WEIGHTS,
        )
        return Prepared(
            materials={
                name: directory / name for name in (TRAIN_TOKENS, VALIDATION_TOKENS, TOKENIZER, SPLIT, MODEL)
            },
            samples=sample_count(counts[TRAIN_TOKENS], task.block_size),
            parameters=tuple(
                Parameter(name=name, shape=tuple(tensor.shape), trainable=tensor.requires_grad)
                for name, tensor in parameters.items()
            ),
            first_weights=directory / FIRST_WEIGHTS,
        )

    def open(self, plan: Plan, materials: Path) -> Task:
        """The task over materials that `prepare` wrote. Raises DataError if one is missing or not whole."""
        settings = _settings(plan)
        try:
            configuration = json.loads((materials / MODEL).read_text(encoding="utf-8"))
            tokenizer = FastTokenizer.from_file(str(materials / TOKENIZER))
        except OSError as error:
            raise DataError(
                f"material {error.filename}: {error.strerror}; prepare or fetch the run's materials"
            ) from error
        except Exception as error:  # tokenizers raises bare Exceptions
            raise DataError(
                f"material {materials / TOKENIZER} or {MODEL}: {error}; fetch the run's materials again"
            ) from error
        return LanguageModel(
            block_size=settings.block_size,
            configuration=configuration,
            tokenizer=tokenizer,
            training=open_tokens(materials / TRAIN_TOKENS),
            validation=open_tokens(materials / VALIDATION_TOKENS),
        )


FAMILY = LanguageModelFamily()


@dataclass(slots=True, kw_only=True)
class LanguageModel:
    """An opened language model task; implements tasks.protocol.Task."""

    block_size: int
    configuration: dict[str, Any]
    tokenizer: FastTokenizer
    training: TokenArray
    validation: TokenArray
    unit: str = "tokens"
    evaluation_sets: tuple[str, ...] = (VALIDATION,)

    def build_model(self) -> torch.nn.Module:
        """A new model in fp32 and training mode, on the CPU; its weights are overwritten before use."""
        return build_model(self.configuration)

    def samples(self, split: str = TRAINING) -> int:
        return sample_count(len(self._tokens(split)), self.block_size)

    def tokens_per_sample(self) -> int:
        return self.block_size

    def batch(self, indices: npt.NDArray[np.int64], split: str = TRAINING) -> Batch:
        """{"tokens": int64 [B, T + 1]}: inputs are all but the last, targets all but the first."""
        return {"tokens": torch.from_numpy(windows(self._tokens(split), indices, self.block_size))}

    def _tokens(self, split: str) -> TokenArray:
        return self.training if split == TRAINING else self.validation

    def loss(self, model: torch.nn.Module, batch: Batch) -> Loss:
        """Mean cross-entropy of the next token in nats, in fp32."""
        tokens = batch["tokens"]
        targets = tokens[:, 1:].reshape(-1)  # [B * T]
        logits = model(input_ids=tokens[:, :-1], use_cache=False).logits  # [B, T, V]
        mean = F.cross_entropy(logits.view(targets.numel(), -1).float(), targets)
        return Loss(mean=mean, count=targets.numel())

    def metrics(self, split: str) -> Metrics:  # noqa: ARG002 - the same for all
        return Metrics(self)

    def save_pretrained(self, weights: Mapping[str, torch.Tensor], directory: Path) -> None:
        """Config, safetensors and tokenizer, as AutoModelForCausalLM and AutoTokenizer load them offline."""
        with without_progress_bars(), torch.device("meta"):
            self.build_model().save_pretrained(directory, state_dict=dict(weights))  # type: ignore[operator]
        as_transformers(self.tokenizer, self.block_size).save_pretrained(directory)


def as_transformers(tokenizer: FastTokenizer, block_size: int) -> PreTrainedTokenizerFast:
    """The tokenizer as transformers knows it, with its special tokens named."""
    special = {"bos_token": END, "eos_token": END}
    if tokenizer.token_to_id(UNKNOWN) is not None:
        special["unk_token"] = UNKNOWN
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, model_max_length=block_size, clean_up_tokenization_spaces=False, **special
    )


def _settings(plan: Plan) -> LanguageModelTask:
    if not isinstance(plan.task, LanguageModelTask):
        raise PlanError(f"task.name is {plan.task.name!r}, and this is the family of language_model")
    return plan.task


def _first_model(configuration: dict[str, Any], plan: Plan) -> torch.nn.Module:
    """The model with its first weights, from the plan's seed. The global generator is left as it was."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(plan.seed)
        model = build_model(configuration)
    parameters = set(dict(model.named_parameters(remove_duplicate=False)))
    buffers = sorted(set(model.state_dict()) - parameters)
    if buffers and plan.buffers != "keep_local":
        raise PlanError(
            f"model_type {configuration['model_type']!r} has buffers that are part of its state ({buffers[0]}, "
            f"{len(buffers)} in all), and buffers is {plan.buffers!r}: set buffers=keep_local or use another model"
        )
    return model


def _split_record(
    source: str,
    unreadable: Sequence[str],
    training: Iterable[Document],
    validation: Iterable[Document],
    tokens: dict[str, int],
) -> dict[str, Any]:
    """Where every byte of the run's text came from, and on which side of the split it is."""

    def part(documents: Iterable[Document], name: str) -> dict[str, Any]:
        files = [
            {"path": d.path, "start_byte": d.start_byte, "bytes": d.size_bytes, "sha256": d.sha256}
            for d in documents
        ]
        digest = hashlib.sha256("".join(str(file["sha256"]) for file in files).encode()).hexdigest()
        size = sum(document.size_bytes for document in documents)
        return {
            "documents": len(files),
            "bytes": size,
            "tokens": tokens[name],
            "sha256": digest,
            "files": files,
        }

    return {
        "version": 1,
        "source": source,
        "training": part(training, TRAIN_TOKENS),
        "validation": part(validation, VALIDATION_TOKENS),
        "unreadable": list(unreadable),
    }


def _write_json(path: Path, value: dict[str, Any]) -> None:
    path.write_text(json.dumps(value, indent=1, sort_keys=True, ensure_ascii=False) + "\n", encoding="utf-8")
