"""``python -m zodb_s3blobs.operate`` is ``zodb-s3blobs``."""

from .main import program


program()
