"""What a bundle and a version are on disk.

Reading, writing, checking; the SavedModel (`served_model`) and its `index`; the `status` of a version.
"""
