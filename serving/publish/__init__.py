"""`twotower export`: a bundle becomes a version, with a measured index. Imports `version`."""
