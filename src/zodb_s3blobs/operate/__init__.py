"""The command line, ``zodb-s3blobs``: moves in, checks, repairs, cleans, warms and moves out."""
