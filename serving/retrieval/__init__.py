"""`Retriever`: top-k with filters and fallback, without a network. Imports `version`."""
