"""What a Zope instance of the tests publishes: a folder of files whose bytes are Blobs.

It is loaded by that instance alone, by way of PYTHONPATH; its classes stand in the database.
"""

from AccessControl.class_init import InitializeClass
from AccessControl.SecurityInfo import ClassSecurityInfo
from OFS.Folder import Folder
from OFS.SimpleItem import SimpleItem
from ZODB.blob import Blob
from ZPublisher import zpublish

from zodb_s3blobs.delivery import Delivery


# From Zope, with ranges; and from S3, by a URL
HERE = Delivery(min_size=1 << 40)
THERE = Delivery()


class BlobFile(SimpleItem):
    """A file."""

    meta_type = "Blob File"

    def __init__(self, id):
        self.id = id
        self.blob = Blob()

    security = ClassSecurityInfo()

    @security.public
    @zpublish
    def download(self, REQUEST):
        """Send the bytes."""
        return HERE.zope(self.blob, REQUEST, "text/plain", self.id)

    @security.public
    @zpublish
    def url(self, REQUEST):
        """Send the browser to S3."""
        return THERE.zope(self.blob, REQUEST, "text/plain", self.id)

    @security.public
    @zpublish
    def edit(self, at, file):
        """Change some bytes in place."""
        with self.blob.open("r+") as target:
            target.seek(int(at))
            target.write(file.read())
        return "edited"


InitializeClass(BlobFile)


class Site(Folder):
    """The files."""

    security = ClassSecurityInfo()

    @security.public
    @zpublish
    def upload(self, id, file):
        """Store a file, new or in the place of another."""
        if id not in self.objectIds():
            self._setObject(id, BlobFile(id))
        with self._getOb(id).blob.open("w") as target:
            while chunk := file.read(1 << 16):
                target.write(chunk)
        return "stored"

    @security.public
    @zpublish
    def copy(self, id, new_id):
        """Copy a file as copy and paste do: export and import."""
        copied = self._getOb(id)._getCopy(self)
        copied._setId(new_id)
        self._setObject(new_id, copied)
        return "copied"


InitializeClass(Site)
