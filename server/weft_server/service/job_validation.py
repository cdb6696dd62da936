"""Reading a job's training file: the step behind the state `validating_files`. Blocking."""

from __future__ import annotations

import logging
from collections.abc import Callable

from weft_server.service.datasets import (
    DatasetAbandonedError,
    DatasetError,
    TokenizedDataset,
    tokenize_dataset,
)
from weft_server.service.job_records import Job, JobError
from weft_server.service.tokenizer import Tokenizer
from weft_server.store.base import BlobMissing, BlobStore, StoreUnavailable

logger = logging.getLogger(__name__)


def read_training_file(
    blobs: BlobStore, tokenizer: Tokenizer, job: Job, *, cancelled: Callable[[], bool]
) -> TokenizedDataset | JobError | None:
    """The tokenized dataset, or why there is none; None when `cancelled` said that nobody needs it.

    Raises:
        StoreUnavailable: try again.
    """
    assert job.training_blob is not None
    try:
        return tokenize_dataset(
            blobs,
            job.training_blob,
            tokenizer,
            max_seq_length=job.max_seq_length,
            overlength=job.hyperparameters.overlength or "error",
            cancelled=cancelled,
        )
    except DatasetAbandonedError:
        return None
    except DatasetError as error:
        return JobError("invalid_training_file", str(error), "training_file")
    except BlobMissing:
        text = "The training file's stored bytes are missing or damaged; upload it again."
        return JobError("training_file_missing", text, "training_file")
    except StoreUnavailable:
        raise
    except Exception:
        logger.exception("reading the training file of job %s failed", job.id)
        return JobError("internal_error", "Internal error while reading the training file; the log has it.")
