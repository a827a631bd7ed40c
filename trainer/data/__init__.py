"""Data: documents, tokenizer, cached token sequences and batches."""

from modeling.lazy import lazy_names

__getattr__, __all__ = lazy_names(
    __name__,
    {
        "batches": ["Batch", "TrainOrder", "eval_batches", "micro_batches"],
        "config": ["DataConfig"],
        "prepare": ["Dataset", "open_data", "prepare_data"],
        "sequences": ["RowLayout", "Sequences"],
        "sources": ["Documents", "check_source", "load_documents"],
        "stories": ["story"],
        "tokenizer": ["EOS_ID", "PAD_ID", "eos_id", "load_tokenizer", "pad_id", "tokenizer_hash", "train_tokenizer"],
    },
)
