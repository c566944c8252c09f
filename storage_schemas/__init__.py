"""The store: its format (FORMAT.md is the norm) and the code that writes and reads it."""

from storage_schemas.reader import Store, open_store
from storage_schemas.spec import Span, StoreSpec

__all__ = ["Span", "Store", "StoreSpec", "open_store"]
