"""ZODB blobs in S3-compatible object storage."""
