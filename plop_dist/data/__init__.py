"""Which tokens are scored and trained on: rows, texts, samples."""
