"""Tests of zodb_s3blobs."""
