"""The towers: ids, attributes and histories → embeddings; `make_towers` by name. Imports `data`."""
