"""Hit ratios of the data plane's own cache on generated traces, beside LRU, ARC and the authors' S3-FIFO."""
