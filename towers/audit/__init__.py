"""`twotower audit`: how far each sampler is from the full softmax. Imports `training` and below."""
