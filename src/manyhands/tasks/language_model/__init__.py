"""The language model task: text in, a causal model of `transformers` out.

family.py               what a run is made from: materials, model configuration, first weights
materials.py            text of any source to tokens, tokenizer and the record of the split
existing_weights.py     a directory of transformers, as first weights
adapter.py              LoRA beside frozen weights, by peft
opened.py               the task as a trainer sees it: batches, model, loss, what a person keeps
"""

from manyhands.tasks.language_model.family import FAMILY
from manyhands.tasks.language_model.opened import LanguageModel

__all__ = ["FAMILY", "LanguageModel"]
