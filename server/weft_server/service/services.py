"""The application's services, wired once at start and handed to the routers.

Owns nothing but the references. Public methods of every service are coroutines; those that touch a store run
the blocking call in a thread.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from weft_server.config import Settings
from weft_server.metrics import Metrics
from weft_server.service.engine_port import EnginePort
from weft_server.service.generation import GenerationService
from weft_server.service.models import ModelService
from weft_server.service.tenants import TenantRegistry
from weft_server.service.tokenizer import Tokenizer
from weft_server.store.base import BlobStore, RecordStore

if TYPE_CHECKING:
    from weft_server.service.adapters import AdapterService
    from weft_server.service.files import FileService
    from weft_server.service.jobs import JobService


@dataclass(frozen=True, slots=True)
class Services:
    """Everything a router may call.

    Attributes:
        settings: the validated configuration.
        records, blobs: the two stores (blocking; routers go through a service).
        engine: the engine boundary.
        tokenizer: text to ids and back, with the base's special tokens and chat template.
        tenants: who a key belongs to.
        models: names to adapter versions.
        generation: completions and chat.
        files, jobs, adapters: the finetuning half.
        metrics: counters and histograms of this process.
    """

    settings: Settings
    records: RecordStore
    blobs: BlobStore
    engine: EnginePort
    tokenizer: Tokenizer
    tenants: TenantRegistry
    models: ModelService
    generation: GenerationService
    files: FileService
    jobs: JobService
    adapters: AdapterService
    metrics: Metrics
