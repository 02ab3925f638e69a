"""ZODB's own test suites, run over blobs in a bucket and over a blob directory."""
