"""What versions with the same base share while one of them is in use: models and tables."""

from __future__ import annotations

import threading
import weakref
from typing import Any

from serving.retrieval.corpus import Corpus, Tables
from serving.version.delta import base_key, read_delta
from serving.version.versions import RETRIEVAL, Version

_lock = threading.Lock()
_bases: weakref.WeakValueDictionary[str, SharedBase] = weakref.WeakValueDictionary()


class SharedBase:
    """The SavedModels and tables of a base; the last of its users frees it.

    Attributes:
      path: of the version whose models are loaded; the delta in their graph is that of it.
      models: by the name of their index; what is missing is loaded under `loading`.
    """

    def __init__(self, version: Version) -> None:
        self.path, self._tables = version.path, Tables(version.path / RETRIEVAL)
        self.models: dict[str, Any] = {}
        self.loading = threading.Lock()
        self._users: weakref.WeakSet[Any] = weakref.WeakSet()

    @classmethod
    def of(cls, version: Version, user: object) -> SharedBase:
        """The base of a version, which stays as long as there is a user that has not left."""
        with _lock:
            key = base_key(version.manifest)
            base = _bases.get(key) or cls(version)
            _bases[key] = base
            base._users.add(user)
            return base

    def corpus(self, version: Version) -> Corpus:
        """The candidates of a version of this base."""
        delta = read_delta(version.path, self._tables.vectors.shape[1])
        title_column = version.manifest.configuration.get("title_column", "")
        return Corpus(self._tables, delta, title_column)

    def leave(self, user: object) -> list[Any]:
        """Frees what ScaNN holds outside Python, with the last user; the models nobody uses now."""
        with _lock, self.loading:
            self._users.discard(user)
            if self._users:
                return []
            models = self.models
            self.models = {}
            for key in [key for key, base in _bases.items() if base is self]:
                del _bases[key]
        if "scann" in models:
            models["scann"].release()
        return list(models.values())
