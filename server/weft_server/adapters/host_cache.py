"""Adapter images in host memory, the tier between the device arena and the store.

Owns which images stay: least recently used goes first. Thread-safe, because fetches end on
their own threads. Knows neither devices nor stores.
"""

from __future__ import annotations

import threading
from collections import OrderedDict

from weft_server.adapters.image import HostImage


class HostCache:
    """Images by digest, at most `max_bytes` of them."""

    def __init__(self, max_bytes: int) -> None:
        self._max_bytes = max_bytes
        self._num_bytes = 0
        self._images: OrderedDict[str, HostImage] = OrderedDict()
        self._lock = threading.Lock()

    @property
    def num_bytes(self) -> int:
        """Bytes held now."""
        return self._num_bytes

    def __len__(self) -> int:
        return len(self._images)

    def __contains__(self, digest: str) -> bool:
        with self._lock:
            return digest in self._images

    def try_get(self, digest: str) -> HostImage | None:
        """The image, now the most recently used, or None."""
        with self._lock:
            image = self._images.get(digest)
            if image is not None:
                self._images.move_to_end(digest)
            return image

    def put(self, image: HostImage) -> bool:
        """Keep an image, evicting others; False if it is larger than the whole cache."""
        with self._lock:
            if image.digest in self._images:
                self._images.move_to_end(image.digest)
                return True
            if image.nbytes > self._max_bytes:
                return False
            self._evict_to(self._max_bytes - image.nbytes)
            self._images[image.digest] = image
            self._num_bytes += image.nbytes
            return True

    def _evict_to(self, max_bytes: int) -> None:
        while self._num_bytes > max_bytes:
            _, image = self._images.popitem(last=False)
            self._num_bytes -= image.nbytes
