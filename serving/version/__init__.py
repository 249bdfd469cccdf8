"""What a bundle and a version are on disk.

Reading, writing, checking; the SavedModel (`served_model`), its `index`, and the `status` of a
version.
"""
