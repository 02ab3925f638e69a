"""A database with an embedded S3, for tests; nothing is imported before it is asked for."""
