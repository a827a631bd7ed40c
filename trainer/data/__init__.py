"""Data: documents, tokenizer, cached token sequences and batches."""

from trainer.data.batches import Batch, TrainOrder, eval_batches, micro_batches
from trainer.data.config import DataConfig
from trainer.data.prepare import Dataset, open_data, prepare_data
from trainer.data.sequences import RowLayout, Sequences
from trainer.data.sources import Documents, check_source, load_documents
from trainer.data.stories import story
from trainer.data.tokenizer import EOS_ID, PAD_ID, eos_id, load_tokenizer, pad_id, tokenizer_hash, train_tokenizer

__all__ = [
    "EOS_ID",
    "PAD_ID",
    "Batch",
    "DataConfig",
    "Dataset",
    "Documents",
    "RowLayout",
    "Sequences",
    "TrainOrder",
    "check_source",
    "eos_id",
    "eval_batches",
    "load_documents",
    "load_tokenizer",
    "micro_batches",
    "open_data",
    "pad_id",
    "prepare_data",
    "story",
    "tokenizer_hash",
    "train_tokenizer",
]
